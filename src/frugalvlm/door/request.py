"""What a comparison is asked for, understood: methods, budgets, data, model. Nothing is run here.

What makes no sense ends in one sentence; a row that the model cannot serve stays a row, and says
why.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm.benchmarks import ALL_BENCHMARKS
from frugalvlm.benchmarks.base import MAX_QUESTIONS, EvalSplit
from frugalvlm.benchmarks.own import MAX_NEW_TOKENS, Score, own_benchmark
from frugalvlm.digest import plain, request_hash
from frugalvlm.door.papers import open_model
from frugalvlm.engine.guidance import Guide
from frugalvlm.errors import FrugalError
from frugalvlm.hosts import host_for
from frugalvlm.loading import model_hash
from frugalvlm.methods import METHODS, VARIANTS, WITHOUT_BUDGET, Method
from frugalvlm.methods.base import GuidedReducer
from frugalvlm.pocket.models import SPECS
from frugalvlm.report.display import method_labels
from frugalvlm.runs.guides import load_guide, with_learnt
from frugalvlm.runs.options import GUIDE_MODEL, Options
from frugalvlm.views import UnsupportedError

BASELINE = "vanilla"
DEFAULT_METHODS = ("uniform", "fastv", "visionzip")
DEFAULT_BUDGETS = ("1/3", "1/9")
DEFAULT_DATA = "pocket-gqa"
FIELDS = ("id", "metric", "headline_max", "max_new_tokens", "dataset", "sheet")  # of a benchmark


class RequestError(FrugalError, ValueError):
    """A comparison that makes no sense as it was asked for; the message says what would."""


# -- the model ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Opened:
    """A model, ready to be asked.

    Attributes:
        name: as records and tables give it.
        weights: identifies them.
        model: the untouched model.
        processor: of the model.
        device: where it is.
    """

    name: str
    weights: str
    model: PreTrainedModel
    processor: ProcessorMixin
    device: str

    @property
    def patches(self) -> int:
        """Visual tokens of an untouched crop."""
        return host_for(self.model).shape.patches


def opened(model: Any, revision: str | None = None, device: str = "cpu") -> Opened:
    """The model that somebody named, or holds already.

    Args:
        model: an embedded model's name, a folder, a Hub id, or a pair (model, processor).
        revision: of a Hub model.
        device: where a named model goes; a pair stays where it is.

    Raises:
        RequestError: for anything else.
        WeightsError: weights are missing or damaged.
        UnsupportedError: no host knows the family.
    """
    if isinstance(model, str | Path):
        _check_device(device)
        name = str(model).strip()
        weights = model_hash(name, revision)
        found = Opened(name, weights, *open_model(name, revision, device, weights), device)
    elif isinstance(model, tuple | list) and len(model) == 2:
        vlm, processor = model
        if revision is not None:
            raise RequestError("A loaded model has no revision any more: leave it out.")
        if not isinstance(vlm, PreTrainedModel) or not hasattr(processor, "tokenizer"):
            raise RequestError(
                "A loaded model is a pair (model, processor), as load_vlm returns it; got "
                f"({type(vlm).__name__}, {type(processor).__name__})."
            )
        if vlm.training:
            raise RequestError("The model is in training mode: call model.eval() first.")
        name = Path(vlm.config.name_or_path or type(vlm).__name__).name
        found = Opened(name, _hash_of(vlm, processor), vlm, processor, str(vlm.device))
    else:
        raise RequestError(
            f"model={str(model)[:80]!r} is no model: give an embedded model "
            f"({', '.join(SPECS)}), a folder, a Hub id, or a pair (model, processor)."
        )
    host_for(found.model)
    return found


def _check_device(device: str) -> None:
    try:
        torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise RequestError(f"Unknown device {device!r}: cpu, cuda, or cuda:1.") from error


def _hash_of(model: PreTrainedModel, processor: ProcessorMixin) -> str:
    """What decides the answers of a model in memory: weights, configuration, processing."""
    state = {
        name: request_hash([list(t.shape), str(t.dtype), _content(t)])
        for name, t in sorted(model.state_dict().items())
    }
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    picture = getattr(processor, "image_processor", None)
    prepared = plain(picture.to_dict()) if picture is not None else None
    return request_hash([state, plain(config), prepared, processor.tokenizer.get_vocab()])


def _content(tensor: torch.Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


# -- data -----------------------------------------------------------------------------------------


def benchmarks_of(
    data: Any, score: str | Score = "exact_match", max_new_tokens: int | None = None
) -> dict[str, Any]:
    """What was given as data, as benchmarks by the names that tables show.

    Args:
        data: a benchmark id; several, in a list or separated by commas; a Benchmark object or
            anything with its attributes; questions of one's own (see `benchmarks.own`); or a
            mapping from names to any of these.
        score: of questions of one's own.
        max_new_tokens: of questions of one's own.

    Raises:
        RequestError: unknown ids, or two of one name.
        OwnDataError: questions that cannot be asked.
    """
    if isinstance(data, Mapping) and not hasattr(data, "column_names"):
        named = [(str(name), value) for name, value in data.items()]
    elif isinstance(data, str):
        named = [("", part.strip()) for part in data.split(",") if part.strip()]
    elif isinstance(data, Sequence) and data and all(_stands_alone(item) for item in data):
        named = [("", item) for item in data]
    else:
        named = [("", data)]
    asked = any(_is_own(value) for _, value in named)
    if named and not asked and (score, max_new_tokens) != ("exact_match", None):
        raise RequestError(
            "score and max_new_tokens are of your own questions, and a benchmark brings its own: "
            "leave them out."
        )
    if not named:
        raise RequestError(f"No data: give one of {', '.join(ALL_BENCHMARKS)}, or your own.")
    found: dict[str, Any] = {}
    for name, value in named:
        label, benchmark = _benchmark(name, value, score, max_new_tokens)
        if label in found:
            raise RequestError(
                f"Two data sets are called '{label}': give names, data={{'NAME': ...}}."
            )
        found[label] = benchmark
    return found


def _stands_alone(item: Any) -> bool:
    """Whether an item of a list is data by itself and not one question."""
    return isinstance(item, str | Path) or _is_benchmark(item) or hasattr(item, "column_names")


def _is_own(value: Any) -> bool:
    """Whether data are questions, and no benchmark."""
    return not _is_benchmark(value) and not (isinstance(value, str) and value in ALL_BENCHMARKS)


def _is_benchmark(value: Any) -> bool:
    return all(hasattr(value, name) for name in FIELDS)


def _benchmark(
    name: str, value: Any, score: str | Score, max_new_tokens: int | None
) -> tuple[str, Any]:
    if _is_benchmark(value):
        return name or str(getattr(value, "name", value.id)), value
    if isinstance(value, str) and value in ALL_BENCHMARKS:
        return name or value, ALL_BENCHMARKS[value]
    if isinstance(value, str) and not Path(value).expanduser().exists():
        raise RequestError(
            f"Unknown benchmark '{value}'{_close(value, ALL_BENCHMARKS)}, and no such folder. "
            f"Known: {', '.join(ALL_BENCHMARKS)}; or give your own questions."
        )
    tokens = MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens
    own = own_benchmark(value, name, score=score, max_new_tokens=tokens)
    if own.name in ALL_BENCHMARKS:
        raise RequestError(f"'{own.name}' is a benchmark of the kit: give your data another name.")
    return own.name, own


def check_sizes(n: Any, split: Any, **counts: Any) -> None:
    """Refuse numbers that are none.

    Raises:
        RequestError: names the argument and what it may be.
    """
    for name, value in {"n": n, **counts}.items():
        least = 2 if name == "repeats" else 1  # an interval needs two rounds
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
            raise RequestError(f"{name} is a whole number from {least}, not {value!r}.")
    if n > MAX_QUESTIONS:
        raise RequestError(f"n must be 1 to {MAX_QUESTIONS}, got {n}.")
    if split not in get_args(EvalSplit):
        raise RequestError(
            f"Unknown split {split!r}: dev (to choose with) or test (to report), "
            "or replication (to report again)."
        )


def check_switches(progress: Any, **switches: Any) -> None:
    """Refuse what is neither True nor False, such as a text that says no.

    Raises:
        RequestError: names the argument.
    """
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise RequestError(f"{name} is True or False, not {value!r}.")
    reports = hasattr(progress, "start") and hasattr(progress, "advance")
    if not isinstance(progress, bool | None) and not reports:
        raise RequestError(f"progress is True, False, None or a reporter, not {progress!r}.")


# -- budgets --------------------------------------------------------------------------------------


def budgets_of(budgets: Any, patches: int) -> list[int]:
    """Visual tokens per crop, largest first.

    Args:
        budgets: one or several, in a list or separated by commas: whole numbers are counts; 0.25,
            "25%" and "1/4" are shares of the model's patches.
        patches: of an untouched crop.

    Raises:
        RequestError: for what is neither.
    """
    if isinstance(budgets, str):
        budgets = [part for part in budgets.split(",") if part.strip()]
    elif isinstance(budgets, numbers.Real):
        budgets = [budgets]
    if not isinstance(budgets, Iterable):
        raise RequestError(_BUDGET.format(repr(budgets)))
    return sorted({_budget(value, patches) for value in budgets}, reverse=True)


_BUDGET = (
    "{} is no budget: give a whole number of visual tokens from 1, or a share of them such as "
    '0.25, "25%" or "1/4".'
)


def _budget(value: Any, patches: int) -> int:
    try:
        number = _number(value)
    except (ValueError, ZeroDivisionError, TypeError, OverflowError) as error:
        raise RequestError(_BUDGET.format(repr(value))) from error
    if isinstance(number, int):
        if number < 1:
            raise RequestError(_BUDGET.format(repr(value)))
        return number
    if not 0 < number <= 1:
        raise RequestError(_BUDGET.format(repr(value)))
    return max(1, round(number * patches))


def _number(value: Any) -> int | Fraction:
    """A count, or a share."""
    if isinstance(value, bool):
        raise ValueError(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return Fraction(float(value)) if not isinstance(value, Fraction) else value
    text = str(value).strip()
    if not isinstance(value, str):
        raise TypeError(text)
    if text.endswith("%"):
        return Fraction(text[:-1].strip()) / 100
    return Fraction(text) if set(text) & set("./") else int(text)


# -- methods --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Line:
    """A row of a comparison.

    Attributes:
        key: of its method.
        label: for people.
        budget: visual tokens per crop that were asked for.
        method: None where it cannot run.
        reason: why it cannot.
    """

    key: str
    label: str
    budget: int
    method: Method | None
    reason: str = ""


def kinds_of(methods: Any) -> list[type[Method] | Method]:
    """Classes and ready objects, as they were named or given, each once.

    Args:
        methods: one or several, in a list or separated by commas: keys, classes, objects.

    Raises:
        RequestError: for what is no method, or two methods of one key.
    """
    if isinstance(methods, str):
        methods = [part.strip() for part in methods.split(",") if part.strip()]
    elif isinstance(methods, Method) or inspect.isclass(methods):
        methods = [methods]
    if not isinstance(methods, Iterable):
        raise RequestError(f"{methods!r} is no list of methods.")
    found: list[type[Method] | Method] = []
    classes: dict[str, type] = {BASELINE: METHODS[BASELINE]}
    for given in methods:
        kind = _kind(given)
        if any(kind is other or (isinstance(kind, Method) and kind == other) for other in found):
            continue
        for part in kind.parts if isinstance(kind, Method) else (kind,):
            own = type(part) if isinstance(part, Method) else part
            known = classes.setdefault(own.key, METHODS.get(own.key, own))
            if known is not own:
                raise RequestError(
                    f"{own.__name__} and {known.__name__} are both called '{own.key}': give yours "
                    "a key of its own."
                )
        found.append(kind)
    if not found:
        raise RequestError(f"No method: give some of {', '.join(METHODS)}, or your own.")
    return found


def _kind(given: Any) -> type[Method] | Method:
    if isinstance(given, str):
        if given in METHODS or given in VARIANTS:
            return METHODS.get(given) or VARIANTS[given]
        if "+" in given or "|" in given:
            raise RequestError(
                f"'{given}': compose method objects, each with its budget, for example "
                "methods.VisionZip(28, 4) | methods.FastV(16)."
            )
        raise RequestError(
            f"Unknown method '{given}'{_close(given, METHODS)}. Known: {', '.join(METHODS)}; or "
            "give a class or an object."
        )
    own = given if inspect.isclass(given) else type(given)
    if not issubclass(own, Method):
        raise RequestError(
            f"{given!r} is no method: give a key ({', '.join(METHODS)}), a class derived from "
            "frugalvlm.methods.Method, or an object of one."
        )
    if inspect.isabstract(own):
        missing = ", ".join(sorted(own.__abstractmethods__))
        raise RequestError(f"{own.__name__} cannot be used yet: it lacks {missing}.")
    if not is_dataclass(own) or "__dataclass_fields__" not in vars(own):
        raise RequestError(
            f"{own.__name__} must be a dataclass, so that records can tell its parameters: write "
            "@dataclass(frozen=True) above it."
        )
    if not isinstance(given.key if not inspect.isclass(given) else getattr(own, "key", None), str):
        raise RequestError(
            f'{own.__name__} needs a name for tables and records: key: ClassVar[str] = "my_method".'
        )
    return given


def lines_of(
    kinds: Sequence[type[Method] | Method],
    budgets: Sequence[int],
    subject: Opened,
    guide: Any = None,
    example: Callable[[], Mapping[str, Any]] | None = None,
) -> list[Line]:
    """The rows: the untouched model, then budget by budget; what cannot run says why.

    Args:
        kinds: classes, made for each budget, and ready objects.
        budgets: visual tokens per crop.
        subject: the model.
        guide: small model of the methods that need one: a name, folder, Hub id or a pair; None: the
            kit's own.
        example: makes the inputs of one prompt, on which objects without `kept_tokens` show what
            they keep.

    Raises:
        RequestError: not one row can run.
    """
    total, names, guides = subject.patches, method_labels(), _Guides(subject, guide)
    lines = []
    for kind in kinds:
        if isinstance(kind, Method):
            if kind.key != BASELINE:
                lines.append(_ready(kind, subject, guides, names, example))
        elif kind.key in WITHOUT_BUDGET:
            own = kind.for_budget(total, total)
            lines.append(_ready(own, subject, guides, names, example))
        elif kind.key != BASELINE:
            lines += [_made(kind, budget, subject, guides, names) for budget in budgets]
    lines = list({_identity(line): line for line in lines}.values())
    if lines and not any(line.method for line in lines):
        raise RequestError(f"None of the rows can run: {lines[0].label}: {lines[0].reason}")
    # Stable: within a budget, in the order of the methods.
    lines.sort(key=lambda line: -line.budget)
    untouched = METHODS[BASELINE].for_budget(total, total)
    return [Line(BASELINE, "untouched", total, untouched), *lines]


def _made(
    kind: type[Method], budget: int, subject: Opened, guides: _Guides, names: Mapping[str, str]
) -> Line:
    """A class at a budget."""
    label = names.get(kind.key, kind.key)
    try:
        method = kind.for_budget(budget, subject.patches)
        return Line(kind.key, label, budget, _tried(method, subject, guides))
    except FrugalError as error:
        return Line(kind.key, label, budget, None, str(error))


def _ready(
    method: Method, subject: Opened, guides: _Guides, names: Mapping[str, str],
    example: Callable[[], Mapping[str, Any]] | None,
) -> Line:  # fmt: skip
    """An object, run as it is; its budget is what it asks for."""
    label = _object_label(method, names)
    kept = getattr(method, "kept_tokens", None)
    budget = kept if isinstance(kept, int) else subject.patches
    try:
        method = _tried(method, subject, guides)
        if not isinstance(kept, int) and example is not None:
            budget = _kept_by(method, subject, example())
        return Line(method.key, label, budget, method)
    except FrugalError as error:
        return Line(method.key, label, budget, None, str(error))


def _tried(method: Method, subject: Opened, guides: _Guides) -> Method:
    """The method with what it needs; put on the model once, which refuses what does not go."""
    method = with_learnt(method, subject.name)
    if isinstance(method, GuidedReducer) and method.guide is None:
        method = replace(method, guide=guides.get())
    with method.on(subject.model):
        return method


@torch.inference_mode()
def _kept_by(method: Method, subject: Opened, example: Mapping[str, Any]) -> int:
    """Visual tokens per crop that a method leaves, the mean over decoder layers, on one prompt."""
    with method.on(subject.model) as trace:
        subject.model(**example)
    placeholders = host_for(subject.model).placeholders(example["input_ids"])
    if not trace.tokens_per_layer:
        return subject.patches
    share = trace.mean_tokens / int(placeholders.sum())
    return max(1, round(share * subject.patches))


class _Guides:
    """The small model, loaded when the first method needs it."""

    def __init__(self, subject: Opened, given: Any) -> None:
        self.subject, self.given = subject, given
        self.guide: Guide | None = None

    def get(self) -> Guide:
        if self.guide is None:
            self.guide = self._load()
        return self.guide

    def _load(self) -> Guide:
        subject, given = self.subject, self.given
        if given is None or isinstance(given, str | Path):
            options = Options(
                model=subject.name, guide=str(given or GUIDE_MODEL), device=subject.device
            )
            return load_guide(options, subject.processor)
        small = opened(given)
        if small.processor.tokenizer.get_vocab() != subject.processor.tokenizer.get_vocab():
            raise UnsupportedError(
                f"{small.name} has another tokenizer than {subject.name}: its ranking would be of "
                "other prompts; take a small model of the same family."
            )
        return Guide(small.model, f"{small.name}@{small.weights[:8]}")


def _identity(line: Line) -> str:
    told = line.method.describe() if line.method else [line.key, line.label]
    return request_hash([told, line.budget])


def _object_label(method: Method, names: Mapping[str, str]) -> str:
    """Its name, with what was set: `VisionZip (dominant=14, contextual=2)`."""
    told = []
    for part in method.parts:
        values = {k: v for k, v in part.describe().items() if k != "method"}
        usual = getattr(type(part), "__dataclass_fields__", {})
        own = [f"{k}={v}" for k, v in values.items()
               if k not in usual or v != usual[k].default]  # fmt: skip
        name = names.get(part.key, part.key)
        told.append(f"{name} ({', '.join(own)})" if own else name)
    return " + ".join(told)


def _close(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word.lower(), list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""
