"""FasterVLM against a slow loop written from the paper, and against plausible mistakes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reference import fastervlm_tokens, tower_states
from tiny_hosts import PATCHES, Picture, model_for, prompt
from torch import Tensor

from frugalvlm.methods import FasterVLM
from frugalvlm.views import EncoderView

T = 5
PICTURES = [Picture(seed) for seed in range(20, 28)]
Selector = Callable[[Tensor, Tensor, Tensor], list[list[int]]]  # maps, last layer's maps, features


def check(kept: list[list[int]]) -> None:
    """Compare the kept patches of eight pictures with the loop; one message per mistake."""
    pixels = torch.cat([p.pixels("llava_clip") for p in PICTURES])
    expected = [
        [patch for _, patch, _ in crop]
        for crop in fastervlm_tokens(*tower_states(model_for("llava_clip"), pixels), T)
    ]
    assert all(len(row) == T for row in kept), "T patches stay"
    assert [sorted(row) for row in kept] == expected, "the top of [CLS] attention, mean of heads"
    assert kept == expected, "raster order"


def test_kept_patches_are_those_of_the_paper():
    model = model_for("llava_clip")
    with FasterVLM(T).on(model) as trace, torch.no_grad():
        model(**prompt("llava_clip", [[2, picture, 3] for picture in PICTURES]))
    check(trace.kept)


def by(score: Tensor) -> list[list[int]]:
    return score.topk(T).indices.sort().values.tolist()


TWINS: dict[str, tuple[Selector, str]] = {
    "all rows instead of [CLS]": (lambda a, z, f: by(a.mean(1).mean(1)[:, 1:]), "the top"),
    "[CLS] column kept": (lambda a, z, f: by(a.mean(1)[:, 0]), "the top"),
    "[CLS] column instead of row": (lambda a, z, f: by(a.mean(1)[:, 1:, 0]), "the top"),
    "last layer": (lambda a, z, f: by(z.mean(1)[:, 0, 1:]), "the top"),
    "largest head": (lambda a, z, f: by(a.amax(1)[:, 0, 1:]), "the top"),
    "length of the features": (lambda a, z, f: by(f.norm(dim=-1)), "the top"),
    "smallest": (lambda a, z, f: by(-a.mean(1)[:, 0, 1:]), "the top"),
    "score order": (lambda a, z, f: a.mean(1)[:, 0, 1:].topk(T).indices.tolist(), "raster"),
    "one too many": (
        lambda a, z, f: a.mean(1)[:, 0, 1:].topk(T + 1).indices.sort().values.tolist(),
        "T patches",
    ),
}


@pytest.mark.parametrize("mistake", TWINS)
def test_every_mistake_is_found(mistake):
    model = model_for("llava_clip", "eager")
    pixels = torch.cat([p.pixels("llava_clip") for p in PICTURES])
    with torch.no_grad():
        out = model.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
    select, message = TWINS[mistake]
    kept = select(out.attentions[-2], out.attentions[-1], out.hidden_states[-2][:, 1:])
    with pytest.raises(AssertionError, match=message):
        check(kept)


def test_the_twins_are_right_without_a_mistake():
    model = model_for("llava_clip", "eager")
    pixels = torch.cat([p.pixels("llava_clip") for p in PICTURES])
    with torch.no_grad():
        maps = model.model.vision_tower(pixels, output_attentions=True).attentions[-2]
    check(by(maps.mean(1)[:, 0, 1:]))


def test_by_hand():
    """Six patches, two heads: the mean ranks 1 and 4 first; head 0 alone would take 0 and 1."""
    features = torch.arange(7.0)[None, :, None]
    view = EncoderView(
        features[:, 1:], features[:, :1], (2, 3), features, lambda r: r[:, None], features[:, None],
        1.0, None,
    )  # fmt: skip
    view.__dict__["cls_attention"] = torch.tensor(
        [[[0.30, 0.25, 0.10, 0.05, 0.20, 0.05], [0.00, 0.40, 0.10, 0.05, 0.30, 0.05]]]
    )
    reduced = FasterVLM(2).reduce(view)
    assert reduced.source.tolist() == [[1, 4]]
    assert reduced.tokens.flatten().tolist() == [2.0, 5.0]
    assert reduced.merged_into is None


def test_budgets_of_the_paper():
    """T = round(576 (1 - R)) at 25, 50, 75, 90 and 95 % reduction; per crop in LLaVA-NeXT."""
    for budget in (432, 288, 144, 58, 29):
        assert FasterVLM.for_budget(budget) == FasterVLM(budget)
    assert FasterVLM.for_budget(PATCHES, PATCHES) == FasterVLM(PATCHES)
