import json
import platform
from types import SimpleNamespace

import torch
import transformers

import frugalvlm.measure as measure
from frugalvlm.measure import describe, hardware, machine_id


def test_describe_is_plain_json_with_versions():
    found = json.loads(json.dumps(describe("cpu")))
    assert found["torch"] == torch.__version__
    assert found["transformers"] == transformers.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]["model"]
    assert found["cpu"]["logical_cores"] >= found["cpu"]["usable_cores"] >= 1
    assert found["cpu"]["memory_gib"] >= 1
    assert found["gpu"] is None


def test_no_host_name_is_kept():
    assert platform.node() not in json.dumps(describe("cpu"))


def test_cpu_model_is_read_from_the_kernel(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2.00GHz\n")
    assert hardware._cpu_model(cpuinfo) == "Some CPU @ 2.00GHz"
    assert hardware._cpu_model(tmp_path / "absent")


def test_gpu_with_and_without_nvml(monkeypatch, fake_nvml):
    board = SimpleNamespace(name="H1", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: board)
    nvml = fake_nvml()
    nvml.nvmlSystemGetDriverVersion = lambda: "600.1"
    nvml.nvmlDeviceGetEnforcedPowerLimit = lambda handle: 700_000
    monkeypatch.setattr(hardware, "nvml_device", lambda device: (nvml, "handle"))
    known = {"name": "H1", "memory_gib": 80, "capability": "9.0"}
    assert describe("cuda")["gpu"] == known | {"driver": "600.1", "power_cap_w": 700.0}
    with_gpu = machine_id("cuda")

    def fail(device):
        raise OSError("no driver library")

    monkeypatch.setattr(hardware, "nvml_device", fail)
    assert describe("cuda")["gpu"] == known | {"driver": None, "power_cap_w": None}
    assert machine_id("cuda") == with_gpu != machine_id("cpu")


def test_machine_id_follows_the_hardware_only(monkeypatch):
    first = machine_id("cpu")
    assert len(first) == 12
    monkeypatch.setattr(platform, "node", lambda: "elsewhere")
    assert machine_id("cpu") == first
    monkeypatch.setattr(hardware, "_cpu_model", lambda: "another")
    assert machine_id("cpu") != first


def test_public_names_exist_once():
    assert len(set(measure.__all__)) == len(measure.__all__)
    assert all(hasattr(measure, name) for name in measure.__all__)
