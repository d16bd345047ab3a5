"""What the stages of training minimise.

Each objective turns scenes into one scalar loss. The tower learns from dense labels (what covers
each patch) beside a contrastive or multi-label signal for its [CLS] token; the decoder learns from
many questions about each image, packed behind one copy of the image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from frugalvlm.pocket.models import PATCH_SIZE
from frugalvlm.pocket.scenes import COLORS, DIGITS, IMAGE_SIZE, KINDS, PLATE_DIGIT_WIDTH, Scene

_SIDE = IMAGE_SIZE // PATCH_SIZE
_COLOR_INDEX = {color: i for i, color in enumerate(COLORS)}
_KIND_INDEX = {kind: i for i, kind in enumerate(KINDS)}
_GROUND = len(KINDS)  # label of a patch that nothing covers
_PLATE = len(COLORS)  # "colour" of a plate's dark digits
_NO_COLOR = len(COLORS) + 1
_SCENE_LABELS = len(KINDS) * len(COLORS) + len(DIGITS)


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
        for i, digit in enumerate(scene.plate.number):
            left = scene.plate.x + 3 + i * PLATE_DIGIT_WIDTH
            height = PLATE_DIGIT_WIDTH + 6
            fill(left, scene.plate.y, PLATE_DIGIT_WIDTH, height, _KIND_INDEX[digit], _PLATE)
    for t in scene.things:
        fill(t.x, t.y, t.size, t.size, _KIND_INDEX[t.kind], _COLOR_INDEX[t.color])
    return kind.ravel(), color.ravel()


def scene_labels(scene: Scene) -> np.ndarray:
    """Which coloured kinds and which plate digits the scene shows: 0/1 array [122]."""
    present = np.zeros(_SCENE_LABELS, dtype=np.float32)
    for t in scene.things:
        present[_KIND_INDEX[t.kind] * len(COLORS) + _COLOR_INDEX[t.color]] = 1
    if scene.plate is not None:
        for digit in scene.plate.number:
            present[len(KINDS) * len(COLORS) + int(digit)] = 1
    return present


class TowerObjective(nn.Module):
    """Dense labels on the features that LLaVA uses, scene labels on the last [CLS].

    The heads exist during this stage only.
    """

    def __init__(self, tower: nn.Module, width: int) -> None:
        super().__init__()
        self.tower = tower
        self.kind = nn.Linear(width, len(KINDS) + 1)
        self.color = nn.Linear(width, len(COLORS) + 2)
        self.position = nn.Linear(width, _SIDE * 2)
        self.scene = nn.Linear(width, _SCENE_LABELS)

    def forward(
        self, pixels: Float[Tensor, "batch 3 height width"], scenes: Sequence[Scene]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the accuracy on patches that something covers."""
        device = pixels.device
        labels = [patch_labels(s) for s in scenes]
        kinds = torch.from_numpy(np.stack([k for k, _ in labels])).to(device)
        colors = torch.from_numpy(np.stack([c for _, c in labels])).to(device)
        present = torch.from_numpy(np.stack([scene_labels(s) for s in scenes])).to(device)

        out = self.tower(pixel_values=pixels, output_hidden_states=True)
        patches = out.hidden_states[-2][:, 1:]
        kind_logits, color_logits = self.kind(patches), self.color(patches)
        row = torch.arange(_SIDE, device=device).repeat_interleave(_SIDE)
        col = torch.arange(_SIDE, device=device).repeat(_SIDE)
        row_logits, col_logits = self.position(patches).float().chunk(2, dim=-1)
        place = sum(
            F.cross_entropy(logits.flatten(0, 1), target.repeat(len(scenes)))
            for logits, target in ((row_logits, row), (col_logits, col))
        )
        # Most patches are ground: weigh covered ones up so that they decide the loss.
        covered = kinds != _GROUND
        weight = torch.where(covered, 1.0, 0.15)
        dense = (
            F.cross_entropy(kind_logits.float().flatten(0, 1), kinds.flatten(), reduction="none")
            + F.cross_entropy(
                color_logits.float().flatten(0, 1), colors.flatten(), reduction="none"
            )
        ) * weight.flatten()
        scene_logits = self.scene(out.pooler_output).float()
        scene_loss = F.binary_cross_entropy_with_logits(
            scene_logits, present, pos_weight=torch.tensor(8.0, device=device)
        )
        loss = dense.sum() / weight.sum() + 0.1 * place + 2.0 * scene_loss
        with torch.no_grad():
            log = {
                "kind": (kind_logits.argmax(-1) == kinds)[covered].float().mean(),
                "color": (color_logits.argmax(-1) == colors)[covered].float().mean(),
                "scene": (
                    ((scene_logits > 0) & (present > 0)).sum()
                    / ((scene_logits > 0) | (present > 0)).sum().clamp(min=1)
                ).float(),
            }
        return loss, log


