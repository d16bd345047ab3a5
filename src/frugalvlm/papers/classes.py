"""What the description of a paper holds: the fields of `data/papers/KEY.yaml`, one class a part.

This is the one place that says so. Files are read against these classes, what does not fit them is
refused, and `docs/papers_format.md` is printed from the docstrings here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from frugalvlm.errors import FrugalError

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "COLUMNS",
    "EQUALS",
    "FIGURE",
    "KINDS",
    "ONCE",
    "ORIGINS",
    "QUANTITY_KINDS",
    "RELATIONS",
    "SCALES",
    "STATES",
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
    "Unverified",
    "suggestion",
]

SCALES = ("pocket", "blueprint", "full")
ONCE = ("all", "none")  # what rows without a budget ask for
KINDS = ("encoder reducer", "layer reducer", "depth policy", "training method")
# Of `data/papers/KEY.csv`: one reported number a line.
FIGURE: Mapping[str, str] = {
    "paper": "its key",
    "table": "table or figure of the paper, as layouts and claims call it",
    "model": "as layouts call it",
    "method": "as the paper calls it",
    "setting": "what else distinguishes this number from its neighbours; - for nothing",
    "visual_tokens": "per image; empty where there is no such count",
    "benchmark": "as the paper calls it",
    "metric": "of the benchmark, or the quantity",
    "value": "the printed number",
    "unit": "of the number",
    "source": "where exactly it was read",
    "verified": "true when it was read in the paper, a transcription of its table, or what its "
    "authors published; false when somebody else reports it, when it was measured off a drawing, "
    "or when its model, setting or label had to be inferred",
}
COLUMNS = tuple(FIGURE)
RELATIONS = (">", ">=", "<", "<=", "==", "~")  # see `Claim`
# Who makes a claim. Verdicts of each are counted apart.
ORIGINS: Mapping[str, str] = {
    "paper": "the paper",
    "kit": "this kit: a control that the paper does not have",
    "identity": "nobody: true by construction, so it tests the kit's code and not the paper",
}
# By what a pair of methods is alike, so that a difference between them is one of choosing tokens.
EQUALS: Mapping[str, str] = {
    "tokens kept": "what is asked for and left at the end",
    "mean tokens": "visual tokens, averaged over decoder layers",
    "FLOPs": "of the whole prefill",
    "nothing": "nothing; the claim says what is compared",
}

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
    "memory_ratio": "peak memory with the method / of the untouched model",
    "largest_rise": "largest step upwards in a list of the paper's own analysis",
    "finding": "a figure of the paper's own analysis, by its place in the record",
}
_ABOUT = {
    "accuracy": ("retention", "score"),
    "time": ("prefill_speedup",),
    "count": ("flops_ratio", "kv_ratio", "token_count", "mean_keep_rate", "memory_ratio"),
}

# "published": the results lie in results/; "runnable": `invoke reproduce` computes them.
STATES = ("planned", "published", "runnable")
_T = TypeVar("_T")


class AmbiguousFigureError(FrugalError, ValueError):
    """More than one reported figure fits the question."""


class _Described:
    """A part of a description: no field but its own, no number that is none."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}


@dataclass(frozen=True)
class Code(_Described):
    """The authors' released code.

    Attributes:
        url: its address.
        commit: the one that was read.
        licence: of the code.
        note: what a reader should know of it.
    """

    url: str
    commit: str | None = None
    licence: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Unverified(_Described):
    """Figures of the CSV that were not read in the paper itself.

    Attributes:
        table: their table, as the CSV calls it.
        figures: how many of its rows are not verified.
        why: where they come from instead.
    """

    table: str
    figures: int
    why: str


@dataclass(frozen=True)
class Anomaly(_Described):
    """A printed number that contradicts other printed numbers.

    Attributes:
        where: place in the paper.
        note: what is wrong with it.
        select: columns of the CSV and their values, which together name one row.
        printed: the value of that row.
        recomputed: what the paper's own cells give.
    """

    where: str
    note: str
    select: Mapping[str, Any] = field(default_factory=dict)
    printed: float | None = None
    recomputed: float | None = None


