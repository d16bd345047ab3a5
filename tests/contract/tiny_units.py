"""Tiny models of families that are reduced behind the projector, and prompts for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from tiny_hosts import BOS, IMAGE, PAD, VIDEO, VOCAB, enliven, guide_for, tiny_weights
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from frugalvlm.methods import METHODS, Method
from frugalvlm.methods.base import DepthPolicy, GuidedReducer
from frugalvlm.methods.trained import Learnt, TrainedMethod

START, END = 58, 59  # around a picture
LAYERS, SHARE = 4, 0.4
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # 3-D positions, pictures of any size
TILES = ("internvl", "smolvlm", "idefics3")  # 1-D positions, tiles of 3 x 3 units
APART = ("smolvlm", "idefics3")  # with tags between the tiles
UNITS = (*QWEN, *TILES)
# By principle: the tower has no [CLS], or nothing reads the features; the processor cuts pictures.
REFUSED = {
    (key, host)
    for host in UNITS
    for key in ("fastervlm", "prumerge_plus", "downsample")
    if (key, host) != ("fastervlm", "internvl")
}
SERVED = [(key, host) for host in UNITS for key in METHODS if (key, host) not in REFUSED]
# Served by the host of another family here: the widest sweep is for the long run.
ALIKE, ALSO = ("qwen2_vl", "idefics3"), ("visionzip", "fastv", "sparsevlm")


def swept(pairs: list[tuple[str, str]]) -> list[Any]:
    """The pairs as parameters, those that another family stands for marked as slow."""
    return [
        pytest.param(*pair, marks=pytest.mark.slow)
        if pair[1] in ALIKE and pair[0] not in ALSO
        else pair
        for pair in pairs
    ]


INSIDE_AND_BEHIND = swept(SERVED)
TRACED = swept([pair for pair in SERVED if not issubclass(METHODS[pair[0]], DepthPolicy)])
FILMED = swept([(k, h) for k, h in SERVED if h in QWEN and not issubclass(METHODS[k], DepthPolicy)])


@dataclass(frozen=True)
class Shown:
    """One random picture of so many rows and columns of units, or a video of such frames."""

    seed: int
    rows: int = 3
    cols: int = 4
    frames: int = 1

    @property
    def units(self) -> int:
        """Tokens that the language model reads."""
        return self.frames * self.rows * self.cols

    def parts(self, host: str) -> list[int]:
        """Tokens of each image that the engine sees; a picture of `cols` columns has as many tiles
        where pictures are cut into tiles."""
        if host in QWEN:
            return [self.units]
        return [9] * self.cols if host in APART else [9 * self.cols]


Row = list["Shown | int"]  # a prompt: pictures, and numbers of text tokens

ONE: list[Row] = [[3, Shown(1), 5]]
# Rows of different length; two pictures of different sizes, none, and one.
MANY: list[Row] = [[2, Shown(2, 2, 5), 4], [2, Shown(3, 4, 4), 1, Shown(4, 1, 3), 3], [6]]


def make(key: str, model: Any, share: float = SHARE) -> Method:
    """A method at a share of each picture's tokens; guided ones with a tiny guide."""
    kind = METHODS[key]
    if key == "early_exit":
        return kind(threshold=0.25)
    if key == "vanilla":
        return kind()
    method = kind.for_share(share)
    if isinstance(method, TrainedMethod):
        return replace(method, learnt=_gates(kind, model, fire=share < 1))
    return replace(method, guide=guide_for(model)) if isinstance(method, GuidedReducer) else method


def _gates(kind: Any, model: Any, fire: bool) -> Learnt:
    """Gates that never fire, or that do behind the second layer."""
    learnt = tiny_weights(kind, model, 0.0)
    if fire:
        for gate in learnt.own[1:]:
            gate.w2.weight.data[1] = 1.0  # hidden states of GELU are hardly ever below 0
    return learnt


@cache
def model_for(host: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> Any:
    """A model with weights large enough that attention is far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(host, attention)
    enliven(model, len(host))
    return model.to(dtype).eval()


def build(host: str, attention: str = "sdpa") -> PreTrainedModel:
    """A fresh model with the library's own small weights."""
    text: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB,
        "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    tower: dict[str, Any] = {
        "depth": 3, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }  # fmt: skip
    tokens = {
        "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START,
        "vision_end_token_id": END, "attn_implementation": attention,
    }  # fmt: skip
    if host == "qwen2_vl":
        tower |= {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        return Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(text_config=text, vision_config=tower, **tokens)
        )
    if host == "qwen3_vl":  # DeepStack behind decoder layers 0 and 1
        rope = {**text["rope_parameters"], "mrope_section": [2, 1, 1], "mrope_interleaved": True}
        text |= {"rope_parameters": rope, "head_dim": 8}
        tower |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
        tower |= {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]}
        return Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(text_config=text, vision_config=tower, **tokens)
        )
    if host in TILES:
        return _tiled(host, text, attention)
    assert host == "qwen2_5_vl"
    # Windows of 2 x 2 units, which cut the pictures above in several places.
    tower |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
    tower |= {"window_size": 16, "fullatt_block_indexes": [2]}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=tower, **tokens)
    )


