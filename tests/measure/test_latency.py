import gc

import pytest

from frugalvlm.measure import Latency, interleaved_latency, ratio
from frugalvlm.measure import latency as module


def test_order_alternates_and_warmup_is_dropped():
    called = []
    runs = {"a": lambda: called.append("a"), "b": lambda: called.append("b")}
    times = interleaved_latency(runs, repeats=4, warmup=2)
    assert "".join(called) == "abba" + "abbaabba"
    assert {name: t.n for name, t in times.items()} == {"a": 4, "b": 4}


def test_samples_are_milliseconds_in_the_order_of_rounds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    seconds = iter([9.0, 0.001, 0.002, 0.004])

    def run():
        now[0] += next(seconds)

    times = interleaved_latency({"a": run}, repeats=3, warmup=1)["a"]
    assert times.samples_ms == pytest.approx((1.0, 2.0, 4.0))
    assert times.p50_ms == pytest.approx(2.0)
    assert times.p95_ms == pytest.approx(3.8)


def test_cuda_is_synchronised_before_both_clock_readings(monkeypatch):
    events = []
    monkeypatch.setattr(module.torch.cuda, "synchronize", lambda device: events.append("sync"))
    monkeypatch.setattr(module.time, "perf_counter", lambda: events.append("clock") or 0.0)
    interleaved_latency({"a": lambda: events.append("run")}, repeats=1, warmup=0, device="cuda")
    assert events == ["sync", "clock", "run", "sync", "clock"]


def test_no_garbage_collection_inside_a_sample_and_restored_after():
    seen = []

    def fail():
        seen.append(gc.isenabled())
        raise KeyError

    with pytest.raises(KeyError):
        interleaved_latency({"a": fail}, repeats=1, warmup=0)
    assert seen == [False]
    assert gc.isenabled()


@pytest.mark.parametrize(("runs", "repeats", "warmup"), [({}, 1, 0), ({"a": int}, 0, 0)])
def test_nothing_to_time_raises(runs, repeats, warmup):
    with pytest.raises(ValueError, match="need a run"):
        interleaved_latency(runs, repeats=repeats, warmup=warmup)


def test_ratio_is_paired_by_round():
    """Drift by 10x between rounds leaves the paired ratio exact."""
    b = Latency((1.0, 10.0, 3.0, 30.0, 2.0))
    a = Latency(tuple(2 * x for x in b.samples_ms))
    result = ratio(a, b)
    assert (result.median, result.low, result.high, result.n) == (2.0, 2.0, 2.0, 5)
    uneven = ratio(Latency((2.0, 30.0, 3.0, 30.0, 4.0)), b)
    assert uneven.median == 2.0  # of 2, 3, 1, 1, 2
    assert 1.0 <= uneven.low <= uneven.median <= uneven.high <= 3.0
    assert uneven.low < uneven.high


def test_ratio_needs_the_same_rounds():
    with pytest.raises(ValueError, match="not paired"):
        ratio(Latency((1.0, 2.0)), Latency((1.0,)))
    with pytest.raises(ValueError, match="at least 2"):
        ratio(Latency((1.0,)), Latency((1.0,)))
