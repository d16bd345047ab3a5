"""AIM beside its main table: the schedule ablation, and the paper's own model of cost.

The paper's FLOPs and prefill times are not measured: they come from an analytic model of the
language model alone (LLM-Viewer's, adapted; LaVi-Lab/AIM at edc24e9, `other_packages/LLM-Viewer`).
It is rebuilt here, operator by operator, so that every printed figure can be checked.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm import measure
from frugalvlm.formats import NONE_PRINTED
from frugalvlm.hosts import host_for
from frugalvlm.methods import Method
from frugalvlm.methods.aim import AIM, AIMEarly, AIMMerge
from frugalvlm.papers import load_paper
from frugalvlm.report.display import Block, Cell, Table
from frugalvlm.runs import records
from frugalvlm.runs.accuracy import answer_cells
from frugalvlm.runs.identity import code_hash
from frugalvlm.runs.options import Options
from frugalvlm.runs.records import Record
from frugalvlm.runs.setting import Reporter, Setting
from frugalvlm.studies.base import Study

OPS_PER_S, BYTES_PER_S = 312e12, 1555e9  # an A100 with 40 GB, FP16
FITS = 0.002  # a rebuilt figure this close to the printed one (relative) is the same figure,
HALF_DIGIT = 0.0051  # and so is one that differs by no more than rounding


# -- accuracy ------------------------------------------------------------------------------------


# At a quarter of the tokens: merging alone, the usual schedule, and an early one.
ABLATION: tuple[type[AIM], ...] = (AIMMerge, AIM, AIMEarly)


def run(
    setting: Setting,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    options: Options,
    reporter: Reporter,
) -> list[Record]:
    """Accuracy of the ablation's methods on the benchmarks of the paper's table."""
    table = load_paper("aim").table("image")
    names = options.benchmarks or [column.id for column in table.columns]
    return answer_cells(setting, model, processor, names, ablation_plan(model), reporter)


def ablation_plan(model: PreTrainedModel) -> list[tuple[Method, int]]:
    """The ablation's methods with their budget."""
    kept = host_for(model).shape.patches // 4
    return [(kind(kept), kept) for kind in ABLATION]


# -- the paper's model of cost -------------------------------------------------------------------


@dataclass(frozen=True)
class Decoder:
    """A language model as the cost model sees it."""

    layers: int
    width: int
    kv_width: int  # of keys or values, all heads
    mlp_width: int
    heads: int
    vocab: int
    text: int  # tokens beside the visual ones
    mlp_add: bool = True  # whether the residual addition behind the MLP is counted


DECODERS = {
    "LLaVA-OneVision-7B": Decoder(28, 3584, 512, 18944, 28, 152064, 100, mlp_add=False),
    "LongVA-7B": Decoder(28, 3584, 512, 18944, 28, 152064, 100, mlp_add=False),
    "LLaVA-1.5-7B": Decoder(32, 4096, 4096, 11008, 32, 32000, 40),
    "Qwen-VL-Chat-7B": Decoder(32, 4096, 4096, 22016, 32, 151936, 40),
}


def prefill_cost(decoder: Decoder, visual: Sequence[float]) -> tuple[float, float]:
    """TFLOPs and milliseconds of a prefill, by the paper's model.

    Every operator takes the longer of its arithmetic and its memory traffic; tower, projector and
    the method's own work are not counted, and the output layer is counted for one token.

    Args:
        decoder: the language model.
        visual: visual tokens at every layer.
    """
    d, kv, mlp, heads = decoder.width, decoder.kv_width, decoder.mlp_width, decoder.heads
    operators = [(d * decoder.vocab, 2 * (d * decoder.vocab + d + decoder.vocab))]
    for tokens in visual:
        n = int(tokens + decoder.text)
        square = heads * n * n
        for wide, out in ((d, d), (d, kv), (d, kv), (d, d), (d, mlp), (d, mlp), (mlp, d)):
            operators.append((2 * n * wide * out, 2 * (wide * out + n * wide + n * out)))
        operators += [
            (2 * n * n * d, 2 * (2 * n * kv + square)),  # q k
            (2 * n * n * d, 2 * (square + n * d + n * kv)),  # attention v
            (5 * square, 4 * square),  # softmax
            *[(7 * n * d, 4 * n * d)] * 2,  # norms
            *[(n * d, 4 * n * d)] * (1 + decoder.mlp_add),  # residual additions
            (2 * n * d, 6 * n * d),  # activation, at the decoder's width as in the paper's code
        ]
    seconds = sum(max(ops / OPS_PER_S, size / BYTES_PER_S) for ops, size in operators)
    return sum(ops for ops, _ in operators) / 1e12, 1000 * seconds


