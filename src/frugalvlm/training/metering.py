"""The energy of a training, session by session."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from frugalvlm import measure
from frugalvlm.pocket.recipe import multiplies_bf16

SESSIONS = "sessions.jsonl"


@contextmanager
def metered(run: Path, device: str) -> Iterator[None]:
    """Add what happens inside to the run's sessions: seconds, machine, energy if it can be read.

    A session that is killed leaves no entry; the card then says how much of the training the
    entries cover.
    """
    meter = measure.EnergyMeter(device)
    meter.begin_window()
    try:
        yield
    finally:
        energy = meter.end_window()
        entry = {
            "seconds": energy.seconds if energy else 0.0,
            "device": device,
            "bfloat16": multiplies_bf16(device),
            "machine": measure.describe(device),
            "joules": dict(energy.joules) if energy else {},
            "methods": meter.methods,
        }
        with (run / SESSIONS).open("a") as file:
            file.write(json.dumps(entry) + "\n")
