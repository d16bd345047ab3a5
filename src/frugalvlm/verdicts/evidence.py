"""Measured quantities of one paper at one scale, from its records.

One small function per kind of quantity (`papers.QUANTITY_KINDS`), found in `QUANTITIES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from frugalvlm.benchmarks.stats import Estimate, from_sums, share
from frugalvlm.papers import QUANTITY_KINDS, Paper
from frugalvlm.runs.records import Record, latest, one_setting, select
from frugalvlm.verdicts.guard import Guard
from frugalvlm.verdicts.scored import Scored, SheetMaker, contrast

_FLOPS_PARTS = {"vision tower": "tower", "tower": "tower", "projector": "projector",
                "decoder": "decoder", "language model": "decoder",
                "visual tokens": "visual"}  # fmt: skip
# Parts of a quantity that say what to measure; all others are hyper-parameters of the method.
_SELECTORS = {
    "kind", "method", "model", "tokens", "tokens_fraction", "mean_keep_rate", "over", "part",
    "statistic", "of", "a", "b", "crops", "analysis", "figure", "source", "last_layers",
    "last_layers_fraction",
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A measured quantity; `reason` says why it, or its interval, is undefined (NaN).

    A counted one has `low == high == value`; n tells how many of `of` it rests on.
    """

    value: float
    low: float
    high: float
    n: int | None = None
    of: str = ""
    reason: str = ""


class MissingEvidence(Exception):
    """A record that the claim needs is not there; the message says which."""