@dataclass(frozen=True)
class Average(_Described):
    """How a table's printed average is made: mean of cells relative to a baseline row, in %.

    Attributes:
        table: as the CSV calls it.
        benchmark: the average's own name there.
        baseline: columns and values that select the baseline row; missing ones are those of the
            row at hand.
        exclude: benchmarks that the average leaves out.
    """

    table: str
    benchmark: str
    baseline: Mapping[str, Any]
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim(_Described):
    """One testable statement of a paper, or one that this kit adds.

    Its relation says what kind of test it is:

    - `>=` and `<=` are levels ("keeps 94 %"): equivalence from one side, within `margin`. The
      threshold is the paper's number on the columns of our own table.
    - `>` and `<` are comparisons ("is better than"): the threshold is where both sides are alike,
      and the distance of the paper's number from it is the paper's effect.
    - `==` and `~` are numbers, met within `margin`.

    Attributes:
        id: its name, once in a paper.
        text: the statement in our own words.
        where: place in the paper: table, figure or section.
        scales: at which it can be tested: pocket, blueprint, full.
        why_not: for every other scale the reason; `others` stands for all that are not named.
        quantity: what is measured, by `kind` (below) and what that kind asks for: `method`,
            `tokens_fraction`, `over`, and for a difference `of`, `a`, `b` and `equal` (below).
            null: nothing here can measure it.
        relation: >, >=, <, <=, == or ~.
        threshold: what the quantity is compared with, in `unit`.
        margin: how far off still counts.
        why_margin: the reason for a margin.
        reported: the paper's number.
        reported_on_columns: the same average over the benchmarks of our layout only.
        unit: of quantity, threshold and reported numbers.
        origin: paper, kit or identity (below).
        not_comparable: why what is measured here is another thing than what the paper states; it is
            shown and decides nothing.
        written: when quantity, relation and threshold were last changed ("2026-11-21T16:16Z"); a
            record that is older was known by then.
        note: what a reader should know.
    """

    id: str
    text: str
    where: str
    scales: tuple[str, ...]
    why_not: Mapping[str, str] = field(default_factory=dict)
    quantity: Mapping[str, Any] | None = None
    relation: str | None = None
    threshold: float | None = None
    margin: float = 0.0
    why_margin: str = ""
    reported: float | None = None
    reported_on_columns: float | None = None
    unit: str = ""
    origin: str = "paper"
    not_comparable: str = ""
    written: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        why_not = dict(self.why_not)
        others = why_not.pop("others", None)
        if others is not None:
            named = {*self.scales, *why_not}
            why_not |= {scale: others for scale in SCALES if scale not in named}
            object.__setattr__(self, "why_not", why_not)

    @property
    def effect(self) -> float | None:
        """How far the paper's own number lies from where both sides of a comparison are alike.

        On our columns where that is known; None for other claims, and where it prints no number.
        """
        own = self.reported if self.reported_on_columns is None else self.reported_on_columns
        if self.relation not in (">", "<") or self.threshold is None or own is None:
            return None
        return own - self.threshold

    @property
    def about(self) -> str:
        """What is tested: accuracy, time, count or finding."""
        quantity = self.quantity or {}
        kind = quantity.get("kind")
        while kind == "difference":
            kind = quantity.get("of", "retention")
            quantity = quantity.get("each", {})
        return next((name for name, kinds in _ABOUT.items() if kind in kinds), "finding")


