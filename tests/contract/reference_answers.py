"""Methods without a reference of their own: what they answered, taken at its word.

A method is listened to while it is on a model: what `reduce` and `keep` gave back. From that alone
the untouched model computes, by another route, what the pruned one must. Whether the answers are
what a paper says is for the method's own test; whether they are well formed is checked here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from reference_schedules import mask_of, positions_of
from tiny_hosts import PATCHES, Row, prompt
from torch import Tensor

from frugalvlm.methods import METHODS, EncoderReducer, LayerReducer
from frugalvlm.views import CLS_SOURCE, EncoderView, Kept, LayerView, Reduced

# Methods that hand patches over in an order of their own, as their released code does.
OWN_ORDER = ("aim", "aim_mask", "prumerge_plus")


@dataclass
class Answers:
    """What a method answered, in the order of the calls."""

    reduced: list[tuple[EncoderView, Reduced]] = field(default_factory=list)
    kept: list[tuple[LayerView, Kept]] = field(default_factory=list)


@contextmanager
def listening(method: Any) -> Iterator[Answers]:
    """While this is open, what methods of this class answer."""
    kind, answers = METHODS.get(method.key, type(method)), Answers()
    patches = []
    for base, name, heard in (
        (EncoderReducer, "reduce", answers.reduced),
        (LayerReducer, "keep", answers.kept),
    ):
        if isinstance(method, base):
            original = getattr(kind, name)

            def told(own: Any, view: Any, original: Any = original, heard: Any = heard) -> Any:
                answer = original(own, view)
                heard.append((view, answer))
                return answer

            patches.append(mock.patch.object(kind, name, told))
    try:
        for patch in patches:
            patch.start()
        yield answers
    finally:
        for patch in patches:
            patch.stop()


def answers_of(method: Any, model: Any, host: str, row: Row) -> Answers:
    """What a method answers to one prompt."""
    with listening(method) as answers, method.on(model), torch.no_grad():
        model(**prompt(host, [row]))
    return answers


# -- well formed -----------------------------------------------------------------------------------


def check_reduced(key: str, view: EncoderView, answer: Reduced) -> None:
    """What every encoder reducer's answer must be; one message per mistake."""
    crops, kept = answer.source.shape
    assert answer.tokens.shape == (view.crops, kept, view.patches.shape[-1]), "one token a source"
    assert crops == view.crops, "an answer for every crop"
    counts = answer.counts or (kept,) * crops
    assert len(counts) == crops, "a count for every crop"
    assert all(1 <= count <= kept for count in counts), "a count beyond the tokens"
    merged = None if answer.merged_into is None else answer.merged_into.tolist()
    for crop, (row, count) in enumerate(zip(answer.source.tolist(), counts, strict=True)):
        real = [source for source in row[:count] if source >= 0]
        assert all(source < PATCHES for source in real), "a patch that does not exist"
        assert len(set(real)) == len(real), "a patch is handed over twice"
        assert key in OWN_ORDER or real == sorted(real), "patches are not in raster order"
        assert row[:count].count(CLS_SOURCE) <= 1, "[CLS] is handed over twice"
        if merged is not None:
            assert len(merged[crop]) == PATCHES, "a slot, or -1, for every patch"
            assert all(-1 <= slot < count for slot in merged[crop]), "merged into no token"


def check_kept(view: LayerView, answer: Kept, least: int = 1) -> None:
    """What every layer reducer's answer must be; one message per mistake."""
    assert len(answer.counts) == len(view.counts) == len(answer.index), "an answer for every image"
    for row, count, there in zip(answer.index.tolist(), answer.counts, view.counts, strict=True):
        assert least <= count <= min(len(row), there), "a count beyond the tokens"
        own = row[:count]
        assert all(0 <= place < there for place in own), "a token that is not there"
        assert len(set(own)) == len(own), "a token is kept twice"
        assert own == sorted(own), "kept tokens are not in order"
    if answer.values is not None:
        assert answer.values.shape[:2] == answer.index.shape, "a state for every kept token"
        assert answer.holds is not None, "whose states they are"
        assert answer.holds.shape == answer.index.shape, "whose state each one is"


# -- the untouched model ---------------------------------------------------------------------------


def answered_crops(
    method: Any, model: Any, host: str, row: Row
) -> list[list[tuple[str, int, Tensor]]]:
    """The tokens that an encoder reducer hands over, crop by crop, as `reference.Token`."""
    ((_, answer),) = answers_of(method, model, host, row).reduced
    counts = answer.counts or (answer.source.shape[1],) * len(answer.source)
    crops = []
    for tokens, sources, count in zip(answer.tokens, answer.source.tolist(), counts, strict=True):
        crop = []
        for slot, source in enumerate(sources[:count]):
            kind = "patch" if source >= 0 else "cls" if source == CLS_SOURCE else "merged"
            crop.append((kind, source if source >= 0 else slot, tokens[slot]))
        crops.append(crop)
    return crops


@torch.no_grad()
def answered_logits(
    method: Any, model: Any, host: str, row: Row, embeds: Tensor, places: list[list[int]],
    new: Tensor,
) -> tuple[Tensor, list[int]]:  # fmt: skip
    """As `reference.expected_logits`: whole layers, one by one, with keys hidden by masks.

    Args:
        method: any method.
        model: the untouched model.
        host: its family.
        row: the prompt.
        embeds: [1, prompt, width] as the decoder reads it.
        places: where each image stands in it.
        new: [1, answer, width] embeddings of an answer.
    """
    cuts = {view.layer: kept for view, kept in answers_of(method, model, host, row).kept}
    masks = isinstance(method, LayerReducer) and method.masks_only
    renumber = isinstance(method, LayerReducer) and method.renumbers
    decoder, prompt_length = model.model.language_model, embeds.shape[1]
    hidden = torch.cat([embeds, new], 1)
    gone: set[int] = set()
    lengths = []
    for number, layer in enumerate(decoder.layers):
        if number in cuts:
            kept = cuts[number]
            stays = [
                [image[i] for i in index[:count]]
                for image, index, count in zip(
                    places, kept.index.tolist(), kept.counts, strict=True
                )
            ]
            gone |= {p for image in places for p in image} - {p for own in stays for p in own}
            places = stays
            if kept.values is not None:
                for own, values in zip(places, kept.values, strict=True):
                    hidden[0, own] = values[: len(own)].to(hidden.dtype)
        mask = mask_of(hidden.shape[1], gone)
        if masks:  # a hidden token still asks, but does not even see itself
            mask[..., sorted(gone)] = False
        positions = positions_of(hidden.shape[1], gone, renumber)
        rotary = decoder.rotary_emb(hidden, positions)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        lengths.append(prompt_length - (0 if masks else len(gone)))
    return model.lm_head(decoder.norm(hidden))[0, prompt_length - 1 :], lengths
