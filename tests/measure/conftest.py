"""Stand-ins for the hardware: a clock, counters, a powercap folder, and NVML."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from frugalvlm.measure import detect as detect_module


class FakeCounter:
    """Joules are set by the test."""

    poll_s = None

    def __init__(self, component="gpu", method="counter", tick_s=0.0):
        self.component, self.method, self.tick_s, self.value = component, method, tick_s, 0.0

    def joules(self):
        return self.value


class NVMLError(Exception):
    pass


class FakeNvml:
    """The part of pynvml that is used. What is None is not supported by the board."""

    NVMLError = NVMLError

    def __init__(self, energy_mj=None, power_mw=None, mig=None, processes=1):
        self.energy_mj, self.power_mw, self.mig, self.n = energy_mj, power_mw, mig, processes

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-abc"
        return "handle"

    def _read(self, value):
        if value is None:
            raise NVMLError("Not Supported")
        return value

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self._read(self.energy_mj)

    def nvmlDeviceGetPowerUsage(self, handle):
        return self._read(self.power_mw)

    def nvmlDeviceGetMigMode(self, handle):
        return (self._read(self.mig), 0)

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=i) for i in range(self._read(self.n))]


@pytest.fixture
def fake_counter():
    return FakeCounter


@pytest.fixture
def fake_nvml(monkeypatch):
    monkeypatch.setattr(detect_module, "_uuid", lambda device: "abc")
    return FakeNvml


@pytest.fixture
def powercap(tmp_path):
    """Write zones: ``powercap({"intel-rapl:0": ("package-0", 500, 1000)})`` (uJ, range in uJ)."""

    def write(zones) -> Path:
        for folder, (name, energy_uj, full_uj) in zones.items():
            zone = tmp_path / folder
            zone.mkdir(exist_ok=True)
            (zone / "name").write_text(f"{name}\n")
            (zone / "energy_uj").write_text(f"{energy_uj}\n")
            (zone / "max_energy_range_uj").write_text(f"{full_uj}\n")
        return tmp_path

    return write


@pytest.fixture
def tiny_llama():
    """A Llama with grouped-query attention: 4 query heads on 2 key heads of width 8."""

    def build(device="cpu", attention="sdpa"):
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=50,
            max_position_embeddings=64,
        )
        config._attn_implementation = attention
        torch.manual_seed(0)
        with torch.device(device):
            return LlamaForCausalLM(config).eval()

    return build
