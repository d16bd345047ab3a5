"""From a paper's table layout to what is run: a method and a budget for every row."""

from __future__ import annotations

from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm.errors import FrugalError
from frugalvlm.hosts import host_for
from frugalvlm.methods import METHODS, VARIANTS, Method, method_class
from frugalvlm.methods.schedules import at_mean
from frugalvlm.papers import Paper, Table
from frugalvlm.papers.classes import suggestion
from frugalvlm.runs.guides import with_guide
from frugalvlm.runs.options import Options
from frugalvlm.views import Shape


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
        "`invoke papers` shows which papers are."
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
                f"method with `invoke new --method {row.method}`."
            )


def rows_of(table: Table, options: Options) -> list[tuple[str, int]]:
    """Method and budget of every row: the baseline first, then budget by budget."""
    tokens = table.model.pocket_tokens
    if tokens is None:
        raise ScaleError(f"Table '{table.id}' has no pocket budgets.")
    budgets = [b.pocket_tokens for b in table.budgets if b.pocket_tokens is not None]
    others = [row.method for row in table.rows if row.method != table.baseline]
    return [
        (table.baseline, tokens),
        *((method, budget) for budget in budgets[: options.budgets] for method in others),
    ]


def plan_of(
    table: Table, options: Options, model: PreTrainedModel, processor: ProcessorMixin
) -> list[tuple[Method, int]]:
    """Method and budget of every row, for a model; with a small model where a method needs one."""
    check_methods(table)
    shape = host_for(model).shape
    plan = [(planned(table, key, b, shape), b) for key, b in rows_of(table, options)]
    return with_guide(plan, options, processor)


def planned(table: Table, key: str, budget: int, shape: Shape) -> Method:
    """A row's method at a budget of its table: the method's own, or a mean over decoder layers."""
    if table.mean_budgets:
        return at_mean(method_class(key), budget, shape.patches, shape.decoder_layers)
    return budgeted(key, budget, shape.patches)


def budgeted(key: str, budget: int | None, total: int) -> Method:
    """A method at a budget; None keeps everything."""
    cls = method_class(key)
    return cls.for_budget(total if budget is None else budget, total)
