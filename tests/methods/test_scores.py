"""The views' scores against the eager attention maps of the untouched model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tiny_hosts import HOSTS, MANY, NO_CLS, ONE, PATCHES, K, Picture, model_for, pictures_of, prompt

from frugalvlm.methods import EncoderReducer, LayerReducer
from frugalvlm.views import EncoderView, Kept, LayerView, Reduced, UnsupportedError

SEEN: list[Any] = []
CLOSE = {"rtol": 1e-3, "atol": 2e-5}


@dataclass(frozen=True)
class TowerSpy(EncoderReducer):
    """Keeps everything and shows its view to the test."""

    key: ClassVar[str] = "tower_spy"

    @classmethod
    def for_budget(cls, kept_tokens, total_tokens=576):
        return cls()

    def reduce(self, view: EncoderView) -> Reduced:
        SEEN.append(view)
        every = torch.arange(view.patch_count).expand(view.crops, -1)
        return Reduced(view.patches, every)


@dataclass(frozen=True)
class LayerSpy(LayerReducer):
    """Keeps everything before layer k and shows what it saw."""

    key: ClassVar[str] = "layer_spy"
    k: int = K
    queries: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def for_budget(cls, kept_tokens, total_tokens=576):
        return cls()

    def layers(self, decoder_layers: int) -> tuple[int, ...]:
        return (self.k,)

    def keep(self, view: LayerView) -> Kept:
        chosen = view.attention_from(torch.tensor(self.queries)) if self.queries else None
        SEEN.append((view, view.last_token_attention, chosen, view.tokens))
        every = torch.arange(view.visual.shape[1]).expand(len(view.visual), -1)
        return Kept(every, view.counts)


@pytest.fixture(autouse=True)
def _forget():
    SEEN.clear()


def pixels_of(host, rows):
    return torch.cat([p.pixels(host) for row in rows for p in pictures_of(row)]).float()


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_tower_attention_is_that_of_the_eager_map(host, attention):
    model = model_for(host, attention, torch.float32)
    with TowerSpy().on(model), torch.no_grad():
        model(**prompt(host, MANY, dtype=torch.float32))
    (view,) = SEEN
    tower = model_for(host, "eager", torch.float32).model.vision_tower
    with torch.no_grad():
        out = tower(pixels_of(host, MANY), output_attentions=True, output_hidden_states=True)
    maps, features = out.attentions[-2], out.hidden_states[-2]
    first = int(host not in NO_CLS)
    assert view.has_cls == bool(first)
    torch.testing.assert_close(view.patches, features[:, first:], **CLOSE)
    torch.testing.assert_close(
        view.received_attention, maps.mean(1).mean(1)[:, first:], **CLOSE,
        msg=lambda m: f"received attention is the mean over heads and all queries: {m}",
    )  # fmt: skip
    if first:
        torch.testing.assert_close(view.cls, features[:, :1], **CLOSE)
        torch.testing.assert_close(
            view.cls_attention, maps[:, :, 0, 1:], **CLOSE,
            msg=lambda m: f"[CLS] attention is row 0 of the feature layer's map: {m}",
        )  # fmt: skip
        assert (view.cls_attention.sum(-1) < 1).all(), "renormalised without the [CLS] column"
        assert not torch.allclose(view.cls_attention, out.attentions[-1][:, :, 0, 1:], **CLOSE)
    else:
        for name in ("cls", "cls_attention"):
            with pytest.raises(UnsupportedError):
                getattr(view, name)


def test_received_attention_in_several_chunks():
    """More positions than one chunk of query rows holds."""
    torch.manual_seed(0)
    hidden, keys = torch.randn(2, 150, 6).double(), torch.randn(2, 3, 150, 2).double()

    def queries_of(rows):
        return rows.unflatten(-1, (3, 2)).transpose(1, 2)

    view = EncoderView(hidden, None, (15, 10), hidden, queries_of, keys, 0.7, None)
    maps = torch.softmax(queries_of(hidden) @ keys.mT * 0.7, -1)
    torch.testing.assert_close(view.received_attention, maps.mean((1, 2)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("host", HOSTS)
def test_raw_keys_are_the_key_projection(host):
    model = model_for(host)
    outputs = []
    tower = model.model.vision_tower
    layers = next(m for n, m in tower.named_modules() if n.endswith("encoder.layers"))
    hook = layers[-2].self_attn.k_proj.register_forward_hook(lambda m, a, o: outputs.append(o))
    with TowerSpy().on(model), torch.no_grad():
        model(**prompt(host))
    hook.remove()
    first, heads = int(host not in NO_CLS), layers[-2].self_attn.num_heads
    for head in range(heads):
        width = outputs[0].shape[-1] // heads
        expected = outputs[0][:, first:, head * width : (head + 1) * width]
        assert torch.equal(SEEN[0].keys[:, head], expected)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("rows", [ONE, MANY], ids=["one", "many"])
def test_decoder_attention_is_that_of_the_eager_map(host, attention, side, k, rows):
    """Padded rows, several pictures in a prompt, none in another; chosen rows of each prompt."""
    inputs = prompt(host, rows, side, torch.float32)
    length = inputs["input_ids"].shape[1]
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    real = inputs["attention_mask"].bool()
    last = [int(row.nonzero().max()) for row in real]
    # The last token, one in the middle of the visual tokens, and the first one.
    queries = tuple((n, (n + int(row.nonzero().min())) // 2, int(row.nonzero().min()))
                    for n, row in zip(last, real, strict=True))  # fmt: skip
    model = model_for(host, attention, torch.float32)
    with LayerSpy(k, queries).on(model), torch.no_grad():
        model(**inputs)
    ((view, by_last, chosen, tokens),) = SEEN
    eager = model_for(host, "eager", torch.float32)
    with torch.no_grad():
        out = eager(**inputs, output_attentions=True, output_hidden_states=True)
    maps, hidden = out.attentions[k - 1], out.hidden_states[k]
    image = 0
    for row, parts in enumerate(rows):
        at = (
            (inputs["input_ids"][row] == 60)
            .nonzero()[:, 0]
            .split([p.tokens(host) for p in pictures_of(parts)])
        )
        for places in at if pictures_of(parts) else ():
            count = len(places)
            assert view.counts[image] == count
            assert view.visual[image, :count].tolist() == places.tolist()
            torch.testing.assert_close(
                by_last[image, :, :count], maps[row, :, last[row], places], **CLOSE,
                msg=lambda m: f"attention of the last real token, layer k - 1: {m}",
            )  # fmt: skip
            for slot, query in enumerate(queries[row]):
                torch.testing.assert_close(
                    chosen[image, :, slot, :count], maps[row, :, query, places], **CLOSE
                )
            torch.testing.assert_close(tokens[image, :count], hidden[row, places], **CLOSE)
            assert (by_last[image, :, count:] == -1).all()
            image += 1
    assert image == len(view.counts)
    assert view.visual.max() <= length


def test_scores_in_float64_are_not_rounded():
    """Faithfulness is tested in float64; a float32 softmax would hide small mistakes."""
    model = model_for("llava_clip")
    with TowerSpy().on(model), LayerSpy().on(model), torch.no_grad():
        model(**prompt("llava_clip"))
    assert SEEN[0].cls_attention.dtype == torch.float64
    assert SEEN[1][1].dtype == torch.float64


def test_a_second_cut_reads_the_short_sequence():
    """Scores before a later cut are those of the sequence that is left."""

    @dataclass(frozen=True)
    class Two(LayerSpy):
        def layers(self, decoder_layers: int) -> tuple[int, ...]:
            return (1, 3)

        def keep(self, view: LayerView) -> Kept:
            SEEN.append((view.visual.clone(), view.last_token_attention, view.tokens))
            return (
                Kept(torch.arange(0, 16, 2)[None], (8,)) if view.layer == 1 else super().keep(view)
            )

    model = model_for("llava_clip")
    with Two().on(model), torch.no_grad():
        model(**prompt("llava_clip", [[3, Picture(1), 5]]))
    (first, _, _), (second, attention, _) = SEEN[:2]
    assert first.tolist() == [list(range(4, 4 + PATCHES))]
    assert second.tolist() == [list(range(4, 4 + 8))]
    assert attention.shape == (1, 4, 8)
