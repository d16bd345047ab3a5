"""The observations that the papers rest on, looked for in the pocket models.

1. The vision tower's [CLS] attention falls on objects (VisionZip, FasterVLM).
2. The text's attention to the image goes through three stages (DyVTE, arXiv:2411.19628, section 3):
   early fusion, attention within each modality, a late return to the image.
3. All decoder layers but the first rank the visual tokens alike (G-Search, arXiv:2412.00556,
   Figure 1: Kendall's tau of neighbouring layers).
4. Behind some layer the visual tokens no longer change the answer (DyVTE, Figure 3).

Every sentence says present or absent by a rule that was fixed before looking at the numbers. The
attention maps here come from eager attention: this module measures nothing that costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm.benchmarks import BENCHMARKS, load_benchmark, stats
from frugalvlm.benchmarks.asking import BATCH_SIZE, Batches, chunks, prepare
from frugalvlm.benchmarks.base import Sheet
from frugalvlm.checks import check_whole
from frugalvlm.digest import request_hash
from frugalvlm.engine.tower_once import tower_once
from frugalvlm.formats import between
from frugalvlm.hosts import Host, host_for
from frugalvlm.methods import NoImageAfter, Vanilla
from frugalvlm.pocket.scenes import make_scene
from frugalvlm.probes.controls import coverage
from frugalvlm.probes.discrimination import accuracy_sheet, opened
from frugalvlm.runs import records
from frugalvlm.runs.accuracy import accuracy_run
from frugalvlm.runs.attention import eager_attention
from frugalvlm.runs.identity import code_hash
from frugalvlm.runs.options import POCKET_MODEL, QUESTIONS, Options
from frugalvlm.runs.records import Record, method_key
from frugalvlm.runs.setting import Reporter, Setting, Silent, find_run, write_run

__all__ = ["findings", "kendall_tau", "removal_frame", "run", "stages"]

IMAGES = 100  # pictures for the attention maps
OBJECT_SHARE = 0.5  # a patch is an object's when its box covers at least so much of it
MORE = 5.0  # points of attention by which object patches must exceed their share of the area
TURN = 1.0  # points by which the text's attention must fall, and rise again
EARLY, LATE = 3 / 32, 12 / 32  # DyVTE: fusion in the first 3 of 32 layers, reasoning from the 13th
SAME_RANKING = 0.65  # G-Search: every pair of neighbours but the first has at least this tau
HARMLESS = 2.0  # points of accuracy that leaving out the image may cost at most
EXIT_BY = 24 / 32  # DyVTE: no loss any more behind layer 24 of 32


def run(
    model_name: str = POCKET_MODEL,
    n: int = QUESTIONS,
    device: str = "cpu",
    *,
    split: str = "test",
    benchmarks: Sequence[str] = (),
    images: int = IMAGES,
    force: bool = False,
    reporter: Reporter | None = None,
) -> list[Record]:
    """Run, or find under results/pocket/benchmarks, the records behind the four figures.

    Args:
        model_name: embedded model, or a folder with one.
        n: questions per benchmark, for figure 4.
        device: "cpu" or "cuda".
        split: "dev" or "test".
        benchmarks: ids, for figure 4; none: all.
        images: pictures, for figures 1 to 3.
        force: run again although complete records exist.
        reporter: told of progress.

    Returns:
        One record of kind "phenomena", then the accuracy records of figure 4.

    Raises:
        OptionError: for a value that an argument cannot have.
        WeightsError: when there is no such model.
    """
    Options(n, tuple(benchmarks) or None, model=model_name, device=device, force=force)
    images = check_whole("images", images)
    model, processor, setting = opened(model_name, n, device, split, force)
    reporter = reporter or Silent()
    shape = host_for(model).shape
    made = [maps_run(setting, model, processor, reporter, images)]
    for name in benchmarks or BENCHMARKS:
        benchmark = load_benchmark(name)
        batches = Batches(benchmark, processor, split, n, device)
        go = partial(accuracy_run, setting, model, benchmark, batches, reporter=reporter)
        with tower_once(model):
            made.append(go(method=Vanilla(), budget=shape.patches))
            for layer in range(1, shape.decoder_layers):
                made.append(go(method=NoImageAfter(layer), budget=0))
    return made


# -- attention maps ------------------------------------------------------------------------------


@torch.inference_mode()
def maps_run(
    setting: Setting,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    reporter: Reporter,
    images: int = IMAGES,
) -> Record:
    """Figures 1 to 3, from one pocket-gqa question about each of `images` pictures; a record.

    Per picture: `covered`, the share of patches that objects cover; `cls` (None without a [CLS])
    and `received`, the share of the tower's attention to patches that falls on these, per layer;
    `text` and `last`, the share of the attention of the question's tokens and of the last prompt
    token on visual tokens, per decoder layer, and `even`, that of attention spread evenly over the
    keys that `text` may see; `neighbours`, tau of neighbouring layers. `tau` is [layers, layers],
    the mean over pictures. Heads are averaged.
    """
    request = {
        "scale": setting.scale, "model": setting.model_name, "split": setting.split,
        "images": images, "object_share": OBJECT_SHARE,
        "dtype": str(model.dtype).removeprefix("torch."), "attn_implementation": "eager",
        "device": torch.device(setting.device).type,
    }  # fmt: skip
    code = code_hash("probes.phenomena", "probes.controls")
    found = find_run(setting, "phenomena", request, code)
    reporter.start("attention maps", images)
    if found is not None:
        reporter.advance(images)
        return found
    started, host = time.monotonic(), host_for(model)
    benchmark = load_benchmark("pocket-gqa")
    data = benchmark.dataset(setting.split, images * benchmark.per_image)  # type: ignore[arg-type]
    data = data.select(range(0, len(data), benchmark.per_image))
    shares: dict[str, list[Any]] = {}
    tau = torch.zeros(host.shape.decoder_layers, host.shape.decoder_layers)
    with eager_attention(model):
        for part in chunks(range(len(data)), BATCH_SIZE):
            scenes = [make_scene(setting.split, data[i]["scene_seed"]) for i in part]  # type: ignore[arg-type]
            covered = torch.tensor(np.stack([coverage(s, host.shape.grid) for s in scenes]))
            objects = (covered.flatten(1) >= OBJECT_SHARE).to(setting.device)
            batch = [data[i]["image"] for i in part]
            inputs = prepare(processor, batch, [data[i]["question"] for i in part], setting.device)
            found_here = {
                "covered": objects.float().mean(1),
                **_tower_shares(host, inputs["pixel_values"], objects),
            }
            decoder, kendall = _decoder_shares(host, inputs)
            tau += kendall.sum(0).cpu()
            for name, values in (found_here | decoder).items():
                shares.setdefault(name, []).extend(values.double().cpu().numpy().round(5).tolist())
            reporter.advance(len(batch))
    record = {
        "kind": "phenomena", "status": "complete", "request": request, "images": len(data),
        "read_layer": _read_layer(host), "shares": shares,
        "tau": (tau / len(data)).double().numpy().round(5).tolist(),
        "provenance": records.provenance(
            code=code, model_hash=setting.model_hash, seconds=time.monotonic() - started,
            data_hash=request_hash(data["question_id"]), device=setting.device,
        ),
    }  # fmt: skip
    write_run(setting, record)
    return record


def _tower_shares(host: Host, pixels: Tensor, objects: Tensor) -> dict[str, Tensor]:
    """Share of the attention to patches that falls on object patches: [pictures, layers] each."""
    maps = [
        w.float().mean(1)
        for w in host.tower(pixel_values=pixels, output_attentions=True).attentions
    ]
    skip = int(host.shape.has_cls)
    rows = {"received": [w[:, :, skip:].mean(1) for w in maps]}
    if host.shape.has_cls:
        rows["cls"] = [w[:, 0, 1:] for w in maps]
    return {
        name: torch.stack([(row * objects).sum(-1) / row.sum(-1) for row in layers], 1)
        for name, layers in rows.items()
    }


def _decoder_shares(host: Host, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Shares on visual tokens [prompts, layers], and tau [prompts, layers, layers]."""
    ids, real = inputs["input_ids"], inputs["attention_mask"] > 0
    visual = ids == host.model.config.image_token_id
    places = torch.arange(ids.shape[1], device=ids.device)
    end = (visual * places).amax(-1, keepdim=True)  # the last visual token
    text = (places > end) & real
    last = (text * places).argmax(-1)
    prompt = torch.arange(len(ids), device=ids.device)
    maps = host.model(**inputs, output_attentions=True, use_cache=False).attentions
    seen = torch.stack([w.float().mean(1) for w in maps], 1)  # [prompts, layers, queries, keys]
    on_image = (seen * visual[:, None, None]).sum(-1)
    keys = real.cumsum(-1)  # as many keys a query may see
    even = visual.sum(-1, keepdim=True) / keys.clamp(min=1)
    rows = seen[prompt, :, last]  # [prompts, layers, keys]
    tokens = rows[visual[:, None].expand_as(rows)].view(*rows.shape[:2], -1)
    tau = kendall_tau(tokens)
    return {
        "text": (on_image * text[:, None]).sum(-1) / text.sum(-1, keepdim=True),
        "last": on_image[prompt, :, last],
        "even": (even * text).sum(-1) / text.sum(-1),
        "neighbours": tau.diagonal(offset=1, dim1=-2, dim2=-1),
    }, tau


