import threading
import time

import pytest

from frugalvlm.measure import GRID_FACTOR_G_PER_KWH, Energy, EnergyMeter, carbon_g
from frugalvlm.measure import meter as meter_module
from frugalvlm.measure.detect import detect


@pytest.fixture
def setup(fake_counter):
    """A meter over one fake GPU counter and a clock that the test moves."""
    now, gpu = [0.0], fake_counter("gpu")
    return EnergyMeter(counters=[gpu], clock=lambda: now[0]), gpu, now


def test_windows_nest_and_overlap(setup):
    meter, gpu, now = setup
    meter.begin_window("outer")
    gpu.value, now[0] = 10.0, 1.0
    meter.begin_window("inner")
    gpu.value, now[0] = 13.0, 2.0
    outer = meter.end_window("outer")  # ended first: windows may overlap
    gpu.value, now[0] = 20.0, 5.0
    inner = meter.end_window("inner")
    assert (outer.joules["gpu"], outer.seconds) == (13.0, 2.0)
    assert (inner.joules["gpu"], inner.seconds) == (10.0, 4.0)


def test_restart_drops_the_open_window(setup):
    meter, gpu, _ = setup
    meter.begin_window("cell")
    gpu.value = 100.0  # the cell crashed here and is run again
    with pytest.raises(ValueError, match="restart=True"):
        meter.begin_window("cell")
    meter.begin_window("cell", restart=True)
    gpu.value = 101.0
    assert meter.end_window("cell").joules["gpu"] == 1.0
    with pytest.raises(ValueError, match="not open"):
        meter.end_window("cell")


def test_an_exception_cancels_the_window_and_passes_on(setup):
    meter, gpu, _ = setup
    with pytest.raises(KeyError), meter.window("x") as failed:
        raise KeyError
    assert failed.energy is None
    with meter.window("x") as window:  # the name is free again
        gpu.value += 2.0
    assert window.energy.joules["gpu"] == 2.0


def test_missing_components_are_none_and_not_zero(setup):
    meter, gpu, _ = setup
    with meter.window() as window:
        gpu.value += 3.0
    energy = window.energy
    assert dict(energy.joules) == {"gpu": 3.0, "cpu": None, "ram": None}
    assert dict(energy.methods) == {"gpu": "counter", "cpu": "none", "ram": "none"}
    assert energy.total_joules == 3.0
    assert energy.rankable


def test_nothing_readable(monkeypatch, tmp_path):
    monkeypatch.setattr(meter_module, "detect", lambda device: detect(device, powercap=tmp_path))
    meter = EnergyMeter("cpu")
    with meter.window() as window:
        pass
    assert window.energy.total_joules is None
    assert window.energy.carbon_g is None
    assert not window.energy.rankable
    assert set(meter.missing) == {"gpu", "cpu", "ram"}
    assert meter.exclusive() is None


def test_second_measurement_gives_the_gap(fake_counter):
    gpu, check = fake_counter("gpu"), fake_counter("gpu", "power_integral")
    meter = EnergyMeter(counters=[gpu], checks=[check])
    with meter.window() as window:
        gpu.value, check.value = 100.0, 94.0
    assert window.energy.total_joules == 100.0  # the check is not added
    assert window.energy.check_gap == pytest.approx(0.06)


def test_a_counter_that_goes_backwards_raises(setup):
    meter, gpu, _ = setup
    meter.begin_window()
    gpu.value = -1.0
    with pytest.raises(RuntimeError, match="backwards"):
        meter.end_window()
    meter.begin_window()  # and the window is gone


def test_polling_only_while_a_window_is_open(fake_counter):
    gpu, polled = fake_counter("gpu"), threading.Event()
    gpu.poll_s = 0.001
    read = gpu.joules
    gpu.joules = lambda: (threading.current_thread() is not main and polled.set()) or read()
    main = threading.current_thread()
    meter = EnergyMeter(counters=[gpu])
    threads = threading.active_count()
    with meter.window("outer"), meter.window("inner"):
        assert polled.wait(5)
        assert threading.active_count() == threads + 1
    deadline = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.001)
    assert threading.active_count() == threads


def test_a_failure_while_polling_is_raised_at_the_end(fake_counter):
    gpu, failed = fake_counter("gpu"), threading.Event()
    gpu.poll_s, main = 0.001, threading.current_thread()

    def joules():
        if threading.current_thread() is not main:
            failed.set()
            raise OSError("gone")
        return 0.0

    gpu.joules = joules
    meter = EnergyMeter(counters=[gpu])
    meter.begin_window()
    assert failed.wait(5)
    time.sleep(0.01)
    with pytest.raises(RuntimeError, match="failed during the window"):
        meter.end_window()


def test_close_drops_open_windows(setup):
    meter, _, _ = setup
    with meter:
        meter.begin_window("left open")
    meter.begin_window("left open")


def test_cuda_is_synchronised_before_both_readings(fake_counter, monkeypatch):
    events = []
    gpu = fake_counter("gpu")
    gpu.joules = lambda: events.append("read") or 0.0
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: events.append("sync"))
    with EnergyMeter("cuda", counters=[gpu]).window():
        events.append("work")
    assert events == ["sync", "read", "work", "sync", "read"]


def test_grams_are_energy_times_the_one_factor():
    assert carbon_g(3.6e6) == GRID_FACTOR_G_PER_KWH
    assert carbon_g(3.6e6, 50.0) == 50.0
    energy = Energy({"gpu": 1.8e6, "cpu": None}, {"gpu": "counter", "cpu": "none"}, 1.0)
    assert energy.carbon_g == GRID_FACTOR_G_PER_KWH / 2
