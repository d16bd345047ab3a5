"""What the stages of the second recipe minimise.

- `TextObjective`: the decoder reads scenes told in words and answers questions about them;
- `TowerObjective`: the vision tower tells captions apart, as CLIP does, and a small reader that
  attends over all patches of a region tells what is there. No patch has a label;
- `PictureObjective`: questions about pictures. It aligns the projector alone, then tunes the
  decoder with it; now and then a text stands in for the picture, as in LLaVA's data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from frugalvlm.pocket.clips import clip_questions, make_clip
from frugalvlm.pocket.models import PATCH_SIZE, VISUAL_TOKENS
from frugalvlm.pocket.objectives import (
    CaptionEncoder,
    Encoder,
    Log,
    clip_features,
    crops,
    pixel_values,
)
from frugalvlm.pocket.packing import Asked, answer_loss
from frugalvlm.pocket.scenes import COLORS, GRID, IMAGE_SIZE, KINDS
from frugalvlm.pocket.second.questions import training_questions
from frugalvlm.pocket.second.scenes import PRINT_DIGITS, SecondScene, draw, is_big
from frugalvlm.pocket.second.texts import caption, story

MAX_OFFSET = 128  # positions; how far a question may stand from its picture in training
TEXT_SHARE = 0.15  # of the steps with pictures
HIDDEN = 0.06  # of the scenes are hidden: what then is likely must come from the question
STORY_TOKENS = 84  # the longest story; shorter ones get fillers in front
_SIDE = IMAGE_SIZE // PATCH_SIZE
TAGS = len(KINDS) + len(COLORS)
CELLS = GRID * GRID
REGIONS = CELLS + PRINT_DIGITS
UNKNOWN = -100


class Scaffold(nn.Module):
    """Modules that exist during training only and are taken down afterwards."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        tower = model.config.vision_config.hidden_size
        self.captions = CaptionEncoder(tokenizer, tower, tower)
        self.tags = nn.Linear(tower, TAGS)
        self.regions = RegionReader(tower)


class RegionReader(nn.Module):
    """Tells what a region of the picture shows, attending over all its patches at once.

    It looks at the layer whose patches the decoder will be given. What a thing is may be spread
    over its patches in any way that attention can put together.
    """

    HEADS = 4

    def __init__(self, width: int) -> None:
        super().__init__()
        self.asked = nn.Embedding(REGIONS, width)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, self.HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU())
        self.out = nn.Linear(2 * width, (len(KINDS) + 1) + (len(COLORS) + 1) + 2)

    def forward(
        self,
        patches: Float[Tensor, "batch patches width"],
        inside: Bool[Tensor, "batch regions patches"],
        labels: Int[Tensor, "batch regions 3"],
    ) -> tuple[Tensor, Tensor]:
        """Loss of kind, colour and size, and how often the kind of a thing is right.

        Args:
            patches: what the tower says, layer `vision_feature_layer`.
            inside: the patches of each region.
            labels: kind, colour, size of what is there; `UNKNOWN` where nobody asks.
        """
        keys = self.norm(patches)
        query = self.asked.weight.expand(len(patches), -1, -1)
        outside = (~inside).repeat_interleave(self.HEADS, 0)
        read, _ = self.attention(query, keys, keys, attn_mask=outside, need_weights=False)
        kind, color, big = self.out(self.mlp(read)).split((len(KINDS) + 1, len(COLORS) + 1, 2), -1)
        weight = torch.where(labels[..., 0] == len(KINDS), 0.3, 1.0)  # empty regions are many
        weight = weight * (labels[..., 0] != UNKNOWN)
        losses = sum(
            nn.functional.cross_entropy(
                said.float().flatten(0, 1), wanted.flatten(), ignore_index=UNKNOWN,
                reduction="none",
            )
            for said, wanted in zip((kind, color, big), labels.unbind(-1), strict=True)
        )  # fmt: skip
        thing = labels[..., 0] < len(KINDS)
        thing &= labels[..., 0] != UNKNOWN
        right = (kind.argmax(-1) == labels[..., 0])[thing].float().mean()
        return (losses * weight.flatten()).sum() / weight.sum(), right