def scheduled(layers: int, tokens: float, l1: int | None, l2: int | None) -> list[float]:
    """Visual tokens at every layer; the cost model uses the ratio of a layer in that very layer."""
    if l1 is None or l2 is None:
        return [tokens] * layers
    # Layers count from 1 here: r = 1 up to l1, then falling to 0 at l2.
    rates = [min(1.0, max(0.0, 1 - (layer - l1) / (l2 - l1))) for layer in range(1, layers + 1)]
    return [rate * tokens for rate in rates]


# What these rows were computed with is not printed: (tokens, layers with all of them and, behind
# these, tokens). Found by fitting both printed figures; LongVA's length stands in the code.
INFERRED = {
    ("video benchmarks", "Vanilla", "-"): (18432, 28, 0),  # 128 frames of 144
    ("video benchmarks", "VTW", "32 frames"): (6272, 6, 0),
    ("video benchmarks", "FastV", "32 frames"): (6272, 1, 1248),
    ("video benchmarks", "LLaVA-PruMerge", "32 frames"): (1620, 28, 0),
    ("image benchmarks", "VTW", "budget A (~2.4 TFLOPs)"): (576, 8, 0),
    ("image benchmarks", "VTW", "budget B (~1.1 TFLOPs)"): (576, 3, 0),
    ("image benchmarks", "FastV", "budget A (~2.4 TFLOPs)"): (576, 1, 144),
    ("image benchmarks", "FastV", "budget B (~1.1 TFLOPs)"): (576, 1, 29),
    ("image benchmarks", "LLaVA-PruMerge+", "budget A (~2.4 TFLOPs)"): (145, 32, 0),
    ("image benchmarks", "LLaVA-PruMerge", "budget B (~1.1 TFLOPs)"): (40, 32, 0),
}


def cost_rows() -> pd.DataFrame:
    """Every printed pair of FLOPs and prefill time, beside what the cost model gives.

    Columns: table, model, method, setting, tokens (visual, at the first layer), l1, l2, inferred
    (the setting is not printed), printed_tflops, tflops, printed_ms, ms, and fits (both rebuilt
    figures are the printed ones; None where nothing could be rebuilt).
    """
    figures = load_paper("aim").figures
    figures = figures[figures["benchmark"] == "efficiency"]
    rows = []
    keys = ["table", "model", "method", "setting"]
    for (table, model, method, setting), own in figures.groupby(keys, sort=False):
        printed = {
            unit: own.loc[own["metric"].str.startswith(start), "value"]
            for unit, start in (("printed_tflops", "FLOPs"), ("printed_ms", "prefill time"))
        }
        if any(values.empty for values in printed.values()):
            continue
        row: dict[str, Any] = {"table": table, "model": model, "method": method}
        row |= {"setting": setting, "inferred": (table, method, setting) in INFERRED}
        row |= {name: float(values.iloc[0]) for name, values in printed.items()}
        visual = _visual(row, own["visual_tokens"].iloc[0])
        row |= {"tokens": visual[0] if visual else None, "tflops": None, "ms": None, "fits": None}
        if visual:
            row["tflops"], row["ms"] = prefill_cost(DECODERS[str(model)], visual)
            row["fits"] = all(
                abs(row[unit] - printed) < max(HALF_DIGIT, FITS * printed)
                for unit, printed in (("tflops", row["printed_tflops"]), ("ms", row["printed_ms"]))
            )
        rows.append(row)
    return pd.DataFrame(rows)


def _visual(row: dict[str, Any], tokens: float) -> Sequence[float] | None:
    """Visual tokens at every layer of a printed row; None where they cannot be told."""
    decoder = DECODERS[row["model"]]
    inferred = INFERRED.get((row["table"], row["method"], row["setting"]))
    if inferred is not None:
        first, whole, rest = inferred
        return [first] * whole + [rest] * (decoder.layers - whole)
    schedule = re.search(r"l1=(\d+) l2=(\d+)", row["setting"])
    l1, l2 = map(int, schedule.groups()) if schedule else (None, None)
    return None if pd.isna(tokens) else scheduled(decoder.layers, tokens, l1, l2)


def overhead_gflops(
    tokens: int, rounds: int, width: int, heads: int, text: int, pruned_layers: int = 8
) -> tuple[float, float]:
    """GFLOPs of merging and of pruning, by the paper's formulas.

    Args:
        tokens: visual tokens before merging, halved in every round.
        rounds: of merging.
        width: of what is merged.
        heads: of the language model.
        text: tokens beside the visual ones.
        pruned_layers: with visual tokens left; their number falls evenly.
    """
    merging = 0.0
    for i in range(rounds):
        n = tokens / 2**i
        merging += 2 * (n / 2) ** 2 * width + 4 * n * width
    pruning = 0.0
    for i in range(pruned_layers):
        n = int(tokens / 2**rounds * (1 - i / pruned_layers)) + text
        pruning += 16 * heads * n * n + 2 * heads * n + n
    return merging / 1e9, pruning / 1e9


