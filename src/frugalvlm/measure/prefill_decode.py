"""Latency of prefill and decode, apart, of Hugging Face causal and vision-language models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from frugalvlm.measure.latency import Latency, quiet, time_ms, turns


@dataclass(frozen=True)
class PrefillDecode:
    """Prefill in ms per prompt batch; decode in ms per step (one token for each batch row)."""

    prefill: Latency
    decode: Latency


@dataclass(frozen=True)
class Arm:
    """One run to time: a model, its inputs, and the method that is active while it runs.

    Attributes:
        model: any Hugging Face causal or vision-language model, or a callable like one.
        inputs: the processor's output: input_ids, attention_mask, pixel_values, ...
        context: makes the context manager of the method, e.g. ``lambda: method.on(model)``.
            It is entered outside the timed region.
    """

    model: Callable[..., Any]
    inputs: Mapping[str, Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@torch.no_grad()
def prefill_decode_ms(
    arms: Mapping[str, Arm],
    decode_steps: int = 16,
    repeats: int = 20,
    warmup: int = 3,
    device: str | torch.device = "cpu",
) -> dict[str, PrefillDecode]:
    """Time prefill and decode apart, the arms in turns.

    Prefill is one forward of the whole prompt that fills the cache and gives the logits of the last
    position only. Decode is ``decode_steps`` greedy forwards of one token with that cache, timed as
    one block (so CUDA is not synchronised per token) and divided by their number. The mask grows by
    one column per step from the full prompt's, as ``generate`` does. The number of steps is fixed:
    an end-of-sequence token does not stop it, so all arms generate equally many tokens.

    Raises:
        ValueError: no arm, no timed round, a negative warm-up, or no decode step.
    """
    if decode_steps < 1:
        raise ValueError(f"decode_steps must be at least 1, got {decode_steps}")
    prefill: dict[str, list[float]] = {name: [] for name in arms}
    decode: dict[str, list[float]] = {name: [] for name in arms}
    for name, keep in turns(arms, repeats, warmup):
        with quiet(), arms[name].context():
            steps = _Steps(arms[name])
            prefill_ms = time_ms(steps.prefill, device)
            decode_ms = time_ms(partial(steps.decode, decode_steps), device)
        if keep:
            prefill[name].append(prefill_ms)
            decode[name].append(decode_ms / decode_steps)
    return {
        name: PrefillDecode(Latency(tuple(prefill[name])), Latency(tuple(decode[name])))
        for name in arms
    }


class _Steps:
    """One prompt's prefill and the greedy steps after it."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm

    def prefill(self) -> None:
        inputs = {**self.arm.inputs, "use_cache": True, "logits_to_keep": 1}
        self._accept(self.arm.model(**inputs))
        self.mask = self.arm.inputs.get("attention_mask")

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            step = {"input_ids": self.token, "past_key_values": self.cache, "use_cache": True}
            if self.mask is not None:
                one = self.mask.new_ones(self.mask.shape[0], 1)
                self.mask = torch.cat([self.mask, one], dim=1)
                step["attention_mask"] = self.mask
            self._accept(self.arm.model(**step, logits_to_keep=1))

    def _accept(self, output: Any) -> None:
        self.cache = output.past_key_values
        self.token = output.logits[:, -1:].argmax(dim=-1)
