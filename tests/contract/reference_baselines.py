"""The baselines once more, one token at a time, written from their papers and released code.

Nothing here calls the kit. Each function takes one crop.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

BASELINES = ("uniform", "avgpool", "downsample", "tome", "divprune", "prumerge_plus")
Merged = tuple[list[int], Tensor]  # the patches of a token, its features


def cells(rows: int, cols: int, count: int) -> list[list[int]]:
    """The patches of each of `count` cells of a grid."""
    square = round(math.sqrt(count * rows / cols))
    bands = min(rows, count, max(math.ceil(count / cols), square))
    answer = []
    for band in range(bands):
        share = math.floor((band + 1) * count / bands) - math.floor(band * count / bands)
        ys = [y for y in range(rows) if band <= y * bands / rows < band + 1]
        for cell in range(share):
            xs = [x for x in range(cols) if cell <= x * share / cols < cell + 1]
            answer.append([y * cols + x for y in ys for x in xs])
    return answer


def middle(patches: list[int], cols: int) -> int:
    """The patch in the middle of a cell; the upper left one of several."""
    ys, xs = sorted({p // cols for p in patches}), sorted({p % cols for p in patches})
    return ys[(len(ys) - 1) // 2] * cols + xs[(len(xs) - 1) // 2]


def cubic(x: float) -> float:
    """Keys' cubic convolution kernel, a = -1/2, as PIL uses it."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def shrunk(picture: Tensor, height: int, width: int) -> Tensor:
    """Bicubic resizing of [channels, H, W] with the kernel as wide as the shrinking."""
    for axis, size in ((1, height), (2, width)):
        full = picture.shape[axis]
        scale = full / size
        lines = []
        for i in range(size):
            centre = (i + 0.5) * scale
            first, last = int(centre - 2 * scale + 0.5), int(centre + 2 * scale + 0.5)
            places = range(max(first, 0), min(last, full))
            weights = [cubic((j - centre + 0.5) / scale) for j in places]
            total = sum(w * picture.select(axis, j) for w, j in zip(weights, places, strict=True))
            lines.append(total / sum(weights))
        picture = torch.stack(lines, axis)
    return picture


