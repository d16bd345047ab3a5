"""Emission against gain: the CEGI of a fine-tuned model, break-even points, what savings cost.

    from frugalvlm import carbon

    result = carbon.cegi(base=61.0, tuned=74.0, spent=8.1e5, trainable_parameters=4_194_304)
    print(result)  # E, G and P beside the index

`cegi` takes numbers, scores per item, or two accuracy records. `break_even` says after how many
questions a training has paid for itself.
"""

from frugalvlm.carbon.break_even import (
    BreakEven,
    amortised,
    break_even,
    lost_per_saved,
    marginal,
)
from frugalvlm.carbon.figure import CarbonError, Figure, difference, figure_of, product_of
from frugalvlm.carbon.index import Cegi, cegi, lora_parameters, trainable_parameters
from frugalvlm.carbon.ranks import agreement, by_grid, by_parameters, greener, ranking
from frugalvlm.carbon.spent import Spent, spent_of

__all__ = [
    "BreakEven",
    "CarbonError",
    "Cegi",
    "Figure",
    "Spent",
    "agreement",
    "amortised",
    "break_even",
    "by_grid",
    "by_parameters",
    "cegi",
    "difference",
    "figure_of",
    "greener",
    "lora_parameters",
    "lost_per_saved",
    "marginal",
    "product_of",
    "ranking",
    "spent_of",
    "trainable_parameters",
]
