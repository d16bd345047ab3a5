"""What views of units show, against whole attention maps and loops over rows and columns."""

import numpy as np
import pytest
import torch
from PIL import Image
from reference_answers import listening
from reference_units import decoder_of, entrance, places_of
from tiny_units import MANY, QWEN, TILES, UNITS, Shown, counts_of, model_for, prompt, shown_in
from transformers import Qwen2VLImageProcessorPil

from frugalvlm.hosts import host_for
from frugalvlm.methods import AvgPool, FasterVLM, FastV, ToMe
from frugalvlm.views import BudgetError

CLOSE = {"rtol": 1e-6, "atol": 1e-6}  # the towers rotate in float32
TWO = [[2, Shown(3, 4, 5), 1, Shown(4, 3, 3), 3]]


@torch.no_grad()
def patch_maps(model, inputs):
    """Of every picture the map [heads, patches, patches] and keys [heads, patches, head_dim] of the
    tower's last block, and its patches' states, in the order that the tower has them."""
    block, seen = model.model.visual.blocks[-1], {}
    handles = [
        block.attn.register_forward_pre_hook(
            lambda m, args, kwargs: seen.update(kwargs, hidden=args[0] if args else None),
            with_kwargs=True,
        ),
        block.register_forward_hook(lambda m, args, out: seen.update(left=out)),
    ]
    features = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    for handle in handles:
        handle.remove()
    hidden = seen["hidden"] if seen["hidden"] is not None else seen["hidden_states"]
    heads = block.attn.num_heads
    cos, sin = seen["position_embeddings"]
    q, k, _ = block.attn.qkv(hidden).view(len(hidden), 3, heads, -1).unbind(1)

    def turned(x):
        half = x.shape[-1] // 2
        return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]

    q, k, start, pictures = turned(q), turned(k), 0, []
    for _, rows, cols in inputs["image_grid_thw"].tolist():
        own = slice(start, start + rows * cols)
        start += rows * cols
        logits = torch.einsum("qhd,khd->hqk", q[own], k[own]) / q.shape[-1] ** 0.5
        pictures.append((logits.softmax(-1), k[own].transpose(0, 1), seen["left"][own]))
    return pictures, features.pooler_output


@pytest.mark.parametrize("host", QWEN)
def test_scores_and_keys_of_units(host):
    """Where the tower has a unit is found by what the merger makes of it."""
    model, inputs, method = model_for(host), prompt(host, TWO), ToMe(2)
    pictures, features = patch_maps(model, inputs)
    with listening(method) as heard, method.on(model), torch.no_grad():
        model(**inputs)
    assert len(heard.reduced) == len(pictures) == 2
    for (view, _), (maps, keys, states), made, shown in zip(
        heard.reduced, pictures, features, shown_in(TWO), strict=True
    ):
        assert view.grid == (shown.rows, shown.cols)
        torch.testing.assert_close(view.features[0], made)
        in_tower = model.model.visual.merger(states)
        received = maps.mean(0).sum(0) / maps.shape[-1]
        for unit in range(shown.units):
            (at,) = [i for i, row in enumerate(in_tower) if torch.allclose(row, made[unit])]
            four = range(4 * at, 4 * at + 4)
            score = sum(float(received[p]) for p in four) / 4
            assert float(view.received_attention[0, unit]) == pytest.approx(score, rel=1e-5)
            key = sum(keys[:, p] for p in four) / 4
            torch.testing.assert_close(view.keys[0, :, unit], key, **CLOSE)