@dataclass(frozen=True)
class Budget(_Described):
    """One token budget of a layout.

    Attributes:
        paper_tokens: the paper's visual tokens per image.
        setting: of the CSV's rows, where they have no token count but, say, a mean retention.
        pocket_tokens: visual tokens of the pocket model that keep the same share.
        per_crop: the paper's tokens per crop, where an image has several.
        split: parts of the budget by name, where the method has several.
    """

    paper_tokens: int
    setting: str = ""
    pocket_tokens: int | None = None
    per_crop: int | None = None
    split: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class LayoutModel(_Described):
    """A model of a layout.

    Attributes:
        name: as the CSV calls it.
        hub: its id on the Hugging Face Hub.
        revision: the commit of it; null: the newest one when it is fetched.
        tokens: visual tokens per image, of all crops together.
        budgets: one block of the table each, the largest first.
        crops: per image.
        pocket_tokens: visual tokens of the pocket counterpart.
    """

    name: str
    hub: str
    tokens: int
    budgets: tuple[Budget, ...]
    crops: int = 1
    pocket_tokens: int | None = None
    revision: str | None = None

    def fraction(self, budget: Budget) -> Fraction:
        """The share of the visual tokens that ``budget`` keeps."""
        return Fraction(budget.paper_tokens, self.tokens)

    def at(self, budget: Budget, patches: int) -> int:
        """What ``budget`` means, per crop, to a checkpoint with so many patches per crop.

        The paper's count at the paper's own patches, and the same share at any other number.
        """
        own, whole = budget.per_crop or budget.paper_tokens, self.tokens // self.crops
        return own if patches == whole else max(1, round(Fraction(own, whole) * patches))

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
class Row(_Described):
    """A method of a layout.

    Attributes:
        method: its key in this kit (`frugalvlm.methods.METHODS`).
        label: what the table calls it.
        paper_method: its name in the CSV; without one no paper printed a number for it.
        paper: key of another paper whose CSV that is.
        paper_table: table of that CSV, where it is not the layout's.
        benchmarks: from the layout's benchmark names to those of that CSV; null: not comparable.
        settings: of the CSV, one for each budget, where it tells this row by them and not by
            tokens; null: none printed.
        once: all or none, the visual tokens asked for, of a row that stands once and not in every
            block.
        at: the budgets, by their paper_tokens, in whose blocks it stands; none: in all.
        values: of the method's own parameters, one for each budget of the layout, where they do
            not follow from it; of `kept_tokens` shares of all visual tokens.
        control: whether it stands among the controls; kinds that are controls always do.
        note: what a reader should know.
    """

    method: str
    label: str
    paper_method: str | None = None
    paper: str | None = None
    paper_table: str | None = None
    benchmarks: Mapping[str, str | None] = field(default_factory=dict)
    settings: tuple[str | None, ...] = ()
    once: str | None = None
    at: tuple[int, ...] = ()
    values: Mapping[str, tuple[int | float, ...]] = field(default_factory=dict)
    control: bool = False
    note: str = ""

    def stands_at(self, budget: Budget | None) -> bool:
        """Whether the row stands in a budget's block; None: above all blocks."""
        if budget is None or self.once is not None:
            return budget is None and self.once is not None
        return not self.at or budget.paper_tokens in self.at


@dataclass(frozen=True)
class Column(_Described):
    """A column of a layout.

    Attributes:
        id: our benchmark (`pocket-gqa`) or quantity.
        label: what the table calls it.
        paper_benchmark: what the CSV calls the benchmark.
        metric: of the CSV, where a benchmark has several.
        unit: of the numbers.
    """

    id: str
    label: str
    paper_benchmark: str | None = None
    metric: str | None = None
    unit: str = ""


