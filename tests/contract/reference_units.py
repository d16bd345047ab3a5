"""What a pruned model must compute where tokens keep their places, by another route.

The untouched model says what its decoder reads; answers of methods are taken at their word
(`reference_answers.listening`); the rest is loops over whole layers, with keys hidden by masks.
"""

from __future__ import annotations

from typing import Any

import torch
from reference_answers import listening
from reference_schedules import mask_of
from tiny_hosts import IMAGE, VIDEO
from tiny_units import QWEN, Row, counts_of, prompt
from torch import Tensor

from frugalvlm.methods import LayerReducer


def decoder_of(model: Any) -> Any:
    """The language model without its head."""
    return getattr(model.model, "language_model", None) or model.model.text_model


@torch.no_grad()
def entrance(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with which the untouched model calls its decoder."""
    seen: dict[str, Any] = {}

    def look(module: Any, args: tuple, kwargs: dict) -> None:
        seen.update(kwargs)

    handle = decoder_of(model).register_forward_pre_hook(look, with_kwargs=True)
    try:
        model(**inputs)
    finally:
        handle.remove()
    return seen


def places_of(ids: Tensor, counts: list[int]) -> list[list[int]]:
    """Where each picture's tokens stand in one prompt."""
    where = [i for i, token in enumerate(ids.tolist()) if token in (IMAGE, VIDEO)]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [where[start : start + n] for start, n in zip(starts, counts, strict=True)]


def planes_of(read: dict[str, Any]) -> list[Tensor]:
    """What the decoder adds behind its first layers, [length, width] each."""
    embeds = read["inputs_embeds"][0]
    planes = []
    for given in read.get("deepstack_visual_embeds") or []:
        plane = torch.zeros_like(embeds)
        plane[read["visual_pos_masks"][0]] = given
        planes.append(plane)
    return planes


@torch.no_grad()
def expected_logits(
    method: Any, model: Any, host: str, row: Row, answer: list[int]
) -> tuple[Tensor, list[int]]:
    """Logits [1 + answer, vocabulary] of the masked full run, and the KV length of each layer."""
    inputs = prompt(host, [row])
    read = entrance(model, inputs)
    decoder, embeds = decoder_of(model), read["inputs_embeds"][0].clone()
    planes, length, width = planes_of(read), len(embeds), embeds.shape[-1]
    with listening(method) as heard, method.on(model):
        model(**inputs)
    places = places_of(inputs["input_ids"][0], counts_of(host, [row]))
    gone: set[int] = set()  # really; `hidden_ones` are there
    for place, (_, told) in zip(places, heard.reduced, strict=bool(heard.reduced)):
        crops, kept = told.source.shape
        stays = []
        for crop in range(crops):
            patches = len(place) // crops
            for slot in range(kept):
                patch = int(told.source[crop, slot])
                if told.stands_at is not None:
                    patch = int(told.stands_at[crop, slot])
                elif patch < 0:
                    patch = told.merged_into[crop].tolist().index(slot)
                at = place[crop * patches + patch]
                stays.append(at)
                embeds[at] = told.tokens[crop, slot, :width]
                for i, plane in enumerate(planes):
                    plane[at] = told.tokens[crop, slot, (i + 1) * width : (i + 2) * width]
        assert len(set(stays)) == len(stays), "two tokens at one place"
        gone |= set(place) - set(stays)
    if heard.reduced:
        places = [[at for at in place if at not in gone] for place in places]
    cuts: dict[int, list[Any]] = {}
    for view, kept in heard.kept:
        cuts.setdefault(view.layer, []).append((view.chosen or range(len(places)), kept))
    new = model.get_input_embeddings()(torch.tensor(answer, dtype=torch.long))
    hidden = torch.cat([embeds, new])[None]
    positions = _positions(host, read, length, len(answer), gone)
    rotary = decoder.rotary_emb(hidden, positions)
    masks = isinstance(method, LayerReducer) and method.masks_only
    lengths, hidden_ones = [], set[int]()
    for number, layer in enumerate(decoder.layers):
        for images, kept in cuts.get(number, []):
            for row_of, image in enumerate(images):
                index = kept.index[row_of, : kept.counts[row_of]].tolist()
                stays = [places[image][i] for i in index]
                (hidden_ones if masks else gone).update(set(places[image]) - set(stays))
                places[image] = stays
                if kept.values is not None:
                    hidden[0, stays] = kept.values[row_of, : len(stays)].to(hidden.dtype)
        if isinstance(method, LayerReducer) and method.renumbers:
            positions = _positions(host, read, length, len(answer), gone)
            rotary = decoder.rotary_emb(hidden, positions)
        mask = mask_of(hidden.shape[1], gone)
        mask[..., sorted(hidden_ones)] = False  # they still ask, but do not even see themselves
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        if number < len(planes):
            hidden[0, :length] += planes[number]
        lengths.append(length - len(gone))
    return model.lm_head(decoder.norm(hidden))[0, length - 1 :], lengths


def _positions(host: str, read: dict[str, Any], length: int, new: int, gone: set[int]) -> Tensor:
    """Positions of a whole prompt, and of what follows: one more each than the largest of all.

    1-D positions close up; 3-D ones stay.
    """
    if host not in QWEN:
        stays = torch.tensor([at not in gone for at in range(length + new)])
        return (stays.cumsum(0) - 1).clamp(min=0)[None]
    positions = read["position_ids"]
    if positions is None:
        positions = torch.arange(length).expand(3, 1, -1)
    more = positions.max() + 1 + torch.arange(new)
    return torch.cat([positions[-3:], more.expand(3, 1, -1)], -1)
