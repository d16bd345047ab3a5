"""Looking into a pocket model while it is trained: what it answers, what its patches say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor

from frugalvlm.checks import check_whole
from frugalvlm.pocket.models import PATCH_SIZE, build_model, build_tokenizer
from frugalvlm.pocket.objectives import Encoder, Scaffold, patch_labels, visual_features
from frugalvlm.pocket.questions import FAMILIES, Question
from frugalvlm.pocket.recipe import Progressed, Stage, StageName, Whole, read_log, train
from frugalvlm.pocket.scenes import COLORS, IMAGE_SIZE, KINDS, MAX_THINGS, Scene, make_scene

FAMILIES_ASKED = ("color_of", "kind_of", "kind_at", "color_at", "kind_present", "place_of")
EYES = ("symbols", "picture", "grey")  # what stands in the prompt where the picture stands
GLYPHS = "●■▲✚0123456789"

Exam = list[tuple[Scene, Question]]
Diary = Mapping[str, Mapping[str, list[str]]]  # moment, then eyes, to the answers


def exam(scenes: int, most_things: int, first_seed: int = 0) -> Exam:
    """Development scenes, with a question of each family that has a short answer.

    Raises:
        OptionError: without scenes, or with more things than a scene may show.
    """
    scenes = check_whole("scenes", scenes)
    most_things = check_whole("most_things", most_things, 1, MAX_THINGS)
    items = []
    for seed in range(first_seed, first_seed + scenes):
        scene, rng = make_scene("dev", seed, most_things), np.random.default_rng(seed)
        asked = [FAMILIES[family](scene, rng) for family in FAMILIES_ASKED]
        items += [(scene, question) for question in asked if question is not None]
    return items


def checkpoint(name: str, folder: Path) -> Whole:
    """Model and scaffold as the last checkpoint of a run holds them; fresh ones if it has none.

    Inside stages of half depth every second decoder layer is still random: look afterwards.
    """
    torch.manual_seed(0)
    model = build_model(name)
    whole = Whole(model, Scaffold(model, build_tokenizer()))
    progress = folder / "progress.json"
    if progress.exists():
        whole.load_state_dict(load_file(folder / json.loads(progress.read_text())["model"]))
    return whole.eval()


def train_until(name: str, folder: Path, plan: Sequence[Stage], stage: StageName) -> Whole:
    """Train, or go on with a run, until a stage is over; returns model and scaffold.

    Raises:
        ValueError: when the folder's run is past that stage already, or of another plan.
    """
    end = [s.name for s in plan].index(stage) + 1
    progress, done = folder / "progress.json", Progressed()
    if progress.exists():
        done = Progressed(**json.loads(progress.read_text())["progress"])
    left = sum(s.steps for s in plan[:end]) - sum(s.steps for s in plan[: done.stage]) - done.step
    if left < 0:
        raise ValueError(
            f"The run in {folder} is past the stage '{stage}': go on below, or name a new folder."
        )
    if left:
        train(name, folder, stages=plan, stop_after=left, quiet=True)
    return checkpoint(name, folder)


@torch.inference_mode()
def visual_tokens(
    whole: Whole, scenes: Sequence[Scene], eyes: str
) -> Float[Tensor, "batch 144 channels"]:
    """What the decoder is shown of the scenes.

    Args:
        whole: model and scaffold.
        scenes: of 96 x 96 pixels.
        eyes: "symbols" (the scene's record in the decoder's own words), "picture" (tower and
            projector look at the pixels) or "grey" (they look at a blank picture).
    """
    if eyes == "picture":
        return visual_features(whole.model, scenes)
    if eyes == "grey":
        blank = torch.zeros(len(scenes), 3, IMAGE_SIZE, IMAGE_SIZE)
        return torch.stack(list(whole.model.get_image_features(blank).pooler_output))
    kinds, colors = zip(*map(patch_labels, scenes), strict=True)
    words = whole.model.get_input_embeddings().weight
    stacked = (torch.from_numpy(np.stack(labels)) for labels in (kinds, colors))
    return whole.scaffold.words(words, *stacked)


@torch.inference_mode()
def answers(whole: Whole, items: Exam, eyes: str) -> list[str]:
    """Greedy answers to an exam; `eyes` as in `visual_tokens`."""
    tokenizer = build_tokenizer()
    encode, embed = Encoder(tokenizer), whole.model.get_input_embeddings()
    prompts = []
    for (_, question), seen in zip(
        items, visual_tokens(whole, [s for s, _ in items], eyes), strict=True
    ):
        ask, _ = encode(question.text, question.answer)
        head, rest = (embed(torch.tensor(ids)) for ids in (encode.head, encode.tail + ask))
        prompts.append(torch.cat([head, seen, rest]))
    longest = max(map(len, prompts))
    shape = (len(prompts), longest)
    embeds, mask = torch.zeros(*shape, prompts[0].shape[-1]), torch.zeros(shape, dtype=torch.long)
    for i, p in enumerate(prompts):  # padded on the left
        embeds[i, -len(p) :], mask[i, -len(p) :] = p, 1
    new = whole.model.generate(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=4, do_sample=False
    )
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def report(items: Exam, diary: Diary) -> pd.DataFrame:
    """Percent of right answers: rows are moments of training, columns what was shown."""
    rows = {
        moment: {
            eyes: 100 * np.mean([q.answer == a for (_, q), a in zip(items, said, strict=True)])
            for eyes, said in seen.items()
        }
        for moment, seen in diary.items()
    }
    return pd.DataFrame(rows).T.round(0).astype(int)


def transcript(items: Exam, diary: Diary, eyes: str, count: int = 8) -> pd.DataFrame:
    """The first questions with the true answer and the one given at each moment of training."""
    table = {"question": [q.text for _, q in items], "truth": [q.answer for _, q in items]}
    table |= {moment: seen[eyes] for moment, seen in diary.items()}
    return pd.DataFrame(table).head(count)


@torch.inference_mode()
def read_patches(whole: Whole, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """For each patch the kind and colour whose words lie nearest to its projected vector.

    Returns:
        Indices into (*KINDS, nothing) and (*COLORS, plate, no colour), two int arrays [144].
    """
    kinds, colors = len(KINDS) + 1, len(COLORS) + 2
    pairs = torch.cartesian_prod(torch.arange(kinds), torch.arange(colors))
    said = visual_tokens(whole, [scene], "picture")[0]
    everywhere = pairs[:, :, None].expand(-1, -1, len(said))
    words = whole.model.get_input_embeddings().weight
    candidates = whole.scaffold.words(words, everywhere[:, 0], everywhere[:, 1])
    nearest = pairs[(candidates - said).pow(2).sum(-1).argmin(0)].numpy()
    return nearest[:, 0], nearest[:, 1]


def show_patches(whole: Whole, scene: Scene) -> Figure:
    """A scene, and beside it what its patches say in the decoder's words."""
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.5))
    kinds, colors = read_patches(whole, scene)
    right = np.mean((kinds == patch_labels(scene)[0])[patch_labels(scene)[0] < len(KINDS)])
    axes[0].imshow(scene.image())
    axes[0].set_title("picture")
    axes[1].set_title(f"its patches ({right:.0%} of covered ones right)")
    _glyphs(axes[1], kinds, colors)
    for ax in axes:
        ax.set_axis_off()
    return figure