def tome(features: Tensor, keys: Tensor, kept: int) -> list[Merged]:
    """Rounds of bipartite soft matching; keys [patches, heads, head_dim]."""
    # A token: its patches, the sums of their features and keys. Sums over sizes are the means.
    tokens = [([i], f, k.mean(0)) for i, (f, k) in enumerate(zip(features, keys, strict=True))]
    while len(tokens) > kept:
        merged = min(len(tokens) // 2, len(tokens) - kept)
        a, b = tokens[0::2], tokens[1::2]
        edges = []
        for i, (patches, _, key) in enumerate(a):
            unit = key / len(patches) / (key / len(patches)).norm()
            cosine = []
            for others, _, other in b:
                mean = other / len(others)
                cosine.append(float(unit @ (mean / mean.norm())))
            best = max(range(len(b)), key=lambda j: cosine[j])
            edges.append((cosine[best], i, best))
        edges.sort(key=lambda e: -e[0])
        gone = {i: j for _, i, j in edges[:merged]}
        for i, j in gone.items():
            b[j] = (b[j][0] + a[i][0], b[j][1] + a[i][1], b[j][2] + a[i][2])
        tokens = [t for i, t in enumerate(a) if i not in gone] + b
    tokens.sort(key=lambda t: min(t[0]))
    return [(sorted(patches), total / len(patches)) for patches, total, _ in tokens]


def divprune(projected: Tensor, kept: int) -> list[int]:
    """Greedy max-min diversity by cosine distance, as in the released loop; ascending."""
    count = len(projected)
    distance = [[0.0] * count for _ in range(count)]
    for i in range(count):
        for j in range(i):  # exactly symmetric, so that the first of two nearest neighbours wins
            a, b = projected[i], projected[j]
            distance[i][j] = distance[j][i] = 1 - float(a @ b / a.norm() / b.norm())
    chosen: list[int] = []
    for _ in range(kept):
        if not chosen:
            score = [
                sorted(distance[i][j] for j in range(count) if j != i)[0] for i in range(count)
            ]
        else:
            score = [min(distance[s][j] for s in chosen) for j in range(count)]
            score = [-math.inf if j in chosen else x for j, x in enumerate(score)]
        chosen.append(max(range(count), key=lambda j: score[j]))
    return sorted(chosen)


def prumerge_plus(
    features: Tensor, query: Tensor, keys: Tensor, kept: int | None, neighbours: int
) -> tuple[list[int], list[Tensor]]:
    """Chosen patches and all tokens (the extra one last) in reading order.

    Args:
        features: [patches, width].
        query: [width] of [CLS], heads side by side.
        keys: [1 + patches, width], [CLS] first.
        kept: tokens, the extra one included; None: by outliers.
        neighbours: k.
    """
    count = len(features)
    logits = [float(query @ k) / math.sqrt(len(query)) for k in keys]
    total = sum(math.exp(x) for x in logits)
    a = [math.exp(x) / total for x in logits[1:]]
    ranked = sorted(range(count), key=lambda j: -a[j])
    if kept is None:
        low, high = percentile(a, 25), percentile(a, 75)
        found = sum(x > high + 1.5 * (high - low) for x in a) or 1
        chosen = ranked[:found]
        step = max(1, int(int(1 / (found / count)) / 3))
        chosen = [*chosen, *(j for j in range(0, count - 1, step) if j not in ranked[:found])]
        chosen = chosen[: count - 1]
    else:
        chosen = ranked[: kept // 2]
        rest, more = sorted(ranked[kept // 2 :]), (kept - 1) // 2
        chosen = chosen + [rest[int((i + 0.5) * len(rest) / more)] for i in range(more)]
    units = [k / k.norm() for k in keys[1:]]
    tokens = []
    for i in chosen:
        others = [j for j in range(count) if j != i]
        nearest = sorted(others, key=lambda j: -float(units[i] @ units[j]))[:neighbours]
        tokens.append(features[i] + sum(a[j] * features[j] for j in nearest))
    extra = sum((a[j] * features[j] for j in range(count) if j not in chosen), features[0] * 0)
    return chosen, [*tokens, extra]


def percentile(values: list[float], percent: float) -> float:
    """Linear between the two nearest values, as numpy does."""
    ordered = sorted(values)
    place = percent / 100 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


# -- on a model ------------------------------------------------------------------------------------


@torch.no_grad()
def baseline_tokens(
    method: Any, model: Any, pixels: Tensor, features: Tensor, keys: Tensor, has_cls: bool
) -> list[tuple[str, int, Tensor]]:
    """The tokens of one crop: kind, patch or slot, features.

    Args:
        method: its hyper-parameters.
        model: the model.
        pixels: [3, H, W].
        features: [positions, width] of the tower.
        keys: [heads, positions, head_dim], raw, of the layer that gives the features.
        has_cls: whether position 0 is [CLS].
    """
    first = int(has_cls)
    patches = features[first:]
    side = math.isqrt(len(patches))
    if method.key == "uniform":
        kept = [middle(cell, side) for cell in cells(side, side, method.kept_tokens)]
        return [("patch", j, patches[j]) for j in kept]
    if method.key == "avgpool":
        return [
            ("merged", slot, sum(patches[j] for j in cell) / len(cell))  # type: ignore[misc]
            for slot, cell in enumerate(cells(side, side, method.kept_tokens))
        ]
    if method.key == "downsample":
        rows = math.isqrt(method.kept_tokens)
        patch = pixels.shape[1] // side
        small = shrunk(pixels, rows * patch, method.kept_tokens // rows * patch)
        states = model.model.vision_tower(
            small[None], output_hidden_states=True, interpolate_pos_encoding=True
        ).hidden_states[-2]
        return [("merged", slot, token) for slot, token in enumerate(states[0, first:])]
    if method.key == "tome":
        return [
            ("patch", own[0], mean) if len(own) == 1 else ("merged", slot, mean)
            for slot, (own, mean) in enumerate(
                tome(patches, keys[:, first:].transpose(0, 1), method.kept_tokens)
            )
        ]
    if method.key == "divprune":
        projected = model.model.multi_modal_projector(patches)
        return [("patch", j, patches[j]) for j in divprune(projected, method.kept_tokens)]
    assert method.key == "prumerge_plus"
    layers = next(
        m for n, m in model.model.vision_tower.named_modules() if n.endswith("encoder.layers")
    )
    normed = layers[-1].layer_norm1(features)
    query = layers[-1].self_attn.q_proj(normed[0])
    chosen, tokens = prumerge_plus(
        patches, query, layers[-1].self_attn.k_proj(normed), method.kept_tokens, method.neighbours
    )
    named = [("patch", j, token) for j, token in zip(chosen, tokens[:-1], strict=True)]
    return [*named, ("merged", len(chosen), tokens[-1])]
