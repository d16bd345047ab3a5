"""What a pruned model must compute, by another route: loops, and the untouched model with masks.

Nothing here calls the kit's views, hosts, methods' `reduce` / `keep`, or surgery; but methods that
have no reference of their own are taken at their word (`reference_answers`).
"""

from __future__ import annotations

from typing import Any

import torch
from reference_answers import answered_crops, answered_logits
from reference_baselines import BASELINES, baseline_tokens
from reference_inside import INSIDE, aim_states, aim_tokens, hiding, inside_logits
from reference_schedules import scheduled_logits
from tiny_hosts import (
    IMAGE,
    OWN_REFERENCE,
    PATCHES,
    SCHEDULES,
    SIDE,
    TILED,
    Picture,
    Row,
    guide_for,
    pictures_of,
    prompt,
)
from torch import Tensor

from frugalvlm.methods import EncoderReducer, Vanilla

Token = tuple[str, int, Tensor]  # "cls", "patch" or "merged"; patch number or slot; features


# -- vision tower --------------------------------------------------------------------------------


@torch.no_grad()
def tower_states(model: Any, crops: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Features, attention maps [crops, heads, S, S] and raw keys [crops, heads, S, d] in float64.

    The last value says whether position 0 is [CLS].
    """
    tower = model.model.vision_tower
    states = tower(crops, output_hidden_states=True).hidden_states
    layers = next(m for n, m in tower.named_modules() if n.endswith("encoder.layers"))
    block = layers[len(layers) - 2]  # vision_feature_layer = -2: the last layer but one
    attention, x = block.self_attn, block.layer_norm1(states[-3])
    split = (*x.shape[:2], attention.num_heads, attention.head_dim)
    q = attention.q_proj(x).view(split).transpose(1, 2)
    k = attention.k_proj(x).view(split).transpose(1, 2)
    logits = torch.einsum("bhid,bhjd->bhij", q, k) / attention.head_dim**0.5
    maps = logits.exp() / logits.exp().sum(-1, keepdim=True)
    has_cls = model.config.vision_feature_select_strategy == "default"
    return states[-2], maps, k, has_cls


def top(scores: list[float], count: int) -> list[int]:
    """The `count` places with the largest score, ascending."""
    return sorted(sorted(range(len(scores)), key=lambda j: -scores[j])[:count])


def fastervlm_tokens(
    features: Tensor, maps: Tensor, keys: Tensor, has_cls: bool, kept: int
) -> list[list[Token]]:
    """Top patches by the [CLS] row, mean over heads."""
    assert has_cls
    answer: list[list[Token]] = []
    for crop in range(len(features)):
        heads = maps.shape[1]
        score = [
            sum(float(maps[crop, h, 0, 1 + j]) for h in range(heads)) / heads
            for j in range(PATCHES)
        ]
        answer.append([("patch", j, features[crop, 1 + j]) for j in top(score, kept)])
    return answer


def visionzip_tokens(
    features: Tensor, maps: Tensor, keys: Tensor, has_cls: bool,
    dominant: int, contextual: int, true_mean: bool,
) -> list[list[Token]]:  # fmt: skip
    """Dominant tokens, then contextual ones: the paper's steps, one token at a time."""
    answer: list[list[Token]] = []
    first, heads = int(has_cls), maps.shape[1]
    for crop in range(len(features)):
        score = []
        for j in range(PATCHES):
            if has_cls:
                score.append(sum(float(maps[crop, h, 0, 1 + j]) for h in range(heads)))
            else:
                rows = range(PATCHES)
                received = sum(float(maps[crop, h, i, j]) for h in range(heads) for i in rows)
                score.append(received / (heads * PATCHES))
        chosen = top(score, dominant - first)
        rest = [j for j in range(PATCHES) if j not in chosen]
        tokens: list[Token] = [("cls", -1, features[crop, 0])] if has_cls else []
        tokens += [("patch", j, features[crop, first + j]) for j in chosen]
        metric = {j: keys[crop, :, first + j].mean(0) for j in rest}
        step = max(1, len(rest) // contextual) if contextual else 0
        targets = [rest[i * step] for i in range(contextual)]
        groups: dict[int, list[int]] = {t: [] for t in targets}
        for j in rest:
            if j in groups or not targets:
                continue
            cosine = {
                t: float(metric[j] @ metric[t] / metric[j].norm() / metric[t].norm())
                for t in targets
            }
            groups[max(targets, key=lambda t: cosine[t])].append(j)
        for slot, t in enumerate(targets):
            own = features[crop, first + t]
            joined = [features[crop, first + j] for j in groups[t]]
            if true_mean:
                merged = sum(joined, own) / (1 + len(joined))
            else:
                merged = own + (sum(joined) / len(joined) if joined else 0)
            tokens.append(("merged", slot, merged))
        answer.append(tokens)
    return answer


def reduced_tokens(
    method: Any, model: Any, crops: Tensor, random_kept: list[list[int]]
) -> list[list[Token]]:
    """The tokens of an encoder reducer, crop by crop; random choices are given."""
    states = tower_states(model, crops)
    if method.key == "random":
        features, first = states[0], int(states[3])
        return [
            [("patch", j, features[crop, first + j]) for j in row]
            for crop, row in enumerate(random_kept)
        ]
    if method.key == "fastervlm":
        return fastervlm_tokens(*states, method.kept_tokens)
    if method.key in ("aim", "aim_mask"):
        pairs = zip(*aim_states(model, crops), strict=True)
        return [aim_tokens(features, keys, method.kept_tokens) for features, keys in pairs]
    if method.key in BASELINES:
        features, _, keys, has_cls = states
        return [
            baseline_tokens(method, model, crops[i], features[i], keys[i], has_cls)
            for i in range(len(crops))
        ]
    assert method.key in ("visionzip", "visionzip_mean")
    true_mean = method.key == "visionzip_mean"
    return visionzip_tokens(*states, method.dominant, method.contextual, true_mean)


def reading_order(picture: Picture, host: str, crops: list[list[Token]]) -> list[Token]:
    """The tokens of one image as the language model reads them."""
    if host not in TILED:
        return crops[0]
    base, tiles = crops[0], crops[1:]
    wide = picture.tiles()[1]
    placed: list[tuple[tuple[int, int], Token]] = []
    for number, tile in enumerate(tiles):
        for token in tile:
            if token[0] == "patch":
                y = number // wide * SIDE + token[1] // SIDE
                x = number % wide * SIDE + token[1] % SIDE
                placed.append(((y, x), token))
    patches = [token for _, token in sorted(placed, key=lambda entry: entry[0])]
    return [
        *base,
        *patches,
        *[t for tile in tiles for t in tile if t[0] == "cls"],
        *[t for tile in tiles for t in tile if t[0] == "merged"],
    ]


# -- language model ------------------------------------------------------------------------------


@torch.no_grad()
def embeddings(
    method: Any, model: Any, host: str, row: Row, random_kept: list[list[int]]
) -> tuple[Tensor, list[list[int]]]:
    """One prompt as the decoder reads it, [1, length, width], and where each image stands."""
    inputs = prompt(host, [row])
    text = model.get_input_embeddings()(inputs["input_ids"])[0]
    marked = (inputs["input_ids"][0] == IMAGE).tolist()
    images: list[Tensor] = []
    pictures = pictures_of(row)
    untouched = not isinstance(method, EncoderReducer)
    if pictures and untouched:
        sizes = {"image_sizes": inputs["image_sizes"]} if host in TILED else {}
        packed = model.get_image_features(inputs["pixel_values"], **sizes).pooler_output
        images = [p.reshape(-1, text.shape[-1]) for p in packed]
    start = 0
    answered = None
    if pictures and not untouched and method.key not in OWN_REFERENCE:
        answered = answered_crops(method, model, host, row)
    for picture in pictures if not untouched else []:
        count = picture.crops(host)
        if answered is not None:
            crops = answered[start : start + count]
        else:
            crops = reduced_tokens(
                method, model, picture.pixels(host), random_kept[start : start + count]
            )
        start += count
        tokens = reading_order(picture, host, crops)
        projected = model.model.multi_modal_projector(torch.stack([t[2] for t in tokens]))
        images.append(projected)
    pieces: list[Tensor] = []
    places: list[list[int]] = []
    position, length = 0, 0
    while position < len(text):
        if marked[position]:
            picture = pictures[len(places)]
            visual = images[len(places)]
            places.append(list(range(length, length + len(visual))))
            pieces.append(visual)
            length += len(visual)
            position += picture.tokens(host)
        else:
            pieces.append(text[position : position + 1])
            length += 1
            position += 1
    return torch.cat(pieces)[None], places


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [length, head_dim]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[:, half:], x[:, :half]], -1) * sin


