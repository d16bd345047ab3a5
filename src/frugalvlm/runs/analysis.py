"""The record of an analysis: found, or measured and written."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from frugalvlm.runs import records
from frugalvlm.runs.records import Record
from frugalvlm.runs.setting import Reporter, Setting, find_run, write_run


def analysis_run(
    setting: Setting,
    request: dict[str, Any],
    code: str,
    measured: Callable[[], dict[str, Any]],
    reporter: Reporter,
    steps: int,
    label: str = "",
) -> Record:
    """The record of an analysis; a whole one of the same request and code is used again.

    Args:
        setting: what all runs of the paper share.
        request: what is asked for.
        code: identity of what decides the figures.
        measured: gives the figures, and as `data_hash` the identity of what was looked at.
        reporter: told of progress.
        steps: that finding a record saves.
        label: of the file's name.
    """
    found = find_run(setting, "analysis", request, code)
    if found is not None:
        reporter.advance(steps)
        return found
    started, figures = time.monotonic(), measured()
    record = {
        "kind": "analysis", "status": "complete", "request": request,
        "provenance": records.provenance(
            code=code, model_hash=setting.model_hash, data_hash=figures.pop("data_hash"),
            seconds=time.monotonic() - started, device=setting.device,
        ), **figures,
    }  # fmt: skip
    return records.read_record(write_run(setting, record, label=label))
