"""The surveyed papers as data: citation, reported figures, claims, table layouts.

``data/papers/KEY.yaml`` describes a paper and ``data/papers/KEY.csv`` holds its reported figures,
one number per row with the place it was taken from. A figure is ``verified`` when the number and
the setting beside it were read in the paper itself, in a transcription of its table, or in what
its authors published (poster, repository, project page). It is not verified when somebody else
reports it (reading notes, reviews, re-runs, re-quotes), when it was measured off a drawing, or
when its model, setting or label had to be inferred. Each YAML file names its unverified tables.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import yaml

from frugalvlm.errors import FrugalError
from frugalvlm.paths import data_dir

__all__ = [
    "COLUMNS",
    "KEYS",
    "KINDS",
    "QUANTITY_KINDS",
    "RELATIONS",
    "SCALES",
    "AmbiguousFigureError",
    "Anomaly",
    "Average",
    "Budget",
    "Claim",
    "Code",
    "Column",
    "LayoutModel",
    "Paper",
    "Row",
    "Table",
    "UnknownPaperError",
    "Unverified",
    "all_papers",
    "load_paper",
]

KEYS = (
    "dyvte",
    "atp_llava",
    "gsearch",
    "early_exit",
    "vlsi",
    "fastervlm",
    "cegi",
    "aim",
    "sgl",
    "safe",
    "flashsloth",
    "visionzip",
    "nvila",
)
SCALES = ("pocket", "blueprint", "full")
KINDS = ("encoder reducer", "layer reducer", "depth policy", "training method")
COLUMNS = (
    "paper",
    "table",
    "model",
    "method",
    "setting",
    "visual_tokens",
    "benchmark",
    "metric",
    "value",
    "unit",
    "source",
    "verified",
)
RELATIONS = (">", ">=", "<", "<=", "==", "~")  # "~": within the claim's tolerance

# What a claim may measure. The verdict code implements these; the data may use no other.
QUANTITY_KINDS: Mapping[str, str] = {
    "retention": "score with the method / score of the untouched model, in %, paired questions",
    "score": "the benchmark's own metric, in its own unit",
    "difference": "quantity `of` (default retention) of side a minus that of side b",
    "prefill_speedup": "prefill time of the untouched model / prefill time with the method",
    "flops_ratio": "prefill FLOPs of the untouched model / prefill FLOPs with the method",
    "kv_ratio": "visual KV-cache bytes with the method / of the untouched model",
    "token_count": "visual tokens handed to the language model, per image",
    "mean_keep_rate": "share of the visual tokens present, averaged over decoder layers",
    "attention_concentration": "share of CLS attention on the top-k patches, per encoder layer",
    "attention_shift": "rank correlation of the attention a visual token gets with its index",
    "rank_agreement": "Kendall's tau of the visual-token rankings of neighbouring layers",
    "last_layer_share": "share of generated tokens whose oracle exit is one of the last layers",
    "finding": "a figure of the paper's own analysis, by its place in the record",
}

# "reproduced": the results are published in results/; "runnable": `invoke reproduce` computes them.
_STATES = {"reproduced", "runnable", "planned"}
_T = TypeVar("_T")


class UnknownPaperError(FrugalError, ValueError):
    """The key names none of the surveyed papers."""


class AmbiguousFigureError(FrugalError, ValueError):
    """More than one reported figure fits the question."""


@dataclass(frozen=True)
class Code:
    """The authors' released code: address, the commit that was read, its licence."""

    url: str
    commit: str | None = None
    licence: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Unverified:
    """Which rows of a CSV table are not verified (``figures`` of them), and why."""

    table: str
    figures: int
    why: str


@dataclass(frozen=True)
class Anomaly:
    """A printed number that contradicts other printed numbers.

    With ``select`` (CSV columns and values) it names one row; ``printed`` is that row's value and
    ``recomputed`` what the paper's own cells give.
    """

    where: str
    note: str
    select: Mapping[str, Any] = field(default_factory=dict)
    printed: float | None = None
    recomputed: float | None = None


