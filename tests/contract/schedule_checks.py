"""Methods that cut at several layers against loops: last-token logits of six prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from reference import embeddings
from reference_schedules import Choose, masked_run
from tiny_hosts import Picture, Row, model_for, prompt
from torch import Tensor

from frugalvlm.methods import Vanilla

ROWS: list[Row] = [[3, Picture(seed), 4] for seed in range(30, 36)]


def logits_by_method(method: Any, host: str) -> tuple[list[Tensor], Any]:
    """As the method computes them, and its trace."""
    model = model_for(host)
    with method.on(model) as trace, torch.no_grad():
        answer = [model(**prompt(host, [row])).logits[0, -1] for row in ROWS]
    return answer, trace


def logits_by_loops(
    host: str, chooser: Callable[[list[int], int], Choose], renumber: bool
) -> list[Tensor]:
    """As `masked_run` computes them; `chooser` gets the picture's places and the length."""
    model, answer = model_for(host), []
    for row in ROWS:
        embeds, (places,) = embeddings(Vanilla(), model, host, row, [])
        choose = chooser(places, embeds.shape[1])
        answer.append(masked_run(model, embeds, choose, renumber)[0][-1])
    return answer


def check_logits(answer: list[Tensor], expected: list[Tensor], rule: str) -> None:
    """Equal to 1e-9; the message names the rule that was not kept."""
    for ours, theirs in zip(answer, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=lambda m: f"{rule}: {m}")