def _tiled(host: str, text: dict[str, Any], attention: str) -> PreTrainedModel:
    """Tiles of 24 pixels, 6 x 6 patches and 3 x 3 units."""
    del text["rope_parameters"]
    tower: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 2, "image_size": 24, "patch_size": 4,
    }  # fmt: skip
    shared: dict[str, Any] = {"image_token_id": IMAGE, "attn_implementation": attention}
    if host == "internvl":
        tower |= {"image_size": [24, 24], "patch_size": [4, 4], "use_qk_norm": True}
        return InternVLForConditionalGeneration(
            InternVLConfig(text_config=Qwen2Config(**text), vision_config=tower, **shared)
        )
    shared |= {"scale_factor": 2, "pad_token_id": PAD, "vision_config": tower}
    shared["text_config"] = LlamaConfig(**text)
    if host == "smolvlm":
        return SmolVLMForConditionalGeneration(SmolVLMConfig(**shared))
    return Idefics3ForConditionalGeneration(Idefics3Config(**shared))


def prompt(
    host: str, rows: list[Row] = ONE, side: str = "left", dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """What a processor would return for these prompts, padded on one side."""
    lines, pixels, grids, token, tiles = [], [], [], IMAGE, []
    for row in rows:
        line, own = [BOS], []
        seed = sum(p.seed if isinstance(p, Shown) else p for p in row)
        generator = torch.Generator().manual_seed(seed)
        for part in row:
            if isinstance(part, Shown) and host not in QWEN:
                # SmolVLM tells in front of every tile which one it is.
                for number, units in enumerate(part.parts(host)):
                    line += [START, 2 + number, *[IMAGE] * units, END]
                seeded = torch.Generator().manual_seed(part.seed)
                own.append(torch.randn(part.cols, 3, 24, 24, generator=seeded).to(dtype))
            elif isinstance(part, Shown):
                token = VIDEO if part.frames > 1 else IMAGE
                # Qwen3-VL tells the time in front of every frame.
                runs = part.frames if host == "qwen3_vl" else 1
                for run in range(runs):
                    line += [2 + run] * (runs > 1)
                    line += [START, *[token] * (part.units // runs), END]
                patches = torch.Generator().manual_seed(part.seed)
                pixels.append(torch.randn(4 * part.units, 3 * 2 * 16, generator=patches))
                grids.append([part.frames, 2 * part.rows, 2 * part.cols])
            else:
                line += torch.randint(2, START, (part,), generator=generator).tolist()
        lines.append(line)
        tiles.append(torch.cat(own) if own else torch.zeros(0, 3, 24, 24, dtype=dtype))
    longest = max(map(len, lines))

    def padded(line: list[int], fill: int) -> list[int]:
        rest = [fill] * (longest - len(line))
        return rest + line if side == "left" else line + rest

    ids = torch.tensor([padded(line, PAD) for line in lines])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.tensor([padded([1] * len(line), 0) for line in lines]),
    }
    if host not in QWEN:
        if host not in APART and any(map(len, tiles)):
            inputs["pixel_values"] = torch.cat(tiles)
        elif any(map(len, tiles)):  # [rows, most tiles, ...], filled up with zeros
            inputs["pixel_values"] = torch.nn.utils.rnn.pad_sequence(tiles, batch_first=True)
        return inputs
    inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    if pixels:
        many = "_videos" if token == VIDEO else ""
        grid = "video_grid_thw" if token == VIDEO else "image_grid_thw"
        inputs |= {f"pixel_values{many}": torch.cat(pixels).to(dtype), grid: torch.tensor(grids)}
    return inputs


def counts_of(host: str, rows: list[Row]) -> list[int]:
    """Tokens of each image that the engine sees in prompts."""
    return [n for picture in shown_in(rows) for n in picture.parts(host)]


def shown_in(rows: list[Row]) -> list[Shown]:
    """The pictures of prompts."""
    return [part for row in rows for part in row if isinstance(part, Shown)]