def visual_features(
    model: PreTrainedModel, scenes: Sequence[SecondScene], hidden: np.ndarray | None = None
) -> Float[Tensor, "batch visual channels"]:
    """Visual tokens as the decoder takes them; gradients reach all that is not frozen.

    Args:
        model: whose tower and projector look.
        scenes: what they look at.
        hidden: bool [batch], pictures to replace by a grey one.
    """
    pixels, *sizes = crops(model, scenes)
    if hidden is not None:
        pixels[torch.from_numpy(hidden)] = 0.0
    return torch.stack(list(model.get_image_features(pixels, *sizes).pooler_output))


class Codes:
    """What a tower might say, without a tower: fixed random vectors, to try recipes with.

    A patch of a thing tells its colour, its size, where it is and *half* of its kind: the patches
    of one diagonal of a block the first half, the others the second. The decoder's words have no
    part in it, so the projector and the decoder must learn what the codes mean.
    """

    def __init__(self, width: int) -> None:
        dice = torch.Generator().manual_seed(0)
        self.halves, self.colors, self.rows, self.cols, self.big = (
            torch.randn(number, width, generator=dice)
            for number in (8, len(COLORS), _SIDE, _SIDE, 1)
        )

    def __call__(
        self, scenes: Sequence[SecondScene], hidden: np.ndarray
    ) -> Float[Tensor, "batch patches width"]:
        """Codes of the patches of scenes with things; `hidden` ones are empty."""
        ground = self.rows[:, None] + self.cols[None]
        patches = ground.repeat(len(scenes), 1, 1, 1)
        for grid, scene, unseen in zip(patches, scenes, hidden, strict=True):
            for thing in () if unseen else scene.things:
                top, left = thing.y // PATCH_SIZE, thing.x // PATCH_SIZE
                halves = divmod(KINDS.index(thing.kind), 4)
                for down, right in np.ndindex(2, 2):
                    which = (down + right) % 2
                    code = self.halves[halves[which] + 4 * which]
                    code = code + self.colors[list(COLORS).index(thing.color)]
                    grid[top + down, left + right] += code + self.big[0] * is_big(thing)
        return patches.flatten(1, 2)


@dataclass(frozen=True)
class Sight:
    """Which decoder layers' text sees the picture in training, step by step.

    A decoder of this size that may look at once answers from its first layer, which a pretrained
    language model does not. So in most steps the text is blind for the first quarter of the
    layers, in some it is blind again in the last quarter; in the others it sees throughout, as
    it will when it is used.

    Args:
        late: share of the steps in which the first quarter is blind.
        brief: share of the steps in which the last quarter is blind.
    """

    late: float = 0.7
    brief: float = 0.3

    def draw(self, depth: int, rng: np.random.Generator) -> range:
        """The layers (from 0) of one step."""
        blind = round(depth / 4)
        late, brief = rng.random(2) < (self.late, self.brief)
        return range(blind * late, depth - blind * brief)