def _glyphs(ax: Axes, kinds: np.ndarray, colors: np.ndarray) -> None:
    paint = [tuple(c / 255 for c in rgb) for rgb in COLORS.values()]
    paint += [(0.6, 0.6, 0.6)] * 2  # on a plate; no colour
    ax.imshow(np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 40, dtype=np.uint8))
    side = IMAGE_SIZE // PATCH_SIZE
    for i, (kind, color) in enumerate(zip(kinds, colors, strict=True)):
        if kind < len(GLYPHS):
            x, y = (PATCH_SIZE * (at + 0.5) - 0.5 for at in (i % side, i // side))
            ax.text(x, y, GLYPHS[kind], color=paint[color], ha="center", va="center", fontsize=9)


def show_exam(items: Exam, count: int = 3) -> Figure:
    """The first scenes of an exam, each with the first question about it."""
    figure, axes = plt.subplots(1, count, figsize=(3 * count, 3.2))
    first = {scene.seed: (scene, question) for scene, question in reversed(items)}
    for ax, seed in zip(axes, sorted(first), strict=False):
        scene, question = first[seed]
        ax.imshow(scene.image())
        ax.set_title(f"{question.text}\n{question.answer}", fontsize=9)
        ax.set_axis_off()
    return figure


def show_curves(folder: Path) -> Figure:
    """The loss of every stage of a run."""
    log = pd.DataFrame(read_log(folder))
    stages = list(dict.fromkeys(log["stage"]))
    figure, axes = plt.subplots(
        1, len(stages), figsize=(3 * len(stages), 2.6), squeeze=False, layout="constrained"
    )
    for ax, stage in zip(axes[0], stages, strict=True):
        part = log[log["stage"] == stage]
        ax.plot(part["step"], part["loss"], marker="." if len(part) < 10 else "")
        ax.set(title=stage, xlabel="step", yscale="log")
    axes[0][0].set_ylabel("loss")
    return figure