def cost_model(folder: Path) -> list[Record]:
    """The rebuilt figures as one record, written to a folder; arithmetic, so never reused."""
    started, frame = time.monotonic(), cost_rows()
    image, video = DECODERS["LLaVA-1.5-7B"], DECODERS["LLaVA-OneVision-7B"]

    def ratio(model: str, tokens: int, unit: str) -> float:
        own = frame[(frame["model"] == model) & frame["method"].isin(("Vanilla", "AIM"))]
        whole, kept = own[own["setting"].isin(("-", "32 frames"))], own[own["tokens"] == tokens]
        return float(whole[unit].iloc[0] / kept[unit].iloc[0])

    def share(work: tuple[float, float], decoder: Decoder, tokens: int, ends: tuple) -> float:
        whole, _ = prefill_cost(decoder, scheduled(decoder.layers, tokens, *ends))
        return 100 * sum(work) / 1000 / whole

    figures = {
        "video_flops_ratio": ratio("LLaVA-OneVision-7B", 1568, "tflops"),
        "video_time_ratio": ratio("LLaVA-OneVision-7B", 1568, "ms"),
        "image_flops_ratio": ratio("LLaVA-1.5-7B", 72, "tflops"),
        "video_overhead_percent": share(
            overhead_gflops(6272, 2, video.width, video.heads, video.text), video, 1568, (14, 22)
        ),
        "image_overhead_percent": share(
            overhead_gflops(576, 3, 1024, image.heads, image.text), image, 72, (13, 21)
        ),
        "contradicting_rows": int((frame["fits"].eq(False) & ~frame["inferred"]).sum()),
    }
    request = {"scale": "blueprint", "model": "the paper's cost model", "analysis": "cost_model"}
    code = code_hash("studies.aim")
    record = {
        "kind": "analysis", "status": "complete", "request": request,
        "rows": frame.astype(object).where(frame.notna(), None).to_dict("records"),
        "figures": {
            name: {"value": value, "low": value, "high": value, "n": None}
            for name, value in figures.items()
        },
        "provenance": records.provenance(code=code, seconds=time.monotonic() - started),
    }  # fmt: skip
    stem = records.record_name(request, code, measure.machine_id())
    records.write(folder / f"{stem}.json", record)
    return [record]


def cost_table() -> Table:
    """Printed and rebuilt FLOPs and prefill times, with the rows that contradict themselves."""
    frame = cost_rows()
    blocks = []
    for table, rows in frame.groupby("table", sort=False):
        cells = [
            _cost_cells({str(k): v for k, v in row.items()}) for row in rows.to_dict("records")
        ]
        blocks.append(Block(str(table), tuple(cells)))
    wrong = frame[frame["fits"].eq(False) & ~frame["inferred"]]
    return Table(
        title="AIM: printed FLOPs and prefill times, rebuilt with the paper's own cost model",
        headers=("model, method", "setting", "tokens", "TFLOPs\nprinted", "rebuilt",
                 "prefill ms\nprinted", "rebuilt", ""),
        blocks=tuple(blocks),
        caption=(
            "Nothing here is measured: LLM-Viewer's roofline of an A100 with 40 GB, language model "
            f"only. Same: within {100 * FITS:g} % in both columns. Settings in brackets are not "
            "printed and were found by fitting.",
            f"{len(wrong)} rows do not follow from the setting they print: "
            + "; ".join(
                f"{_bare(str(r.setting))} gives {r.tflops:.2f}, not {r.printed_tflops:.2f} TFLOPs"
                for r in wrong.itertuples()
            )
            + ".",
        ),
        data=frame,
        facts={"scale": "blueprint"},
        styles={"same": "green", "differs": "red"},
    )  # fmt: skip


def _bare(setting: str) -> str:
    return setting.removesuffix(" as printed (FLOPs do not match it)")


def _cost_cells(row: dict[str, Any]) -> tuple[Cell, ...]:
    name = Cell(f"{row['model']}\n{row['method']}")
    setting = _bare(row["setting"])
    if row["inferred"]:
        first, whole, rest = INFERRED[(row["table"], row["method"], row["setting"])]
        setting += f"\n[{first} tokens, {whole} layers" + (f", then {rest}]" if rest else "]")
    printed = Cell(f"{row['printed_tflops']:.2f}"), Cell(f"{row['printed_ms']:.2f}")
    if pd.isna(row["tflops"]):
        none = Cell(NONE_PRINTED)
        return (name, Cell(setting), none, printed[0], none, printed[1], none,
                Cell("setting unknown"))  # fmt: skip
    return (
        name, Cell(setting), Cell(f"{row['tokens']:.0f}"), printed[0], Cell(f"{row['tflops']:.2f}"),
        printed[1], Cell(f"{row['ms']:.2f}"), Cell("same" if row["fits"] else "differs"),
    )  # fmt: skip


STUDY = Study(
    "aim",
    analysis=run,
    more_costs=lambda made, model: ablation_plan(model),
    blueprint=cost_model,
)