@dataclass(frozen=True)
class Table(_Described):
    """A table in the paper's own layout: rows methods, columns benchmarks, one block a budget.

    Attributes:
        id: its name, once in a paper. `blueprint` is the one that the blueprint scale counts.
        title: above the table.
        where: place in the paper.
        scales: at which it is rebuilt. The first one with `pocket` is the paper's main table.
        baseline: method of the row that all others are compared with.
        models: with their budgets; one, but for tables of costs.
        rows: methods.
        columns: benchmarks, or quantities.
        paper_table: the paper's table as the CSV calls it; without it no printed number is shown.
        note: below the table.
        mean_budgets: whether our tokens are a mean over decoder layers, the same for every method.
        pocket_model: embedded model of the pocket counterpart, where it is not the main table's.
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

    def lines(self, model: LayoutModel | None = None) -> tuple[tuple[Row, Budget | None], ...]:
        """All rows with their budgets, as they stand below each other.

        The baseline and the rows that stand once, then budget by budget all others.

        Args:
            model: whose budgets; it may be left out where there is just one.
        """
        base = [row for row in self.rows if row.method == self.baseline]
        others = [row for row in self.rows if row.method != self.baseline]
        budgets = (self.model if model is None else model).budgets
        return (
            *((row, None) for row in base),
            *((row, b) for b in (None, *budgets) for row in others if row.stands_at(b)),
        )


def _alone(key: str) -> Paper | None:
    """What a paper that was not read from a folder knows of others."""
    return None


# What whoever reads a paper adds to it; no field of the file.
_ADDED = {"added": True}


@dataclass(frozen=True)
class Paper(_Described):
    """One surveyed paper; `figures` and `reported` give its published numbers.

    Attributes:
        key: its one name everywhere: files, method, notebook, results.
        title: of the paper.
        authors: in the paper's order.
        arxiv: its number, in quotes, for example "2412.04467"; papers are listed in this order.
        arxiv_version: the version that was read; null where that is not known.
        venue: where it was published, or preprint.
        year: of the first version.
        code: the released code; null where there is none.
        licence: of what was released.
        summary: idea and result in 300 to 1000 characters of our own words.
        kind: one or several of the kinds below.
        status: for each scale planned, runnable (`invoke reproduce` computes it) or published
            (results lie in results/).
        evidence: what was read, and what was only read about.
        claims: statements that records can test.
        unverified: how many figures of which table of the CSV are not verified, and why.
        anomalies: printed numbers that contradict others.
        averages: how the paper's averages are made.
        tables: layouts of the tables that are rebuilt.
        labels: names of methods that stand in no layout, or under a name that says too little.
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
    folder: Path = field(default=Path(), repr=False, compare=False, metadata=_ADDED)
    other: Callable[[str], Paper | None] = field(
        default=_alone, repr=False, compare=False, metadata=_ADDED
    )

    @property
    def url(self) -> str:
        """The paper's arXiv page, with its version where the version read is known."""
        version = "" if self.arxiv_version is None else f"v{self.arxiv_version}"
        return f"https://arxiv.org/abs/{self.arxiv}{version}"

    @cached_property
    def _figures(self) -> pd.DataFrame:
        import pandas as pd  # late: who asks for no figure need not wait for it

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
                raise ValueError(f"{self.key} has no {column} {value!r}{suggestion(value, known)}")
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
        """The number printed beside a cell of a layout, or None when no (readable) paper has one.

        ``budget`` may be left out for the baseline row only; ``model`` when there is just one.
        """
        model = model or table.model
        if row.method != table.baseline and budget is None and row.once is None:
            raise ValueError(f"row {row.method} of layout {table.id} needs a budget")
        source = self if row.paper is None else self.other(row.paper)
        where = row.paper_table or table.paper_table
        benchmark = row.benchmarks.get(column.paper_benchmark or "", column.paper_benchmark)
        if source is None or row.paper_method is None or where is None or benchmark is None:
            return None
        is_baseline = row.method == table.baseline or budget is None
        place = model.budgets.index(budget) if budget is not None else 0
        own = row.settings[place] if row.settings and budget is not None else None
        if row.settings and own is None:
            return None
        by_setting = own is not None or any(b.setting for b in model.budgets)
        tokens = model.tokens if is_baseline or budget is None else budget.paper_tokens
        tokens = 0 if row.once == "none" else tokens
        return source.reported(
            table=where,
            model=model.name,
            method=row.paper_method,
            tokens=None if by_setting else tokens,
            benchmark=benchmark,
            metric=column.metric,
            setting=(own or budget.setting) if by_setting and budget and not is_baseline else None,
        )


def _named(items: tuple[_T, ...], wanted: str, complaint: str) -> _T:
    by_id = {item.id: item for item in items}  # type: ignore[attr-defined]
    if wanted not in by_id:
        raise ValueError(f"{complaint} {wanted!r}{suggestion(wanted, by_id)}; it has {list(by_id)}")
    return by_id[wanted]


def suggestion(wanted: object, known: Iterable[object]) -> str:
    """What may have been meant, in brackets and with a space in front; nothing when all is far."""
    lower = {str(name).lower(): str(name) for name in known}
    close = difflib.get_close_matches(str(wanted).lower(), lower, n=1)
    return f" (did you mean {lower[close[0]]!r}?)" if close else ""


def _ambiguity(key: str, frame: pd.DataFrame) -> str:
    columns = ["table", "model", "method", "visual_tokens", "benchmark", "metric", "setting"]
    varying = [c for c in columns if len(frame[c].drop_duplicates()) > 1]
    choices = "; ".join(f"{c}: {', '.join(map(str, frame[c].unique()[:6]))}" for c in varying)
    return f"{len(frame)} figures of {key} fit: say which ({choices})"
