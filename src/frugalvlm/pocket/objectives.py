"""What the stages of training minimise.

Each objective turns scenes into one scalar loss and a few figures for the log:

- `LanguageObjective`: the decoder learns to answer from symbolic pictures, as a language model is
  pretrained before it sees anything;
- `TowerObjective`: the vision tower learns from captions (CLIP) and from what covers each patch;
- `AlignObjective`: the projector learns to speak the decoder's language, decoder and tower frozen;
- `InstructObjective`: projector and decoder learn to answer questions about pictures.

The modules that only training needs are held by `Scaffold`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL.Image import Resampling
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedModel, PreTrainedTokenizerBase

from frugalvlm.pocket.clips import FRAMES, Clip, clip_questions, make_clip
from frugalvlm.pocket.models import IMAGE_TOKEN, PATCH_SIZE, VISUAL_TOKENS
from frugalvlm.pocket.packing import Asked, answer_loss
from frugalvlm.pocket.questions import caption, training_questions
from frugalvlm.pocket.scenes import (
    COLORS,
    DIGITS,
    GRID,
    IMAGE_SIZE,
    KINDS,
    PLACES,
    PLATE_DIGIT_WIDTH,
    PLATE_MARGIN,
    Scene,
    draw,
)

_SIDE = IMAGE_SIZE // PATCH_SIZE
_COLOR_INDEX = {color: i for i, color in enumerate(COLORS)}
_KIND_INDEX = {kind: i for i, kind in enumerate(KINDS)}
_GROUND = len(KINDS)  # label of a patch that nothing covers
_PLATE = len(COLORS)  # "colour" of a plate's dark digits
_NO_COLOR = len(COLORS) + 1
_SCENE_LABELS = len(KINDS) * len(COLORS) + len(DIGITS)
MAX_OFFSET = 128  # positions; how far a question may stand from its picture in training

Log = dict[str, Tensor]


def pixel_values(images: Sequence[np.ndarray]) -> Float[Tensor, "batch 3 height width"]:
    """Pictures (uint8 [height, width, 3]) as the pocket processor gives them: in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return stacked.float() / 127.5 - 1.0


