"""Cost tables from records: efficiency, counted blueprints, energy. `tables` gives them out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from frugalvlm import papers
from frugalvlm.formats import NONE_PRINTED, NOT_MEASURED, between
from frugalvlm.papers import Budget, Column, LayoutModel, Paper, load_paper
from frugalvlm.report.display import (
    Block,
    Cell,
    Narrow,
    Table,
    budget_heading,
    facts_of,
    labels_of,
    name_of,
    setting_lines,
)
from frugalvlm.runs.options import ROUNDS, WINDOW_S
from frugalvlm.runs.records import Record, latest, one_setting, select


def efficiency_table(records: Iterable[Record], paper: Paper | str | None = None) -> Table:
    """What the methods cost on the hardware at hand, from the newest efficiency record.

    Args:
        records: records of one setting.
        paper: gives the methods their labels.

    Raises:
        MixedSettingError: when the efficiency records come from several models or machines.
    """
    known = latest(select(records, "efficiency"))
    one_setting(known)
    rows = known[-1]["rows"] if known else []
    labels = labels_of(paper)
    base = rows[0] if rows else {}
    unit, flops_name = _flops_unit(r["flops"] for r in rows)
    size, size_name = _bytes_unit(r["kv_visual_bytes"] for r in rows)
    data = [_efficiency_numbers(row, base, labels) for row in rows]
    facts = facts_of(known[-1:], "pocket", None)
    request = known[-1]["request"] if known else {}
    blocks = [
        (
            Cell(d["label"]),
            _tokens_cell(d),
            _lines(f"{d['flops'] / unit:.2f}", f"{100 / d['flops_ratio']:.1f} %", tight=1),
            _lines(f"{d['prefill_ms_p50']:.1f}", f"{d['prefill_ms_p95']:.1f}"),
            _speedup_cell(d),
            _realised_cell(d),
            _lines(f"{d['decode_ms_p50']:.2f}", f"{d['decode_ms_p95']:.2f}"),
            Cell(NOT_MEASURED if d["peak_mib"] is None else f"{d['peak_mib']:.0f}"),
            _lines(f"{d['kv_visual_bytes'] / size:.1f}", f"{d['kv_visual_ratio']:.3f}", tight=1),
        )
        for d in data
    ]
    return Table(
        title=f"Cost of prefill and decoding at the {facts['scale']} scale",
        headers=(
            "method", "tokens\nasked/mean", f"prefill {flops_name}\n% of untouched",
            "prefill ms\np50, p95", "prefill speed-up\n[95 % interval]",
            "of FLOPs\nratio", "decode ms/token\np50, p95", "peak\nMiB",
            f"visual KV {size_name}\nof untouched",
        ),
        blocks=_by_budget(blocks, data),
        caption=(
            *setting_lines(facts),
            "FLOPs and cache are counted for one prompt; times and memory are measured for "
            f"batches of {request.get('batch_size', '?')}, methods taking turns in "
            f"{request.get('repeats', '?')} rounds. Speed-up: time of the untouched model over "
            "time with the method, paired by round; vision tower and selection included. Peak "
            f"memory: {rows[0].get('peak_method', '?') if rows else '?'}.",
            *_shortened(request),
            REALISED,
        ),
        data=pd.DataFrame(data),
        facts=facts,
        narrow=Narrow({
            0: "method", 1: "tokens", 2: "FLOPs\n%", 4: "prefill speed-up\n[95 % interval]",
            5: "of FLOPs\nratio", 6: "decode\nms", 7: "peak\nMiB", 8: "KV of\nall",
        }),
    )  # fmt: skip


def _efficiency_numbers(
    row: Mapping[str, Any], base: Mapping[str, Any], labels: Mapping[str, str]
) -> dict[str, Any]:
    speedup, prefill, decode = row["prefill_speedup"], row["prefill_ms"], row["decode_ms"]
    counted = _counted_numbers(row, base, labels)
    return counted | {
        "prefill_ms_p50": prefill["p50"],
        "prefill_ms_p95": prefill["p95"],
        "decode_ms_p50": decode["p50"],
        "decode_ms_p95": decode["p95"],
        "n": prefill["n"],
        "prefill_speedup": speedup["median"],
        "prefill_speedup_low": speedup["low"],
        "prefill_speedup_high": speedup["high"],
        "realised": realised(speedup["median"], counted["flops_ratio"]),
        "peak_mib": row.get("peak_mib"),
        "peak_method": row.get("peak_method", ""),
    }


def _counted_numbers(
    row: Mapping[str, Any], base: Mapping[str, Any], labels: Mapping[str, str]
) -> dict[str, Any]:
    parts = {f"flops_{name}": value for name, value in row["flops_parts"].items()}
    decoder = row["flops_parts"].get("decoder")
    return {
        "model": row.get("model"),
        "method": row["method"],
        "label": labels.get(row["method"], row["method"]),
        "budget": row["budget"],
        "tokens_mean": row["tokens_mean"],
        "tokens_after": row["tokens_after"],
        "flops": row["flops"],
        **parts,
        "flops_ratio": base["flops"] / row["flops"],
        "decoder_flops_ratio": base["flops_parts"]["decoder"] / decoder if decoder else None,
        "kv_bytes": row["kv_bytes"],
        "kv_visual_bytes": row["kv_visual_bytes"],
        "kv_visual_ratio": row["kv_visual_bytes"] / base["kv_visual_bytes"],
    }


def _shortened(request: Mapping[str, Any]) -> list[str]:
    """A sentence where a trial measured with fewer rounds or shorter windows than usual."""
    rounds, window = request.get("repeats", ROUNDS), request.get("energy_window_s", WINDOW_S)
    if rounds >= ROUNDS and window >= WINDOW_S:
        return []
    return [
        f"A trial of few questions: {rounds} rounds instead of {ROUNDS}, modelled energy over "
        f"{window:g} s instead of {WINDOW_S:g} s; intervals are wider, and energy is rougher."
    ]


REALISED = (
    "Of FLOPs ratio: how much of what the FLOPs promise the clock gives, speed-up over the ratio "
    "of FLOPs. FLOPs are not time: below 100 % the rest went into choosing, gathering and work "
    "that does not shrink."
)


def realised(speedup: float | None, flops_ratio: float | None) -> float | None:
    """Speed-up in time over that in FLOPs, in percent; None where either is unknown."""
    return 100 * speedup / flops_ratio if speedup and flops_ratio else None


def _realised_cell(d: Mapping[str, Any]) -> Cell:
    share = d["realised"]
    return Cell(NONE_PRINTED if share is None or pd.isna(share) else f"{share:.0f} %")


def _lines(first: str, second: str, tight: int = 0) -> Cell:
    """Two lines; where there is little room only the one that `tight` counts."""
    return Cell(f"{first}\n{second}", tight=(first, second)[tight])


def _speedup_cell(d: Mapping[str, Any]) -> Cell:
    interval = between(d["prefill_speedup_low"], d["prefill_speedup_high"], 2)
    speedup = f"{d['prefill_speedup']:.2f}x"
    return Cell(f"{speedup}\n{interval}", tight=f"{speedup} {interval}")


def _tokens_cell(d: Mapping[str, Any]) -> Cell:
    return Cell(f"{d['budget']}/{d['tokens_mean']:.4g}")


def blueprint_table(
    paper: Paper | str, records: Iterable[Record], table_id: str = "blueprint"
) -> Table:
    """Exact costs on the paper's own architectures: counted, so without intervals.

    Where the paper printed a prefill time for the same model and budget, its speed-up stands
    beside the FLOPs, marked as the other quantity that it is.

    Args:
        paper: the paper or its key.
        records: blueprint records; of cells counted twice the newest one is shown.
        table_id: the layout that names models, budgets and methods.
    """
    paper = load_paper(paper) if isinstance(paper, str) else paper
    layout = paper.table(table_id)
    counted = {
        (row["model"], row["method"], row["budget"]): row
        for record in latest(select(records, "blueprint"))
        for row in record["rows"]
    }
    labels = labels_of(paper)
    blocks, data = [], []
    for model in layout.models:
        base = counted.get((model.name, layout.baseline, model.tokens))
        for budget in (None, *model.budgets):
            tokens = model.tokens if budget is None else budget.paper_tokens
            methods = [
                (line.method, 0 if line.once == "none" else tokens)
                for line, own in layout.lines(model)
                if own is budget
            ]
            rows = []
            for method, tokens in methods:
                row = counted.get((model.name, method, tokens))
                times = _printed_times(paper, model, method, budget)
                if row is None or base is None:
                    gap = {"model": model.name, "method": method, "budget": tokens}
                    data.append(gap | {"label": labels.get(method, method), **times})
                    rows.append(_gap_row(labels.get(method, method), 9))
                    continue
                numbers = _counted_numbers(row, base, labels) | times
                data.append(numbers)
                rows.append(_blueprint_row(numbers))
            heading = f"{model.name}: {budget_heading(tokens, model.tokens, None, model)}"
            blocks.append(Block(heading, tuple(rows)))
    doubt = {u.table: u.why for u in paper.unverified}
    times_table = next((t for t in paper.tables if _time_column(t)), None)
    why = doubt.get((times_table.paper_table or "") if times_table else "")
    return Table(
        title=f"{name_of(paper)}: counted cost of one prefill, no weights involved",
        headers=(
            "method", "tokens\nasked/mean", "TFLOPs\ntotal", "tower", "decoder",
            "other", "FLOPs ratio\nall (decoder)", "visual KV\nMiB (ratio)",
            "another quantity:\nprinted time ratio",
        ),
        blocks=tuple(blocks),
        caption=(
            "Scale: blueprint. Counted on the real modules without weights, one prompt with one "
            "image; exact, so without an interval. Ratio of FLOPs: untouched model over method. "
            "Ratio of the cache: method over untouched. Other: projector, head and the method's "
            "own work, the answer of a guiding model included.",
            "The last column is no FLOPs figure: it is the paper's measured prefill time of the "
            "untouched model over that with the method, on its own hardware"
            + (f" ({times_table.where}, {times_table.title}" if times_table else "")
            + (f"; {why})." if why else ")." if times_table else "."),
            *_extra_tokens(data),
        ),
        data=pd.DataFrame(data),
        facts={"scale": "blueprint"},
        narrow=Narrow({0: "method", 1: "tokens", 2: "TFLOPs", 6: "FLOPs ratio\nall (decoder)",
                       7: "visual KV\nMiB (ratio)", 8: "printed\ntime"}),
    )  # fmt: skip


def _extra_tokens(data: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each model whose untouched prompt holds more tokens than its paper counts."""
    return [
        f"{d['model']}: the untouched prompt holds {d['tokens_mean']:g} visual tokens where the "
        f"paper counts {d['budget']}; the others are newline tokens, one per row of tiles."
        for d in data
        if d.get("flops_ratio") == 1 and d["tokens_mean"] > d["budget"]
    ]