def kendall_tau(
    scores: Float[Tensor, "*batch rankings items"],
) -> Float[Tensor, "*batch rankings rankings"]:
    """Kendall's tau-b between every two of several rankings of the same items.

    Concordant minus discordant pairs, over the geometric mean of the pairs that each ranking does
    not tie; NaN for a ranking that ties them all.
    """
    items = scores.shape[-1]
    first, second = torch.triu_indices(items, items, 1, device=scores.device)
    signs = (scores[..., first] - scores[..., second]).sign()
    agreement = signs @ signs.transpose(-1, -2)
    untied = agreement.diagonal(dim1=-2, dim2=-1)
    return agreement / (untied[..., :, None] * untied[..., None, :]).sqrt()


def _read_layer(host: Host) -> int:
    """The tower layer (from 1) whose output the language model reads."""
    names = [name for name, module in host.tower.named_modules() if module is host.feature_module]
    return int(names[0].rsplit(".", 1)[1]) + 1


# -- what the records say ------------------------------------------------------------------------


def stages(layers: int) -> tuple[range, range, range]:
    """DyVTE's three stages, scaled to a decoder of so many layers; each has at least one."""
    early = max(1, round(EARLY * layers))
    late = min(layers - 1, max(early + 1, round(LATE * layers)))
    return range(early), range(early, late), range(late, layers)