class Asking:
    """Questions about scenes, and the loss of their answers behind any visual tokens."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: int,
        sight: Sight | None = None,
    ) -> None:
        self.model, self.questions, self.sight = model, questions, sight
        self.encode = Encoder(tokenizer)
        self.tokenizer = tokenizer

    def packs(self, scenes: Sequence[SecondScene], rng: np.random.Generator) -> list[list[Asked]]:
        """Per scene its questions and answers as tokens."""
        return [
            [self.encode(q.text, q.answer) for q in training_questions(s, rng, self.questions)]
            for s in scenes
        ]

    def loss(
        self, features: Tensor, packs: list[list[Asked]], rng: np.random.Generator
    ) -> tuple[Tensor, Log]:
        """Loss of the answers; half of the questions stand at a distance, as in a later turn."""
        shape = (len(packs), max(map(len, packs)))
        offsets = torch.from_numpy(rng.integers(0, MAX_OFFSET, shape) * (rng.random(shape) < 0.5))
        depth = self.model.config.get_text_config().num_hidden_layers
        sight = None if self.sight is None else self.sight.draw(depth, rng)
        head, tail = self.encode.head, self.encode.tail
        return answer_loss(self.model, features, head, tail, packs, offsets, sight)

    def stories(
        self,
        scenes: Sequence[SecondScene],
        rng: np.random.Generator,
        hidden: np.ndarray | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """The scenes in words, embedded, where pictures stand in prompts; `hidden`: no words."""
        ids = torch.full((len(scenes), STORY_TOKENS), self.tokenizer.pad_token_id)
        unseen = np.zeros(len(scenes), dtype=bool) if hidden is None else hidden
        for row, scene, silent in zip(ids, scenes, unseen, strict=True):
            told = self.tokenizer(story(scene, rng), add_special_tokens=False).input_ids
            if not silent:
                row[-len(told) :] = torch.tensor(told)
        embedding = self.model.get_input_embeddings()
        return embedding(ids.to(embedding.weight.device))


class TextObjective(Asking):
    """Questions about scenes told in words."""

    def __call__(
        self, scenes: Sequence[SecondScene], rng: np.random.Generator
    ) -> tuple[Tensor, Log]:
        """The loss, and the share of answer tokens that are right."""
        told = self.stories(scenes, rng, rng.random(len(scenes)) < HIDDEN)
        return self.loss(told, self.packs(scenes, rng), rng)


class PictureObjective(Asking):
    """Questions about pictures, now and then about texts.

    Args:
        model: the model.
        tokenizer: of the model.
        questions: per scene.
        text_share: share of the steps in which scenes are told in words.
        codes: what the projector is shown in place of what the tower says.
        sight: which layers see the picture; None: all.
        clip_share: share of the steps that show clips; then the scenes only lend their seeds.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: int,
        text_share: float = TEXT_SHARE,
        codes: Codes | None = None,
        sight: Sight | None = None,
        clip_share: float = 0.0,
    ) -> None:
        super().__init__(model, tokenizer, questions, sight)
        self.text_share, self.codes, self.clip_share = text_share, codes, clip_share

    def __call__(
        self, scenes: Sequence[SecondScene], rng: np.random.Generator
    ) -> tuple[Tensor, Log]:
        """The loss, and the share of answer tokens that are right."""
        kind, hidden = rng.random(), rng.random(len(scenes)) < HIDDEN
        if self.text_share <= kind < self.text_share + self.clip_share:
            return self._clips(scenes, rng)
        told = kind < self.text_share
        if told:
            features = self.stories(scenes, rng, hidden)
        elif self.codes is None:
            features = visual_features(self.model, scenes, hidden)
        else:
            features = coded_features(self.model, self.codes, scenes, hidden)
        loss, log = self.loss(features, self.packs(scenes, rng), rng)
        return loss, {("text_" if told else "") + key: value for key, value in log.items()}

    def _clips(self, scenes: Sequence[SecondScene], rng: np.random.Generator) -> tuple[Tensor, Log]:
        clips = [make_clip("train", scene.seed) for scene in scenes]
        packs = [[self.encode(q.text, q.answer) for q in clip_questions(c, rng)] for c in clips]
        loss, log = self.loss(clip_features(self.model, clips), packs, rng)
        return loss, {"clip_" + key: value for key, value in log.items()}


def coded_features(
    model: PreTrainedModel, codes: Codes, scenes: Sequence[SecondScene], hidden: np.ndarray
) -> Float[Tensor, "batch visual channels"]:
    """Visual tokens that the model's projector makes of codes."""
    device = model.get_input_embeddings().weight.device
    return model.model.multi_modal_projector(codes(scenes, hidden).to(device))


