"""Energy of a window, and grams of CO2e from one stated grid factor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

COMPONENTS = ("gpu", "cpu", "ram")

#: The one factor behind every gram this kit prints. It is a convention, not the reader's grid.
GRID_FACTOR_G_PER_KWH = 475.0
GRID_FACTOR_SOURCE = (
    "world average of electricity generation, IEA Global Energy & CO2 Status Report 2019 "
    "(data year 2018), as shipped in codecarbon: carbon_intensity_per_source.json"
)


def carbon_g(joules: float, grid_factor_g_per_kwh: float = GRID_FACTOR_G_PER_KWH) -> float:
    """Grams of CO2 equivalent: joules / 3.6e6 x factor. Cooling overhead (PUE) is not added."""
    return joules / 3.6e6 * grid_factor_g_per_kwh


@dataclass(frozen=True)
class Energy:
    """Energy of one window.

    Attributes:
        joules: per component ("gpu", "cpu", "ram"); None where nothing was read.
        methods: per component: gpu counter, power_integral or none; cpu and ram rapl or none;
            tdp_load_model and constant_model when modelled.
        seconds: length of the window.
        modelled: True if computed from a model of the machine and not read from hardware.
        check_joules: the same component measured a second way (GPU: power integral), if possible.
    """

    joules: Mapping[str, float | None]
    methods: Mapping[str, str]
    seconds: float
    modelled: bool = False
    check_joules: Mapping[str, float] | None = None

    @property
    def total_joules(self) -> float | None:
        """Sum of the components that were read; None if there are none.

        Compare totals only between runs with equal `methods`.
        """
        known = [j for j in self.joules.values() if j is not None]
        return sum(known) if known else None

    @property
    def rankable(self) -> bool:
        """Whether it may enter a ranking: measured, not modelled."""
        return not self.modelled and self.total_joules is not None

    @property
    def carbon_g(self) -> float | None:
        """Grams of CO2e of the total, by the kit's grid factor."""
        return None if self.total_joules is None else carbon_g(self.total_joules)

    @property
    def check_gap(self) -> float | None:
        """Largest relative difference between a component and its second measurement."""
        gaps = [
            abs(second - first) / first
            for name, second in (self.check_joules or {}).items()
            if (first := self.joules[name])
        ]
        return max(gaps, default=None)


class Window:
    """An open window; `energy` is there after a successful end."""

    def __init__(self) -> None:
        self.energy: Energy | None = None
