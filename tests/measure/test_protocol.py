import pytest

from frugalvlm.measure import EnergyMeter, carbon_g, measure_energy
from frugalvlm.measure import protocol as module

QUICK = {"idle_s": 0.0, "cooldown_s": 0.0, "warmup": 0}


@pytest.fixture
def lab(fake_counter, monkeypatch):
    """A fake GPU of 100 W and its power integral on one fake clock: windows of any length."""

    class Lab:
        now, watts, bias, order = 0.0, 100.0, 1.0, ""

        def spend(self, name, seconds, watts=None):
            self.order += name
            self.advance(seconds, watts)

        def advance(self, seconds, watts=None):
            watts = self.watts if watts is None else watts
            self.now += seconds
            self.gpu.value += watts * seconds
            self.check.value += watts * seconds * self.bias

        def run(self, name, seconds, watts=None):
            return lambda: self.spend(name, seconds, watts)

    lab = Lab()
    lab.gpu, lab.check = fake_counter("gpu", tick_s=0.1), fake_counter("gpu", "power_integral")
    lab.meter = EnergyMeter(counters=[lab.gpu], checks=[lab.check], clock=lambda: lab.now)
    monkeypatch.setattr(module.time, "perf_counter", lambda: lab.now)
    monkeypatch.setattr(module.time, "sleep", lambda s: lab.advance(s, watts=20.0))
    return lab


def test_windows_are_interleaved_filled_and_divided_by_calls(lab):
    runs = {"a": lab.run("a", 4.0, 100.0), "b": lab.run("b", 10.0, 50.0)}
    results = measure_energy(runs, meter=lab.meter, **QUICK)
    assert lab.order == "aaabbaaa" + "aaabbaaa" + "aaab"  # A B, B A, ...; 4 s needs 3 calls
    a, b = results["a"], results["b"]
    assert a.calls == (3,) * 5
    assert a.window_s == (12.0,) * 5
    assert a.mean_joules == pytest.approx(400.0)
    assert b.mean_joules == pytest.approx(500.0)
    assert (a.n, a.sd_joules, a.cv) == (5, pytest.approx(0.0), pytest.approx(0.0))
    assert a.carbon_g_per_call == pytest.approx(carbon_g(400.0))
    assert a.methods["gpu"] == "counter"
    assert a.reliable
    assert a.rankable


def test_spread_is_the_sample_standard_deviation(lab):
    watts = iter([99.0, 100.0, 101.0, 100.0, 100.0])
    result = measure_energy(
        {"a": lambda: lab.spend("a", 10.0, next(watts))}, meter=lab.meter, **QUICK
    )["a"]
    assert result.joules_per_call == pytest.approx((990, 1000, 1010, 1000, 1000))
    assert result.sd_joules == pytest.approx(50**0.5)
    assert result.cv == pytest.approx(50**0.5 / 1000)
    assert result.reliable


def test_idle_power_is_taken_before_and_after(lab):
    result = measure_energy(
        {"a": lab.run("a", 5.0)}, meter=lab.meter, warmup=2, idle_s=30.0, cooldown_s=10.0
    )["a"]
    assert result.idle_watts == pytest.approx((20.0, 20.0))
    assert result.mean_joules == pytest.approx(500.0)  # neither cooling nor warm-up is inside
    assert result.net_joules == pytest.approx(500.0 - 20.0 * 5.0)
    assert lab.order.count("a") == 2 + 5 * 2


def _reasons(lab, seconds=10.0, watts=None, **options):
    values = iter(watts or [100.0] * 5)
    run = {"a": lambda: lab.spend("a", seconds, next(values))}
    result = measure_energy(run, meter=lab.meter, **QUICK, **options)["a"]
    assert result.reliable == (not result.reasons)
    return " ".join(result.reasons)


def test_each_rule_of_acceptance(lab):
    assert _reasons(lab) == ""
    assert "fewer than 5" in _reasons(lab, repeats=2)
    assert "below 10 s" in _reasons(lab, seconds=9.0, min_window_s=1.0)
    assert "coefficient of variation" in _reasons(lab, watts=[90.0, 100.0, 110.0, 100.0, 100.0])
    assert "no spread" in _reasons(lab, watts=[0.0] * 5)
    lab.bias = 1.06
    assert "differ by 6.0%" in _reasons(lab)
    lab.bias = 1.04
    assert _reasons(lab) == ""
    lab.gpu.tick_s = 0.2
    assert "below 100 ticks" in _reasons(lab)


def test_a_shared_or_unchecked_gpu_is_not_reliable(lab):
    lab.gpu.processes = lambda: 2
    assert "another process" in _reasons(lab)
    lab.gpu.processes = lambda: None  # NVML may refuse the question
    assert _reasons(lab) == ""
    lab.gpu.processes = lambda: 1
    assert _reasons(lab) == ""
    lab.meter.checks = ()
    assert "no second measurement" in _reasons(lab)


def test_cpu_counters_need_no_second_measurement(lab):
    lab.gpu.component, lab.gpu.method, lab.meter.checks = "cpu", "rapl", ()
    assert _reasons(lab) == ""


def test_without_counters_nothing_is_run(lab):
    result = measure_energy({"a": lab.run("a", 1.0)}, meter=EnergyMeter(counters=[]))["a"]
    assert lab.order == ""
    assert (result.n, result.mean_joules, result.carbon_g_per_call) == (0, None, None)
    assert "no energy counter" in result.reasons[0]
    assert not result.rankable


def test_an_exception_leaves_no_window_open(lab):
    def fail():
        raise KeyError

    with pytest.raises(KeyError):
        measure_energy({"a": fail}, meter=lab.meter, **QUICK)
    assert measure_energy({"a": lab.run("a", 10.0)}, meter=lab.meter, **QUICK)["a"].n == 5


def test_nothing_to_measure_raises(lab):
    with pytest.raises(ValueError, match="need a run"):
        measure_energy({}, meter=lab.meter)
    with pytest.raises(ValueError, match="need a run"):
        measure_energy({"a": int}, meter=lab.meter, repeats=0)