@dataclass(frozen=True)
class Average:
    """How a table's printed average is made: mean of cells relative to a baseline row, in %.

    ``benchmark`` is the average's own name in the CSV, ``baseline`` selects the baseline row
    (missing columns are those of the row at hand), ``exclude`` names benchmarks left out.
    """

    table: str
    benchmark: str
    baseline: Mapping[str, Any]
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """One testable statement of a paper (or, with ``origin`` kit, one this kit adds).

    ``quantity`` is an expression over records (see QUANTITY_KINDS). The claim is reproduced when
    the measured quantity stands in ``relation`` to ``threshold``; it has the same direction when
    only ``weaker`` (a relation and a threshold of its own) holds. ``reported`` is the paper's
    number; ``reported_on_columns`` is the same average over the benchmarks of our layout only.
    Every scale is either in ``scales`` (testable there) or has a reason in ``why_not``.
    """

    id: str
    text: str
    where: str
    scales: tuple[str, ...]
    why_not: Mapping[str, str] = field(default_factory=dict)
    quantity: Mapping[str, Any] | None = None
    relation: str | None = None
    threshold: float | None = None
    tolerance: float = 0.0
    weaker: Mapping[str, Any] | None = None
    reported: float | None = None
    reported_on_columns: float | None = None
    unit: str = ""
    origin: str = "paper"
    note: str = ""


@dataclass(frozen=True)
class Budget:
    """One token budget of a layout: the paper's visual tokens per image and ours.

    ``setting``: the CSV's column of that name, where the paper's rows have no token count but, for
    example, a mean retention.
    """

    paper_tokens: int
    setting: str = ""
    pocket_tokens: int | None = None
    per_crop: int | None = None
    split: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class LayoutModel:
    """A model of a layout: ``tokens`` visual tokens per image, in ``crops`` crops."""

    name: str
    hub: str
    tokens: int
    budgets: tuple[Budget, ...]
    crops: int = 1
    pocket_tokens: int | None = None

    def fraction(self, budget: Budget) -> Fraction:
        """The share of the visual tokens that ``budget`` keeps."""
        return Fraction(budget.paper_tokens, self.tokens)

    def kept(self, budget: Budget, patches: int) -> int | None:
        """What ``budget`` means, per crop, to a small model with so many patches per crop.

        The pocket count at the pocket model's own patches. At any other number the paper's share;
        where the pocket count is another share (budgets that are means over a decoder of another
        depth), that one. None: the budget has no pocket counterpart.
        """
        ours, whole = budget.pocket_tokens, self.pocket_tokens
        if ours is None or whole is None:
            return None
        if patches == whole:
            return ours
        share = self.fraction(budget)
        if abs(share * whole - ours) >= 1:
            share = Fraction(ours, whole)
        return max(1, round(share * patches))


@dataclass(frozen=True)
class Row:
    """A method of a layout; ``paper_method`` is its name in the CSV of paper ``paper``.

    ``paper_method`` None: no paper printed a number for it. ``benchmarks`` maps the layout's
    benchmark names to those of that CSV; None there means the two are not comparable.
    """

    method: str
    label: str
    paper_method: str | None = None
    paper: str | None = None
    paper_table: str | None = None
    benchmarks: Mapping[str, str | None] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Column:
    """A column of a layout: our benchmark or quantity, and what the paper calls it."""

    id: str
    label: str
    paper_benchmark: str | None = None
    metric: str | None = None
    unit: str = ""


