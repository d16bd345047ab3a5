"""The registry of quantities: whatever a paper may ask for has one function."""

import pytest

from frugalvlm.papers import QUANTITY_KINDS, load_paper
from frugalvlm.verdicts.evidence import QUANTITIES, measure
from frugalvlm.verdicts.quantity import Evidence, MissingEvidence, hyper_of, wanted


def test_every_kind_of_quantity_has_a_function_and_no_other() -> None:
    assert set(QUANTITIES) == set(QUANTITY_KINDS)
    assert len(set(QUANTITIES.values())) == len(QUANTITIES)


def test_an_unknown_kind_is_refused_with_those_known() -> None:
    empty = Evidence.of(load_paper("visionzip"), [], "pocket")
    with pytest.raises(ValueError, match=r"Unknown quantity 'speed'\. Known: retention, score"):
        measure(empty, {"kind": "speed"})


ASKED = {
    "retention": {"method": "visionzip", "tokens": 16},
    "score": {"method": "visionzip", "tokens": 16},
    "difference": {"a": {"method": "visionzip"}, "b": {"method": "random"}},
    "prefill_speedup": {"method": "visionzip"},
    "flops_ratio": {"method": "visionzip"},
    "kv_ratio": {"method": "visionzip"},
    "token_count": {"method": "visionzip", "statistic": "max_abs_error"},
    "mean_keep_rate": {"method": "visionzip"},
    "attention_concentration": {"patches_fraction": "1/9", "statistic": "last_minus_second_last"},
    "attention_shift": {"by": "text"},
    "rank_agreement": {"statistic": "min_over_layers"},
    "last_layer_share": {"last_layers": 1},
    "memory_ratio": {"method": "sgl"},
    "largest_rise": {"analysis": "search", "figure": "rates"},
    "finding": {"analysis": "depth", "figure": "a.b"},
}


@pytest.mark.parametrize("kind", QUANTITY_KINDS)
def test_without_records_every_kind_says_what_is_missing(kind: str) -> None:
    empty = Evidence.of(load_paper("visionzip"), [], "pocket")
    with pytest.raises(MissingEvidence, match=r"^no "):
        measure(empty, {"kind": kind, **ASKED[kind]})


def test_what_is_no_selector_is_a_hyper_parameter() -> None:
    asked = {"kind": "retention", "method": "fastv", "tokens": 16, "layer": 3}
    assert hyper_of(asked) == {"layer": 3}
    assert wanted(asked) == " (tokens 16, layer 3)"
