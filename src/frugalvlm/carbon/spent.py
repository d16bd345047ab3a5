"""What a piece of work took: energy, time, arithmetic; and emission from energy.

Energy that was not read from a counter is no measurement (`frugalvlm.measure`), so seconds and
FLOPs always stand beside it and nothing is ranked in grams.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from frugalvlm.carbon.figure import CarbonError, numbers_of
from frugalvlm.measure import GRID_FACTOR_G_PER_KWH, Energy, EnergyResult, carbon_g

__all__ = ["CURRENCIES", "PARTS", "Spent", "SpentLike", "spent_of"]

PARTS = ("gpu", "cpu", "ram")
CURRENCIES = ("g", "kg", "J", "s", "TFLOPs")  # in which a cost can be told


@dataclass(frozen=True)
class Spent:
    """What one piece of work took; None where it is not known.

    Attributes:
        joules: energy.
        seconds: wall clock.
        flops: counted operations (a multiply-add is 2).
        modelled: the energy comes from a model of the machine or cannot be relied on: never
            ranked.
        methods: by part of the machine how its energy was read; only equal ones are compared.
    """

    joules: float | None = None
    seconds: float | None = None
    flops: float | None = None
    modelled: bool = False
    methods: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in ("joules", "seconds", "flops"):
            value = getattr(self, name)
            if value is not None and not (numbers_of(value, name) >= 0).all():
                raise CarbonError(f"{name} of a piece of work cannot be negative; got {value!r}.")

    @property
    def rankable(self) -> bool:
        """Whether its emission may be ranked: measured, not modelled."""
        return self.joules is not None and not self.modelled

    def amount(
        self, currency: str, grid_g_per_kwh: float = GRID_FACTOR_G_PER_KWH, pue: float = 1.0
    ) -> float | None:
        """The cost in one of `CURRENCIES`; None where it is not known.

        Args:
            currency: "g" and "kg" are CO2 equivalents.
            grid_g_per_kwh: grams of CO2e per kWh, one stated factor.
            pue: what the building takes for each joule of the machine (power usage effectiveness).

        Raises:
            CarbonError: an unknown currency.
        """
        if currency not in CURRENCIES:
            raise CarbonError(f"Unknown currency {currency!r}: {', '.join(CURRENCIES)}.")
        if currency in ("s", "TFLOPs"):
            known = self.seconds if currency == "s" else self.flops
            return None if known is None else known / (1e12 if currency == "TFLOPs" else 1)
        if self.joules is None:
            return None
        if currency == "J":
            return self.joules
        return pue * carbon_g(self.joules, grid_g_per_kwh) / (1000 if currency == "kg" else 1)

    def __add__(self, other: Spent) -> Spent:
        """Both together: unknown where either is, modelled where either is."""
        joules, seconds, flops = (
            None if a is None or b is None else a + b
            for a, b in (
                (self.joules, other.joules), (self.seconds, other.seconds),
                (self.flops, other.flops),
            )
        )  # fmt: skip
        methods = tuple(dict.fromkeys((*self.methods, *other.methods)))
        return Spent(joules, seconds, flops, self.modelled or other.modelled, methods)


SpentLike: TypeAlias = float | Spent | Energy | EnergyResult | Mapping[str, Any]


def spent_of(work: SpentLike, parts: Sequence[str] = PARTS) -> Spent:
    """What a user hands over, as a `Spent`.

    Args:
        work: joules that a counter read; a window of `measure.EnergyMeter`; a measured run (one
            call); a training log of this kit (a mapping with its `sessions`, each with seconds,
            joules per part and methods); a `Spent`, the only one that can carry FLOPs.
        parts: which parts of the machine count, where they are known apart.

    Raises:
        CarbonError: none of these, an unknown part, or a negative amount.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown or isinstance(parts, str) or not parts:
        raise CarbonError(f"parts is a list of {', '.join(PARTS)}; got {parts!r}.")
    if isinstance(work, Spent):
        return work
    if isinstance(work, Energy):
        joules, methods = _counted([work.joules], [work.methods], parts)
        return Spent(joules, work.seconds, modelled=work.modelled, methods=methods)
    if isinstance(work, EnergyResult):
        each = [s / c for s, c in zip(work.window_s, work.calls, strict=True)]
        return Spent(
            work.mean_joules, sum(each) / len(each) if each else None,
            modelled=not work.rankable, methods=tuple(sorted(work.methods.items())),
        )  # fmt: skip
    if isinstance(work, Mapping):
        if "sessions" not in work:
            raise CarbonError("A training log holds 'sessions'; this mapping does not.")
        sessions = work["sessions"]
        joules, methods = _counted(
            [s.get("joules", {}) for s in sessions], [s.get("methods", {}) for s in sessions], parts
        )
        # `seconds` of the whole log also count sessions that were killed without an entry; their
        # energy is then missing, and a part of an energy is no energy.
        entered = sum(s["seconds"] for s in sessions)
        seconds = float(work.get("seconds", entered))
        whole = abs(seconds - entered) <= 0.01 * max(seconds, 1e-9)
        return Spent(joules if whole else None, seconds, methods=methods)
    joules = float(numbers_of(work, "the energy of the training, in joules,").sum())
    return Spent(joules)


def _counted(
    joules: Iterable[Mapping[str, float | None]], methods: Iterable[Mapping[str, str]],
    parts: Sequence[str],
) -> tuple[float | None, tuple[tuple[str, str], ...]]:  # fmt: skip
    """Joules of the parts over all windows, and how they were read; None if a window lacks them."""
    read = [{p: float(v) for p, v in w.items() if p in parts and v is not None} for w in joules]
    if not read or not all(read) or len({tuple(sorted(own)) for own in read}) > 1:
        return None, ()
    how = {(p, m) for own in methods for p, m in own.items() if p in read[0]}
    return sum(sum(own.values()) for own in read), tuple(sorted(how))