def patch_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Which kind and which colour covers the centre of each patch; two int arrays [144]."""
    kind = np.full((_SIDE, _SIDE), _GROUND)
    color = np.full((_SIDE, _SIDE), _NO_COLOR)
    centre = (np.arange(_SIDE) + 0.5) * PATCH_SIZE

    def fill(x: int, y: int, width: int, height: int, kind_label: int, color_label: int) -> None:
        rows = (centre > y) & (centre < y + height)
        cols = (centre > x) & (centre < x + width)
        kind[np.ix_(rows, cols)] = kind_label
        color[np.ix_(rows, cols)] = color_label

    if scene.plate is not None:
        height = scene.plate.size[1]
        for i, digit in enumerate(scene.plate.number):
            left = scene.plate.x + PLATE_MARGIN + i * PLATE_DIGIT_WIDTH
            fill(left, scene.plate.y, PLATE_DIGIT_WIDTH, height, _KIND_INDEX[digit], _PLATE)
    for t in scene.things:
        fill(t.x, t.y, t.size, t.size, _KIND_INDEX[t.kind], _COLOR_INDEX[t.color])
    return kind.ravel(), color.ravel()


def _stacked_labels(scenes: Sequence[Scene], device: torch.device) -> tuple[Tensor, Tensor]:
    """Kinds and colours of all patches of all scenes, two tensors [batch, 144]."""
    kinds, colors = zip(*(patch_labels(s) for s in scenes), strict=True)
    return tuple(torch.from_numpy(np.stack(x)).to(device) for x in (kinds, colors))  # type: ignore[return-value]


def scene_labels(scene: Scene) -> np.ndarray:
    """Which coloured kinds and which plate digits the scene shows: 0/1 array [122]."""
    present = np.zeros(_SCENE_LABELS, dtype=np.float32)
    for t in scene.things:
        present[_KIND_INDEX[t.kind] * len(COLORS) + _COLOR_INDEX[t.color]] = 1
    if scene.plate is not None:
        for digit in scene.plate.number:
            present[len(KINDS) * len(COLORS) + int(digit)] = 1
    return present


def visual_features(
    model: PreTrainedModel, scenes: Sequence[Scene]
) -> Float[Tensor, "batch visual channels"]:
    """Visual tokens as the decoder takes them; gradients reach the projector, not the tower."""
    return torch.stack(list(model.get_image_features(*crops(model, scenes)).pooler_output))


def crops(model: PreTrainedModel, scenes: Sequence[Scene]) -> tuple[Tensor, ...]:
    """What the processor makes of scenes: pixels, and for models that tile pictures their sizes.

    Returns:
        [batch, 3, 96, 96]; or [batch, crops, 3, 96, 96] and [batch, 2].
    """
    images = [scene.image() for scene in scenes]
    pixels = pixel_values([np.asarray(image) for image in images])
    pixels = pixels.to(model.get_input_embeddings().weight.device)
    if not hasattr(model.config, "image_grid_pinpoints"):
        return (pixels,)
    # LLaVA-NeXT and OneVision: the whole picture, shrunk as PIL does, and its tiles row by row.
    side, square = scenes[0].side, (IMAGE_SIZE, IMAGE_SIZE)
    small = [np.asarray(image.resize(square, Resampling.BICUBIC)) for image in images]
    n = side // IMAGE_SIZE
    grid = pixels.unflatten(3, (n, -1)).unflatten(2, (n, -1))  # [b, 3, row, height, column, width]
    tiles = grid.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    whole = pixel_values(small).to(pixels)[:, None]
    return torch.cat([whole, tiles], 1), torch.full((len(scenes), 2), side)


def clip_features(
    model: PreTrainedModel, clips: Sequence[Clip]
) -> Float[Tensor, "batch visual channels"]:
    """Visual tokens of clips as the decoder of LLaVA-OneVision takes them."""
    frames = [draw(clip.scene(frame)) for clip in clips for frame in range(FRAMES)]
    pixels = pixel_values(frames).to(model.get_input_embeddings().weight.device)
    return model.get_video_features(pixels.unflatten(0, (-1, FRAMES))).pooler_output


class Encoder:
    """Questions and answers as tokens, as the processor would give them for a whole prompt.

    Attributes:
        head: tokens in front of the picture.
        tail: tokens between the picture and the question.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        opening = tokenizer("USER: " + IMAGE_TOKEN + "\n").input_ids
        at = opening.index(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        self.head, self.tail = opening[:at], opening[at + 1 :]
        self.cache: dict[tuple[str, str], Asked] = {}

    def __call__(self, question: str, answer: str) -> Asked:
        """Tokens of the question with its cue, and of the answer with the end of sequence."""
        key = (question, answer)
        if key not in self.cache:
            if len(self.cache) > 200_000:  # descriptions are all different
                self.cache.clear()
            ask = self.tokenizer(f"{question} ASSISTANT:", add_special_tokens=False).input_ids
            say = self.tokenizer(answer, add_special_tokens=False).input_ids
            self.cache[key] = (ask, [*say, self.tokenizer.eos_token_id])
        return self.cache[key]


class VisualWords(nn.Module):
    """A symbolic picture: each patch as the sum of the decoder's own words for what it shows.

    A patch of a red circle at the top left is embedded as red + circle + top + left, with a learned
    code for its row and column. It is what a perfect tower and projector would say.
    """

    kinds: Tensor
    colors: Tensor
    places: Tensor

    def __init__(self, tokenizer: PreTrainedTokenizerBase, width: int) -> None:
        super().__init__()
        self.row = nn.Embedding(_SIDE, width)
        self.col = nn.Embedding(_SIDE, width)
        for table in (self.row, self.col):
            nn.init.normal_(table.weight, std=0.02)
        size = len(tokenizer)

        def bag(phrases: Sequence[str]) -> Tensor:
            counts = torch.zeros(len(phrases), size)
            for i, phrase in enumerate(phrases):
                for token in tokenizer(phrase, add_special_tokens=False).input_ids:
                    counts[i, token] += 1
            return counts

        places = bag(PLACES).unflatten(0, (GRID, GRID))
        per_cell = _SIDE // GRID
        places = places.repeat_interleave(per_cell, 0).repeat_interleave(per_cell, 1)
        self.register_buffer("kinds", bag([*KINDS, "nothing"]), persistent=False)
        self.register_buffer("colors", bag([*COLORS, "plate", ""]), persistent=False)
        self.register_buffer("places", places.flatten(0, 1), persistent=False)

    def forward(
        self,
        words: Float[Tensor, "vocabulary channels"],
        kinds: Int[Tensor, "batch 144"],
        colors: Int[Tensor, "batch 144"],
    ) -> Float[Tensor, "batch 144 channels"]:
        """Embed patches, given the decoder's word embeddings and the labels of the patches."""
        code = self.row.weight[:, None] + self.col.weight[None]
        place = self.places @ words + code.flatten(0, 1)
        return (self.kinds @ words)[kinds] + (self.colors @ words)[colors] + place


class CaptionEncoder(nn.Module):
    """The text half of CLIP: a small transformer over scene captions."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, width: int, channels: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=96,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        self.text_projection = nn.Linear(width, channels, bias=False)
        self.image_projection = nn.Linear(channels, channels, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(np.log(10.0), dtype=torch.float32))
        self.shift = nn.Parameter(torch.tensor(-5.0))  # SigLIP's bias

    def forward(
        self, pooled: Float[Tensor, "batch channels"], captions: Sequence[str], sigmoid: bool
    ) -> tuple[Tensor, Tensor]:
        """Contrastive loss of pictures and their captions, and how often the right one wins.

        Args:
            pooled: the tower's summary of each picture.
            captions: one per picture.
            sigmoid: SigLIP's pairwise loss instead of CLIP's softmax.
        """
        eos = self.tokenizer.eos_token
        inputs = self.tokenizer(
            [c + eos for c in captions], padding=True, padding_side="right", return_tensors="pt"
        ).to(pooled.device)
        text = self.text(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
        text = F.normalize(self.text_projection(text.pooler_output).float(), dim=-1)
        image = F.normalize(self.image_projection(pooled).float(), dim=-1)
        logits = image @ text.T * self.log_scale.clamp(max=4.6).exp()
        own = torch.arange(len(captions), device=pooled.device)
        if sigmoid:
            sign = 2 * torch.eye(len(captions), device=pooled.device) - 1
            loss = -F.logsigmoid(sign * (logits + self.shift)).sum() / len(captions)
        else:
            loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return loss, (logits.argmax(1) == own).float().mean()


class TowerHeads(nn.Module):
    """Linear heads that read labels off the tower's states."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kind = nn.Linear(width, len(KINDS) + 1)
        self.color = nn.Linear(width, len(COLORS) + 2)
        self.position = nn.Linear(width, _SIDE * 2)
        self.scene = nn.Linear(width, _SCENE_LABELS)


class Scaffold(nn.Module):
    """Modules that exist during training only and are taken down afterwards."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        tower = model.config.vision_config.hidden_size
        self.words = VisualWords(tokenizer, model.config.get_text_config().hidden_size)
        self.captions = CaptionEncoder(tokenizer, 128, tower)
        self.heads = TowerHeads(tower)


Objective = Callable[[Sequence[Scene], np.random.Generator], tuple[Tensor, Log]]


class TowerObjective:
    """CLIP's contrast between captions, and labels for every patch and for the whole picture."""

    def __init__(self, model: PreTrainedModel, scaffold: Scaffold) -> None:
        self.model, self.scaffold = model, scaffold

    def __call__(self, scenes: Sequence[Scene], rng: np.random.Generator) -> tuple[Tensor, Log]:
        """The loss, and accuracies on the patches that something covers."""
        heads = self.scaffold.heads
        device = heads.kind.weight.device
        kinds, colors = _stacked_labels(scenes, device)
        present = torch.from_numpy(np.stack([scene_labels(s) for s in scenes])).to(device)
        tower = self.model.model.vision_tower
        pixels = pixel_values([draw(s) for s in scenes]).to(device)
        out = tower(pixel_values=pixels, output_hidden_states=True)
        patches = out.hidden_states[self.model.config.vision_feature_layer][:, -VISUAL_TOKENS:]

        kind_logits, color_logits = heads.kind(patches).float(), heads.color(patches).float()
        row = torch.arange(_SIDE, device=device).repeat_interleave(_SIDE).repeat(len(scenes))
        col = torch.arange(_SIDE, device=device).repeat(_SIDE).repeat(len(scenes))
        row_logits, col_logits = heads.position(patches).float().flatten(0, 1).chunk(2, dim=-1)
        place = F.cross_entropy(row_logits, row) + F.cross_entropy(col_logits, col)
        # Most patches are ground: weigh covered ones up so that they decide the loss.
        covered = kinds != _GROUND
        weight = torch.where(covered, 1.0, 0.15).flatten()
        dense = sum(
            F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            for logits, labels in ((kind_logits, kinds), (color_logits, colors))
        )
        scene_logits = heads.scene(out.pooler_output).float()
        scene = F.binary_cross_entropy_with_logits(
            scene_logits, present, pos_weight=torch.tensor(8.0, device=device)
        )
        captions = [caption(s).answer for s in scenes]
        sigmoid = self.model.config.vision_config.model_type.startswith("siglip")
        contrast, retrieved = self.scaffold.captions(out.pooler_output, captions, sigmoid)
        loss = (dense * weight).sum() / weight.sum() + 0.1 * place + 2.0 * scene + 0.2 * contrast
        with torch.no_grad():
            log = {
                "kind": (kind_logits.argmax(-1) == kinds)[covered].float().mean(),
                "color": (color_logits.argmax(-1) == colors)[covered].float().mean(),
                "caption": retrieved,
            }
        return loss, log


class _Asking(ABC):
    """Common to the objectives that ask questions."""

    def __init__(
        self, model: PreTrainedModel, scaffold: Scaffold, tokenizer: PreTrainedTokenizerBase,
        questions: int, late: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.scaffold, self.questions = model, scaffold, questions
        self.late = late
        self.encode = Encoder(tokenizer)

    @abstractmethod
    def __call__(self, scenes: Sequence[Scene], rng: np.random.Generator) -> tuple[Tensor, Log]:
        """The loss of a step, and figures for the log."""

    def _loss(
        self, features: Tensor, packs: list[list[Asked]], rng: np.random.Generator
    ) -> tuple[Tensor, Log]:
        # Half of the questions stand at a distance, as in a later turn of a conversation.
        shape = (len(packs), max(map(len, packs)))
        offsets = torch.from_numpy(rng.integers(0, MAX_OFFSET, shape) * (rng.random(shape) < 0.5))
        return answer_loss(self.model, features, self.encode.head, self.encode.tail, packs, offsets)

    def _packs(self, scenes: Sequence[Scene], rng: np.random.Generator) -> list[list[Asked]]:
        return [
            [
                self.encode(q.text, q.answer)
                for q in training_questions(s, rng, self.questions, self.late)
            ]
            for s in scenes
        ]


class LanguageObjective(_Asking):
    """Questions about symbolic pictures of varying length; no pixels.

    A step shows all that covers something, and as much empty ground as makes up a random number
    of visual tokens, numbered without gaps. The decoder so meets prompts of any length, as one
    pretrained on text has.
    """

    def __call__(self, scenes: Sequence[Scene], rng: np.random.Generator) -> tuple[Tensor, Log]:
        """Loss of the answers."""
        words = self.model.get_input_embeddings().weight
        kinds, colors = _stacked_labels(scenes, words.device)
        covered = (kinds != _GROUND).cpu()
        number = int(rng.integers(int(covered.sum(1).max()), VISUAL_TOKENS + 1))
        order = torch.from_numpy(rng.random(tuple(covered.shape))) - covered.double()
        kept = order.argsort(1)[:, :number].sort(1).values.to(words.device)
        features = self.scaffold.words(words, kinds, colors)
        features = features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))
        return self._loss(features, self._packs(scenes, rng), rng)


