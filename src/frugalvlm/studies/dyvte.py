"""DyVTE beside its training-free table (Figure 3): attention by modality, entropy behind an exit,
the trained gates, and where they let the picture go.

- stages (App. A.1): attention maps merged over heads by their maximum; per decoder layer the mass
  that visual tokens pay to visual ones, text to visual and text to text, per querying token.
- entropy (Figures 4 and 5): of the text's attention to the text, when the picture has left behind
  a quarter, half and three quarters of the layers, and when it stays.
- accuracy records of what needs no weights (`no_image`, layer 0 of Figure 3), and of DyVTE and
  DyVTE + FastV where gates are installed for the model; where they are not, nothing is made up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm.benchmarks import load_benchmark, stats
from frugalvlm.benchmarks.asking import BATCH_SIZE, chunks, prepare
from frugalvlm.digest import request_hash
from frugalvlm.hosts import host_for
from frugalvlm.methods import DyVTE, DyVTEFastV, ManualExit, Method, NoImage
from frugalvlm.methods.trained import LearntError, TrainedMethod
from frugalvlm.papers import load_paper
from frugalvlm.runs import records
from frugalvlm.runs.accuracy import answer_cells
from frugalvlm.runs.analysis import analysis_run
from frugalvlm.runs.attention import eager_attention
from frugalvlm.runs.guides import with_learnt
from frugalvlm.runs.identity import code_hash
from frugalvlm.runs.options import Options
from frugalvlm.runs.records import Record
from frugalvlm.runs.setting import Reporter, Setting
from frugalvlm.studies.base import Study

PROMPTS = 100  # whose attention is looked at, at most
SHARES = {"quarter": 0.25, "half": 0.5, "three_quarters": 0.75}  # of the layers that see it
EARLY, MIDDLE = (0.0, 3 / 32), (3 / 32, 12 / 32)  # the paper's first two stages, of the depth


def run(
    setting: Setting,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    options: Options,
    reporter: Reporter,
) -> list[Record]:
    """All records of these analyses, measured or found."""
    table = load_paper("dyvte").table("figure3")
    names = options.benchmarks or tuple(column.id for column in table.columns)
    prompts = min(PROMPTS, setting.n)
    looked = stages_run(setting, model, processor, reporter, prompts)
    plan = beside_plan(setting, model)
    return [looked, *answer_cells(setting, model, processor, names, plan, reporter)]


def beside_plan(setting: Setting, model: PreTrainedModel) -> list[tuple[Method, int]]:
    """What is run beside the table, with budgets; gates only where they are installed."""
    patches = host_for(model).shape.patches
    plan: list[tuple[Method, int]] = [(NoImage(), 0)]  # a row of the table, too: asked once
    with suppress(LearntError):  # `missing` says which command makes them
        plan += [(with_learnt(m, setting.model_name), budget) for m, budget in _gated(patches)]
    return plan


def missing(model_name: str) -> str:
    """What is not shown for want of trained gates, in a sentence; "" where they are installed."""
    try:
        DyVTE().for_model(model_name)
    except LearntError as error:
        return f"The rows and claims that need trained gates are not shown: {error}"
    return ""


def costed_plan(made: Sequence[Record], model: PreTrainedModel) -> list[tuple[Method, int]]:
    """Whose costs are measured beside the table's rows: what had answers, but for no picture."""
    known = {r["request"]["method"]["method"] for r in made if r["kind"] == "accuracy"}
    patches = host_for(model).shape.patches
    name = getattr(model, "name_or_path", "")
    return [(with_learnt(m, name), budget) for m, budget in _gated(patches) if m.key in known]


def _gated(patches: int) -> tuple[tuple[TrainedMethod, int], ...]:
    """What needs trained gates, with budgets."""
    half = patches // 2
    return (DyVTE(), patches), (DyVTEFastV(kept_tokens=half), half)


# -- attention by modality -----------------------------------------------------------------------