@dataclass(frozen=True)
class Table:
    """A table in the paper's own layout: rows methods, columns benchmarks, one block a budget.

    With ``mean_budgets`` our tokens are a mean over decoder layers, the same for every method.
    ``pocket_model``: embedded model of the pocket counterpart, where it is not the main table's.
    """

    id: str
    title: str
    where: str
    scales: tuple[str, ...]
    baseline: str
    models: tuple[LayoutModel, ...]
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    paper_table: str | None = None
    note: str = ""
    mean_budgets: bool = False
    pocket_model: str | None = None

    @property
    def model(self) -> LayoutModel:
        """The only model of the layout; ValueError when there are several."""
        if len(self.models) != 1:
            raise ValueError(f"layout {self.id} has {len(self.models)} models: use .models")
        return self.models[0]

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The budgets of the only model."""
        return self.model.budgets


@dataclass(frozen=True)
class Paper:
    """One surveyed paper; ``figures`` and ``reported`` give its published numbers.

    ``labels``: names of methods that stand in no layout, or under a name that says too little.
    """

    key: str
    title: str
    authors: tuple[str, ...]
    arxiv: str
    arxiv_version: int | None
    venue: str
    year: int
    code: Code | None
    licence: str
    summary: str
    kind: tuple[str, ...]
    status: Mapping[str, str]
    evidence: str
    claims: tuple[Claim, ...]
    unverified: tuple[Unverified, ...] = ()
    anomalies: tuple[Anomaly, ...] = ()
    averages: tuple[Average, ...] = ()
    tables: tuple[Table, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    folder: Path = field(default=Path(), repr=False, compare=False)

    @property
    def url(self) -> str:
        """The paper's arXiv page, with its version where the version read is known."""
        version = "" if self.arxiv_version is None else f"v{self.arxiv_version}"
        return f"https://arxiv.org/abs/{self.arxiv}{version}"

    @cached_property
    def _figures(self) -> pd.DataFrame:
        # keep_default_na off: "-" and "NA" are text here; only an empty token count is missing.
        return pd.read_csv(
            self.folder / f"{self.key}.csv",
            keep_default_na=False,
            na_values={"visual_tokens": [""]},
            dtype={"visual_tokens": float, "value": float, "verified": bool},
        )

    @property
    def figures(self) -> pd.DataFrame:
        """The reported figures, one per row (columns COLUMNS); a copy, read when first asked."""
        return self._figures.copy()

    def claim(self, claim_id: str) -> Claim:
        """The claim with this id."""
        return _named(self.claims, claim_id, f"{self.key} has no claim")

    @property
    def pocket_table(self) -> Table | None:
        """The main table of the pocket scale: the first one with a counterpart there."""
        return next((table for table in self.tables if "pocket" in table.scales), None)

    def table(self, table_id: str) -> Table:
        """The layout with this id."""
        return _named(self.tables, table_id, f"{self.key} has no layout")

    def reported(
        self,
        *,
        table: str | None = None,
        model: str | None = None,
        method: str | None = None,
        tokens: float | None = None,
        benchmark: str | None = None,
        metric: str | None = None,
        setting: str | None = None,
    ) -> float | None:
        """The one reported figure that fits every given filter, or None when there is none.

        A table, model, benchmark or metric that occurs nowhere in the paper's figures is a
        ValueError (a misspelt name must not read as "not reported"); a method, token count or
        setting the paper does not have is None. Several matches raise AmbiguousFigureError.
        """
        asked = {"table": table, "model": model, "benchmark": benchmark, "metric": metric}
        frame = self._figures
        for column, value in asked.items():
            if value is not None and not (frame[column] == value).any():
                known = list(frame[column].unique())
                raise ValueError(f"{self.key} has no {column} {value!r}{_suggest(value, known)}")
        asked |= {"method": method}
        for column, value in asked.items():
            if value is not None:
                frame = frame[frame[column] == value]
        if setting is not None:  # details in brackets may be left out
            exact = frame["setting"] == setting
            frame = frame[exact if exact.any() else frame["setting"].str.startswith(f"{setting} (")]
        if tokens is not None:
            frame = frame[frame["visual_tokens"] == tokens]
        if len(frame) > 1:
            raise AmbiguousFigureError(_ambiguity(self.key, frame))
        return float(frame["value"].iloc[0]) if len(frame) else None

    def printed(
        self,
        table: Table,
        row: Row,
        column: Column,
        budget: Budget | None = None,
        model: LayoutModel | None = None,
    ) -> float | None:
        """The number printed beside a cell of a layout, or None when no paper has one.

        ``budget`` may be left out for the baseline row only; ``model`` when there is just one.
        """
        model = model or table.model
        if row.method != table.baseline and budget is None:
            raise ValueError(f"row {row.method} of layout {table.id} needs a budget")
        source = self if row.paper is None else load_paper(row.paper, folder=self.folder)
        where = row.paper_table or table.paper_table
        benchmark = row.benchmarks.get(column.paper_benchmark or "", column.paper_benchmark)
        if row.paper_method is None or where is None or benchmark is None:
            return None
        is_baseline = row.method == table.baseline or budget is None
        by_setting = any(b.setting for b in model.budgets)
        tokens = model.tokens if is_baseline or budget is None else budget.paper_tokens
        return source.reported(
            table=where,
            model=model.name,
            method=row.paper_method,
            tokens=None if by_setting else tokens,
            benchmark=benchmark,
            metric=column.metric,
            setting=budget.setting if by_setting and budget and not is_baseline else None,
        )


def load_paper(key: str, folder: Path | None = None) -> Paper:
    """Read one paper's description (``folder`` defaults to ``data/papers``).

    An unknown key raises UnknownPaperError; a description that breaks the format, ValueError.
    """
    if key not in KEYS:
        raise UnknownPaperError(
            f"unknown paper {key!r}{_suggest(key, KEYS)}; known: {', '.join(KEYS)}"
        )
    folder = data_dir() / "papers" if folder is None else folder
    path = folder / f"{key}.yaml"
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        paper = _paper(raw, folder)
        _check(paper)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if paper.key != key:
        raise ValueError(f"{path}: describes {paper.key!r}, not {key!r}")
    return paper


