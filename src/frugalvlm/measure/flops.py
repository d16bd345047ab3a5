"""FLOPs of what really runs.

Counted by ``torch.utils.flop_counter.FlopCounterMode``, which sees every ATen operator: a method's
own work (scores, merging) is inside the count. Conventions:

- one multiply-accumulate is two FLOPs;
- matrix products, attention and convolutions count; element-wise work, softmax, norms, sorting and
  gathering do not (the usual convention, under 1 % of a transformer's arithmetic);
- causal attention is counted in full, not halved: kernels differ in how much of the masked half
  they skip, and the papers' formulas count the full square as well.

The count is the same on CPU, CUDA and meta tensors, and for ``sdpa`` and ``eager`` attention.
Backward passes are the exception: fused kernels recompute the scores, and that work is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten
_Shape = Sequence[int]


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one call: in total, per module path (parents include children), per operator."""

    total: int
    by_module: dict[str, int] = field(default_factory=dict)
    by_operator: dict[str, int] = field(default_factory=dict)

    @property
    def tflops(self) -> float:
        """Total in units of 1e12 FLOPs."""
        return self.total / 1e12


def count_flops(fn: Callable[[], object]) -> FlopCount:
    """Run ``fn`` once and count its FLOPs.

    Args:
        fn: takes no argument; gradients are recorded or not as the caller's context says.
            A model on the meta device works: nothing is computed, only shapes flow.

    Returns:
        The count. ``by_module`` is keyed by the path below the outermost module that was called,
        e.g. ``LlamaModel.layers.0.self_attn``.
    """
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        fn()
    counts = counter.get_flop_counts()
    return FlopCount(
        total=counter.get_total_flops(),
        by_module={name: sum(c.values()) for name, c in counts.items() if name != "Global"},
        by_operator={str(op): n for op, n in counts.get("Global", {}).items()},
    )


def _attention(q: _Shape, k: _Shape, v: _Shape, *_: Any, **__: Any) -> int:
    """Two products per query head: scores [queries, keys], then the weighted sum of values."""
    return 2 * prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _attention_backward(_grad: _Shape, q: _Shape, k: _Shape, v: _Shape, *_: Any, **__: Any) -> int:
    """Scores again, gradients of q and k (width of q), of v and of the weights (width of v)."""
    return 2 * prod(q[:-1]) * k[-2] * (3 * q[-1] + 2 * v[-1])


def _matrix_vector(matrix: _Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(matrix)


def _add_matrix_vector(_bias: _Shape, matrix: _Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(matrix)


# torch up to 2.13 has no formula for the CPU attention kernel and counts it as zero
# (pytorch/pytorch#195460), nor for products with a vector. The CUDA kernels are listed again so
# that grouped-query attention counts by query heads in every version.
_FORMULAS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_cudnn_attention: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.mv: _matrix_vector,
    aten.addmv: _add_matrix_vector,
    aten.dot: _matrix_vector,
    aten.vdot: _matrix_vector,
}