def flows(
    maps: Float[Tensor, "heads length length"],
    visual: Bool[Tensor, " length"],
    text: Bool[Tensor, " length"],
) -> dict[str, float]:
    """App. A.1 for one prompt and layer: attention mass by modality, per querying token."""
    merged = maps.amax(0)
    pairs = {"visual_self": (visual, visual), "cross": (text, visual), "text_self": (text, text)}
    return {name: float(merged[of][:, to].sum() / of.sum()) for name, (of, to) in pairs.items()}


def text_entropy(
    maps: Float[Tensor, "heads length length"], text: Bool[Tensor, " length"]
) -> float:
    """Entropy in nats of the text's attention to the text alone, mean over heads and words.

    The first word, which sees itself only, is left out.
    """
    own = maps[:, text][:, :, text].double()
    share = own / own.sum(-1, keepdim=True)
    return float(torch.special.entr(share).sum(-1)[:, 1:].mean())


@torch.inference_mode()
def stages_run(
    setting: Setting, model: PreTrainedModel, processor: ProcessorMixin, reporter: Reporter,
    prompts: int,
) -> Record:  # fmt: skip
    """Attention by modality per layer, and entropies behind exits; a record named "stages".

    `flows` holds by kind, and `entropy` by exit, the mean over prompts per layer. Of the others,
    each with its 95 % interval over prompts, `first_minus_middle` is the attention from text to the
    picture in the first stage less that in the second, and `moved`, by exit, by how many percent
    the entropy behind three quarters of the depth differs from the untouched model's.
    """
    layers = host_for(model).shape.decoder_layers

    def measured() -> dict[str, Any]:
        benchmark = load_benchmark("pocket-gqa")
        data = benchmark.dataset(setting.split, prompts * benchmark.per_image)  # type: ignore[arg-type]
        rows = range(0, len(data), benchmark.per_image)
        seen: dict[str, list[list[float]]] = {}
        for part in chunks(rows, BATCH_SIZE):
            pictures, asked = ([data[i][name] for i in part] for name in ("image", "question"))
            inputs = prepare(processor, pictures, asked, setting.device)
            for name, values in _look(model, inputs).items():
                seen.setdefault(name, []).extend(values)
            reporter.advance(len(part))
        asked_hash = request_hash([data[i]["question_id"] for i in rows])
        return {**_figures(seen, layers), "data_hash": asked_hash}

    reporter.start("attention by modality", prompts)
    return _analysis(setting, model, "stages", {"prompts": prompts}, measured, reporter, prompts)


def _look(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, list[list[float]]]:
    """By kind of flow, and by exit, a row of layers for each prompt."""
    host = host_for(model)
    layers = host.shape.decoder_layers
    visual = host.placeholders(inputs["input_ids"])
    text = (visual.cumsum(1) == visual.sum(1, keepdim=True)) & ~visual
    found: dict[str, list[list[float]]] = {}
    exits: dict[str, int | None] = {"full": None}
    exits |= {name: max(1, round(share * layers)) for name, share in SHARES.items()}
    for name, after in exits.items():
        block = nullcontext() if after is None else ManualExit(after).on(model)
        with eager_attention(model), block:
            maps = model(**inputs, output_attentions=True, use_cache=False).attentions
        if not maps:
            raise RuntimeError("The decoder returned no attention maps.")
        entropies = torch.zeros(len(text), layers)
        for layer, batch in enumerate(maps):
            length = batch.shape[-1]  # what is left stands at the end, the text last
            for row, own in enumerate(batch):
                words = text[row, -length:]
                entropies[row, layer] = text_entropy(own, words)
                if after is None:
                    for kind, value in flows(own, visual[row], words).items():
                        found.setdefault(kind, [[] for _ in text])[row].append(value)
        found[name] = entropies.tolist()
    return found


