"""Run records: one JSON file per run, written atomically, read with checks.

A record is written once, when its run is over, and never edited. Answers that come before the end
of a run are kept in a log beside it, so a run that was killed continues where it stopped.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from frugalvlm import measure
from frugalvlm.digest import plain, request_hash
from frugalvlm.errors import FrugalError
from frugalvlm.paths import project_root

__all__ = [
    "KINDS",
    "SCHEMA",
    "SETTING",
    "STATUSES",
    "AnswerLog",
    "MixedSettingError",
    "Record",
    "RecordError",
    "code_hash",
    "complete",
    "created",
    "find",
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
]

Record = dict[str, Any]

SCHEMA = 1
KINDS = ("accuracy", "efficiency", "blueprint", "attention", "phenomena", "analysis")
STATUSES = ("complete", "partial", "failed")

# Records that differ in one of these do not belong in one table.
SETTING = ("scale", "model", "split", "n", "device", "dtype", "attn_implementation")
PACKAGES = ("frugalvlm", "torch", "transformers", "tokenizers", "datasets", "numpy", "pillow")


class RecordError(FrugalError, ValueError):
    """A record or an answer log that cannot be written or used; the message names the remedy."""


class MixedSettingError(FrugalError, ValueError):
    """Records of different settings were given where one table needs one setting."""


def write(path: Path, record: Mapping[str, Any]) -> Path:
    """Write a record so that the file is either absent, the old one, or complete.

    NaN and infinity become null: JSON has no name for them.

    Raises:
        RecordError: when the record breaks the format, or the disk is full or read-only. Nothing is
            left behind then.
    """
    record = plain({"schema": SCHEMA, **record})
    _check(record, str(path))
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    # In the same folder, because only there renaming is atomic; hidden, so that nobody reads it.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RecordError(_unwritable(path, error)) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_record(path: Path) -> Record:
    """Read one record.

    Raises:
        RecordError: when the file is damaged or is no record of this kit.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecordError(
            f"{path} is damaged ({error}): delete it and run again, or restore it with "
            f"`git checkout -- {path}`."
        ) from error
    _check(record, str(path))
    return record


def read_records(
    folder: Path, kind: str | None = None, machine: str | None = None, pattern: str = "*.json"
) -> list[Record]:
    """All records of a folder, oldest first; an absent folder has none.

    Args:
        folder: where the records lie, e.g. `results/pocket/visionzip/records`.
        kind: only this kind.
        machine: only those of the machine with this id.
        pattern: only files with such a name.

    Raises:
        RecordError: for a damaged file or an unknown kind.
    """
    if kind is not None and kind not in KINDS:
        raise RecordError(f"Unknown kind of record '{kind}'. Known: {', '.join(KINDS)}.")
    records = [read_record(path) for path in sorted(Path(folder).glob(pattern))]
    wanted = [
        r
        for r in records
        if kind in (None, r["kind"]) and machine in (None, r["provenance"]["machine"])
    ]
    return sorted(wanted, key=_created)


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
    """When a record was made, to the second."""
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

    Args:
        folder: where the records lie.
        kind: one of KINDS.
        request: the configuration after defaults.
        code: `code_hash` of the source that decides the result.
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
        if same and request_hash(record["request"]) == wanted:
            return record
    return None


def record_name(request: Mapping[str, Any], code: str, machine: str) -> str:
    """The file name (no suffix) of a run: readable parts, then a hash of all that decides it."""
    method = request.get("method") or {}
    parts = [method.get("method"), request.get("budget"), request.get("benchmark")]
    readable = [str(p) for p in parts if p is not None] or [str(request.get("model", "run"))]
    readable = ["".join(c if c.isalnum() or c in "-_." else "-" for c in p) for p in readable]
    return "--".join([*readable, request_hash([request, code, machine])])