def _block_mask(
    prefix: int, lengths: Int[Tensor, "batch questions"], total: int
) -> tuple[Tensor, Tensor]:
    """Who may attend to whom, and at which position, when questions are packed.

    Every question sees the prefix (the image) and itself, as if it were alone.

    Returns:
        allowed: bool [batch, 1, total, total].
        positions: [batch, total]; each question restarts behind the prefix.
    """
    batch = lengths.shape[0]
    ends = prefix + lengths.cumsum(1)
    slot = torch.arange(total)
    # Question number of every slot: 0 for the prefix, 1.. for questions.
    block = (slot[None, :, None] >= ends[:, None, :]).sum(-1) + 1
    block[:, :prefix] = 0
    starts = torch.cat([torch.full((batch, 1), prefix), ends], 1)
    positions = slot[None] - starts.gather(1, (block - 1).clamp(0, starts.shape[1] - 1)) + prefix
    positions[:, :prefix] = slot[:prefix]
    causal = slot[:, None] >= slot[None, :]
    same = block[:, :, None] == block[:, None, :]
    allowed = causal & (same | (block[:, None, :] == 0))
    return allowed[:, None], positions.clamp(min=0)


def packed_question_loss(
    model: LlavaForConditionalGeneration,
    pixels: Float[Tensor, "batch 3 height width"],
    prefix_ids: Sequence[int],
    questions: Sequence[Sequence[tuple[list[int], list[int]]]],
    train_tower: bool,
    per_question: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of every answer, all questions of an image sharing one copy of the image.

    The result equals that of separate prompts (a test compares them); the image is paid for once.

    Args:
        model: the model in training.
        pixels: pictures.
        prefix_ids: the tokens before the question, `<image>` placeholders expanded.
        questions: per picture, pairs of question tokens and answer tokens (with end of sequence).
        train_tower: whether gradients flow into the vision tower.
        per_question: every question counts the same, however long its answer; otherwise every
            answer token does, which lets descriptions drown one-word answers.
    """
    device = pixels.device
    prefix = len(prefix_ids)
    lengths = torch.zeros(len(questions), max(map(len, questions)), dtype=torch.long)
    rows: list[list[int]] = []
    targets: list[list[int]] = []
    weights: list[float] = []  # of every answer token, in order
    for b, items in enumerate(questions):
        ids, target = list(prefix_ids), [-100] * prefix
        for q, (ask, answer) in enumerate(items):
            ids += ask + answer
            # The token before an answer token predicts it.
            target += [-100] * (len(ask) - 1) + answer + [-100]
            lengths[b, q] = len(ask) + len(answer)
            weights += [1 / len(answer) if per_question else 1.0] * len(answer)
        rows.append(ids)
        targets.append(target)
    total = max(map(len, rows))
    pad = model.config.text_config.pad_token_id
    input_ids = torch.tensor([r + [pad] * (total - len(r)) for r in rows], device=device)
    target_ids = torch.tensor([t + [-100] * (total - len(t)) for t in targets], device=device)
    allowed, positions = _block_mask(prefix, lengths, total)

    inner = model.model
    with torch.set_grad_enabled(train_tower and torch.is_grad_enabled()):
        states = inner.vision_tower(pixel_values=pixels, output_hidden_states=True)
        selected = states.hidden_states[model.config.vision_feature_layer][:, 1:]
    features = inner.multi_modal_projector(selected)
    embeds = inner.get_input_embeddings()(input_ids)
    is_image = (input_ids == model.config.image_token_id).unsqueeze(-1)
    embeds = embeds.masked_scatter(is_image, features.to(embeds.dtype))
    hidden = inner.language_model(
        inputs_embeds=embeds,
        attention_mask=allowed.to(device),
        position_ids=positions.to(device),
        use_cache=False,
    ).last_hidden_state
    asked = target_ids != -100
    logits = model.lm_head(hidden[asked]).float()
    weight = torch.tensor(weights, device=device)
    losses = F.cross_entropy(logits, target_ids[asked], reduction="none")
    loss = (losses * weight).sum() / weight.sum()
    with torch.no_grad():
        token_accuracy = (logits.argmax(-1) == target_ids[asked]).float().mean()
    return loss, {"token_accuracy": token_accuracy}