class Evidence:
    """Measured quantities of one paper at one scale, by the vocabulary of QUANTITY_KINDS."""

    def __init__(
        self,
        paper: Paper,
        records: Sequence[Record],
        scale: str,
        benchmarks: Mapping[str, SheetMaker] | None,
        guard: Guard | None,
    ) -> None:
        self.paper, self.scale = paper, scale
        self.scored = Scored(records, benchmarks=benchmarks, guard=guard)
        self.attention = latest(select(records, "attention"))
        efficiency = latest(select(records, "efficiency"))
        self.analyses = latest(select(records, "analysis"))
        for group in (self.attention, efficiency, self.analyses):
            one_setting(group)
        blueprint = latest(select(records, "blueprint"))
        self.rows = [
            {"model": record["request"].get("model"), **row}
            for record in (*blueprint, *efficiency[-1:])
            for row in record["rows"]
        ]

    def measure(self, quantity: Mapping[str, Any]) -> Measured:
        """The value of a quantity; MissingEvidence when records lack it."""
        kind = quantity["kind"]
        if kind not in QUANTITY_KINDS:
            raise ValueError(f"Unknown quantity '{kind}'. Known: {', '.join(QUANTITY_KINDS)}.")
        measure = getattr(self, f"_{kind}", None)
        if measure is None:
            raise MissingEvidence(f"no record holds {kind.replace('_', ' ')} yet")
        return measure(quantity)

    # --- accuracy -----------------------------------------------------------------------------

    def _retention(self, q: Mapping[str, Any]) -> Measured:
        budget, over = self._budget(q), self._over(q)
        found = self.scored.retention(q["method"], budget, over)
        if found is None:
            raise MissingEvidence(self._gap(q["method"], budget, over))
        return _from(found)

    def _score(self, q: Mapping[str, Any]) -> Measured:
        budget, over = self._budget(q), self._over(q)
        if len(over) == 1:
            found = self.scored.score(q["method"], budget, over[0])
            if found is None:
                raise MissingEvidence(self._gap(q["method"], budget, over))
            return _from(found)
        return _from(contrast(self._terms("score", q, 1.0)))

    def _difference(self, q: Mapping[str, Any]) -> Measured:
        kind = q.get("of", "retention")
        shared = {k: v for k, v in q.items() if k not in ("kind", "of", "a", "b")}
        a, b = ({**shared, "kind": kind, **q[side]} for side in ("a", "b"))
        if kind in ("retention", "score"):
            terms = self._terms(kind, a, 1.0)
            for name, parts in self._terms(kind, b, -1.0).items():
                terms.setdefault(name, []).extend(parts)
            return _from(contrast(terms))
        return _apart(self.measure(a), self.measure(b))

    def _terms(self, kind: str, q: Mapping[str, Any], sign: float) -> dict[str, list]:
        """What a mean over benchmarks adds up, by benchmark."""
        budget, over = self._budget(q), self._over(q)
        make = self.scored.retention_terms if kind == "retention" else self.scored.score_terms
        if kind == "score" and len(over) == 1:  # in its own unit, where nothing is averaged
            make = self.scored.sheet
        sheets = {name: make(q["method"], budget, name) for name in over}
        if any(sheet is None for sheet in sheets.values()):
            raise MissingEvidence(self._gap(q["method"], budget, over))
        return {name: [(sign / len(over), sheet)] for name, sheet in sheets.items()}

    def left_out(self, q: Mapping[str, Any]) -> tuple[str, ...]:
        """Benchmarks that the guard keeps out of the means of an accuracy quantity."""
        kind = q.get("of", "retention") if q["kind"] == "difference" else q["kind"]
        if kind not in ("retention", "score"):
            return ()
        sides = [{**q, **q.get(side, {})} for side in ("a", "b")]
        named = [name for side in sides for name in self._named(side)]
        inside = {name for side in sides for name in self._over(side)}
        return tuple(name for name in dict.fromkeys(named) if name not in inside)

    def _over(self, q: Mapping[str, Any]) -> list[str]:
        """The benchmarks that a quantity is about, as far as the guard admits them."""
        named = self._named(q)
        if named and not (admitted := self.scored.guard.admitted(named)):
            raise MissingEvidence(
                "the untouched model answers all benchmarks as well from blank pictures"
            )
        return admitted if named else named

    def _named(self, q: Mapping[str, Any]) -> list[str]:
        over = q.get("over", "mean")
        if over != "mean":
            return [over] if isinstance(over, str) else list(over)
        layout = next((t for t in self.paper.tables if self.scale in t.scales), None)
        if layout is not None:
            return [column.id for column in layout.columns]
        return sorted({r["request"]["benchmark"] for r in self.scored.records})

    def _budget(self, q: Mapping[str, Any]) -> int:
        """Visual tokens per crop that a quantity speaks of, from the accuracy records."""
        total = self.scored.total
        if total is None:
            raise MissingEvidence("no accuracy record of the untouched model")
        runs = select(self.scored.records, method=q["method"])
        fitting = [r for r in runs if self._fits(r, q, total)]
        budgets = sorted({int(r["request"]["budget"]) for r in fitting})
        if len(budgets) == 1:
            return budgets[0]
        wanted = _wanted(q)
        if not budgets:
            raise MissingEvidence(f"no accuracy record of {q['method']}{wanted}")
        raise MissingEvidence(f"{q['method']}{wanted} fits budgets {budgets}, the claim names none")

    def _fits(self, record: Record, q: Mapping[str, Any], total: int) -> bool:
        hyper = record["request"]["method"]
        if any(hyper.get(name) != value for name, value in _hyper(q).items()):
            return False
        if "mean_keep_rate" in q:
            layers = record["tokens"]["per_layer"]
            rate = sum(layers) / len(layers) / total
            return abs(rate - float(q["mean_keep_rate"])) < 0.005
        if "tokens_fraction" in q:
            return record["request"]["budget"] == round(Fraction(q["tokens_fraction"]) * total)
        return "tokens" not in q or record["request"]["budget"] == q["tokens"]

    def _gap(self, method: str, budget: int, over: Sequence[str]) -> str:
        """Which accuracy records are missing."""
        total = self.scored.total or budget
        runs = [(method, budget), (self.scored.baseline, total)]
        lacking = [
            f"{key} at {tokens} tokens on {name}"
            for key, tokens in dict.fromkeys(runs)
            for name in over
            if self.scored.record(key, tokens, name) is None
        ]
        more = f" and {len(lacking) - 2} more" if len(lacking) > 2 else ""
        return f"no record of {'; '.join(lacking[:2])}{more}" if lacking else "unknown benchmark"

    # --- cost ---------------------------------------------------------------------------------

    def _prefill_speedup(self, q: Mapping[str, Any]) -> Measured:
        speedup = self._cost_row(q, "prefill_speedup")["prefill_speedup"]
        values = (speedup["median"], speedup["low"], speedup["high"])
        median, low, high = (math.nan if x is None else float(x) for x in values)
        return Measured(median, low, high, speedup.get("n"), "rounds")

    def _flops_ratio(self, q: Mapping[str, Any]) -> Measured:
        row, base = self._cost_row(q, "flops"), self._base_row(q)
        return _exact(_flops(base, q.get("part")) / _flops(row, q.get("part")))

    def _kv_ratio(self, q: Mapping[str, Any]) -> Measured:
        row, base = self._cost_row(q, "kv_visual_bytes"), self._base_row(q)
        return _exact(row["kv_visual_bytes"] / base["kv_visual_bytes"])

    def _mean_keep_rate(self, q: Mapping[str, Any]) -> Measured:
        row, base = self._cost_row(q, "tokens_mean"), self._base_row(q)
        return _exact(row["tokens_mean"] / base["tokens_mean"])

    def _token_count(self, q: Mapping[str, Any]) -> Measured:
        """The largest difference between asked and actual tokens, over budgets, layers, images."""
        if q.get("statistic") != "max_abs_error":
            row = self._cost_row(q, "tokens_mean")
            return _exact(row["tokens_mean"])
        errors = [
            abs(row[name] - row["budget"])
            for row in self._rows_of(q)
            if row["method"] == q["method"]
            for name in ("tokens_mean", "tokens_after")
        ]
        for record in select(self.scored.records, method=q["method"]):
            tokens, asked = record["tokens"], record["request"]["budget"]
            ends = [x for pair in tokens.get("spread") or [] for x in pair]
            errors += [abs(x - asked) for x in (*tokens["per_layer"], *ends)]
        if not errors:
            raise MissingEvidence(f"no record of {q['method']}{_wanted(q)}")
        return _exact(max(errors))

    def _rows_of(self, q: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The cost rows of the claim's model (default: that of the paper's first table)."""
        if self.scale == "pocket":
            return self.rows
        models = [model for table in self.paper.tables for model in table.models]
        name = q.get("model") or (models[0].name if models else None)
        names = {name, *(m.hub for m in models if m.name == name)}
        return [row for row in self.rows if row["model"] in names]

    def _base_row(self, q: Mapping[str, Any]) -> dict[str, Any]:
        found = [r for r in self._rows_of(q) if r["method"] == self.scored.baseline]
        if not found:
            raise MissingEvidence("no cost record of the untouched model")
        return found[-1]

    def _cost_row(self, q: Mapping[str, Any], needed: str) -> dict[str, Any]:
        total = self._base_row(q)["budget"]
        wanted = q.get("tokens")
        if wanted is None and "tokens_fraction" in q:
            wanted = round(Fraction(q["tokens_fraction"]) * total)
        found = [
            row
            for row in self._rows_of(q)
            if row["method"] == q["method"]
            and wanted in (None, row["budget"])
            and row.get(needed) is not None
            and all((row.get("hyper_parameters") or {}).get(k) == v for k, v in _hyper(q).items())
        ]
        if not found:
            raise MissingEvidence(f"no cost record of {q['method']}{_wanted(q)}")
        if len({row["budget"] for row in found}) > 1:
            raise MissingEvidence(f"{q['method']}{_wanted(q)} fits several budgets")
        return found[-1]

    # --- attention ----------------------------------------------------------------------------

    def _attention_concentration(self, q: Mapping[str, Any]) -> Measured:
        share = float(Fraction(q["patches_fraction"]))
        fitting = [
            r
            for r in self.attention
            if abs(float(r["patches_fraction"]) - share) < 1e-3 and q.get("by", "cls") == "cls"
        ]
        statistic = _ATTENTION.get(q.get("statistic", ""))
        if not fitting or statistic is None:
            raise MissingEvidence(f"no attention record with the top {share:.1%} of the patches")
        record = fitting[-1]
        mass = np.asarray(record["mass_per_layer"], dtype=float)
        if len(mass) < 2:
            raise MissingEvidence("an encoder of one layer has no depth")
        value = statistic(mass)
        images = int(record["images"])
        low, high = _attention_interval(record, statistic, value)
        of = "images" if record.get("mass_per_image") else "images, no interval"
        return Measured(value, low, high, images, of, "all layers are alike")

    # --- the paper's own analysis ---------------------------------------------------------------

    def _finding(self, q: Mapping[str, Any]) -> Measured:
        """A figure and its interval, at a dotted path in the newest record of an analysis."""
        found: Any = self._analysis(q["analysis"])
        for name in q["figure"].split("."):
            found = found.get(name) if isinstance(found, Mapping) else None
        if found is None:
            raise MissingEvidence(f"no record of the analysis holds {q['figure']}")
        value, low, high = (
            math.nan if found[k] is None else float(found[k]) for k in ("value", "low", "high")
        )
        return Measured(value, low, high, found["n"], "prompts", "there is no such token")

    def _last_layer_share(self, q: Mapping[str, Any]) -> Measured:
        """From the number of tokens per prompt and oracle exit."""
        source = self._analysis("depth")["sources"][q.get("source", "captions")]
        counts = np.asarray(source[q.get("statistic", "first_match")]["per_item"], dtype=float)
        layers = counts.shape[1]
        last = q.get("last_layers") or round(Fraction(q["last_layers_fraction"]) * layers)
        sums = np.stack([100 * counts[:, layers - last :].sum(1), counts.sum(1)], 1)
        return replace(_from(from_sums(share, sums)), of="prompts")

    def _attention_shift(self, q: Mapping[str, Any]) -> Measured:
        """Rank correlation of the attention that visual tokens get with their index."""
        return self._finding({"analysis": "attention", "figure": f"shift.{q['by']}"})

    def _rank_agreement(self, q: Mapping[str, Any]) -> Measured:
        """From Kendall's tau per prompt and pair of neighbouring layers, bootstrapped over prompts.

        The least of the pairs' means, without the first `skip_first` pairs.
        """
        if q.get("statistic") != "min_over_layers":
            raise MissingEvidence(f"no record of {q.get('statistic')} of the rankings")
        tau = np.asarray(self._analysis("ranking")["neighbours"], dtype=float)
        tau = tau[:, q.get("skip_first", 0) :]
        if not tau.shape[1]:
            raise MissingEvidence("a decoder of so few layers has no such pair of neighbours")
        drawn = np.random.default_rng(0).integers(len(tau), size=(1000, len(tau)))
        low, high = np.quantile(tau[drawn].mean(1).min(-1), [0.025, 0.975])
        return Measured(float(tau.mean(0).min()), float(low), float(high), len(tau), "prompts")

    def _analysis(self, name: str) -> Record:
        found = select(self.analyses, analysis=name)
        if not found:
            raise MissingEvidence(f"no record of the analysis '{name}'")
        return found[-1]


def _rank_correlation(mass: np.ndarray) -> float:
    """Spearman's with the layer number; NaN where all layers are alike."""
    if np.ptp(mass) == 0:
        return math.nan
    return float(spearmanr(mass, np.arange(len(mass))).statistic)


