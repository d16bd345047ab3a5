"""`A | B` is what two nested blocks are, bit for bit; refusals, records and traces included."""

import pytest
import tiny_hosts as tiny
import torch

from frugalvlm import methods
from frugalvlm.methods import AIM, Composed, EarlyExit, FastV, PyramidDrop, Uniform, VisionZip
from frugalvlm.runs.identity import code_of
from frugalvlm.trace import ExitTrace
from frugalvlm.views import BudgetError, UnsupportedError

PAIRS = {
    "visionzip+fastv": (VisionZip(8, 2), FastV(4, k=2)),
    "uniform+pyramiddrop": (Uniform(10), PyramidDrop.for_budget(10, tiny.PATCHES)),
    "fastv+uniform": (FastV(4, k=2), Uniform(10)),
    "uniform+early_exit": (Uniform(6), EarlyExit(threshold=0.25)),
}


@pytest.mark.parametrize("host", ["llava_clip", "llava_next", "llava_onevision"])
@pytest.mark.parametrize("name", PAIRS)
def test_equals_nested_blocks(name, host):
    outer, inner = PAIRS[name]
    model, inputs = tiny.model_for(host), tiny.prompt(host, tiny.MANY)
    arguments = {"max_new_tokens": 4, "do_sample": False}
    both = outer | inner
    with torch.no_grad():
        untouched = model(**inputs).logits  # the library sets itself up in a first call
        before = tiny.fingerprint_of(model)
        with outer.on(model) as one, inner.on(model):
            wanted, said = model(**inputs).logits, model.generate(**inputs, **arguments)
        with both.on(model) as trace:
            got, answer = model(**inputs).logits, model.generate(**inputs, **arguments)
    assert torch.equal(got, wanted)
    assert torch.equal(answer, said)
    assert not torch.equal(got, untouched), "the pair must change something"
    if "early" not in outer.key:
        assert trace.tokens_per_layer == one.tokens_per_layer
        assert trace.kept == one.kept
    assert tiny.fingerprint_of(model) == before


def test_one_trace_tells_of_both_cuts_and_of_exits():
    model, inputs = tiny.model_for("llava_clip"), tiny.prompt("llava_clip")
    with (VisionZip(8, 2) | FastV(4, k=2)).on(model) as trace, torch.no_grad():
        model(**inputs)
    assert trace.tokens_per_layer == [10, 10, 4, 4]
    for both in (Uniform(6) | EarlyExit(threshold=0.25), EarlyExit(threshold=0.25) | Uniform(6)):
        with both.on(model) as trace:
            model.generate(**inputs, max_new_tokens=6, do_sample=False)
            assert isinstance(trace, ExitTrace)
            assert trace.tokens_per_layer == [6] * tiny.LAYERS
        assert len(trace.exits) == 5
        assert trace.mean_layers <= tiny.LAYERS


def test_name_record_and_flags_are_those_of_the_parts():
    both = VisionZip(8, 2) | FastV(4)
    assert both.key == "visionzip+fastv"
    assert both.describe() == {
        "method": "visionzip+fastv",
        "parts": [VisionZip(8, 2).describe(), FastV(4).describe()],
    }
    three = Uniform(10) | (FastV(8, k=1) | FastV(4, k=2))
    assert three == Uniform(10) | FastV(8, k=1) | FastV(4, k=2), "flat, however it was bracketed"
    assert [m.key for m in three.parts] == ["uniform", "fastv", "fastv"]
    assert (methods.FasterVLM(4) | FastV(4)).needs_cls
    assert not both.needs_cls
    assert not both.adaptive
    assert (methods.METHODS["prumerge_plus"].for_budget(8, 16) | FastV(4)).adaptive == (
        methods.METHODS["prumerge_plus"].adaptive
    )
    with pytest.raises(AttributeError):
        both.members = ()


def test_its_code_is_that_of_all_parts():
    alone = {code_of(VisionZip(8, 2)), code_of(FastV(4)), code_of(Uniform(4))}
    assert len(alone) == 3
    assert code_of(VisionZip(8, 2) | FastV(4)) not in alone
    assert code_of(VisionZip(8, 2) | FastV(4)) != code_of(VisionZip(8, 2) | Uniform(4))


def test_what_does_not_go_together_is_refused_and_leaves_nothing():
    model = tiny.model_for("llava_clip")
    before = tiny.fingerprint_of(model)
    with (
        pytest.raises(UnsupportedError, match="both reduce tokens"),
        (VisionZip(8, 2) | Uniform(4)).on(model),
    ):
        pass
    with (
        pytest.raises(UnsupportedError, match="both cut before layer 2"),
        (FastV(8, k=2) | FastV(4, k=2)).on(model),
    ):
        pass
    assert tiny.fingerprint_of(model) == before


@pytest.mark.parametrize("part", [Uniform(99), FastV(99)])
def test_every_part_is_checked_on_its_own(part):
    model = tiny.model_for("llava_clip")
    other = AIM(6, l1=1, l2=4) if part.key == "uniform" else Uniform(6)
    with pytest.raises(BudgetError, match="99"), (other | part).on(model):
        pass


def test_only_method_objects_compose():
    with pytest.raises(TypeError):
        Uniform(4) | "fastv"
    with pytest.raises(UnsupportedError, match="two or more method objects"):
        Composed((Uniform(4),))
    with pytest.raises(BudgetError, match="each part with its own budget"):
        Composed.for_budget(4, 16)
