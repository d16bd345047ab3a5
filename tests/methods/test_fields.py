"""Every field of every method says what it may hold, is checked, and is explained in its help."""

import copy
import inspect
import math
import pydoc
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pytest

from frugalvlm import methods
from frugalvlm.errors import FrugalError
from frugalvlm.methods import METHODS, VARIANTS, Method, Vanilla
from frugalvlm.methods.base import SizedReducer
from frugalvlm.methods.fields import RUNTIME, Limits, Share, rules_of
from frugalvlm.methods.gsearch import GSearchBayes, GSearchGreedy
from frugalvlm.views import BudgetError, UnsupportedError

EVERY = (*METHODS.values(), *VARIANTS.values(), GSearchGreedy, GSearchBayes)
FIELDS = [(kind, name) for kind in EVERY for name in rules_of(kind) if name != "guide"]
ONE = [1]
KEEPS_ALL = (Vanilla, methods.EarlyExit, methods.ManualExit)
WRONG = ["2", "", True, np.True_, None, math.nan, math.inf, -math.inf, np.float32("nan"), -1, -0.5,
         2.5, ONE, ["a"], ("a",), {}, {3}, 1j, object(), np.array([1.0, 2.0])]  # fmt: skip
RIGHT = {  # of these, what each field may hold after all
    "prune": [True, np.True_],
    "k": [2.5],  # of gsearch; fastv's is whole
    "tau": [2.5],
    "scale": [2.5],
    "bias": [2.5],
    "rates": [ONE],
    "threshold": [-1, -0.5, 2.5],  # out of reach: never fires
}


class Model:
    config = None


def by_default(kind: type[Method]) -> Method:
    return kind.for_budget(144 if kind in KEEPS_ALL else 16, 144)


def made_with(kind: type[Method], name: str, value: Any) -> Method:
    beside = {"kept_tokens": None} if name == "rates" else {}
    return replace(by_default(kind), **{**beside, name: value})


def possible(kind: type[Method], name: str, value: Any) -> bool:
    if value is None:
        return "None" in rules_of(kind)[name].words
    whole = kind is methods.FastV or name not in RIGHT
    return not whole and any(value is right for right in RIGHT[name])


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda x: getattr(x, "key", x))
def test_wrong_values_are_refused_in_one_sentence(kind, name):
    for value in WRONG:
        if possible(kind, name, value):
            continue
        with pytest.raises(FrugalError) as caught:
            print("taken:", made_with(kind, name, value))
        said = str(caught.value)
        assert "\n" not in said
        assert said.endswith(".")
        assert ". " not in said
        assert said.startswith(f"{kind.__name__}({name}=")
        assert f"{name} is " in said
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.key)
def test_every_field_is_declared_and_explained(kind):
    for f in fields(kind):
        if f.metadata == RUNTIME:
            continue
        rule = rules_of(kind)[f.name]
        assert rule.text, f"{kind.__name__}.{f.name} has no description"
        assert f.name == "guide" or rule.hint is not Any
        assert f"\n    {f.name} ({rule.words}"[:60] in kind.__doc__


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.key)
def test_help_names_the_paper_and_the_algorithm(kind):
    doc = inspect.getdoc(kind)
    paper = [line for line in doc.splitlines() if line.startswith("Paper:") and "arXiv:" in line]
    assert paper or "Source: none; " in doc or "Source: the control of arXiv:" in doc
    assert "\n1. " in doc or "control" in doc or kind.key == "random"
    assert "Deviations: " in doc
    assert all(len(line) <= 100 for line in doc.splitlines())
    assert "Annotated" not in str(inspect.signature(kind))


