import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from frugalvlm.measure import kv_cache_bytes, peak_memory_bytes

MB = 10**6


def test_peak_of_known_allocations():
    def run():
        a = torch.empty(4 * MB, dtype=torch.uint8)
        b = torch.empty(2 * MB, dtype=torch.uint8)  # 6 MB live: the peak
        del a
        c = torch.empty(3 * MB, dtype=torch.uint8)  # 5 MB live
        return b, c

    peak = peak_memory_bytes(run)
    assert abs(peak.bytes - 6 * MB) < 4096
    assert peak.mib == peak.bytes / 2**20
    assert "profiler" in peak.method


def test_temporaries_inside_an_operator_count():
    x = torch.ones(64, 100, 100)

    # One operator to the caller; its sorted values and indices (int64) live side by side.
    sorting = peak_memory_bytes(lambda: torch.argsort(x, dim=-1).shape)
    assert sorting.bytes >= (4 + 8) * 64 * 100 * 100


def test_what_was_live_before_is_not_counted():
    before = [torch.empty(8 * MB, dtype=torch.uint8)]

    def run():
        before.clear()
        torch.empty(1 * MB, dtype=torch.uint8)

    assert abs(peak_memory_bytes(run).bytes - MB) < 4096


def test_earlier_profiles_leave_nothing_behind():
    kept = []
    peak_memory_bytes(lambda: kept.append(torch.empty(5 * MB, dtype=torch.uint8)))

    def free_then_allocate():  # the profiler knows the block it saw being made
        kept.clear()
        torch.empty(MB, dtype=torch.uint8)

    second = peak_memory_bytes(free_then_allocate)
    assert abs(second.bytes - MB) < 4096


def test_attention_without_a_map_needs_less_memory(tiny_llama):
    """The purpose: SDPA never holds the 4 x 60 x 60 map in float32, eager does."""
    tokens = torch.zeros(8, 60, dtype=torch.long)
    peaks = {}
    for attention in ("sdpa", "eager"):
        model = tiny_llama(attention=attention)
        with torch.no_grad():
            peaks[attention] = peak_memory_bytes(lambda model=model: model(tokens)).bytes
    assert peaks["sdpa"] + 8 * 4 * 60 * 60 * 4 < peaks["eager"]


def _cache(lengths, device="cpu", dtype=torch.float32):
    cache = DynamicCache()
    for layer, length in enumerate(lengths):
        states = torch.zeros(2, 3, length, 8, device=device, dtype=dtype)
        cache.update(states, states.clone(), layer)
    return cache


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_cache_bytes_by_layer(device):
    found = kv_cache_bytes(_cache([10, 10, 4], device, torch.bfloat16))
    per_token = 2 * 2 * 3 * 8 * 2  # keys and values, batch, heads, width, bytes
    assert found.per_layer == (10 * per_token, 10 * per_token, 4 * per_token)
    assert found.total == found.allocated == 24 * per_token


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_sliced_cache_still_holds_its_buffer(device):
    cache = _cache([10], device)
    layer = cache.layers[0]
    layer.keys, layer.values = layer.keys[..., :4, :], layer.values[..., :4, :]
    found = kv_cache_bytes(cache)
    assert found.total == 4 * (2 * 2 * 3 * 8 * 4)
    assert found.allocated == 10 * (2 * 2 * 3 * 8 * 4)


def test_cache_of_a_real_model(tiny_llama):
    tokens = torch.zeros(1, 9, dtype=torch.long)
    with torch.no_grad():
        cache = tiny_llama()(tokens, use_cache=True).past_key_values
    assert kv_cache_bytes(cache).per_layer == (2 * 9 * 2 * 8 * 4,) * 2


def test_empty_cache_is_zero(tiny_llama):
    assert kv_cache_bytes(DynamicCache()).total == 0
    assert kv_cache_bytes(DynamicCache(config=tiny_llama().config)).per_layer == (0, 0)


def test_caches_with_other_state_are_refused():
    with pytest.raises(TypeError, match="self_attention_cache"):
        kv_cache_bytes(EncoderDecoderCache(DynamicCache(), DynamicCache()))
    cache = _cache([4])
    cache.layers[0].conv_states = torch.zeros(1)
    with pytest.raises(TypeError, match="more than keys"):
        kv_cache_bytes(cache)


@pytest.mark.gpu
def test_cuda_peak():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    peak = peak_memory_bytes(lambda: torch.empty(2**20, device="cuda"), "cuda")
    assert peak.bytes == 4 * 2**20
    assert "max_memory_allocated" in peak.method


def test_torchs_lines_about_older_blocks_are_dropped_and_no_others():
    script = (
        "import os, torch\n"
        "from frugalvlm import measure\n"
        "old = [torch.randn(1000, 1000)]\n"
        "def fn():\n"
        "    old[0] = old[0].clone()  # frees a block that the profile never saw\n"
        "    os.write(2, b'a word of another\\n')\n"
        "print(measure.peak_memory_bytes(fn).bytes)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == str(4 * 1000 * 1000)
    assert done.stderr == "a word of another\n"