_ATTENTION: dict[str, Callable[[np.ndarray], float]] = {
    "rank_correlation_with_depth": _rank_correlation,
    "argmax_layer_from_end": lambda m: float(len(m) - int(np.argmax(m))),
    "last_minus_second_last": lambda m: float(m[-1] - m[-2]),
}


def _attention_interval(
    record: Record, statistic: Callable[[np.ndarray], float], value: float
) -> tuple[float, float]:
    """Bootstrap over pictures where the record has them apart; otherwise the mean alone."""
    per_image = record.get("mass_per_image")
    if not per_image:
        return value, value
    masses = np.asarray(per_image, dtype=float)
    rng = np.random.default_rng(0)
    draws = rng.integers(len(masses), size=(1000, len(masses)))
    values = [statistic(masses[drawn].mean(0)) for drawn in draws]
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def _from(found: Estimate) -> Measured:
    n = found.n_questions
    return Measured(found.value, found.low, found.high, n, "questions", found.reason)


def _exact(value: float) -> Measured:
    return Measured(float(value), float(value), float(value))


def _apart(a: Measured, b: Measured) -> Measured:
    """a minus b from their intervals alone: wider than a paired interval, so never too sure."""
    n = min((x.n for x in (a, b) if x.n is not None), default=None)
    low, high = a.low - b.high, a.high - b.low
    return Measured(a.value - b.value, low, high, n, a.of, a.reason or b.reason)


def _flops(row: Mapping[str, Any], part: str | None) -> float:
    if part is None:
        return float(row["flops"])
    names = [_FLOPS_PARTS[name.strip()] for name in part.split(" and ")]
    parts = {**row["flops_parts"], "visual": row.get("flops_visual", math.nan)}
    return float(sum(parts[name] for name in names))


def _hyper(q: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in q.items() if k not in _SELECTORS}


def _wanted(q: Mapping[str, Any]) -> str:
    """The rest of a quantity, for a sentence about what is missing."""
    parts = [
        f"{k.replace('_', ' ')} {q[k]}"
        for k in ("tokens_fraction", "tokens", "mean_keep_rate", "model")
        if k in q
    ]
    parts += [f"{k} {v}" for k, v in _hyper(q).items()]
    return f" ({', '.join(parts)})" if parts else ""
