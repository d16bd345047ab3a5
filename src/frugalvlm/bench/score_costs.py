"""What a score costs: the query rows that are needed, against whole attention maps.

Released code mostly reads its scores off attention maps (`output_attentions=True`), which only
eager attention gives: of n tokens it holds n x n weights per head, and of every layer at once. The
kit computes the rows it needs from the queries and keys of the running model (`frugalvlm.views`),
which keeps its own fast attention. Here both are timed, and their peak memory is compared, on
models with random weights; that the scores are the same is measured too.

Two scores, each in one prefill in which nothing is dropped:
* [CLS] row: attention of [CLS] in the vision tower (FasterVLM, VisionZip). The tower is of moderate
  width, the decoder as small as can be.
* last row: attention of the last prompt token in a decoder layer (FastV). The other way round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Self

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from frugalvlm import measure
from frugalvlm.bench.tax import busy_line, prompt
from frugalvlm.hosts import host_for
from frugalvlm.hosts.base import encoder_layers
from frugalvlm.methods.base import EncoderReducer, LayerReducer
from frugalvlm.paths import result_file
from frugalvlm.report.display import Block, Cell, Table, facts_of, setting_lines
from frugalvlm.report.plots import MARKERS
from frugalvlm.runs import records
from frugalvlm.views import EncoderView, Kept, LayerView, Reduced

__all__ = ["ARMS", "SCORES", "SIDES", "arms", "growth", "measure_scores", "model_for",
           "score_plot", "score_table"]  # fmt: skip

RECORD = "score_costs.json"
SIDES = (12, 24, 34, 54)  # patches a side: 144, 576, 1,156 and 2,916 visual tokens
SCORES = {"cls": "[CLS] row (vision tower)", "last": "last row (decoder layer 2)"}
ARMS = {
    "none": "SDPA, no score",
    "rows": "SDPA, needed row (ours)",
    "map": "eager, map of one layer",
    "maps": "eager, maps of all layers",
}
READ = 2  # as FastV: the decoder layer before which the last row is read (of the layer before)
_MODERATE = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4,
             "num_hidden_layers": 4}  # fmt: skip
_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 1,
          "num_hidden_layers": 2}  # fmt: skip


def model_for(score: str, side: int) -> PreTrainedModel:
    """A LLaVA with random weights, `side` x `side` patches and SDPA.

    Args:
        score: "cls" or "last", which decides what part is of moderate width.
        side: patches a side.
    """
    torch.manual_seed(0)
    tower, decoder = (_MODERATE, _SMALL) if score == "cls" else (_SMALL, _MODERATE)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=14 * side, patch_size=14, projection_dim=32, **tower
        ),
        text_config=LlamaConfig(vocab_size=128, max_position_embeddings=4096, **decoder),
        image_token_id=4,
        attn_implementation="sdpa",
    )
    return LlavaForConditionalGeneration(config).eval()


@dataclass(frozen=True)
class _Probe:
    """Reads a score and drops nothing."""

    seen: list[Tensor] = field(default_factory=list, compare=False)

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        return cls()


class _ClsRow(_Probe, EncoderReducer):
    key: ClassVar[str] = "cls_row"

    def reduce(self, view: EncoderView) -> Reduced:
        self.seen.append(view.cls_attention.mean(1))
        every = torch.arange(view.patch_count, device=view.patches.device)
        return Reduced(view.patches, every.expand(view.crops, -1))


class _LastRow(_Probe, LayerReducer):
    key: ClassVar[str] = "last_row"

    def layers(self, decoder_layers: int) -> tuple[int, ...]:
        return (READ,)

    def keep(self, view: LayerView) -> Kept:
        self.seen.append(view.last_token_attention.mean(1))
        every = torch.arange(view.visual.shape[1], device=view.visual.device)
        return Kept(every.expand(len(view.counts), -1), view.counts)


def arms(score: str, side: int, device: str = "cpu") -> dict[str, Callable[[], Tensor | None]]:
    """One prefill per way to get the score, by `ARMS`; each returns [images, visual] scores.

    Args:
        score: "cls" or "last".
        side: patches a side.
        device: where to run.
    """
    model, eager = (model_for(score, side).to(device) for _ in range(2))  # the same weights
    eager.set_attn_implementation({"vision_config" if score == "cls" else "text_config": "eager"})
    inputs, host = prompt(model), host_for(eager)
    by_cls = score == "cls"
    probe: _ClsRow | _LastRow = _ClsRow() if by_cls else _LastRow()
    read = host.feature_attention if by_cls else host.language_model.layers[READ - 1].self_attn
    visual = (inputs["input_ids"][0] == 4).nonzero()[:, 0]

    def row(attention: Tensor) -> Tensor:
        """The needed row of a map [1, heads, queries, keys], as a copy that holds no map."""
        own = attention[:, :, 0, 1:] if by_cls else attention[:, :, -1, visual]
        return own.mean(1)

    @torch.inference_mode()
    def prefill(model: PreTrainedModel, **more: Any) -> Any:
        return model(**inputs, use_cache=True, logits_to_keep=1, **more)

    def none() -> None:
        prefill(model)

    def rows() -> Tensor:
        with probe.on(model):
            prefill(model)
        return probe.seen.pop()

    def one_map() -> Tensor:
        seen: list[Tensor] = []
        hook = read.register_forward_hook(lambda module, args, out: seen.append(row(out[1])))
        try:
            prefill(eager)
        finally:
            hook.remove()
        return seen.pop()

    def all_maps() -> Tensor:
        if not by_cls:
            return row(prefill(eager, output_attentions=True).attentions[READ - 1])
        seen: list[Tensor] = []
        layer, tower = list(encoder_layers(host.tower)).index(host.feature_module), host.tower
        hook = tower.register_forward_hook(
            lambda module, args, out: seen.append(row(out.attentions[layer]))
        )
        # The model asks its tower for no maps; released code calls the tower itself.
        tower.config.output_attentions = True
        try:
            prefill(eager)
        finally:
            tower.config.output_attentions = False
            hook.remove()
        return seen.pop()

    return {"none": none, "rows": rows, "map": one_map, "maps": all_maps}


def measure_scores(
    sides: Sequence[int] = SIDES, repeats: int = 4, warmup: int = 1, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Time and peak memory of every way to get a score, the ways taking turns.

    Args:
        sides: patches a side.
        repeats: timed rounds.
        warmup: rounds before them.
        device: where to run.

    Returns:
        One row per score, size and way: median ms, its ratio to the prefill without a score with
        its 95 % interval, peak memory of the prefill and what it is more than without a score, and
        how far the scores are from those of the maps (largest difference over the largest score).
    """
    rows = []
    for score in SCORES:
        for side in sides:
            runs = arms(score, side, device)
            timed = measure.interleaved_latency(runs, repeats, warmup, device)
            scores: dict[str, Tensor | None] = {}
            peaks = {
                name: measure.peak_memory_bytes(partial(_into, scores, name, run), device)
                for name, run in runs.items()
            }
            for name in runs:
                ratio = measure.ratio(timed[name], timed["none"])
                rows.append({
                    "score": score, "way": name, "visual_tokens": side * side,
                    "ms": timed[name].p50_ms,
                    "ratio": {"median": ratio.median, "low": ratio.low, "high": ratio.high,
                              "n": ratio.n},
                    "peak_mib": peaks[name].mib,
                    "more_mib": peaks[name].mib - peaks["none"].mib,
                    "peak_method": peaks[name].method,
                    "difference": _difference(scores[name], scores["maps"]),
                })  # fmt: skip
    return rows