def test_the_signature_and_the_words_of_one_method():
    assert str(inspect.signature(methods.VisionZip)) == (
        "(dominant, contextual, merge='target_plus_mean', score='auto')"
    )
    doc = methods.VisionZip.__doc__
    assert doc.startswith("Keep `dominant` tokens")
    assert "    dominant (a whole number of visual tokens from 1): D, per crop" in doc
    assert "    merge (one of 'target_plus_mean', 'mean'; default 'target_plus_mean')" in doc
    assert methods.VisionZip(14, 2).__doc__ == doc, "help(object) as help(class)"


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.key)
@pytest.mark.parametrize("total", [16, 144, 576, 729])
def test_budgets_pass_and_reprs_are_code(kind, total):
    names = {**vars(methods), "GSearchGreedy": GSearchGreedy, "GSearchBayes": GSearchBayes}
    for kept in {1, 2, total // 4, total // 2, total - 1, total}:
        if kind in KEEPS_ALL and kept != total:
            continue
        method = kind.for_budget(kept, total)
        numpy = kind.for_budget(np.int64(kept), np.int32(total))
        assert eval(repr(method), names) == method == numpy
        assert repr(method) == repr(numpy), "plain numbers"
        for value in method.describe().values():
            assert type(value) in (int, float, bool, str, list, type(None))
            if isinstance(value, list):
                assert all(type(part) in (int, float, str) for part in value)


def test_short_reprs():
    assert repr(methods.VisionZip(14, 2)) == "VisionZip(14, 2)"
    assert repr(methods.VisionZip(14, 2, merge="mean")) == "VisionZip(14, 2, merge='mean')"
    assert repr(methods.VisionZipMean(14, 2)) == "VisionZipMean(14, 2)"
    assert repr(methods.PruMergePlus(16, 8)) == "PruMergePlus(16, neighbours=8)"
    assert repr(methods.GSearch(rates=(1.0, 0.5))) == "GSearch(rates=(1.0, 0.5))"
    assert repr(Vanilla()) == "Vanilla()"
    guide = type("Small", (), {"name": "small@1f0c", "model": None})()
    guided = methods.SGL(4, 0.25, guide=guide)
    assert repr(guided) == "SGL(4, 0.25, guide=<small@1f0c>)"


@pytest.mark.parametrize(
    "call",
    [
        lambda: methods.VisionZip(14, 2, merge="avg"),
        lambda: methods.VisionZip(14, 2, score="clss"),
        lambda: methods.VisionZip(14, -2),
        lambda: methods.SparseVLM((4, 20, 40)),
        lambda: methods.SparseVLM((9, 6)),
        lambda: methods.SparseVLMRank((9, 6, 3)),
        lambda: methods.EarlyExit("patience", 1.5),
        lambda: methods.EarlyExit(threshold=10**400),
        lambda: methods.SGL(4, 0.5, guide_from=0.6, guide_to=0.5),
        lambda: methods.SGL(4, 0.5, guide="pocket-llava-small"),
        lambda: methods.SGL(4, 0.5).guided_by("pocket-llava-small"),
        lambda: methods.SGL(4, 0.5).guided_by(Model, max_new_tokens=0),
        lambda: methods.SGL(4, 0.5).guided_by(Model, max_new_tokens="10"),
        lambda: methods.GSearch().check(methods.base.Shape(144, (12, 12), 12, True)),
        lambda: methods.FasterVLM.for_budget(16, "144"),
        lambda: methods.FasterVLM.for_budget(16, True),
        lambda: methods.FasterVLM.for_budget(1, 0),
        lambda: methods.FasterVLM.for_budget(math.nan, 144),
        lambda: methods.FastV.for_mean(144, 144, 2),
        lambda: methods.GSearch.for_mean(144, 144, 2),
        lambda: methods.FastV.for_mean(48, 144, "12"),
        lambda: methods.SGL.for_mean(48, 144, 12.0),
        lambda: methods.GSearch.for_mean(48, 144, None),
        lambda: methods.PyramidDrop.for_mean(48, 144, -3),
    ],
)
def test_what_goes_wrong_between_fields_and_in_budgets(call):
    with pytest.raises(FrugalError, match=r"^[^\n]*\.$") as caught:
        call()
    assert ". " not in str(caught.value)


def test_budgets_are_named_as_they_were_asked_for():
    with pytest.raises(BudgetError, match=r"a budget of 5 of 16 is impossible: choose 16\."):
        Vanilla.for_budget(5, 16)
    with pytest.raises(BudgetError, match="a budget of 5 of 16"):
        methods.EarlyExit.for_budget(5, 16)
    shape = methods.base.Shape(144, (12, 12), 12, True)
    with pytest.raises(BudgetError, match=r"202 visual tokens \(VisionZip\(200, 2\)\) .* 144 per"):
        methods.VisionZip(200, 2).check(shape)
    with pytest.raises(UnsupportedError, match=r"choose neighbours in 1\.\.143"):
        methods.PruMergePlus(16, 144).check(shape)


def test_lists_become_tuples():
    assert methods.SparseVLM([9, np.int64(6), 3]) == methods.SparseVLM((9, 6, 3))


# -- a new method: its annotations are all that it says -------------------------------------------


@dataclass(frozen=True)
class Own(SizedReducer):
    """A method of a user."""

    key: ClassVar[str] = "own"
    share: Annotated[Share, "of something"] = 0.5
    mode: Literal["a", "b"] = "a"
    steps: Annotated[tuple[int, ...], Limits(1, 9)] = (1,)
    name: str | None = None
    pair: tuple[tuple[int, ...], ...] = ()
    more: Any = field(default=None, repr=False)

    def reduce(self, view):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("wrong", "possible"),
    [
        ({"kept_tokens": 0}, "a whole number of visual tokens from 1"),
        ({"share": 1.5}, "a finite number from 0 to 1"),
        ({"mode": "c"}, "one of 'a', 'b'"),
        ({"steps": (1, 10)}, "a tuple of which each is a whole number from 1 to 9"),
        ({"steps": "12"}, "a tuple"),
        ({"name": 3}, "a text or None"),
        ({"pair": ((1,), (1.5,))}, "a tuple of which each is a tuple of which"),
    ],
)
def test_a_users_own_method_is_checked_by_its_annotations(wrong, possible):
    assert Own(4, 1, "b", [2], "x", [[1, 2]], object()).pair == ((1, 2),)
    with pytest.raises(FrugalError, match=possible):
        Own(**{"kept_tokens": 4, **wrong})