def _blueprint_row(d: Mapping[str, Any]) -> tuple[Cell, ...]:
    tera, mib = 1e12, 2**20
    known = ("tower", "decoder")
    other = d["flops"] - sum(d[f"flops_{part}"] for part in known)
    time = d["paper_prefill_time_ratio"]
    return (
        Cell(d["label"]),
        _tokens_cell(d),
        Cell(f"{d['flops'] / tera:.2f}"),
        *(Cell(f"{d[f'flops_{part}'] / tera:.2f}") for part in known),
        Cell(f"{other / tera:.2f}"),
        Cell(f"{d['flops_ratio']:.2f}x ({d['decoder_flops_ratio']:.2f}x)"),
        Cell(f"{d['kv_visual_bytes'] / mib:.1f} ({d['kv_visual_ratio']:.3f})"),
        Cell(NONE_PRINTED if time is None else f"{time:.1f}x time"),
    )


def _printed_times(
    paper: Paper, model: LayoutModel, method: str, budget: Budget | None
) -> dict[str, float | None]:
    """The paper's own prefill times of this model and budget, if a layout of it has them."""
    times: dict[str, float | None] = {"paper_prefill_ms": None, "paper_prefill_time_ratio": None}
    for layout in paper.tables:
        column = _time_column(layout)
        own = next((m for m in layout.models if m.name == model.name), None)
        row = next((r for r in layout.rows if r.method == method), None)
        if column is None or own is None or row is None:
            continue
        if budget and budget.paper_tokens not in [b.paper_tokens for b in own.budgets]:
            continue
        base = next(r for r in layout.rows if r.method == layout.baseline)
        untouched = paper.printed(layout, base, column, model=own)
        value = paper.printed(layout, row, column, budget, model=own)
        ratio = untouched / value if untouched and value else None
        times = {"paper_prefill_ms": value, "paper_prefill_time_ratio": ratio}
    return times


