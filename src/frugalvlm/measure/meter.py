"""Energy windows over hardware counters.

`EnergyMeter` has the interface of Zeus windows: begin, end, nested and overlapping, restartable.
A component without a counter is missing, never guessed: `Energy.methods` says "none" and why is in
`EnergyMeter.missing`. For a figure where nothing can be measured see `modelled`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from frugalvlm.measure.counters import Counter
from frugalvlm.measure.detect import detect
from frugalvlm.measure.energy import COMPONENTS, Energy, Window
from frugalvlm.measure.latency import synchronize


class EnergyMeter:
    """Reads hardware energy counters around named windows.

    Args:
        device: where the work happens; a CUDA device is synchronised at both ends.
        counters: default: what `detect` finds for the device.
        checks: second measurements of the same components.
        clock: seconds, monotonic.
    """

    modelled = False

    def __init__(
        self,
        device: str | torch.device = "cpu",
        counters: Sequence[Counter] | None = None,
        checks: Sequence[Counter] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.device, self._clock = device, clock
        self.missing: Mapping[str, str] = {}
        if counters is None:
            found = detect(device)
            counters, checks, self.missing = found.counters, found.checks, found.missing
        self.counters, self.checks = tuple(counters), tuple(checks)
        self._open: dict[str, tuple[float, list[float]]] = {}
        self._stop: threading.Event | None = None
        self._error: Exception | None = None

    @property
    def methods(self) -> dict[str, str]:
        """Method per component; "none" where there is no counter (the reason is in `missing`)."""
        return dict.fromkeys(COMPONENTS, "none") | {c.component: c.method for c in self.counters}

    @property
    def tick_s(self) -> float:
        """The slowest counter's update interval, in seconds."""
        return max((counter.tick_s for counter in self.counters), default=0.0)

    def exclusive(self) -> bool | None:
        """Whether no other process computes on the GPU; None if unknown or without a counter."""
        counts = [c.processes() for c in self.counters if hasattr(c, "processes")]
        if not counts or None in counts:
            return None
        return max(counts) <= 1

    def begin_window(self, name: str = "window", restart: bool = False) -> None:
        """Open a window. ``restart=True`` first drops an open one of that name (a rerun cell).

        Raises:
            ValueError: a window of that name is open.
        """
        if name in self._open and not restart:
            raise ValueError(f"window {name!r} is open; end it or pass restart=True")
        self._open.pop(name, None)
        self._stop_polling()
        synchronize(self.device)
        self._open[name] = (self._clock(), self._readings())
        self._start_polling()

    def end_window(self, name: str = "window", cancel: bool = False) -> Energy | None:
        """Close a window and return its energy; with ``cancel`` drop it and return None.

        Raises:
            ValueError: no window of that name is open.
            RuntimeError: a counter went backwards or failed during the window.
        """
        if name not in self._open:
            raise ValueError(f"window {name!r} is not open")
        try:
            if cancel:
                return None
            synchronize(self.device)
            now, after = self._clock(), self._readings()
            start, before = self._open[name]
            if self._error is not None:
                raise RuntimeError("a counter failed during the window") from self._error
            steps = [b - a for a, b in zip(before, after, strict=True)]
            return self._energy(steps, now - start)
        finally:
            del self._open[name]
            self._stop_polling()

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

    def close(self) -> None:
        """Drop all open windows and stop polling."""
        self._open.clear()
        self._stop_polling()

    def __enter__(self) -> EnergyMeter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _readings(self) -> list[float]:
        return [counter.joules() for counter in (*self.counters, *self.checks)]

    def _energy(self, steps: list[float], seconds: float) -> Energy:
        if any(step < 0 for step in steps):
            raise RuntimeError("an energy counter went backwards (driver reloaded?)")
        joules: dict[str, float | None] = dict.fromkeys(COMPONENTS)
        for counter, step in zip(self.counters, steps, strict=False):
            joules[counter.component] = (joules[counter.component] or 0.0) + step
        checks = steps[len(self.counters) :]
        second = {c.component: step for c, step in zip(self.checks, checks, strict=True)}
        return Energy(joules, self.methods, seconds, check_joules=second or None)

    def _start_polling(self) -> None:
        """Read the counters that need it (power samples, wrap-around) while a window is open."""
        polled = [c for c in (*self.counters, *self.checks) if c.poll_s is not None]
        if not polled or self._stop is not None:
            return
        self._error, self._stop = None, threading.Event()
        period = min(c.poll_s for c in polled if c.poll_s is not None)
        threading.Thread(target=self._poll, args=(polled, period, self._stop), daemon=True).start()

    def _poll(self, counters: list[Counter], period: float, stop: threading.Event) -> None:
        while not stop.wait(period):
            try:
                for counter in counters:
                    counter.joules()
            except Exception as error:  # shown by end_window, in the caller's thread
                self._error = error
                return

    def _stop_polling(self) -> None:
        if self._stop is not None and not self._open:
            self._stop.set()
            self._stop = None
