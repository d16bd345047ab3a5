"""What a record holds, kind by kind; whatever else it holds is let through.

Only records of finished runs must have what their kind is about.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = ["KINDS", "SCHEMA", "STATUSES", "fault_of"]

# 2: with a digest of the content. Records of schema 1, made before, have none and are still read.
SCHEMA = 2
KINDS = ("accuracy", "efficiency", "blueprint", "attention", "phenomena", "analysis")
STATUSES = ("complete", "partial", "failed")

Number = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    # Strict: "12" is no number. Values come as JSON, whose lists may be tuples here.
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Provenance(_Part):
    created: str
    machine: str
    code: str | None = None
    model_hash: str | None = None
    data_hash: str | None = None


class _Record(_Part):
    made_as: Literal[1, 2] = Field(alias="schema")
    kind: Literal["accuracy", "efficiency", "blueprint", "attention", "phenomena", "analysis"]
    status: Literal["complete", "partial", "failed"]
    request: dict[str, Any]
    provenance: _Provenance
    digest: str | None = None


class _Method(_Part):
    method: str


class _Asked(_Part):
    method: _Method
    budget: Count
    benchmark: str
    n: Count


class _Tokens(_Part):
    requested: Count
    per_layer: Annotated[list[Number], Field(min_length=1)]
    spread: list[tuple[Number, Number]] = []


class _Counts(_Part):
    asked: Count
    answered: Count
    failed: Count


class _Accuracy(_Record):
    request: _Asked  # type: ignore[assignment]
    tokens: _Tokens
    counts: _Counts
    answers: list[tuple[str, str | None]]
    metrics: dict[str, Any]


class _Milliseconds(_Part):
    p50: Number
    p95: Number | None = None


class _Ratio(_Part):
    median: Number
    low: Number | None
    high: Number | None


class _Energy(_Part):
    joules_per_question: Number | None
    modelled: bool
    reliable: bool | None = None
    methods: dict[str, str] = {}


class _Counted(_Part):
    """What is counted of a prefill."""

    method: str
    budget: Count
    tokens_mean: Number
    tokens_after: Number
    flops: Number
    flops_parts: dict[str, Number]
    kv_bytes: Number
    kv_visual_bytes: Number


class _Measured(_Counted):
    prefill_ms: _Milliseconds
    decode_ms: _Milliseconds
    prefill_speedup: _Ratio
    energy: _Energy
    peak_mib: Number | None = None


class _Efficiency(_Record):
    rows: Annotated[list[_Measured], Field(min_length=1)]


class _Bench(_Record):
    """The speed benchmark's: of the same kind, with rows of its own."""

    rows: Annotated[list[dict[str, Any]], Field(min_length=1)]


class _Blueprint(_Record):
    rows: Annotated[list[_Counted], Field(min_length=1)]


class _Attention(_Record):
    patches_fraction: Number
    images: Count
    mass_per_layer: Annotated[list[Number], Field(min_length=1)]


class _Phenomena(_Record):
    images: Count
    shares: dict[str, Any]
    tau: list[list[float]]


class _Named(_Part):
    analysis: str


class _Analysis(_Record):
    request: _Named  # type: ignore[assignment]


_SCHEMAS: dict[str, type[_Record]] = {
    "accuracy": _Accuracy,
    "efficiency": _Efficiency,
    "blueprint": _Blueprint,
    "attention": _Attention,
    "phenomena": _Phenomena,
    "analysis": _Analysis,
}


def fault_of(record: Any, text: str) -> str:
    """What is wrong with a record, in a few words; "" for nothing.

    Args:
        record: what the text holds.
        text: the same as JSON.
    """
    if not isinstance(record, dict):
        return "no JSON object"
    schema = record.get("schema")
    if isinstance(schema, bool) or schema not in (1, SCHEMA):
        return f"schema {schema!r}, this kit reads 1 and {SCHEMA}"
    try:
        _model_of(record).model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        more = f", and {error.error_count() - 1} more faults" if error.error_count() > 1 else ""
        return f"{place}: {first['msg'][:1].lower()}{first['msg'][1:]}{more}"
    try:
        datetime.fromisoformat(record["provenance"]["created"])
    except ValueError:
        return f"provenance.created: {record['provenance']['created']!r} is no time"
    if record["status"] == "complete" and record["kind"] == "accuracy":
        return _miscounted(record)
    return _unlike(record)


def _model_of(record: dict[str, Any]) -> type[_Record]:
    kind, request = record.get("kind"), record.get("request")
    if record.get("status") != "complete" or not isinstance(kind, str):
        return _Record
    if kind == "efficiency" and isinstance(request, dict) and request.get("scale") == "benchmark":
        return _Bench
    return _SCHEMAS.get(kind, _Record)


def _miscounted(record: dict[str, Any]) -> str:
    """Whether an accuracy record's counts and its answers agree."""
    answers, counts = record["answers"], record["counts"]
    ids = {question for question, _ in answers}
    if len(ids) != len(answers):
        return f"{len(answers) - len(ids)} question ids occur twice"
    failed = sum(answer is None for _, answer in answers)
    told = (counts["asked"], counts["answered"], counts["failed"])
    if told != (len(ids), len(ids) - failed, failed):
        return f"counts say asked, answered, failed = {told}; the answers say otherwise"
    return ""


def _unlike(record: dict[str, Any]) -> str:
    """Whether an efficiency record has a row for every method that it was asked about."""
    asked, rows = record["request"].get("methods"), record.get("rows")
    if isinstance(asked, list) and isinstance(rows, list) and len(asked) != len(rows):
        return f"{len(rows)} rows for {len(asked)} methods"
    return ""