def _time_column(layout: papers.Table) -> Column | None:
    return next((c for c in layout.columns if c.metric == "prefill time"), None)


def energy_table(records: Iterable[Record], paper: Paper | str | None = None) -> Table:
    """Energy and carbon per question, in the order of the runs: never sorted by energy.

    Modelled figures are marked and compared with nothing; measured ones are compared only when
    they are reliable and were read by the same methods.

    Raises:
        MixedSettingError: when the efficiency records come from several models or machines.
    """
    known = latest(select(records, "efficiency"))
    one_setting(known)
    rows = known[-1]["rows"] if known else []
    labels = labels_of(paper)
    base = rows[0]["energy"] if rows else {}
    data = [_energy_numbers(row, base, labels) for row in rows]
    blocks = [
        (
            Cell(d["label"]),
            _tokens_cell(d),
            Cell(_energy_text(d, "joules_per_question")),
            Cell(_ratio_text(d)),
            Cell(_energy_text(d, "carbon_g_per_1000")),
            *(Cell(str(d[f"{part}_method"])) for part in ("gpu", "cpu", "ram")),
        )
        for d in data
    ]
    facts = facts_of(known[-1:], "pocket", None)
    reasons = sorted({reason for row in rows for reason in row["energy"].get("reasons", ())})
    return Table(
        title=f"Energy of one prefill at the {facts['scale']} scale",
        headers=(
            "method", "tokens\nasked/mean", "J per\nquestion", "of\nuntouched",
            "g CO2e per\n1000 questions", "GPU", "CPU", "memory",
        ),
        blocks=_by_budget(blocks, data),
        caption=(
            *setting_lines(facts),
            "Modelled figures come from a model of the machine's power and not from a counter: "
            "they are shown for orientation and neither ranked nor compared.",
            *([f"Why not measured or not reliable: {'; '.join(reasons)}."] if reasons else []),
            *(_shortened(known[-1]["request"]) if known else []),
        ),
        data=pd.DataFrame(data),
        facts=facts,
        narrow=Narrow({0: "method", 1: "tokens", 2: "J per\nquestion", 3: "of\nuntouched",
                       4: "g CO2e per\n1000 questions"}),
    )  # fmt: skip