def _figures(seen: Mapping[str, list[list[float]]], layers: int) -> dict[str, Any]:
    values = {name: np.asarray(rows) for name, rows in seen.items()}
    kinds = ("visual_self", "cross", "text_self")
    late = slice(round(SHARES["three_quarters"] * layers), layers)
    moved = {
        name: 100 * np.abs(values[name][:, late] / values["full"][:, late] - 1).mean(1)
        for name in SHARES
    }
    early, middle = (
        values["cross"][:, slice(round(a * layers), max(round(b * layers), round(a * layers) + 1))]
        for a, b in (EARLY, MIDDLE)
    )
    return {
        "flows": {kind: values[kind].mean(0).round(5).tolist() for kind in kinds},
        "entropy": {n: values[n].mean(0).round(5).tolist() for n in ("full", *SHARES)},
        "first_minus_middle": _mean(early.mean(1) - middle.mean(1)),
        "moved": {name: _mean(each) for name, each in moved.items()},
        "early_moves_more": _mean(moved["quarter"] - moved["three_quarters"]),
    }


def _mean(values: np.ndarray) -> dict[str, Any]:
    """The mean over prompts with its interval."""
    found = stats.from_sums(stats.share, np.stack([values, np.ones(len(values))], 1))
    return {"value": found.value, "low": found.low, "high": found.high, "n": len(values)}


def _analysis(
    setting: Setting, model: PreTrainedModel, name: str, more: Mapping[str, Any],
    measured: Callable[[], dict[str, Any]], reporter: Reporter, steps: int,
) -> Record:  # fmt: skip
    """The record of an analysis, found or made; what it measured has its own `data_hash`."""
    request = {
        "scale": setting.scale, "model": setting.model_name, "n": setting.n, "analysis": name,
        "split": setting.split, "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.device(setting.device).type, **more,
    }  # fmt: skip
    code = code_hash("methods.dyvte", "studies.dyvte")
    return analysis_run(setting, request, code, measured, reporter, steps, label=name)


# -- shown ---------------------------------------------------------------------------------------


def stages(made: Sequence[Record]) -> Record:
    """The newest record of the attention by modality."""
    return records.latest(records.select(made, "analysis", analysis="stages"))[-1]


def flow_frame(made: Sequence[Record]) -> pd.DataFrame:
    """Attention mass per querying token: rows decoder layers (from 1), columns kinds of flow."""
    frame = pd.DataFrame(stages(made)["flows"])
    frame.index = pd.RangeIndex(1, len(frame) + 1, name="layer")
    return frame


def entropy_frame(made: Sequence[Record]) -> pd.DataFrame:
    """Entropy of the text's attention to the text: rows layers, columns when the picture leaves."""
    frame = pd.DataFrame(stages(made)["entropy"])
    frame.index = pd.RangeIndex(1, len(frame) + 1, name="layer")
    return frame


def exit_frame(made: Sequence[Record]) -> pd.DataFrame:
    """Mean exit layer of each benchmark's questions under trained gates (Tables 4 and 7).

    Counted from 0, as the paper's: `exit` k means that layers 0..k have seen the picture. `fewest`
    and `most` are the visual tokens that a picture had at the last layer.
    """
    lines = []
    for record in records.latest(records.select(made, "accuracy", method=DyVTE.key)):
        layers = record["tokens"]["per_layer"]
        last = (record["tokens"].get("spread") or [[layers[-1]] * 2])[-1]
        lines.append({
            "benchmark": record["request"]["benchmark"], "exit": sum(layers) / layers[0] - 1,
            "layers": len(layers), "fewest": last[0], "most": last[1],
            "score": record["metrics"]["headline"]["value"],
        })  # fmt: skip
    columns = ["benchmark", "exit", "layers", "fewest", "most", "score"]
    return pd.DataFrame(lines, columns=columns).sort_values("exit", ignore_index=True)


STUDY = Study("dyvte", analysis=run, more_costs=costed_plan)