def removal_frame(
    made: Sequence[Record], sheet: Callable[[Record], Sheet] = accuracy_sheet
) -> pd.DataFrame:
    """Accuracy without the image behind each layer, and the mean loss over benchmarks (paired).

    Returns:
        One row per benchmark and `layer` (the last decoder layer that sees the image; the untouched
        model at the last layer): `value`, `low`, `high`, `n`. Rows of the benchmark "loss" hold the
        mean loss against the untouched model, in points.
    """
    runs: dict[int, dict[str, Sheet]] = {}
    for record in made:
        if record["kind"] == "accuracy" and method_key(record) in ("vanilla", NoImageAfter.key):
            depth = len(record["tokens"]["per_layer"])
            layer = record["request"]["method"].get("layer", depth)
            runs.setdefault(layer, {})[record["request"]["benchmark"]] = sheet(record)
    untouched = runs[max(runs)]
    lines = []
    for layer, sheets in sorted(runs.items()):
        figures = {name: stats.interval(own) for name, own in sheets.items()}
        pairs = {name: (untouched[name], own) for name, own in sheets.items()}
        figures["loss"] = stats.mean_difference(pairs)
        lines += [
            {"benchmark": name, "layer": layer, "value": f.value, "low": f.low, "high": f.high,
             "n": f.n_questions}
            for name, f in figures.items()
        ]  # fmt: skip
    return pd.DataFrame(lines)


