"""Run records: one JSON file per run, written atomically, read with checks.

A record is written once, when its run is over, and never edited: it carries a digest of its
content, and one that does not match is refused. Records that were written before there were digests
(schema 1) have none and are read as they are. A file that cannot be used is named, with the remedy,
and left out; the others stand. Answers that come before the end of a run are kept in a log beside
it, so a run that was killed continues where it stopped.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import psutil
from filelock import SoftFileLock, Timeout

from frugalvlm import measure
from frugalvlm.digest import plain, request_hash
from frugalvlm.errors import FrugalError, unwritable
from frugalvlm.paths import project_root
from frugalvlm.runs.schema import KINDS, SCHEMA, STATUSES, fault_of

__all__ = [
    "KINDS",
    "SCHEMA",
    "SETTING",
    "STATUSES",
    "AnswerLog",
    "MixedSettingError",
    "Record",
    "RecordError",
    "RecordWarning",
    "clear_left_over",
    "complete",
    "created",
    "find",
    "from_the_future",
    "latest",
    "method_key",
    "newest_setting",
    "one_setting",
    "provenance",
    "read_record",
    "read_records",
    "record_name",
    "request_hash",
    "select",
    "setting_of",
    "write",
    "write_bytes",
]

Record = dict[str, Any]

# Records that differ in one of these do not belong in one table.
SETTING = ("scale", "model", "split", "n", "device", "dtype", "attn_implementation")
# Clocks of two machines differ a little; a record from farther ahead has a wrong time.
CLOCK_SLACK = timedelta(minutes=5)
LONGEST = 150  # bytes of a file name in front of the hash; systems take 255 in all
PACKAGES = ("frugalvlm", "torch", "transformers", "tokenizers", "datasets", "numpy", "pillow")


class RecordError(FrugalError, ValueError):
    """A record or an answer log that cannot be written or used; the message names the remedy."""


class RecordWarning(UserWarning):
    """A record that is left out or not the newest; says which, why, and the remedy."""


class MixedSettingError(FrugalError, ValueError):
    """Records of different settings were given where one table needs one setting."""


def write(path: Path, record: Mapping[str, Any]) -> Path:
    """Write a record, with its digest, so that the file is absent, the old one, or complete.

    NaN and infinity become null: JSON has no name for them.

    Raises:
        RecordError: when the record breaks the format, or the disk is full or read-only. Nothing is
            left behind then.
    """
    record = plain({"schema": SCHEMA, **record})
    fault = fault_of(record, json.dumps(record))
    if fault:
        raise RecordError(f"{path} would be no usable record ({fault}), so it is not written.")
    record = {**record, "schema": SCHEMA}
    record["digest"] = _digest(record)
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode())
    return path


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is absent, the old one, or complete.

    Raises:
        RecordError: the disk is full or read-only; nothing is left behind.
    """
    # In the same folder, because only there renaming is atomic; hidden, so that nobody reads it.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RecordError(unwritable(path, error)) from error
    finally:
        with suppress(OSError):  # it was renamed, or its folder cannot be
            temporary.unlink()


def read_record(path: Path) -> Record:
    """Read one record; its digest is checked and not part of what is returned.

    Raises:
        RecordError: when the file is damaged, was edited, or is no record of this kit.
    """
    remedy = f"delete it and run again, or restore it with `git checkout -- {path}`"
    try:
        text = path.read_text(encoding="utf-8")
        record = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise RecordError(f"{path} is damaged ({error}): {remedy}.") from error
    except OSError as error:  # a folder, or a file that may not be read
        raise RecordError(f"{path} cannot be read ({error.strerror}): {remedy}.") from error
    fault = fault_of(record, text)
    if fault:
        raise RecordError(
            f"{path} is not a usable record ({fault}): {remedy}, or update the kit if a newer "
            "version wrote it."
        )
    told = record.pop("digest", None)
    if told is None and record["schema"] > 1:
        raise RecordError(f"{path} has no digest, so nobody can tell what it was: {remedy}.")
    if told is not None and told != _digest(record):
        raise RecordError(
            f"{path} was edited after its run (its content does not match its digest): {remedy}."
        )
    return record


