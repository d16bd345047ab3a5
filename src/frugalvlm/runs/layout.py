"""From a paper's table layout to what is run: a method and a budget for every row."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm.errors import FrugalError
from frugalvlm.hosts import host_for
from frugalvlm.methods import METHODS, VARIANTS, Method, method_class
from frugalvlm.methods.schedules import at_mean
from frugalvlm.methods.trained import LearntError
from frugalvlm.papers import Budget, Paper, Row, Table
from frugalvlm.papers.classes import suggestion
from frugalvlm.paths import command
from frugalvlm.runs.guides import with_guide, with_learnt
from frugalvlm.runs.options import Options
from frugalvlm.views import BudgetError, Shape, UnsupportedError


class ScaleError(FrugalError, ValueError):
    """A scale or a paper that cannot be reproduced here; the message says what can."""


def pocket_table(paper: Paper) -> Table:
    """The paper's first table with a pocket counterpart.

    Raises:
        ScaleError: when there is none; the message lists the papers that have one.
    """
    if paper.pocket_table is not None:
        return paper.pocket_table
    raise ScaleError(
        f"The tables of '{paper.key}' are not reproduced at the pocket scale yet; "
        f"`{command('papers')}` shows which papers are."
    )


def check_methods(table: Table) -> None:
    """Refuse, before anything is run, a layout with a method that the kit does not know.

    Raises:
        ScaleError: names the row and what to do.
    """
    known = {**METHODS, **VARIANTS}
    for row in table.rows:
        if row.method not in known:
            raise ScaleError(
                f"Row '{row.method}' of layout '{table.id}' is none of the kit's methods"
                f"{suggestion(row.method, known)}: correct it in the paper's YAML file, or add the "
                f"method with `{command(f'new --method {row.method}')}`."
            )


def rows_of(table: Table, options: Options, patches: int | None = None) -> list[tuple[str, int]]:
    """Method and budget of every row: the baseline first, then budget by budget.

    Args:
        table: the layout.
        options: say how many of its budgets to run.
        patches: per crop of the model, to which budgets are scaled; None: the pocket model's.
    """
    return [(line.row.method, line.tokens) for line in _lines(table, options, patches)]


@dataclass(frozen=True)
class _Line:
    """A row at a budget, and what that means here, per crop."""

    row: Row
    budget: Budget | None
    tokens: int


def _lines(table: Table, options: Options, patches: int | None) -> list[_Line]:
    total = table.model.pocket_tokens if patches is None else patches
    if total is None or table.model.pocket_tokens is None:
        raise ScaleError(f"Table '{table.id}' has no pocket budgets.")
    scaled = {id(b): table.model.kept(b, total) for b in table.budgets}
    asked = [b for b in table.budgets if scaled[id(b)] is not None][: options.budgets]
    lines = []
    for row, budget in table.lines():
        if budget is None:
            lines.append(_Line(row, None, 0 if row.once == "none" else total))
        elif budget in asked:
            lines.append(_Line(row, budget, scaled[id(budget)] or 0))
    return lines


def plan_of(
    table: Table, options: Options, model: PreTrainedModel, processor: ProcessorMixin
) -> list[tuple[Method, int]]:
    """Method and budget of every row, for a model; with a small model where a method needs one.

    Raises:
        BudgetError, UnsupportedError: of the first row that the model cannot serve.
    """
    plan, skipped = possible_plan(table, options, model, processor)
    for row in skipped:
        raise row.error
    return plan


@dataclass(frozen=True)
class Skipped:
    """A row that a model cannot serve.

    Attributes:
        method: its key.
        budget: visual tokens per crop that were asked for.
        error: says why.
    """

    method: str
    budget: int
    error: FrugalError

    @property
    def reason(self) -> str:
        """The sentence."""
        return str(self.error)


def possible_plan(
    table: Table, options: Options, model: PreTrainedModel, processor: ProcessorMixin
) -> tuple[list[tuple[Method, int]], list[Skipped]]:
    """The rows of a table that a model can serve, and the others; nothing is run."""
    check_methods(table)
    shape = host_for(model).shape
    plan: list[tuple[Method, int]] = []
    skipped: list[Skipped] = []
    for line in _lines(table, options, shape.patches):
        try:
            method = planned(table, line.row, line.budget, line.tokens, shape)
            method.check(shape)
            plan.append((with_learnt(method, options.model), line.tokens))
        except (BudgetError, UnsupportedError, LearntError) as error:
            skipped.append(Skipped(line.row.method, line.tokens, error))
    return with_guide(plan, options, processor), skipped


def planned(table: Table, row: Row, budget: Budget | None, tokens: int, shape: Shape) -> Method:
    """A row's method at a budget of its table: the method's own, or a mean over decoder layers.

    Args:
        table: the layout; its budgets may be means.
        row: of it; may have parameters of its own.
        budget: of one of its models; None: of a row above all blocks.
        tokens: what the budget means here, per crop.
        shape: of the model.
    """
    if row.once is not None:  # its budget says nothing
        return budgeted(row.method, None, shape.patches)
    if table.mean_budgets:
        kind = method_class(row.method)
        method = at_mean(kind, tokens, shape.patches, shape.decoder_layers)
    else:
        method = budgeted(row.method, tokens, shape.patches)
    if not row.values or budget is None:
        return method
    place = [b for model in table.models for b in model.budgets].index(budget)
    own = {name: values[place] for name, values in row.values.items()}
    if "kept_tokens" in own:
        own["kept_tokens"] = max(1, round(own["kept_tokens"] * shape.patches))
    return replace(method, **own)


def budgeted(key: str, budget: int | None, total: int) -> Method:
    """A method at a budget; None keeps everything."""
    cls = method_class(key)
    return cls.for_budget(total if budget is None else budget, total)