def _into(scores: dict[str, Tensor | None], name: str, run: Callable[[], Tensor | None]) -> None:
    scores[name] = run()


def _difference(found: Tensor | None, expected: Tensor | None) -> float | None:
    if found is None or expected is None:
        return None
    return float((found - expected).abs().max() / expected.abs().max())


def growth(data: pd.DataFrame, column: str = "peak_mib") -> dict[tuple[str, str], float]:
    """With which power of the number of visual tokens a cost grows, between the two largest sizes.

    Args:
        data: rows of `measure_scores`, or the data of `score_table`.
        column: what grows.

    Returns:
        The power by score and way, 1 for linear and 2 for quadratic growth; NaN for what is not
        above zero.
    """
    powers = {}
    for score in data["score"].unique():
        for way in data["way"].unique():
            own = data[(data["score"] == score) & (data["way"] == way)]
            last = own.sort_values("visual_tokens").tail(2)
            (less, more), (few, many) = last[column], last["visual_tokens"]
            known = min(less, more) > 0
            powers[score, way] = math.log(more / less, many / few) if known else math.nan
    return powers


def score_table(record: records.Record | None = None) -> Table:
    """Time and memory of every way to get a score, score by score.

    Args:
        record: default: the published one.

    Raises:
        FileNotFoundError: when nothing was measured; `invoke bench` does.
    """
    record = record or records.read_record(result_file("benchmark", RECORD))
    rows = [{k: v for k, v in row.items() if k != "ratio"} | _spread(row) for row in record["rows"]]
    data, facts = pd.DataFrame(rows), facts_of([record], "benchmark", None)
    of_peak, of_more = growth(data), growth(data, "more_mib")
    blocks: dict[str, list[tuple[Cell, ...]]] = {}
    for d in data.to_dict("records"):
        heading = f"{SCORES[d['score']]}, {d['visual_tokens']:,} visual tokens"
        blocks.setdefault(heading, []).append(
            _line(d, *(p[d["score"], d["way"]] for p in (of_peak, of_more)))
        )
    return Table(
        title="What a score costs: needed rows against attention maps",
        headers=("way", "prefill\nms", "of no score\n[95 % interval]", "peak MiB\n(power)",
                 "more than no\nscore, MiB (power)", "difference\nto maps"),
        blocks=tuple(Block(heading, tuple(lines)) for heading, lines in blocks.items()),
        caption=(
            *setting_lines(facts),
            "One prefill of a model with random weights, nothing dropped. The part that gives the "
            f"score has {_MODERATE['num_hidden_layers']} layers of width "
            f"{_MODERATE['hidden_size']} with {_MODERATE['num_attention_heads']} heads, the other "
            "part is as small as can be. Times: median, and ratio to no score over rounds in "
            f"which all took turns. Peak: {record['rows'][0]['peak_method']}, above the model "
            "itself. Power: of the number of visual tokens with which memory grows, between the "
            "two largest sizes; 1 is linear, 2 quadratic. Difference: largest one between the "
            "scores, over the largest score.",
            busy_line(record),
        ),
        data=data,
        facts=facts,
    )  # fmt: skip


