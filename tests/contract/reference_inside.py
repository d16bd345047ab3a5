"""AIM, SparseVLM and DyVTE by another route: one token at a time, and layers run by hand.

Nothing here calls the kit's views, hosts, methods or surgery.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

INSIDE = ("aim", "aim_mask", "sparsevlm", "sparsevlm_rank", "dyvte")


# -- merging -------------------------------------------------------------------------------------


@torch.no_grad()
def aim_states(model: Any, crops: Tensor) -> tuple[Tensor, Tensor]:
    """Patch features, and keys of the tower layer behind them with heads side by side."""
    tower = model.model.vision_tower
    states = tower(crops, output_hidden_states=True).hidden_states
    layers = next(m for n, m in tower.named_modules() if n.endswith("encoder.layers"))
    first = int(model.config.vision_feature_select_strategy == "default")
    keys = layers[-1].self_attn.k_proj(layers[-1].layer_norm1(states[-2]))
    return states[-2][:, first:], keys[:, first:]


def aim_tokens(features: Tensor, keys: Tensor, kept: int) -> list[tuple[str, int, Tensor]]:
    """Rounds of matching on one crop [patches, width]; single patches are named."""
    tokens = [({j}, features[j], keys[j]) for j in range(len(features))]
    while len(tokens) > kept:
        r = min(len(tokens) - kept, len(tokens) // 2)
        sources, targets = tokens[0::2], tokens[1::2]
        pairs = []
        for i, (_, _, a) in enumerate(sources):
            cosine = [float(a @ b / a.norm() / b.norm()) for _, _, b in targets]
            best = max(range(len(targets)), key=lambda j: cosine[j])
            pairs.append((cosine[best], i, best))
        pairs.sort(key=lambda pair: -pair[0])
        tokens = [sources[i] for _, i, _ in pairs[r:]]
        for j, target in enumerate(targets):
            group = [target, *(sources[i] for _, i, best in pairs[:r] if best == j)]
            members = set().union(*(m for m, _, _ in group))
            x, k = (sum(t[n] for t in group) / len(group) for n in (1, 2))
            tokens.append((members, x, k))
    return [
        ("patch", min(members), x) if len(members) == 1 else ("merged", slot, x)
        for slot, (members, x, _) in enumerate(tokens)
    ]


# -- pruning -------------------------------------------------------------------------------------


@contextmanager
def hiding(model: Any, plan: dict[int, list[int]], see_themselves: bool) -> Any:
    """The untouched model; from each layer of the plan on, these keys are hidden."""

    def hook(layer: int) -> Any:
        def replace(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            mask = allowed(plan, layer, args[0].shape[1], see_themselves)
            return args, {**kwargs, "attention_mask": mask[None, None]}

        return replace

    layers = model.model.language_model.layers
    handles = [
        layer.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def allowed(plan: dict[int, list[int]], layer: int, length: int, see_themselves: bool) -> Tensor:
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    for first, gone in plan.items():
        if first <= layer:
            mask[:, gone] = False
    if see_themselves:
        mask |= torch.eye(length, dtype=torch.bool)
    return mask


def logits_of(model: Any, x: Tensor, layer: int) -> Tensor:
    """q.k / sqrt(d) of a layer [heads, length, length] on [length, width]; positions 0, 1, 2 ..."""
    decoder = model.model.language_model
    block, length, config = decoder.layers[layer], len(x), decoder.config
    x = block.input_layernorm(x)
    cos, sin = (t[0] for t in decoder.rotary_emb(x[None], torch.arange(length)[None]))
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    q = block.self_attn.q_proj(x).view(length, heads, -1)
    k = block.self_attn.k_proj(x).view(length, groups, -1)

    def turned(t: Tensor) -> Tensor:
        half = t.shape[-1] // 2
        return t * cos + torch.cat([-t[:, half:], t[:, :half]], -1) * sin

    return torch.stack([
        turned(q[:, h]) @ turned(k[:, h * groups // heads]).T / q.shape[-1] ** 0.5
        for h in range(heads)
    ])  # fmt: skip


def page_rank(logits: Tensor, mask: Tensor, tau: float, steps: int = 5) -> list[float]:
    """Mass of every position [length] after some steps, root mean square over heads."""
    length, squares = logits.shape[-1], [0.0] * logits.shape[-1]
    for head in logits:
        weights = (head / tau).masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0.0)
        mass = [1 / length] * length
        for _ in range(steps):
            mass = [sum(mass[i] * float(weights[i, j]) for i in range(length))
                    for j in range(length)]  # fmt: skip
        squares = [s + m * m for s, m in zip(squares, mass, strict=True)]
    return [(s / len(logits)) ** 0.5 for s in squares]


@torch.no_grad()
def aim_plan(method: Any, model: Any, embeds: Tensor, places: list[list[int]]) -> dict:
    """What AIM drops (or hides) before which layer, by whole maps of the masked model."""
    masks, length = method.key == "aim_mask", embeds.shape[1]
    plan: dict[int, list[int]] = {}
    decoder = model.model.language_model
    for layer in range(method.l1 + 1, min(method.l2 + 1, len(decoder.layers))):
        with hiding(model, plan, not masks):
            states = decoder(inputs_embeds=embeds, output_hidden_states=True, use_cache=False)
        logits = logits_of(model, states.hidden_states[layer - 1][0], layer - 1)
        mask = allowed(plan, layer - 1, length, False)
        gone = {p for dropped in plan.values() for p in dropped}
        rows = [p for p in range(length) if masks or p not in gone]
        score = page_rank(logits[:, rows][:, :, rows], mask[rows][:, rows], method.tau)
        plan[layer] = []
        for image in places:
            alive = [p for p in image if p not in gone]
            count = len(image) * (method.l2 - layer) // (method.l2 - method.l1)
            best = sorted(alive, key=lambda p: -score[rows.index(p)])[:count]
            plan[layer] += [p for p in alive if p not in best]
    return plan


@torch.no_grad()
def dyvte_plan(weights: dict, model: Any, embeds: Tensor, places: list[list[int]]) -> dict:
    """Behind which layer all visual tokens are hidden, by two sums over the text and a gate."""
    visual, length = [p for image in places for p in image], embeds.shape[1]
    text = sorted({
        p
        for image in places
        for p in [q for q in range(image[-1] + 1, length) if q not in visual] or [length - 1]
    })  # fmt: skip
    decoder = model.model.language_model
    states = decoder(inputs_embeds=embeds, output_hidden_states=True, use_cache=False).hidden_states
    for layer in range(len(decoder.layers) - 1) if places else ():
        x = [states[layer + 1][0, p].tolist() for p in text]
        before = x[:-1] or x
        features = [sum(column) / len(before) for column in zip(*before, strict=True)] + x[-1]
        w1, w2 = (weights[f"{layer}.{name}.weight"].tolist() for name in ("w1", "w2"))
        inner = [sum(w * f for w, f in zip(row, features, strict=True)) for row in w1]
        inner = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in inner]
        keep, leave = (sum(w * v for w, v in zip(row, inner, strict=True)) for row in w2)
        if leave > keep:
            return {layer + 1: visual}
    return {}


# -- recycling -----------------------------------------------------------------------------------


def sparse_raters(visual: Tensor, words: Tensor) -> list[int]:
    """Words [n, width] that resemble the visual tokens more than the average word does."""
    relevance = [0.0] * len(words)
    for v in visual:
        products = [float(v @ t) for t in words]
        top = max(products)
        powers = [torch.tensor(p - top).double().exp().item() for p in products]
        for t, power in enumerate(powers):
            relevance[t] += power / sum(powers) / len(visual)
    mean = sum(relevance) / len(relevance)
    return [t for t, r in enumerate(relevance) if r > mean] or list(range(len(words)))


def sparse_clusters(tokens: list[Tensor], count: int) -> list[Tensor]:
    """Density-peak clusters of tokens; their means, clearest centre first."""
    n, width = len(tokens), len(tokens[0])
    d = [[float((a - b).norm()) / width**0.5 for b in tokens] for a in tokens]
    density = []
    for row in d:
        near = sorted(row)[:count]
        density.append(torch.tensor(-sum(x * x for x in near) / count).double().exp().item())
    furthest = max(map(max, d))
    score = []
    for i in range(n):
        denser = [d[i][j] for j in range(n) if (density[j], -j) > (density[i], -i)]
        score.append(density[i] * min(denser, default=furthest))
    centres = sorted(range(n), key=lambda i: -score[i])[:count]
    groups: dict[int, list[int]] = {c: [] for c in centres}
    for i in range(n):
        groups[i if i in groups else min(centres, key=lambda c: d[i][c])].append(i)
    return [sum(tokens[i] for i in groups[c]) / len(groups[c]) for c in centres]


def sparse_step(
    hidden: list[Tensor], scores: list[float], kept: int
) -> tuple[list[int], list[Tensor]]:
    """Which of an image's tokens stay, and what is recycled from the others."""
    if kept >= len(hidden):
        return list(range(len(hidden))), []
    ranked = sorted(range(len(hidden)), key=lambda i: -scores[i])
    dropped = ranked[kept:]
    pool = dropped[: int(len(dropped) * 0.3) + 1]
    return sorted(ranked[:kept]), sparse_clusters([hidden[i] for i in pool], len(pool) // 10 + 1)


@torch.no_grad()
def sparse_run(
    method: Any, model: Any, embeds: Tensor, places: list[list[int]], crops: list[int], prompt: int
) -> tuple[Tensor, list[int]]:
    """Logits behind the prompt and the answer that follows it, and the prompt's length per layer.

    The sequence really gets shorter, layers run one by one, positions count from 0 in each.
    """
    decoder, patches = model.model.language_model, 16
    x, length, lengths = embeds[0], prompt, []
    cuts = (1, 2, 3)
    words = [[p for p in range(image[-1] + 1, prompt) if not any(p in i for i in places)]
             for image in places]  # fmt: skip
    asked = [
        [own[t] for t in sparse_raters(x[image], x[own])]
        for image, own in zip(places, words, strict=True)
    ]
    before = x
    for number, layer in enumerate(decoder.layers):
        if number in cuts and places:
            maps = logits_of(model, before, number - 1)
            causal = torch.ones(len(before), len(before), dtype=torch.bool).tril()
            maps = maps.masked_fill(~causal, float("-inf")).softmax(-1).mean(0)
            steps = []
            for image, raters, n in zip(places, asked, crops, strict=True):
                rows = maps[raters][:, image]
                if method.key == "sparsevlm":
                    kept = method.kept[cuts.index(number)]
                else:
                    rank = int(torch.linalg.matrix_rank(rows.float()))
                    kept = int(rank * method.scale + method.bias)
                    kept = patches if rank == len(image) else kept
                kept = len(image) if kept >= patches else kept * n
                steps.append(sparse_step([x[p] for p in image], rows.mean(0).tolist(), kept))
            pieces: list[Tensor] = []
            new: dict[int, int] = {}
            fresh: list[list[int]] = []
            for p in range(len(x)):
                owner = next((i for i, image in enumerate(places) if p in image), None)
                if owner is None:
                    new[p] = len(pieces)
                    pieces.append(x[p])
                elif p == places[owner][0]:
                    stays, merged = steps[owner]
                    tokens = [*(x[places[owner][i]] for i in stays), *merged]
                    fresh.append(list(range(len(pieces), len(pieces) + len(tokens))))
                    pieces += tokens
            length -= len(x) - len(pieces)
            places, asked = fresh, [[new[p] for p in raters] for raters in asked]
            x = torch.stack(pieces)
        lengths.append(length)
        before = x
        rotary = decoder.rotary_emb(x[None], torch.arange(len(x))[None])
        mask = torch.ones(len(x), len(x), dtype=torch.bool).tril()[None, None]
        x = layer(x[None], attention_mask=mask, position_embeddings=rotary)[0]
    return model.lm_head(decoder.norm(x))[length - 1 :], lengths


@torch.no_grad()
def inside_logits(
    method: Any, model: Any, embeds: Tensor, places: list[list[int]], crops: list[int], prompt: int
) -> tuple[Tensor, list[int]]:
    """Logits behind the prompt and the answer that follows it, and the prompt's KV lengths.

    Args:
        method: one of INSIDE.
        model: the untouched model.
        embeds: [1, prompt + answer, width] as the decoder reads it.
        places: where each image stands.
        crops: of each image.
        prompt: length without the answer.
    """
    if method.key.startswith("sparsevlm"):
        return sparse_run(method, model, embeds, places, crops, prompt)
    masks, layers = method.key == "aim_mask", model.config.text_config.num_hidden_layers
    if method.key == "dyvte":
        plan = dyvte_plan(method.weights(model), model, embeds[:, :prompt], places)
    else:
        plan = aim_plan(method, model, embeds[:, :prompt], places)
    with hiding(model, plan, not masks):
        hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False)[0]
    gone = {i: sum(len(p) for first, p in plan.items() if first <= i) for i in range(layers)}
    lengths = [prompt - (0 if masks else gone[i]) for i in range(layers)]
    return model.lm_head(hidden)[0, prompt - 1 :], lengths