class AlignObjective(_Asking):
    """Captions, and the decoder's own words for every patch, from the projector's output."""

    def __call__(self, scenes: Sequence[Scene], rng: np.random.Generator) -> tuple[Tensor, Log]:
        """Loss of the captions plus the distance from the symbolic picture."""
        words = self.model.get_input_embeddings().weight
        features = visual_features(self.model, scenes)
        with torch.no_grad():
            wanted = self.scaffold.words(words, *_stacked_labels(scenes, words.device)).float()
        # In units of the symbolic picture's own spread; covered patches count as much as ground.
        covered = _stacked_labels(scenes, words.device)[0] != _GROUND
        distance = (features.float() - wanted).pow(2).mean(-1) / wanted.var()
        match = 0.5 * (distance[covered].mean() + distance[~covered].mean())
        packs = [[self.encode(q.text, q.answer)] for q in map(caption, scenes)]
        captions, log = self._loss(features, packs, rng)
        return match + 0.2 * captions, {"match": match, **log}


class InstructObjective(_Asking):
    """Many questions about each picture; now and then a symbolic one, or a clip.

    LLaVA's instruction data hold conversations without a picture too; they keep up what the
    language model knew.
    """

    text_share = 0.2

    def __init__(
        self, model: PreTrainedModel, scaffold: Scaffold, tokenizer: PreTrainedTokenizerBase,
        questions: int, late: bool = False, clip_share: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(model, scaffold, tokenizer, questions, late)
        self.clip_share = clip_share
        self.language = LanguageObjective(model, scaffold, tokenizer, questions, late)

    def __call__(self, scenes: Sequence[Scene], rng: np.random.Generator) -> tuple[Tensor, Log]:
        """Loss of the answers. In a step of clips the scenes only lend their seeds."""
        kind = rng.random()
        # Symbolic pictures are of one crop: large scenes do not fit.
        if kind < self.text_share and scenes[0].side == IMAGE_SIZE:
            return self.language(scenes, rng)
        if self.text_share <= kind < self.text_share + self.clip_share:
            clips = [make_clip("train", scene.seed) for scene in scenes]
            packs = [[self.encode(q.text, q.answer) for q in clip_questions(c, rng)] for c in clips]
            loss, log = self._loss(clip_features(self.model, clips), packs, rng)
            return loss, {"clip_" + key: value for key, value in log.items()}
        features = visual_features(self.model, scenes)
        return self._loss(features, self._packs(scenes, rng), rng)