def score_plot(record: records.Record | None = None) -> Figure:
    """Peak memory (above) and time (below) over the number of visual tokens, score by score.

    Args:
        record: default: the published one.

    Raises:
        FileNotFoundError: when nothing was measured; `invoke bench` does.
    """
    data = score_table(record).data
    colors = dict(zip(ARMS, sns.color_palette("colorblind"), strict=False))
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(2, 2, figsize=(9.5, 6.4), sharex=True, layout="constrained")
    for column, (score, title) in enumerate(SCORES.items()):
        for ax, name, unit in zip(axes[:, column], ("peak_mib", "ms"), ("MiB", "ms"), strict=True):
            for i, (way, label) in enumerate(ARMS.items()):
                own = data[(data["score"] == score) & (data["way"] == way)]
                ax.plot(own["visual_tokens"], own[name], color=colors[way], marker=MARKERS[i],
                        label=label, linestyle=":" if way == "none" else "-")  # fmt: skip
            ax.set(xscale="log", yscale="log", ylabel=unit)
        axes[0, column].set_title(f"{title}: peak memory of a prefill", fontsize=10, loc="left")
        axes[1, column].set_title(f"{title}: time of a prefill", fontsize=10, loc="left")
        sizes = sorted(data["visual_tokens"].unique())
        axes[1, column].set_xticks(sizes, [f"{n:,}" for n in sizes])
        axes[1, column].minorticks_off()
        axes[1, column].set_xlabel("visual tokens")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    facts = score_table(record).facts
    figure.suptitle(f"Cost of a score, random weights, on {facts['hardware']}", fontsize=11)
    return figure


def _spread(row: dict[str, Any]) -> dict[str, Any]:
    r = row["ratio"]
    return {"ratio": r["median"], "ratio_low": r["low"], "ratio_high": r["high"], "n": r["n"]}


def _line(d: Mapping[Any, Any], of_peak: float, of_more: float) -> tuple[Cell, ...]:
    more = "" if d["way"] == "none" else f"{d['more_mib']:.1f} ({of_more:.1f})"
    off = "" if pd.isna(d["difference"]) else f"{d['difference']:.0e}"
    return tuple(
        Cell(text)
        for text in (
            ARMS[d["way"]], f"{d['ms']:.1f}",
            f"{d['ratio']:.2f} [{d['ratio_low']:.2f}, {d['ratio_high']:.2f}]",
            f"{d['peak_mib']:.1f} ({of_peak:.1f})", more, off,
        )
    )  # fmt: skip