def all_papers() -> tuple[Paper, ...]:
    """All surveyed papers, in the order of KEYS."""
    return tuple(load_paper(key) for key in KEYS)


def _paper(raw: Mapping[str, Any], folder: Path) -> Paper:
    parts = dict(raw)
    code = parts.pop("code")
    return _build(
        Paper,
        parts
        | {
            "code": None if code is None else _build(Code, code),
            "claims": tuple(_claim(c) for c in parts["claims"]),
            "unverified": tuple(_build(Unverified, u) for u in parts.get("unverified", ())),
            "anomalies": tuple(_build(Anomaly, a) for a in parts.get("anomalies", ())),
            "averages": tuple(_build(Average, a) for a in parts.get("averages", ())),
            "tables": tuple(_table(t) for t in parts.get("tables", ())),
            "folder": folder,
        },
    )


def _claim(raw: Mapping[str, Any]) -> Claim:
    why_not = dict(raw.get("why_not", {}))
    others = why_not.pop("others", None)  # shorthand: one reason for every scale not named
    if others is not None:
        named = {*raw["scales"], *why_not}
        why_not |= {scale: others for scale in SCALES if scale not in named}
    return _build(Claim, {**raw, "why_not": why_not})


def _table(raw: Mapping[str, Any]) -> Table:
    models = tuple(
        _build(LayoutModel, {**m, "budgets": tuple(_build(Budget, b) for b in m["budgets"])})
        for m in raw["models"]
    )
    rows = tuple(_build(Row, r) for r in raw["rows"])
    columns = tuple(_build(Column, c) for c in raw["columns"])
    return _build(Table, {**raw, "models": models, "rows": rows, "columns": columns})


def _build(cls: type[_T], raw: Mapping[str, Any]) -> _T:
    """An instance of dataclass ``cls``; an unknown or missing field is an error that names it."""
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for name in raw:
        if name not in known:
            raise ValueError(f"{cls.__name__} has no field {name!r}{_suggest(name, known)}")
    frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    return cls(**frozen)


def _check(paper: Paper) -> None:
    _subset(paper.kind, KINDS, "kind")
    if set(paper.status) != set(SCALES) or not set(paper.status.values()) <= _STATES:
        raise ValueError(f"status must give one of {sorted(_STATES)} for each of {SCALES}")
    for claim in paper.claims:
        where = f"claim {claim.id}"
        _subset(claim.scales, SCALES, where)
        if sorted([*claim.scales, *claim.why_not]) != sorted(SCALES):
            raise ValueError(f"{where}: each scale needs to be in scales or, once, in why_not")
        if claim.origin not in ("paper", "kit"):
            raise ValueError(f"{where}: origin is paper or kit, not {claim.origin!r}")
        if claim.quantity is not None:
            _subset([claim.quantity["kind"]], QUANTITY_KINDS, where)
            _subset([claim.relation], RELATIONS, where)
            if claim.threshold is None:
                raise ValueError(f"{where}: a quantity needs a threshold")
    for table in paper.tables:
        _subset(table.scales, SCALES, f"layout {table.id}")
        if table.pocket_model and table is paper.pocket_table:
            raise ValueError(f"layout {table.id}: the main table must stand before it")
        if table.baseline not in [row.method for row in table.rows]:
            raise ValueError(f"layout {table.id}: its baseline is none of its rows")


def _subset(values: Any, allowed: Any, where: str) -> None:
    for value in values:
        if value not in allowed:
            raise ValueError(f"{where}: {value!r} is none of {', '.join(allowed)}")


def _named(items: tuple[_T, ...], wanted: str, complaint: str) -> _T:
    by_id = {item.id: item for item in items}  # type: ignore[attr-defined]
    if wanted not in by_id:
        raise ValueError(f"{complaint} {wanted!r}{_suggest(wanted, by_id)}; it has {list(by_id)}")
    return by_id[wanted]


def _suggest(wanted: str, known: Any) -> str:
    lower = {str(name).lower(): str(name) for name in known}
    close = difflib.get_close_matches(str(wanted).lower(), lower, n=1)
    return f" (did you mean {lower[close[0]]!r}?)" if close else ""


def _ambiguity(key: str, frame: pd.DataFrame) -> str:
    columns = ["table", "model", "method", "visual_tokens", "benchmark", "metric", "setting"]
    varying = [c for c in columns if len(frame[c].drop_duplicates()) > 1]
    choices = "; ".join(f"{c}: {', '.join(map(str, frame[c].unique()[:6]))}" for c in varying)
    return f"{len(frame)} figures of {key} fit: say which ({choices})"
