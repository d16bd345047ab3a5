"""What the stages of the second recipe minimise.

- `TextObjective`: the decoder reads scenes told in words and answers questions about them;
- `TowerObjective`: the vision tower tells captions apart, as CLIP does. No patch has a label;
- `PictureObjective`: questions about pictures. It aligns the projector alone, then tunes the
  decoder with it; now and then a text stands in for the picture, as in LLaVA's data.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from frugalvlm.pocket.models import PATCH_SIZE
from frugalvlm.pocket.objectives import CaptionEncoder, Encoder, Log, pixel_values
from frugalvlm.pocket.packing import Asked, answer_loss
from frugalvlm.pocket.scenes import COLORS, IMAGE_SIZE, KINDS
from frugalvlm.pocket.second.questions import training_questions
from frugalvlm.pocket.second.scenes import SecondScene, draw, is_big
from frugalvlm.pocket.second.texts import caption, story

MAX_OFFSET = 128  # positions; how far a question may stand from its picture in training
TEXT_SHARE = 0.15  # of the steps with pictures
HIDDEN = 0.06  # of the scenes are hidden: what then is likely must come from the question
STORY_TOKENS = 84  # the longest story; shorter ones get fillers in front
_SIDE = IMAGE_SIZE // PATCH_SIZE
TAGS = len(KINDS) + len(COLORS)


class Scaffold(nn.Module):
    """Modules that exist during training only and are taken down afterwards."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        tower = model.config.vision_config.hidden_size
        self.captions = CaptionEncoder(tokenizer, tower, tower)
        self.tags = nn.Linear(tower, TAGS)


def visual_features(
    model: PreTrainedModel, scenes: Sequence[SecondScene], hidden: np.ndarray | None = None
) -> Float[Tensor, "batch visual channels"]:
    """Visual tokens as the decoder takes them; gradients reach all that is not frozen.

    Args:
        model: whose tower and projector look.
        scenes: what they look at.
        hidden: bool [batch], pictures to replace by a grey one.
    """
    pixels = pixel_values([draw(s) for s in scenes]).to(model.get_input_embeddings().weight.device)
    if hidden is not None:
        pixels[torch.from_numpy(hidden)] = 0.0
    return torch.stack(list(model.get_image_features(pixels).pooler_output))


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


class Asking:
    """Questions about scenes, and the loss of their answers behind any visual tokens."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: int
    ) -> None:
        self.model, self.questions = model, questions
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
        return answer_loss(self.model, features, self.encode.head, self.encode.tail, packs, offsets)

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
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: int,
        text_share: float = TEXT_SHARE,
        codes: Codes | None = None,
    ) -> None:
        super().__init__(model, tokenizer, questions)
        self.text_share, self.codes = text_share, codes

    def __call__(
        self, scenes: Sequence[SecondScene], rng: np.random.Generator
    ) -> tuple[Tensor, Log]:
        """The loss, and the share of answer tokens that are right."""
        told, hidden = rng.random() < self.text_share, rng.random(len(scenes)) < HIDDEN
        if told:
            features = self.stories(scenes, rng, hidden)
        elif self.codes is None:
            features = visual_features(self.model, scenes, hidden)
        else:
            features = coded_features(self.model, self.codes, scenes, hidden)
        loss, log = self.loss(features, self.packs(scenes, rng), rng)
        return loss, {("text_" if told else "") + key: value for key, value in log.items()}


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


class TowerObjective:
    """CLIP's contrast between pictures and captions, and keywords of the whole picture.

    Both look at the tower's summary only. Which patch shows what, the tower must find out.
    """

    def __init__(self, model: PreTrainedModel, scaffold: Scaffold) -> None:
        self.model, self.scaffold = model, scaffold

    def __call__(
        self, scenes: Sequence[SecondScene], rng: np.random.Generator
    ) -> tuple[Tensor, Log]:
        """The loss, how often the right caption wins, and the share of right keywords."""
        device = self.scaffold.tags.weight.device
        pixels = pixel_values([draw(s) for s in scenes]).to(device)
        pooled = self.model.model.vision_tower(pixel_values=pixels).pooler_output
        contrast, retrieved = self.scaffold.captions(
            pooled, [caption(s, rng) for s in scenes], sigmoid=False
        )
        wanted = torch.from_numpy(np.stack([tags(s) for s in scenes])).to(device)
        said = self.scaffold.tags(pooled).float()
        keywords = nn.functional.binary_cross_entropy_with_logits(said, wanted)
        found = ((said > 0) & (wanted > 0)).sum() / wanted.sum()
        return contrast + 2.0 * keywords, {"caption": retrieved, "found": found}