def _energy_numbers(
    row: Mapping[str, Any], base: Mapping[str, Any], labels: Mapping[str, str]
) -> dict[str, Any]:
    energy = row["energy"]
    joules, whole = energy["joules_per_question"], base["joules_per_question"]
    comparable = rankable(energy) and rankable(base) and energy["methods"] == base["methods"]
    methods = energy.get("methods", {})
    return {
        "method": row["method"],
        "label": labels.get(row["method"], row["method"]),
        "budget": row["budget"],
        "tokens_mean": row["tokens_mean"],
        "joules_per_question": joules,
        "carbon_g_per_1000": energy.get("carbon_g_per_1000"),
        "modelled": energy["modelled"],
        "reliable": energy["reliable"],
        "of_untouched": joules / whole if comparable and joules and whole else None,
        **{f"{part}_method": methods.get(part, "none") for part in ("gpu", "cpu", "ram")},
        "reasons": "; ".join(energy.get("reasons", ())),
    }


def rankable(energy: Mapping[str, Any]) -> bool:
    """Whether a measured energy may be ranked and compared."""
    known = energy["joules_per_question"] is not None
    return known and not energy["modelled"] and bool(energy["reliable"])


def _energy_text(d: Mapping[str, Any], name: str) -> str:
    if d[name] is None:
        return NOT_MEASURED
    mark = " modelled" if d["modelled"] else "" if d["reliable"] else " unreliable"
    return f"{d[name]:.3g}{mark}"


def _ratio_text(d: Mapping[str, Any]) -> str:
    return "not compared" if d["of_untouched"] is None else f"{d['of_untouched']:.2f}"


def _by_budget(
    rows: Sequence[tuple[Cell, ...]], data: Sequence[Mapping[str, Any]]
) -> tuple[Block, ...]:
    """One block per budget, in the order of the runs; the first row is the untouched model."""
    if not rows:
        return (Block(NOT_MEASURED, ()),)
    total = data[0]["budget"]
    budgets = dict.fromkeys(d["budget"] for d in data)
    return tuple(
        Block(
            f"{budget} of {total} visual tokens ({100 * budget / total:.1f} %)",
            tuple(row for row, d in zip(rows, data, strict=True) if d["budget"] == budget),
        )
        for budget in budgets
    )


def _gap_row(label: str, columns: int) -> tuple[Cell, ...]:
    return (Cell(label), Cell(NOT_MEASURED), *(Cell("") for _ in range(columns - 2)))


def _flops_unit(values: Iterable[float]) -> tuple[float, str]:
    top = max(values, default=1e9)
    return (1e12, "TFLOPs") if top >= 1e12 else (1e9, "GFLOPs")


def _bytes_unit(values: Iterable[float]) -> tuple[int, str]:
    return (2**20, "MiB") if max(values, default=0) >= 2**20 else (2**10, "KiB")