def read_records(
    folder: Path, kind: str | None = None, machine: str | None = None, pattern: str = "*.json"
) -> list[Record]:
    """All usable records of a folder, oldest first; an absent folder has none.

    What cannot be used, and records from the future, are told of once, as a `RecordWarning`.

    Args:
        folder: where the records lie, e.g. `results/pocket/visionzip/records`.
        kind: only this kind.
        machine: only those of the machine with this id.
        pattern: only files with such a name.

    Raises:
        RecordError: for an unknown kind.
    """
    if kind is not None and kind not in KINDS:
        raise RecordError(f"Unknown kind of record '{kind}'. Known: {', '.join(KINDS)}.")
    wanted = []
    for path in sorted(Path(folder).glob(pattern)):
        try:
            record = read_record(path)
        except RecordError as error:
            _tell(f"Left out: {error}")
            continue
        if from_the_future(record):
            _tell(
                f"{path} is dated {record['provenance']['created']}, in the future, so it counts "
                "as the oldest: delete it, or correct the clock and run again."
            )
        if kind in (None, record["kind"]) and machine in (None, record["provenance"]["machine"]):
            wanted.append(record)
    return sorted(wanted, key=_created)


_told: set[str] = set()


def _tell(sentence: str) -> None:
    """Warn once, however often the same files are read."""
    if sentence not in _told:
        _told.add(sentence)
        warnings.warn(sentence, RecordWarning, stacklevel=3)


def _digest(record: Mapping[str, Any]) -> str:
    return request_hash({k: v for k, v in record.items() if k != "digest"})


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def complete(records: Iterable[Record]) -> list[Record]:
    """The records of runs that finished; only these enter tables."""
    return [r for r in records if r["status"] == "complete"]


def select(records: Iterable[Record], kind: str | None = None, **request: Any) -> list[Record]:
    """The records of a kind whose request has these values (`method` is compared by its key)."""

    def fits(record: Record, name: str, wanted: Any) -> bool:
        if name == "method":
            return method_key(record) == wanted
        return record["request"].get(name) == wanted

    return [
        r
        for r in records
        if kind in (None, r["kind"]) and all(fits(r, k, v) for k, v in request.items())
    ]


def method_key(record: Record) -> str | None:
    """The key of the method that an accuracy record ran."""
    return (record["request"].get("method") or {}).get("method")


def latest(records: Iterable[Record]) -> list[Record]:
    """The newest complete record of every request on every machine, oldest first."""
    newest: dict[tuple, Record] = {}
    for record in sorted(complete(records), key=_created):
        key = (record["kind"], request_hash(record["request"]), record["provenance"]["machine"])
        newest[key] = record
    return sorted(newest.values(), key=_created)


def created(record: Record) -> datetime:
    """When a record was made, to the second; the beginning of time for one from the future.

    So a wrong clock never makes it the newest.
    """
    return datetime.min.replace(tzinfo=UTC) if from_the_future(record) else _dated(record)


def from_the_future(record: Record) -> bool:
    """Whether a record says that it was made after now."""
    return _dated(record) > datetime.now(UTC) + CLOCK_SLACK


def _dated(record: Record) -> datetime:
    made = datetime.fromisoformat(record["provenance"]["created"])
    return made if made.tzinfo else made.replace(tzinfo=UTC)


def setting_of(record: Record) -> dict[str, Any]:
    """What a record shares with all others of its table: SETTING, the weights, the machine."""
    setting = {name: record["request"].get(name) for name in SETTING}
    made = record["provenance"]
    return {**setting, "model_hash": made.get("model_hash"), "machine": made["machine"]}


