import importlib.resources
import inspect
import json
import socket
import threading
import time

import pytest
from codecarbon import OfflineEmissionsTracker

from frugalvlm.measure import GRID_FACTOR_G_PER_KWH, ModelledMeter, carbon_g, measure_energy
from frugalvlm.measure.modelled import SETTINGS


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("network used")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    return tried


def _work(seconds=0.06):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        sum(range(1000))


def test_modelled_figure_is_quiet_offline_and_not_rankable(no_network, tmp_path, capfd):
    threads = threading.active_count()
    with ModelledMeter() as meter, meter.window() as window:
        _work()
    energy = window.energy
    assert energy.modelled
    assert not energy.rankable
    assert energy.methods == {"gpu": "none", "cpu": "tdp_load_model", "ram": "constant_model"}
    assert energy.joules["gpu"] is None
    assert energy.joules["cpu"] > 0
    assert energy.joules["ram"] > 0
    total = meter.tracker.final_emissions_data
    assert total.emissions * 1e3 == pytest.approx(carbon_g(total.energy_consumed * 3.6e6))
    assert no_network == []
    assert list(tmp_path.iterdir()) == []  # no csv, no log
    assert capfd.readouterr() == ("", "")
    assert threading.active_count() == threads


HOSTILE = {
    "force_cpu_power": "0.5", "force_ram_power": "0.01", "pue": "3", "wue": "2",
    "tracking_mode": "machine", "measure_power_secs": "1000", "allow_multiple_runs": "false",
    "cloud_provider": "aws", "cloud_region": "us-east-1", "force_mode_cpu_load": "false",
    "force_carbon_intensity_g_co2e_kwh": "1", "region": "california", "gpu_ids": "0",
    "experiment_id": "mine", "api_key": "secret", "output_dir": "/no/such/folder",
}  # fmt: skip


def _told() -> dict:
    with ModelledMeter() as meter:
        powers = [getattr(part, "tdp", None) and part.tdp for part in meter.tracker._hardware]
        return {**meter.tracker._conf, "tdp": powers}


@pytest.mark.parametrize("where", ["environment", "file"])
def test_the_users_own_configuration_changes_nothing(no_network, tmp_path, monkeypatch, where):
    expected = _told()
    if where == "environment":
        for name, value in HOSTILE.items():
            monkeypatch.setenv(f"CODECARBON_{name.upper()}", value)
    else:
        lines = ["[codecarbon]", *(f"{name} = {value}" for name, value in HOSTILE.items())]
        (tmp_path / ".codecarbon.config").write_text("\n".join(lines))
    assert {name: _told().get(name) for name in expected} == expected


def test_the_tracker_is_told_all_that_it_can_be_told():
    """A setting that codecarbon adds would come from the user's files until it stands here."""
    known = set()
    for cls in OfflineEmissionsTracker.__mro__[:-1]:
        known |= {p.name for p in inspect.signature(cls.__init__).parameters.values()
                  if p.kind is not p.VAR_POSITIONAL and p.kind is not p.VAR_KEYWORD}  # fmt: skip
    old = {name for name in known if name.startswith("save_to_")} | {"co2_signal_api_token"}
    assert known - old - {"self"} == set(SETTINGS)


def test_the_tracker_stops_after_an_exception(no_network):
    threads = threading.active_count()
    with pytest.raises(KeyError), ModelledMeter() as meter, meter.window():
        raise KeyError
    assert threading.active_count() == threads


def test_windows_repeat_and_restart_but_do_not_nest(no_network):
    with ModelledMeter() as meter:
        meter.begin_window("a")
        with pytest.raises(ValueError, match="cannot nest"):
            meter.begin_window("b")
        meter.begin_window("a", restart=True)
        _work()
        first = meter.end_window("a")
        with pytest.raises(ValueError, match="not open"):
            meter.end_window("a")
        with meter.window("a") as second:
            _work()
    assert first.total_joules > 0
    assert second.energy.total_joules > 0
    assert first.seconds < 10


def test_the_protocol_runs_on_it_and_marks_it(no_network):
    with ModelledMeter() as meter:
        quick = {"min_window_s": 0.05, "repeats": 2, "warmup": 0, "idle_s": 0, "cooldown_s": 0}
        result = measure_energy({"a": _work}, meter=meter, **quick)["a"]
    assert result.n == 2
    assert result.mean_joules > 0
    assert result.modelled
    assert not result.rankable
    assert "modelled, not measured" in result.reasons


def test_the_factor_is_the_one_codecarbon_ships():
    folder = importlib.resources.files("codecarbon") / "data" / "private_infra"
    table = json.loads((folder / "carbon_intensity_per_source.json").read_text())
    assert table["world_average"] == GRID_FACTOR_G_PER_KWH
