"""Running methods on benchmarks and measuring them; each run leaves one record.

Answers are appended to a log as they come, so a run that was killed continues where it stopped.
A complete record of the same request, made by the same code on the same machine, is used again.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FunctionType
from typing import Any, Protocol

from frugalvlm import measure
from frugalvlm.digest import request_hash
from frugalvlm.methods import Method
from frugalvlm.runs import records

CODE_ALWAYS = (
    "engine", "views.py", "trace.py", "loading.py",
    "hosts", "methods/base.py", "methods/schedules.py", "benchmarks", "pocket/scenes.py",
    "pocket/questions.py", "pocket/clips.py", "runs/setting.py", "runs/accuracy.py",
)  # fmt: skip


class Reporter(Protocol):
    """Told of progress: a rich progress bar, a notebook's, or nothing."""

    def start(self, description: str, total: int) -> None:
        """A run of `total` questions or rounds begins."""

    def advance(self, steps: int) -> None:
        """So many are done."""


class Silent:
    """A reporter that shows nothing."""

    def start(self, description: str, total: int) -> None:
        """Ignored."""

    def advance(self, steps: int) -> None:
        """Ignored."""


@dataclass(frozen=True)
class Setting:
    """What all runs of one table share.

    Attributes:
        scale: "pocket" or "full".
        model_name: what `load_vlm` was given.
        model_hash: identifies the weights.
        folder: where records go (`results/SCALE/KEY/records`).
        split: "dev" to choose anything with, "test" to report.
        n: questions per benchmark.
        device: where the model is.
        force: run again although a complete record exists.
        since: with `force`, records made from this moment on count all the same.
        others: folders of records that other tables left; one of the same request, code, weights,
            questions and machine is copied and not made a second time.
        timed: whether times may be measured now. Without it, what measures any is left out.
    """

    scale: str
    model_name: str
    model_hash: str
    folder: Path
    split: str = "test"
    n: int = 200
    device: str = "cpu"
    force: bool = False
    since: datetime | None = None
    others: tuple[Path, ...] = ()
    timed: bool = True


def code_of(method: Method) -> str:
    """Hash of the source that decides this method's answers, of all its parts."""
    kit = sorted({_file_of(type(part)) for part in method.parts if _of_kit(type(part))})
    return with_foreign(code_hash(*kit), [method])


def code_of_kit() -> str:
    """Hash of all source that decides a cost."""
    return code_hash("methods", "measure", "runs/costs.py")


def with_foreign(code: str, methods: Iterable[Method]) -> str:
    """The same hash, or one over it and the source of those methods that are not the kit's."""
    foreign = [
        kind
        for method in methods
        for part in method.parts
        for kind in type(part).__mro__
        if not _of_kit(kind) and issubclass(kind, Method)
    ]
    return request_hash([code, *map(_source_of, foreign)]) if foreign else code


def _of_kit(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "frugalvlm"


def _file_of(kind: type) -> str:
    return kind.__module__.removeprefix("frugalvlm.").replace(".", "/") + ".py"


def _source_of(kind: type) -> str:
    """Source of a class of a script or a notebook cell (there, that of its functions)."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        own = [getattr(value, "__func__", value) for value in vars(kind).values()]
        return "".join(_function_source(f) for f in own if inspect.isfunction(f))


def _function_source(function: FunctionType) -> str:
    try:
        return inspect.getsource(function)
    except OSError:  # typed at a prompt, or made by @dataclass
        code = function.__code__
        return f"{code.co_code.hex()}{code.co_names}"


def code_hash(*more: str) -> str:
    """Hash of what decides every answer, and of more source files or folders of the package."""
    root = Path(__file__).resolve().parents[1]
    return records.code_hash(root / p for p in (*CODE_ALWAYS, *more))


def run_name(setting: Setting, request: dict[str, Any], code: str) -> str:
    """File name of a run; other weights or another machine give another name."""
    machine = measure.machine_id(setting.device)
    return records.record_name(request, f"{code}-{setting.model_hash}", machine)


def find_run(
    setting: Setting, kind: str, request: dict[str, Any], code: str, data_hash: str | None = None
) -> dict[str, Any] | None:
    """The record of a run that need not be made: this table's own, or a copy of another one's.

    Args:
        setting: what all runs of the table share; `force`, `since` and `others` say what counts.
        kind: of the record.
        request: the configuration after defaults.
        code: `code_hash` of the source that decides the result.
        data_hash: when given, a record made with other questions does not count.
    """
    if setting.force and setting.since is None:
        return None
    since = setting.since if setting.force else None
    known = {"model_hash": setting.model_hash, "data_hash": data_hash}
    pattern = f"*--{run_name(setting, request, code).rsplit('--', 1)[-1]}.json"
    for folder in (setting.folder, *setting.others):
        record = records.find(folder, kind, request, code, pattern=pattern, **known)
        if record is None or (since and records.created(record) < since):
            continue
        if folder != setting.folder:
            write_run(setting, record)
        return record
    return None


def write_run(setting: Setting, record: records.Record, label: str = "") -> Path:
    """Write the record of a run where `find_run` finds it.

    Args:
        setting: what all runs of the table share.
        record: with its request and, in its provenance, the hash of the code.
        label: what the file name begins with.

    Returns:
        The file.

    Raises:
        RecordError: as by `records.write`.
    """
    name = run_name(setting, record["request"], record["provenance"]["code"])
    return records.write(setting.folder / f"{label and label + '--'}{name}.json", record)