def one_setting(records: Sequence[Record]) -> dict[str, Any]:
    """The setting that all these records share; empty for no records.

    Raises:
        MixedSettingError: when they differ; the message names in what, and the remedy.
    """
    settings = [setting_of(r) for r in records]
    mixed = {
        name: sorted({str(s[name]) for s in settings})
        for name in (settings[0] if settings else ())
        if len({str(s[name]) for s in settings}) > 1
    }
    if mixed:
        what = "; ".join(f"{name}: {', '.join(values)}" for name, values in mixed.items())
        raise MixedSettingError(
            f"These records do not belong in one table ({what}): pick one with "
            "`records.select(...)`, or take `records.newest_setting(...)`."
        )
    return settings[0] if settings else {}


def newest_setting(records: Iterable[Record]) -> list[Record]:
    """The latest complete records that share the setting of the newest one of their kind."""
    chosen: list[Record] = []
    known = latest(records)
    for kind in KINDS:
        own = [r for r in known if r["kind"] == kind]
        chosen += [r for r in own if setting_of(r) == setting_of(own[-1])]
    return chosen


def find(
    folder: Path,
    kind: str,
    request: Mapping[str, Any],
    code: str,
    *,
    model_hash: str | None = None,
    data_hash: str | None = None,
    machine: str | None = None,
    pattern: str = "*.json",
) -> Record | None:
    """The complete record of this very request, made by the same code on the same machine.

    One dated in the future is none: nobody knows when it was made.

    Args:
        folder: where the records lie.
        kind: one of KINDS.
        request: the configuration after defaults.
        code: identity of the code that decides the result.
        model_hash: when given, a record made with other weights does not count.
        data_hash: when given, a record made with other questions does not count.
        machine: default: this machine, with the device that the request names.
        pattern: look only at files with such a name; in a large folder this saves much reading.
    """
    machine = machine or measure.machine_id(request.get("device"))
    wanted = request_hash(request)
    expected = {"code": code, "model_hash": model_hash, "data_hash": data_hash}
    for record in reversed(complete(read_records(folder, kind, machine, pattern))):
        made = record["provenance"]
        same = all(v is None or made.get(k) == v for k, v in expected.items())
        if same and request_hash(record["request"]) == wanted and not from_the_future(record):
            return record
    return None


def record_name(request: Mapping[str, Any], code: str, machine: str) -> str:
    """The file name (no suffix) of a run: readable parts, then a hash of all that decides it."""
    method = request.get("method") or {}
    parts = [method.get("method"), request.get("budget"), request.get("benchmark")]
    readable = [str(p) for p in parts if p is not None] or [str(request.get("model", "run"))]
    readable = ["".join(c if c.isalnum() or c in "-_." else "-" for c in p) for p in readable]
    head = "--".join(readable).encode()[:LONGEST].decode(errors="ignore")
    return f"{head}--{request_hash([request, code, machine])}"