def tags(scene: SecondScene) -> np.ndarray:
    """Which kinds and which colours the whole picture shows: 0/1 array [22]."""
    present = np.zeros(TAGS, dtype=np.float32)
    for t in scene.things:
        present[KINDS.index(t.kind)] = present[len(KINDS) + list(COLORS).index(t.color)] = 1
    if scene.plate is not None:
        for digit in scene.plate.number:
            present[KINDS.index(digit)] = 1
    return present


def regions(scene: SecondScene) -> tuple[np.ndarray, np.ndarray]:
    """The regions of a scene and what they show: its cells, or the digits of its print.

    Returns:
        bool [REGIONS, 144], the patches of each region, and int [REGIONS, 3], what is there:
        kind, colour and size, or `UNKNOWN`.
    """
    inside = np.ones((REGIONS, _SIDE, _SIDE), dtype=bool)
    labels = np.full((REGIONS, 3), UNKNOWN)
    if scene.plate is not None:
        width, height = (-(-pixels // PATCH_SIZE) for pixels in scene.plate.size)
        top, left = scene.plate.y // PATCH_SIZE, scene.plate.x // PATCH_SIZE
        for i, digit in enumerate(scene.plate.number):
            inside[CELLS + i] = False
            inside[CELLS + i, top : top + height, left : left + width] = True
            labels[CELLS + i] = KINDS.index(digit), len(COLORS), 0
        return inside.reshape(REGIONS, -1), labels
    step = _SIDE // GRID
    for i, (row, col) in enumerate(np.ndindex(GRID, GRID)):
        inside[i] = False
        inside[i, row * step : (row + 1) * step, col * step : (col + 1) * step] = True
        thing = scene.at(row, col)
        labels[i] = (
            (len(KINDS), len(COLORS), 0) if thing is None else
            (KINDS.index(thing.kind), list(COLORS).index(thing.color), is_big(thing))
        )  # fmt: skip
    return inside.reshape(REGIONS, -1), labels


class TowerObjective:
    """CLIP's contrast between pictures and captions, keywords of the whole picture, regions.

    Contrast and keywords look at the tower's summary, regions at the patches behind the feature
    layer. Which patch shows what, the tower must find out.
    """

    def __init__(self, model: PreTrainedModel, scaffold: Scaffold) -> None:
        self.model, self.scaffold = model, scaffold

    def __call__(
        self, scenes: Sequence[SecondScene], rng: np.random.Generator
    ) -> tuple[Tensor, Log]:
        """The loss, how often the right caption wins, and the share of right keywords."""
        device = self.scaffold.tags.weight.device
        pixels = pixel_values([draw(s) for s in scenes]).to(device)
        sigmoid = self.model.config.vision_config.model_type.startswith("siglip")
        seen = self.model.model.vision_tower(pixel_values=pixels, output_hidden_states=True)
        pooled = seen.pooler_output
        contrast, retrieved = self.scaffold.captions(
            pooled, [caption(s, rng) for s in scenes], sigmoid
        )
        wanted = torch.from_numpy(np.stack([tags(s) for s in scenes])).to(device)
        said = self.scaffold.tags(pooled).float()
        keywords = nn.functional.binary_cross_entropy_with_logits(said, wanted)
        found = ((said > 0) & (wanted > 0)).sum() / wanted.sum()
        inside, labels = (
            torch.from_numpy(np.stack(x)).to(device)
            for x in zip(*map(regions, scenes), strict=True)
        )
        patches = seen.hidden_states[self.model.config.vision_feature_layer][:, -VISUAL_TOKENS:]
        shown, kinds = self.scaffold.regions(patches, inside, labels)
        log = {"caption": retrieved, "found": found, "kinds": kinds}
        return contrast + 2.0 * keywords + shown, log
