"""Energy per call of one run over several windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev

from frugalvlm.measure.energy import Energy, carbon_g


@dataclass(frozen=True)
class EnergyResult:
    """Gross energy per call of one run over several windows.

    Attributes:
        windows: energy of every window, in order.
        calls: how often the run was called in each window.
        methods: method per component, see `Energy`.
        modelled: True: never rank it.
        idle_watts: power of the idle machine, model loaded, before and after; None: not taken.
        reasons: why the result is not reliable; empty when it is.
    """

    windows: tuple[Energy, ...]
    calls: tuple[int, ...]
    methods: Mapping[str, str]
    modelled: bool
    idle_watts: tuple[float, float] | None
    reasons: tuple[str, ...]

    @property
    def joules_per_call(self) -> tuple[float, ...]:
        """One value per window, in joules."""
        return tuple(
            w.total_joules / calls
            for w, calls in zip(self.windows, self.calls, strict=True)
            if w.total_joules is not None
        )

    @property
    def n(self) -> int:
        """Number of windows with a figure; 0 on a machine without a counter."""
        return len(self.joules_per_call)

    @property
    def mean_joules(self) -> float | None:
        """Mean over windows of the energy per call, in joules; None if not measured."""
        return fmean(self.joules_per_call) if self.n else None

    @property
    def sd_joules(self) -> float | None:
        """Sample standard deviation over windows, in joules; None below two windows."""
        return stdev(self.joules_per_call) if self.n > 1 else None

    @property
    def cv(self) -> float | None:
        """Standard deviation over mean; None below two windows or at zero energy."""
        sd, mean = self.sd_joules, self.mean_joules
        return None if sd is None or not mean else sd / mean

    @property
    def window_s(self) -> tuple[float, ...]:
        """Length of each window, in seconds."""
        return tuple(w.seconds for w in self.windows)

    @property
    def net_joules(self) -> float | None:
        """Mean energy per call above idle, in joules; shown beside the gross one, never ranked."""
        if self.mean_joules is None or self.idle_watts is None:
            return None
        seconds = fmean(s / c for s, c in zip(self.window_s, self.calls, strict=True))
        return self.mean_joules - fmean(self.idle_watts) * seconds

    @property
    def carbon_g_per_call(self) -> float | None:
        """Grams of CO2e per call by the kit's grid factor; None if not measured."""
        return None if self.mean_joules is None else carbon_g(self.mean_joules)

    @property
    def reliable(self) -> bool:
        """Whether every rule of acceptance holds."""
        return not self.reasons

    @property
    def rankable(self) -> bool:
        """Measured (not modelled) and reliable: may be ordered against equal `methods`."""
        return self.n > 0 and not self.modelled and self.reliable