def code_hash(paths: Iterable[Path]) -> str:
    """16 hexadecimal digits of source files; a folder stands for all Python files below it.

    The same on every machine: neither the place of the repository nor the line ends matter.

    Raises:
        FileNotFoundError: when a path does not exist (a typo must not hash as "no code").
    """
    files = {file.resolve() for path in paths for file in _sources(Path(path))}
    root = Path(os.path.commonpath([f.parent for f in files])) if files else Path()
    digest = hashlib.sha256()
    for name, file in sorted((f.relative_to(root).as_posix(), f) for f in files):
        content = file.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


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
    appending. The log of another request or of other code is refused.
    """

    def __init__(
        self, path: Path, request: Mapping[str, Any], code: str, model_hash: str | None = None
    ) -> None:
        self.path = Path(path)
        self._header = {"request": request_hash(request), "code": code, "model_hash": model_hash}

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
        return done

    def append(self, answers: Iterable[tuple[str, str | None]]) -> None:
        """Add answers and make sure that they are on the disk.

        Raises:
            RecordError: as `read`, or when the disk is full or read-only.
        """
        self.read()
        lines = [json.dumps(list(pair), ensure_ascii=False) for pair in answers]
        end = sum(len(line) + 1 for line in self._whole_lines())
        if end == 0:
            lines.insert(0, json.dumps(self._header))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            with self.path.open("r+b") as file:
                file.truncate(end)  # away with half a line, or the next one would be glued to it
                file.seek(end)
                file.write("".join(line + "\n" for line in lines).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RecordError(_unwritable(self.path, error)) from error

    def clear(self) -> None:
        """Remove the log, if there is one."""
        self.path.unlink(missing_ok=True)

    def _whole_lines(self) -> list[bytes]:
        if not self.path.is_file():
            return []
        return self.path.read_bytes().split(b"\n")[:-1]


def _check(record: Any, where: str) -> None:
    """Refuse what is no record, with a sentence that names the file and the fault."""
    fault = _fault(record)
    if fault:
        raise RecordError(
            f"{where} is not a usable record ({fault}): delete it and run again, or update the kit "
            "if a newer version wrote it."
        )


def _fault(record: Any) -> str:
    if not isinstance(record, dict):
        return "no JSON object"
    if record.get("schema") != SCHEMA:
        return f"schema {record.get('schema')!r}, this kit reads {SCHEMA}"
    if record.get("kind") not in KINDS or record.get("status") not in STATUSES:
        return f"kind {record.get('kind')!r}, status {record.get('status')!r}"
    made = record.get("provenance")
    if not isinstance(record.get("request"), dict) or not isinstance(made, dict):
        return "request or provenance missing"
    if not isinstance(made.get("machine"), str) or not isinstance(made.get("created"), str):
        return "provenance without machine or time"
    return _accuracy_fault(record) if record["kind"] == "accuracy" else ""


def _accuracy_fault(record: Record) -> str:
    if record["status"] != "complete":
        return ""
    answers, counts = record.get("answers"), record.get("counts")
    if not isinstance(answers, list) or not isinstance(counts, dict):
        return "answers or counts missing"
    ids = [question for question, _ in answers]
    if len(set(ids)) != len(ids):
        return f"{len(ids) - len(set(ids))} question ids occur twice"
    failed = sum(answer is None for _, answer in answers)
    told = (counts.get("asked"), counts.get("answered"), counts.get("failed"))
    if told != (len(ids), len(ids) - failed, failed):
        return f"counts say asked, answered, failed = {told}; the answers say otherwise"
    return ""


def _created(record: Record) -> tuple[datetime, str]:
    # The hash decides between records of one second, so that the order is the same everywhere.
    return created(record), request_hash(record["request"])


def _sources(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.rglob("*.py"))
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, so its code cannot be hashed.")
    return [path]


def _unwritable(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"No space left for {path}; nothing was written: free some space and run again."
    return f"Cannot write {path} ({error.strerror or error}): check the folder's permissions."


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