def findings(record: Record, removal: pd.DataFrame) -> dict[str, str]:
    """A sentence for each of the four figures: "Present" or "Absent", and the numbers.

    Args:
        record: of kind "phenomena".
        removal: what `removal_frame` returned.

    Returns:
        Sentences by "objects", "stages", "ranking" and "exit".
    """
    shares = {name: np.asarray(values) for name, values in record["shares"].items()}
    return {
        "objects": _objects(shares, record["read_layer"]),
        "stages": _stages(shares["text"]),
        "ranking": _ranking(shares["neighbours"]),
        "exit": _exit(removal),
    }


def _figure(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and interval of one figure per picture."""
    mean, low, high = stats.mean_interval(values)
    return float(mean), float(low), float(high)


def _verdict(present: bool) -> str:
    return "Present" if present else "Absent"


def _objects(shares: dict[str, np.ndarray], read: int) -> str:
    name, who = ("cls", "[CLS] attention") if "cls" in shares else ("received", "attention")
    share = 100 * shares[name][:, read - 1]
    covered = 100 * shares["covered"]
    mean, low, high = _figure(share)
    more, least, most = _figure(share - covered)
    return (
        f"{_verdict(least > MORE)}: in layer {read} of {shares[name].shape[1]}, whose output the "
        f"language model reads, {mean:.0f} % {between(low, high, 0)} of the tower's {who} falls on "
        f"patches of objects, which are {covered.mean():.0f} % of all: {more:+.1f} points "
        f"{between(least, most, 1)}, wanted more than {MORE:g}."
    )


def _stages(text: np.ndarray) -> str:
    early, middle, late = (100 * text[:, list(s)].mean(1) for s in stages(text.shape[1]))
    fusion, back = _figure(early - middle), _figure(late - middle)
    names = [f"{s.start + 1}" if len(s) == 1 else f"{s.start + 1}-{s.stop}"
             for s in stages(text.shape[1])]  # fmt: skip
    return (
        f"{_verdict(fusion[1] > TURN and back[1] > TURN)}: the text's attention on the image is "
        f"{early.mean():.0f} % in layer {names[0]}, {middle.mean():.0f} % in {names[1]} and "
        f"{late.mean():.0f} % in {names[2]}; three stages need a fall "
        f"and then a rise of more than {TURN:g} point each; here it changes by {-fusion[0]:+.1f} "
        f"{between(-fusion[2], -fusion[1], 1)} and then by {back[0]:+.1f} "
        f"{between(back[1], back[2], 1)}."
    )


def _ranking(neighbours: np.ndarray) -> str:
    mean, low, _ = stats.mean_interval(neighbours)
    alike = int((low[1:] >= SAME_RANKING).sum())
    return (
        f"{_verdict(alike == len(low) - 1)}: tau of layers 1 and 2 is {mean[0]:.2f}; of the "
        f"{len(low) - 1} later pairs of neighbours, whose tau is {mean[1:].min():.2f} to "
        f"{mean[1:].max():.2f}, {alike} lie with their whole interval above {SAME_RANKING}."
    )


def _exit(removal: pd.DataFrame) -> str:
    loss = removal[removal["benchmark"] == "loss"].sort_values("layer")
    total = int(loss["layer"].max())
    harmless = (loss["high"] <= HARMLESS) | (loss["layer"] == total)
    # The first layer from which on the image is never missed again.
    first = int(loss[harmless[::-1].cummin()[::-1].astype(bool)]["layer"].min())
    by_layer = loss.set_index("layer")[["value", "low", "high"]]

    def points(layer: int) -> str:
        value, low, high = by_layer.loc[[layer]].to_numpy(float)[0].tolist()
        return f"{value:.1f} {between(low, high, 1)}"

    where = (
        f"from layer {first} of {total} on, leaving out the image costs at most {HARMLESS:g} points"
        f" ({points(first)} there)"
        if first < total
        else f"the image is still missed behind layer {total - 1} of {total}"
    )
    # An image that is not missed behind the first layer either was never used.
    return (
        f"{_verdict(1 < first <= EXIT_BY * total)}: {where}; behind layer 1 it costs {points(1)} "
        f"points. Mean over benchmarks; the paper's exit is at {100 * EXIT_BY:.0f} % of the depth."
    )