def test_a_users_own_method_is_explained_without_a_paper():
    assert Own.__doc__.startswith(
        "A method of a user.\n\nArgs:\n    kept_tokens (a whole number of"
    )
    assert "share (a finite number from 0 to 1; default 0.5): of something" in Own.__doc__
    assert "fields" not in Own.__doc__, "not this file's docstring"
    assert repr(Own(4, mode="b")) == "Own(4, mode='b')"


def test_an_annotation_that_cannot_be_read_is_an_error():
    body = {"__annotations__": {"late": "Undefined"}, "late": 1, "key": "unread"}
    with pytest.raises(UnsupportedError, match=r"Unread\.late cannot be read"):
        dataclass(frozen=True)(type("Unread", (Own,), {**body, "__module__": __name__}))


def test_a_class_that_was_pickled_by_value_still_knows_its_defaults():
    """Notebook cells go to other processes so; the mark of a missing default is copied, too."""
    kind = dataclass(frozen=True)(type("Moved", (Own,), {"__module__": __name__}))
    moved = {name: copy.copy(f) for name, f in kind.__dataclass_fields__.items()}
    for f in moved.values():
        f.default_factory = type(MISSING)()
    moved["kept_tokens"].default = type(MISSING)()
    kind.__dataclass_fields__ = moved
    assert repr(kind(4, mode="b")) == "Moved(4, mode='b')"
    assert str(inspect.signature(kind)).startswith("(kept_tokens, share=0.5, ")


def test_a_class_inside_a_function_may_name_what_is_local():
    Mode = Literal["a", "b"]

    @dataclass(frozen=True)
    class Local(SizedReducer):
        key: ClassVar[str] = "local"
        mode: "Mode" = "a"

        def reduce(self, view):
            raise NotImplementedError

    assert repr(Local(4, mode="b")) == "Local(4, mode='b')"
    with pytest.raises(BudgetError):
        Local(0)


# -- tab completion --------------------------------------------------------------------------------


def test_the_room_shows_methods_and_no_modules():
    shown = dir(methods)
    assert shown == sorted(methods.__all__)
    assert not any(inspect.ismodule(getattr(methods, name)) for name in shown)
    assert {kind.__name__ for kind in (*METHODS.values(), *VARIANTS.values())} < set(shown)


def test_the_front_shows_what_it_has():
    import frugalvlm

    assert dir(frugalvlm) == sorted(frugalvlm.__all__)
    assert all(getattr(frugalvlm, name) is not None for name in dir(frugalvlm))


@pytest.mark.parametrize("key", METHODS)
def test_help_prints_arguments_and_paper(key):
    """What `help()` shows; pydoc reads docstrings otherwise than `inspect` does."""
    shown = pydoc.plain(pydoc.render_doc(METHODS[key]))
    start = shown[: shown.index("Method resolution order")]
    assert "arXiv:" in start or "Source: none" in start
    assert ("Args:" in start) == bool(
        [f for f in fields(METHODS[key]) if "runtime" not in f.metadata]
    )
