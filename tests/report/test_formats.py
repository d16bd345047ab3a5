"""How numbers are written."""

from frugalvlm.formats import plus_minus


def test_a_percentage_never_reaches_below_nothing() -> None:
    assert plus_minus(0.3, 0.0, 1.0, 1) == "0.3 [0.0, 1.0]"
    assert plus_minus(5.0, 3.0, 7.0, 1) == "5.0 ±2.0"
    assert plus_minus(0.3, -0.7, 1.3, 1) == "0.3 ±1.0"  # a difference may
    assert plus_minus(0.3, None, None, 1) == "0.3"
