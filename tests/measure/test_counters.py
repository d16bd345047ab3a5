import pytest

from frugalvlm.measure.counters import NvmlPower, Rapl
from frugalvlm.measure.detect import detect


def _methods(found):
    return {c.component: c.method for c in found.counters}


def test_rapl_undoes_the_wrap_around_of_each_package(powercap):
    zones = {"intel-rapl:0": ("package-0", 900, 1000), "intel-rapl:1": ("package-1", 100, 2000)}
    root = powercap(zones)
    rapl = Rapl("cpu", [root / "intel-rapl:0", root / "intel-rapl:1"])
    start = rapl.joules()
    powercap({"intel-rapl:0": ("package-0", 50, 1000), "intel-rapl:1": ("package-1", 400, 2000)})
    assert rapl.joules() - start == pytest.approx((150 + 300) / 1e6)
    powercap({"intel-rapl:0": ("package-0", 40, 1000)})  # a second wrap, on the total so far
    assert rapl.joules() - start == pytest.approx((150 + 300 + 990) / 1e6)


def test_packages_are_cpu_and_dram_is_ram(powercap):
    root = powercap(
        {
            "intel-rapl:0": ("package-0", 1, 1000),
            "intel-rapl:0:0": ("core", 2, 1000),
            "intel-rapl:0:1": ("dram", 4, 1000),
            "intel-rapl:1": ("package-1", 8, 1000),
            "intel-rapl:1:0": ("dram", 16, 1000),
            "intel-rapl:2": ("package-1", 32, 1000),  # the same package listed twice
            "intel-rapl:3": ("psys", 64, 1000),
            "intel-rapl-mmio:0": ("package-0", 128, 1000),
        }
    )
    found = detect("cpu", powercap=root)
    assert _methods(found) == {"cpu": "rapl", "ram": "rapl"}
    for folder in root.iterdir():  # each zone consumes what it showed
        energy = folder / "energy_uj"
        energy.write_text(str(2 * int(energy.read_text())))
    cpu, ram = (c.joules() * 1e6 for c in found.counters)
    assert cpu == pytest.approx(1 + 8)
    assert ram == pytest.approx(4 + 16)
    assert "cpu" in found.missing["gpu"]


def test_nothing_there_is_said(tmp_path):
    found = detect("cpu", powercap=tmp_path / "absent")
    assert found.counters == ()
    assert "no RAPL zone" in found.missing["cpu"]
    assert "no RAPL zone" in found.missing["ram"]


def test_permission_denied_is_said(powercap, monkeypatch):
    root = powercap({"intel-rapl:0": ("package-0", 1, 1000)})
    real = type(root).read_text

    def read_text(self, *args, **kwargs):
        if self.name == "energy_uj":  # root may read mode 000, so chmod would not do
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(root), "read_text", read_text)
    found = detect("cpu", powercap=root)
    assert found.counters == ()
    assert "not readable" in found.missing["cpu"]
    assert "energy_uj" in found.missing["cpu"]


def test_a_broken_zone_is_said(powercap):
    root = powercap({"intel-rapl:0": ("package-0", "", 1000)})
    assert "cannot be read" in detect("cpu", powercap=root).missing["cpu"]


def test_nvml_counter_with_power_as_its_check(fake_nvml, tmp_path):
    nvml = fake_nvml(energy_mj=5000, power_mw=1000, mig=0, processes=2)
    found = detect("cuda", nvml=nvml, powercap=tmp_path)
    assert _methods(found) == {"gpu": "counter"}
    assert [c.method for c in found.checks] == ["power_integral"]
    assert found.counters[0].joules() == 5.0
    assert found.counters[0].processes() == 2
    nvml.n = None
    assert found.counters[0].processes() is None


def test_nvml_without_counter_integrates_power(fake_nvml, tmp_path):
    found = detect("cuda", nvml=fake_nvml(power_mw=1000), powercap=tmp_path)
    assert _methods(found) == {"gpu": "power_integral"}
    assert found.checks == ()


@pytest.mark.parametrize(
    ("board", "reason"), [({}, "Not Supported"), ({"energy_mj": 1, "mig": 1}, "MIG is on")]
)
def test_nvml_with_nothing_usable(fake_nvml, tmp_path, board, reason):
    found = detect("cuda", nvml=fake_nvml(**board), powercap=tmp_path)
    assert found.counters == ()
    assert reason in found.missing["gpu"]


def test_power_is_integrated_by_the_trapezoidal_rule(fake_nvml):
    now = [0.0]
    nvml = fake_nvml(power_mw=100_000)
    power = NvmlPower(nvml, "handle", clock=lambda: now[0])
    now[0], nvml.power_mw = 2.0, 200_000
    assert power.joules() == pytest.approx(300.0)
    now[0], nvml.power_mw = 3.0, 0
    assert power.joules() == pytest.approx(400.0)
