"""Which benchmarks may enter a mean: those for which the untouched model needs the pictures.

Where it scores about the same with blank pictures, no loss of visual tokens can show. Retention is
near 100 % there whatever is kept, and a mean with it in flatters every method. Such a benchmark
keeps its own column and stays out of means. Both scores are stored beside the weights by
`invoke train` (`scores.json`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from frugalvlm.benchmarks.stats import Estimate
from frugalvlm.loading import model_hash
from frugalvlm.pocket.installed import WeightsError, models_dir
from frugalvlm.pocket.models import SPECS

__all__ = ["POINTS", "Guard", "guard_of"]

POINTS = 10.0  # percentage points that the pictures must be worth


@dataclass(frozen=True)
class Guard:
    """What the pictures are worth to an untouched model.

    Attributes:
        worth: by benchmark, the mean score of the questions with the pictures minus that with
            blank ones, paired, in points (for yes-or-no questions a guess has 50). Benchmarks that
            are not in it were not compared: they are let in, and `notes` says so.
    """

    worth: Mapping[str, Estimate] = field(default_factory=dict)

    def admits(self, benchmark: str) -> bool:
        """Whether the pictures are worth at least `POINTS`, and surely more than nothing."""
        worth = self.worth.get(benchmark)
        return worth is None or (worth.low > 0 and worth.value >= POINTS)

    def admitted(self, benchmarks: Sequence[str]) -> list[str]:
        """Those that may enter a mean over these benchmarks; one alone is no mean."""
        return [b for b in benchmarks if len(benchmarks) == 1 or self.admits(b)]

    def notes(self, benchmarks: Sequence[str]) -> tuple[str, ...]:
        """What a table with a mean over these benchmarks says below it; names those left out."""
        if len(benchmarks) < 2:
            return ()
        out = [b for b in benchmarks if not self.admits(b)]
        unknown = [b for b in benchmarks if b not in self.worth]
        worth = [(b, self.worth[b]) for b in out]
        each = ", ".join(f"{b} ({w.value:.1f} [{w.low:.1f}, {w.high:.1f}])" for b, w in worth)
        left = (
            f"Not in the mean: {each}. In brackets, by how many percentage points the untouched "
            "model is more often right with the pictures than with blank ones; a benchmark enters "
            f"a mean only with {POINTS:g} or more, and its whole 95 % interval above 0."
        )
        names = "any benchmark" if len(unknown) == len(benchmarks) else ", ".join(unknown)
        unchecked = (
            f"No score with blank pictures is stored with these weights for {names}, so the mean "
            "may hold benchmarks that need no picture."
        )
        return (*([left] if out else []), *([unchecked] if unknown else []))


def guard_of(setting: Mapping[str, Any]) -> Guard:
    """The guard that the scores beside an embedded model's weights give.

    Args:
        setting: of the records (`records.setting_of`): `model` and `model_hash`. For other weights
            than those installed, and for models without scores, nothing is known.
    """
    name = setting.get("model")
    path = models_dir() / str(name) / "scores.json"
    if name not in SPECS or not path.is_file():
        return Guard()
    try:
        if model_hash(name) != setting.get("model_hash"):
            return Guard()
    except WeightsError:
        return Guard()
    scores = json.loads(path.read_text())
    return Guard({b: Estimate(**s["difference"]) for b, s in scores.items() if "difference" in s})