@pytest.mark.parametrize("host", TILES)
def test_scores_and_keys_of_tiles(host):
    """Whole maps of the tower's last layer; which patches a unit has is found by changing one."""
    model, inputs, method = model_for(host), prompt(host, TWO), ToMe(2)
    tower = getattr(model.model, "vision_tower", None) or model.model.vision_model
    layer = (getattr(tower.encoder, "layer", None) or tower.encoder.layers)[-1]
    attention, seen = getattr(layer, "attention", None) or layer.self_attn, []
    handle = attention.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs.get("hidden_states", *args[:1])),
        with_kwargs=True,
    )
    with listening(method) as heard, method.on(model), torch.no_grad():
        model(**inputs)
    handle.remove()
    hidden = seen[0]
    with torch.no_grad():
        q, k = attention.q_proj(hidden), attention.k_proj(hidden)
        if host == "internvl":
            q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = (v.unflatten(-1, (2, -1)) for v in (q, k))
    maps = (torch.einsum("tqhd,tkhd->thqk", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    first, tile = int(host == "internvl"), 0
    for view, _ in heard.reduced:
        for crop in range(view.crops):
            for unit in range(9):
                row, col = unit // 3, unit % 3
                cells = [(2 * row + i) * 6 + 2 * col + j for i in (0, 1) for j in (0, 1)]
                four = [first + cell for cell in cells]
                received = maps[tile].mean(0).sum(0) / maps.shape[-1]
                score = sum(float(received[p]) for p in four) / 4
                assert float(view.received_attention[crop, unit]) == pytest.approx(score, rel=1e-6)
                key = sum(k[tile, p] for p in four) / 4
                torch.testing.assert_close(view.keys[crop, :, unit], key, **CLOSE)
                if host == "internvl":
                    row_of = [sum(float(maps[tile, h, 0, p]) for p in four) / 4 for h in (0, 1)]
                    assert view.cls_attention[crop, :, unit].tolist() == pytest.approx(row_of)
            tile += 1
    assert tile == len(hidden) == 8


@pytest.mark.parametrize("host", UNITS)
def test_the_last_token_s_attention(host):
    model, inputs, method = model_for(host), prompt(host, TWO), FastV(2, 3)
    read, decoder = entrance(model, inputs), decoder_of(model)
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    if host in QWEN:
        positions = read["position_ids"][-3:]
    states = []
    handle = decoder.layers[2].register_forward_pre_hook(lambda m, args: states.append(args[0]))
    with torch.no_grad():
        model(**inputs)
        handle.remove()
        attention, x = decoder.layers[2].self_attn, decoder.layers[2].input_layernorm(states[0])
        cos, sin = (part[0] for part in decoder.rotary_emb(x, positions))
        q, k = (
            p(x)[0].unflatten(-1, (-1, cos.shape[-1])) for p in (attention.q_proj, attention.k_proj)
        )
        q, k = (
            getattr(attention, n, torch.nn.Identity())(v) for n, v in (("q_norm", q), ("k_norm", k))
        )
        half = cos.shape[-1] // 2
        q, k = (
            v * cos[:, None] + torch.cat([-v[..., half:], v[..., :half]], -1) * sin[:, None]
            for v in (q, k)
        )
        rows = [
            (q[-1, head] @ k[:, head * k.shape[1] // q.shape[1]].T / cos.shape[-1] ** 0.5).softmax(
                -1
            )
            for head in range(q.shape[1])
        ]
        with listening(method) as heard, method.on(model):
            model(**inputs)
    places = places_of(inputs["input_ids"][0], counts_of(host, TWO))
    seen = {}
    for view, _ in heard.kept:
        seen |= dict(zip(view.chosen or range(len(places)), view.last_token_attention, strict=True))
    for image, place in enumerate(places):
        expected = torch.stack([row[place] for row in rows])
        torch.testing.assert_close(seen[image][:, : len(place)], expected, rtol=1e-9, atol=1e-12)


def test_the_processor_s_patches_stand_where_the_view_has_them():
    """One bright cell of a picture is the unit of that row and column."""
    processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, do_normalize=False,
        size={"shortest_edge": 64, "longest_edge": 4096},
    )  # fmt: skip
    pixels = np.zeros((32, 24, 3), dtype=np.uint8)
    pixels[16:24, 8:16] = 255  # of 4 x 3 cells the one in row 2, column 1
    made = processor(images=[Image.fromarray(pixels)], return_tensors="pt")
    assert made["image_grid_thw"].tolist() == [[1, 8, 6]]
    for name in QWEN:
        model = model_for(name)
        inputs = prompt(name, [[2, Shown(1, 4, 3), 3]])
        inputs["pixel_values"] = made["pixel_values"].double()
        with listening(AvgPool(12)) as heard, AvgPool(12).on(model), torch.no_grad():
            model(**inputs)
        (view, _) = heard.reduced[0]
        # Merged groups of four patches are in reading order as they enter the tower.
        bright = made["pixel_values"].view(12, 4, -1).mean((1, 2))
        assert bright.argmax() == 2 * view.grid[1] + 1
        assert view.grid == (4, 3)


@pytest.mark.parametrize("host", QWEN)
def test_budgets_that_are_counts_are_clamped_to_what_a_picture_has(host):
    model = model_for(host)
    with ToMe(9).on(model) as trace, torch.no_grad():
        model(**prompt(host, MANY))
    assert [len(image) for image in trace._origins()] == [min(9, p.units) for p in shown_in(MANY)]
    with FastV(9).on(model) as trace, torch.no_grad():
        model(**prompt(host, MANY))
    assert [len(kept) for kept in trace.kept] == [min(9, p.units) for p in shown_in(MANY)]


def test_a_share_is_a_number_where_all_pictures_have_one_size():
    from tiny_hosts import model_for as llava
    from tiny_hosts import prompt as asked

    model, inputs = llava("llava_clip"), asked("llava_clip")
    with torch.no_grad():
        with FasterVLM.for_share(0.4).on(model) as trace:
            share = model(**inputs).logits
        with FasterVLM(6).on(model):
            count = model(**inputs).logits
    assert torch.equal(share, count)
    assert trace.tokens_per_layer == [6] * 4
    for wrong in (0, -0.1, 1.2, True, "1"):
        with pytest.raises(BudgetError, match="above 0 and at most 1"):
            FasterVLM.for_share(wrong)
    method = FastV.for_share(0.25)
    assert repr(method) == "FastV.for_share(0.25)"
    assert method.describe()["picture_share"] == 0.25
    assert "picture_share" not in FastV(4).describe()
    assert method.fitted(40) == FastV(10)
    assert host_for(model).shape.most == 16