@torch.no_grad()
def decoder_attention(model: Any, embeds: Tensor, layer: int) -> Tensor:
    """Attention map [heads, length, length] of one decoder layer on one prompt, float64."""
    decoder = model.model.language_model
    out = decoder(inputs_embeds=embeds, output_hidden_states=True, use_cache=False)
    block, length = decoder.layers[layer], embeds.shape[1]
    x = block.input_layernorm(out.hidden_states[layer])
    cos, sin = (t[0] for t in decoder.rotary_emb(x, torch.arange(length)[None]))
    attention, config = block.self_attn, decoder.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    q = attention.q_proj(x)[0].view(length, heads, -1)
    k = attention.k_proj(x)[0].view(length, groups, -1)
    maps = []
    for head in range(heads):
        rotated = rotate(q[:, head], cos, sin), rotate(k[:, head * groups // heads], cos, sin)
        logits = rotated[0] @ rotated[1].T / q.shape[-1] ** 0.5
        future = torch.arange(length)[None, :] > torch.arange(length)[:, None]
        maps.append(logits.masked_fill(future, float("-inf")).softmax(-1))
    return torch.stack(maps)


def fastv_dropped(
    model: Any, embeds: Tensor, places: list[list[int]], k: int, kept: list[int]
) -> list[int]:
    """Positions that FastV drops: not among the top of the last row, layer k - 1, mean of heads."""
    row = decoder_attention(model, embeds, k - 1)[:, -1].mean(0).tolist()
    dropped = []
    for image, count in zip(places, kept, strict=True):
        stays = {image[i] for i in top([row[p] for p in image], count)}
        dropped += [p for p in image if p not in stays]
    return dropped


@torch.no_grad()
def sgl_scores(
    guide: Any, host: str, row: Row, steps: int, maps_of: Any = decoder_attention
) -> list[list[float]]:
    """What SGL adds up for each visual token of a prompt, from whole maps of the guide.

    `maps_of(guide, embeds, layer)` gives the map [heads, length, length] of a layer.
    """
    embeds, places = embeddings(Vanilla(), guide, host, row, [])
    if not places:
        return []
    for _ in range(steps - 1):  # the last token of the answer is never read again
        hidden = guide.model.language_model(inputs_embeds=embeds, use_cache=False)[0]
        said = guide.lm_head(hidden[:, -1:]).argmax(-1)
        embeds = torch.cat([embeds, guide.get_input_embeddings()(said)], 1)
    scores = [[0.0] * len(image) for image in places]
    for layer in range(guide.config.text_config.num_hidden_layers):
        maps = maps_of(guide, embeds, layer)
        for query in range(places[-1][-1], embeds.shape[1]):
            for image, score in zip(places, scores, strict=True):
                for i, place in enumerate(image):
                    score[i] += float(maps[:, query, place].sum())
    return scores


def hidden_keys(model: Any, dropped: list[int], from_layer: int) -> Any:
    """The untouched model, with keys hidden from a layer on; every query still sees itself."""
    return hiding(model, {from_layer: dropped}, see_themselves=True)


@torch.no_grad()
def expected_logits(
    method: Any, model: Any, host: str, row: Row, answer: list[int],
    random_kept: list[list[int]], kept: list[int],
) -> tuple[Tensor, list[int]]:  # fmt: skip
    """Logits [1 + answer, vocabulary] behind the prompt and behind each token of an answer.

    Also the KV length of every layer for the prompt.
    """
    embeds, places = embeddings(method, model, host, row, random_kept)
    layers, prompt_length = model.config.text_config.num_hidden_layers, embeds.shape[1]
    dropped: list[int] = []
    from_layer = layers
    if method.key == "fastv":
        from_layer = method.k
        dropped = fastv_dropped(model, embeds, places, method.k, kept)
    if method.key == "sgl":
        (from_layer,) = method.layers(layers)
        scores = sgl_scores(guide_for(model).model, host, row, steps=3)
        for image, score, count in zip(places, scores, kept, strict=True):
            dropped += [p for i, p in enumerate(image) if i not in top(score, count)]
    new = model.get_input_embeddings()(torch.tensor([answer], dtype=torch.long))
    if method.key not in OWN_REFERENCE:
        return answered_logits(method, model, host, row, embeds, places, new)
    if method.key in SCHEDULES:
        crops = [p.crops(host) for p in pictures_of(row)]
        return scheduled_logits(method, model, embeds, places, crops, new)
    embeds = torch.cat([embeds, new], 1)
    if method.key in INSIDE:
        crops = [p.crops(host) for p in pictures_of(row)]
        return inside_logits(method, model, embeds, places, crops, prompt_length)
    with hidden_keys(model, dropped, from_layer):
        hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False)[0]
    lengths = [prompt_length - (len(dropped) if i >= from_layer else 0) for i in range(layers)]
    return model.lm_head(hidden)[0, prompt_length - 1 :], lengths
