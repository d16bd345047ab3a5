import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from frugalvlm.measure import count_flops


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_linear_is_two_flops_per_multiply_accumulate(device):
    layer = torch.nn.Linear(5, 7, device=device)
    count = count_flops(lambda: layer(torch.ones(3, 5, device=device)))
    assert count.total == 2 * 3 * 5 * 7
    assert count.by_module == {"Linear": count.total}
    assert count.tflops == count.total / 1e12


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("masked", ["no", "causal", "mask"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_counts_the_full_square_of_every_query_head(device, masked, kv_heads):
    q = torch.ones(2, 4, 6, 8, device=device)
    kv = torch.ones(2, kv_heads, 6, 8, device=device)
    mask = torch.zeros(2, 1, 6, 6, device=device) if masked == "mask" else None
    count = count_flops(
        lambda: scaled_dot_product_attention(
            q, kv, kv, attn_mask=mask, is_causal=masked == "causal", enable_gqa=kv_heads < 4
        )
    )
    scores, weighted_sum = 2 * 2 * 4 * 6 * 6 * 8, 2 * 2 * 4 * 6 * 6 * 8
    assert count.total == scores + weighted_sum


def test_the_library_alone_may_miss_cpu_attention():
    """The wrong twin: without our formula the same call counts 0 (torch 2.13), never more."""
    q = torch.ones(1, 2, 4, 8)
    with FlopCounterMode(display=False) as bare:
        scaled_dot_product_attention(q, q, q)
    ours = count_flops(lambda: scaled_dot_product_attention(q, q, q)).total
    assert ours == 2 * 2 * 2 * 4 * 4 * 8
    assert bare.get_total_flops() in (0, ours)


def test_attention_backward_counts_five_products():
    q, k, v = (torch.ones(1, 2, 4, 8, requires_grad=True) for _ in range(3))
    count = count_flops(lambda: scaled_dot_product_attention(q, k, v).sum().backward())
    assert count.total == (2 + 5) * 2 * 2 * 4 * 4 * 8


def test_products_with_a_vector_count():
    matrix, vector = torch.ones(5, 7), torch.ones(7)
    assert count_flops(lambda: matrix @ vector).total == 2 * 5 * 7
    assert count_flops(lambda: vector @ vector).total == 2 * 7
    assert count_flops(lambda: torch.addmv(torch.ones(5), matrix, vector)).total == 2 * 5 * 7


def _llama_flops(tokens: int, cached: int = 0) -> int:
    """By hand from the fixture: width 32, 4 heads on 2 of width 8, MLP 48, 50 words."""
    projections = 2 * tokens * 32 * (32 + 16 + 16 + 32)
    attention = 2 * 4 * tokens * (tokens + cached) * (8 + 8)
    mlp = 2 * tokens * 3 * 32 * 48
    return 2 * (projections + attention + mlp) + 2 * tokens * 32 * 50


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_tiny_llama_by_hand(tiny_llama, device, attention):
    model = tiny_llama(device, attention)
    tokens = torch.zeros(1, 9, dtype=torch.long, device=device)
    outputs = []
    prefill = count_flops(lambda: outputs.append(model(tokens, use_cache=True)))
    assert prefill.total == _llama_flops(9)
    layers = [prefill.by_module[f"LlamaForCausalLM.model.layers.{i}"] for i in range(2)]
    assert sum(layers) + prefill.by_module["LlamaForCausalLM.lm_head"] == prefill.total
    step = count_flops(lambda: model(tokens[:, :1], past_key_values=outputs[0].past_key_values))
    assert step.total == _llama_flops(1, cached=9)


def test_counting_restores_state_after_an_exception():
    def fail():
        raise KeyError("inside")

    with pytest.raises(KeyError):
        count_flops(fail)
    assert count_flops(lambda: torch.ones(2, 3) @ torch.ones(3, 4)).total == 2 * 2 * 3 * 4


def test_nothing_counted_is_zero():
    assert count_flops(lambda: None).total == 0