def provenance(
    *,
    code: str,
    model_hash: str | None = None,
    data_hash: str | None = None,
    seconds: float | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Where a record comes from: time, commit, versions, hardware.

    `commit` and `dirty` are None without git; `dirty` says whether src/ or data/ differ from the
    commit (new results do not make the code dirty).
    """
    commit, dirty = _commit()
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "code": code,
        "machine": measure.machine_id(device),
        "hardware": measure.describe(device),
        "versions": {name: _version(name) for name in PACKAGES},
        "model_hash": model_hash,
        "data_hash": data_hash,
        "seconds": None if seconds is None else round(seconds, 1),
    }


class AnswerLog:
    """Answers of a run that is not over yet: JSON lines, a header and then [question id, answer].

    A line that was cut off by a kill or a full disk is dropped when reading and overwritten when
    appending. The log of another request or of other code is refused. One process writes at a time:
    from its first `append`, or for as long as a `with` block lasts, it holds a lock file with its
    id; that of a process that was killed does not count.
    """

    def __init__(
        self, path: Path, request: Mapping[str, Any], code: str, model_hash: str | None = None
    ) -> None:
        self.path = Path(path)
        self._header = {"request": request_hash(request), "code": code, "model_hash": model_hash}
        self._end: int | None = None  # where the next line goes; None: look
        self._lock = SoftFileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=0.3)

    def __enter__(self) -> Self:
        """Become the one writer.

        Raises:
            RecordError: another process is, or the folder cannot be written to.
        """
        self._hold()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def read(self) -> dict[str, str | None]:
        """The answers so far by question id; empty without a log. A repeated id: the last one.

        Raises:
            RecordError: when the log belongs to another run or is damaged before its last line.
        """
        lines = self._whole_lines()
        if not lines:
            return {}
        try:
            header, *answers = [json.loads(line) for line in lines]
            done = {str(question): answer for question, answer in answers}
        except (ValueError, TypeError) as error:
            raise RecordError(f"{self.path} is damaged: delete it and run again.") from error
        if header != self._header:
            raise RecordError(
                f"{self.path} holds the answers of another request, other code or other weights: "
                "delete it and run again."
            )
        if any(not isinstance(answer, str | None) for answer in done.values()):
            raise RecordError(f"{self.path} is damaged: delete it and run again.")
        return done

    def append(self, answers: Iterable[tuple[str, str | None]]) -> None:
        """Add answers and make sure that they are on the disk.

        The log is read before the first line is added, and not again unless its size has changed.

        Raises:
            RecordError: as `read`; another process writes; the disk is full or read-only.
        """
        self._hold()
        if self._end is None or self._size() != self._end:
            self.read()
            self._end = sum(len(line) + 1 for line in self._whole_lines())
        lines = [json.dumps(list(pair), ensure_ascii=False) for pair in answers]
        if self._end == 0:
            lines.insert(0, json.dumps(self._header))
        added = "".join(line + "\n" for line in lines).encode()
        end, self._end = self._end, None  # if this fails, look at the file again
        try:
            self.path.touch()
            with self.path.open("r+b") as file:
                file.truncate(end)  # away with half a line, or the next one would be glued to it
                file.seek(end)
                file.write(added)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RecordError(unwritable(self.path, error)) from error
        self._end = end + len(added)

    def clear(self) -> None:
        """Remove the log, if there is one."""
        self.path.unlink(missing_ok=True)
        self._end = None

    def _hold(self) -> None:
        if self._lock.is_locked:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(poll_interval=0.05)
        except Timeout as error:
            raise RecordError(
                f"Process {self._lock.pid} answers the same questions and writes {self.path}: wait "
                "until it is over, or end it, and run again."
            ) from error
        except OSError as error:
            raise RecordError(unwritable(self.path, error)) from error

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def _whole_lines(self) -> list[bytes]:
        if not self.path.is_file():
            return []
        return self.path.read_bytes().split(b"\n")[:-1]


def clear_left_over(folder: Path) -> None:
    """Remove the temporary and lock files that killed processes left below a folder."""
    for path in Path(folder).rglob(".*.tmp"):
        owner = re.search(r"\.(\d+)\.tmp$", path.name)
        if owner and not psutil.pid_exists(int(owner[1])):
            path.unlink(missing_ok=True)
    for path in Path(folder).rglob(".*.jsonl.lock"):
        pid = SoftFileLock(path).pid
        if pid is not None and not psutil.pid_exists(pid):
            path.unlink(missing_ok=True)


def _created(record: Record) -> tuple[datetime, str]:
    # The hash decides between records of one second, so that the order is the same everywhere.
    return created(record), request_hash(record["request"])


def _commit() -> tuple[str | None, bool | None]:
    try:
        root = project_root()
    except FileNotFoundError:
        return None, None
    top = _git(root, "rev-parse", "--show-toplevel")
    # A kit unpacked inside some other repository must not take that repository's commit for ours.
    if top is None or Path(top).resolve() != root:
        return None, None
    changed = _git(root, "status", "--porcelain", "--", "src", "data")
    return _git(root, "rev-parse", "HEAD"), None if changed is None else bool(changed)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):  # no git, or a folder on a hanging disk
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
