"""Methods that cut at several layers, by loops over the untouched layers with keys hidden by masks.

Nothing here calls the kit's views, hosts, methods' `keep`, or surgery.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny_hosts import PATCHES, SCHEDULES
from torch import Tensor

# Which tokens of each image go before a layer: the layer's number, the map [heads, L, L] of the
# layer in front, that of this one, and what is gone already.
Choose = Callable[[int, Tensor, Tensor, set[int]], set[int]]


def positions_of(length: int, gone: set[int], renumber: bool) -> Tensor:
    """Position ids [1, length]; with `renumber` those of survivors count survivors only."""
    if not renumber:
        return torch.arange(length)[None]
    ids, count = [], 0
    for place in range(length):
        ids.append(count)
        count += place not in gone
    return torch.tensor([ids])


def mask_of(length: int, gone: set[int]) -> Tensor:
    """Causal, without the keys that are gone; every query sees at least itself."""
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[:, sorted(gone)] = False
    return (mask | torch.eye(length, dtype=torch.bool))[None, None]


def attention_map(
    model: Any, layer: int, hidden: Tensor, positions: Tensor, mask: Tensor
) -> Tensor:
    """Attention [heads, L, L] of a decoder layer on the states [1, L, width] in front of it."""
    decoder = model.model.language_model
    block, config = decoder.layers[layer], decoder.config
    x, heads = block.input_layernorm(hidden)[0], config.num_attention_heads
    cos, sin = (t[0] for t in decoder.rotary_emb(hidden, positions))
    q = block.self_attn.q_proj(x).view(len(x), heads, -1)
    k = block.self_attn.k_proj(x).view(len(x), config.num_key_value_heads, -1)
    half, maps = q.shape[-1] // 2, []
    for head in range(heads):
        pair = []
        for y in (q[:, head], k[:, head * config.num_key_value_heads // heads]):
            pair.append(y * cos + torch.cat([-y[:, half:], y[:, :half]], -1) * sin)
        logits = pair[0] @ pair[1].T / q.shape[-1] ** 0.5
        maps.append(logits.masked_fill(~mask[0, 0], float("-inf")).softmax(-1))
    return torch.stack(maps)


@torch.no_grad()
def masked_run(
    model: Any, embeds: Tensor, choose: Choose, renumber: bool
) -> tuple[Tensor, list[set[int]]]:
    """Logits [L, vocabulary] of one prompt, and what is gone at each layer."""
    decoder, hidden, length = model.model.language_model, embeds, embeds.shape[1]
    gone: set[int] = set()
    history, front = [], torch.empty(0)
    for index, layer in enumerate(decoder.layers):
        positions, mask = positions_of(length, gone, renumber), mask_of(length, gone)
        here = attention_map(model, index, hidden, positions, mask)
        gone = gone | choose(index, front, here, gone)
        history.append(gone)
        positions, mask = positions_of(length, gone, renumber), mask_of(length, gone)
        front = attention_map(model, index, hidden, positions, mask)
        rotary = decoder.rotary_emb(hidden, positions)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    return model.lm_head(decoder.norm(hidden))[0], history


def chooser(
    key: str, places: list[list[int]], crops: list[int], length: int, schedule: tuple[int, ...]
) -> Choose:
    """What `gsearch` and `pyramiddrop` drop, one visual token at a time."""
    visual = {place for image in places for place in image}

    def choose(index: int, front: Tensor, here: Tensor, gone: set[int]) -> set[int]:
        going: set[int] = set()
        for image, own_crops in zip(places, crops, strict=True):
            left = [place for place in image if place not in gone]
            keep = len(left) if schedule[index] >= PATCHES else schedule[index] * own_crops
            if keep >= len(left):
                continue
            if key == "gsearch":
                rows = [row for row in range(image[-1] + 1, length) if row not in visual]
                maps, rows = front, rows or [length - 1]
            else:
                maps, rows = here, [length - 1]
            score = {p: sum(float(maps[:, row, p].mean()) for row in rows) for p in left}
            going |= set(sorted(left, key=lambda p: -score[p])[keep:])
        return going

    return choose


def scheduled_logits(
    method: Any, model: Any, embeds: Tensor, places: list[list[int]], crops: list[int], new: Tensor,
    schedule: tuple[int, ...] | None = None,
) -> tuple[Tensor, list[int]]:  # fmt: skip
    """As `reference.expected_logits`; `new` are the embeddings [1, answer, width] of an answer."""
    length, renumber = embeds.shape[1], method.key == "pyramiddrop"
    choose = chooser(method.key, places, crops, length, schedule or SCHEDULES[method.key])
    _, history = masked_run(model, embeds, choose, renumber)
    logits, _ = masked_run(
        model, torch.cat([embeds, new], 1), lambda i, front, here, gone: history[i], renumber
    )
    return logits[length - 1 :], [length - len(gone) for gone in history]
