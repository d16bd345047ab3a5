"""A modelled energy figure by codecarbon, for machines without any readable counter.

It is a thermal design power times this process's share of CPU time, plus a constant per memory
module. Tools and settings disagree on it several times over, so it is labelled ``modelled`` and
never ranked (`Energy.rankable` is False). It shows students the arithmetic, not the machine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from frugalvlm.measure.energy import GRID_FACTOR_G_PER_KWH, Energy, Window

_JOULES_PER_KWH = 3.6e6

# All that the tracker could be told: what is left out it would read from the user's own
# `.codecarbon.config` and CODECARBON_* variables, and the figure would be another one.
SETTINGS: Mapping[str, Any] = {
    "country_iso_code": "FRA",  # demanded, without effect: the factor is forced
    "force_carbon_intensity_g_co2e_kwh": GRID_FACTOR_G_PER_KWH,
    "force_mode_cpu_load": True,  # the model everywhere, so the label is always true
    "tracking_mode": "process",
    "output_methods": [],
    "log_level": "critical",
    "pue": 1.0,
    "wue": 0.0,
    "measure_power_secs": 15.0,
    "api_call_interval": 8,
    "rapl_include_dram": False,
    "rapl_prefer_psys": False,
    "allow_multiple_runs": True,
    "project_name": "frugalvlm",
    "experiment_name": "base",
    "output_dir": ".",
    "output_file": "emissions.csv",
    "output_handlers": [],
    "on_csv_write": "append",
    "logger_preamble": "",
    "gpu_ids": [],
    **dict.fromkeys(
        ("force_cpu_power", "force_ram_power", "region", "cloud_provider", "cloud_region",
         "country_2letter_iso_code", "api_endpoint", "api_key", "emissions_endpoint",
         "experiment_id", "electricitymaps_api_token", "logging_logger", "prometheus_url",
         "metadata")
    ),
}  # fmt: skip


class ModelledMeter:
    """`EnergyMeter`'s windows over codecarbon's offline tracker; a context manager.

    Offline: the tracker's grid factor is forced to the kit's, no file is written and nothing is
    sent. Windows cannot nest. Leaving the context stops the tracker's threads, also after an
    exception.
    """

    modelled = True
    tick_s = 0.0

    def __init__(self) -> None:
        self._name: str | None = None
        self._task = ""
        self._windows = 0

    @property
    def methods(self) -> dict[str, str]:
        """How each component's figure comes about."""
        return {"gpu": "none", "cpu": "tdp_load_model", "ram": "constant_model"}

    def __enter__(self) -> ModelledMeter:
        import codecarbon

        # The tracker logs before it applies its own log_level.
        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
        self.tracker = codecarbon.OfflineEmissionsTracker(**SETTINGS)
        return self

    def __exit__(self, *_: object) -> None:
        self.tracker.stop()

    def exclusive(self) -> bool | None:
        """Unknown: a model does not see other processes."""
        return None

    def begin_window(self, name: str = "window", restart: bool = False) -> None:
        """Open a window.

        Raises:
            ValueError: a window is open and ``restart`` is False.
        """
        if self._name is not None:
            if not restart:
                raise ValueError(f"window {self._name!r} is open; modelled windows cannot nest")
            self.tracker.stop_task(self._task)
        self._windows += 1
        self._name, self._task = name, f"{name}-{self._windows}"
        self.tracker.start_task(self._task)
        self._start = time.perf_counter()

    def end_window(self, name: str = "window", cancel: bool = False) -> Energy | None:
        """Close the window and return its modelled energy; with ``cancel`` drop it.

        Raises:
            ValueError: no window of that name is open.
            RuntimeError: codecarbon gave no figure (it logs its errors and returns nothing).
        """
        if self._name != name:
            raise ValueError(f"window {name!r} is not open")
        seconds = time.perf_counter() - self._start
        self._name = None
        data = self.tracker.stop_task(self._task)
        if cancel:
            return None
        if data is None:
            raise RuntimeError("codecarbon returned no figure for this window")
        joules = {
            "gpu": None,
            "cpu": data.cpu_energy * _JOULES_PER_KWH,
            "ram": data.ram_energy * _JOULES_PER_KWH,
        }
        return Energy(joules, self.methods, seconds, modelled=True)

    @contextmanager
    def window(self, name: str = "window", restart: bool = False) -> Iterator[Window]:
        """``with meter.window() as w: ...``; then ``w.energy``. An exception inside cancels it."""
        self.begin_window(name, restart)
        window = Window()
        try:
            yield window
        except BaseException:
            self.end_window(name, cancel=True)
            raise
        window.energy = self.end_window(name)
