"""Tiny models of random weights, and pictures with questions about them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from transformers import CLIPImageProcessorPil, LlavaForConditionalGeneration, LlavaProcessor

from frugalvlm.pocket.installed import save_vlm
from frugalvlm.pocket.models import build_config, build_model, build_processor, build_tokenizer

Pair = tuple[Any, Any]


@pytest.fixture(autouse=True)
def _results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(tmp_path / "results"))


@pytest.fixture(scope="session")
def tiny() -> Pair:
    """144 patches, a [CLS] token."""
    torch.manual_seed(0)
    return build_model("pocket-llava-tiny").eval(), build_processor()


@pytest.fixture(scope="session")
def no_cls() -> Pair:
    """A SigLIP tower: no [CLS] token."""
    torch.manual_seed(0)
    name = "pocket-siglip-base"
    return build_model(name).eval(), build_processor(name)


@pytest.fixture(scope="session")
def folder_of_64(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model with 8 x 8 patches."""
    torch.manual_seed(0)
    config = build_config("pocket-llava-tiny")
    config.vision_config.image_size, config.image_seq_length = 64, 64
    square = {"height": 64, "width": 64}
    pixels = CLIPImageProcessorPil(
        size=square, crop_size=square, do_center_crop=False, image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )  # fmt: skip
    processor = LlavaProcessor(
        image_processor=pixels, tokenizer=build_tokenizer(), image_token="<image>", patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "small-64"
    save_vlm(LlavaForConditionalGeneration(config).eval(), processor, folder)
    return str(folder)


@pytest.fixture(scope="session")
def picture() -> Callable[[int], PIL.Image.Image]:
    def make(seed: int) -> PIL.Image.Image:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randint(0, 256, (96, 96, 3), generator=generator, dtype=torch.uint8)
        return PIL.Image.fromarray(values.numpy())

    return make


@pytest.fixture(scope="session")
def own(picture) -> list[tuple[Any, str, Any]]:
    """Six questions about three pictures."""
    pictures = [picture(seed) for seed in range(3)]
    return [
        (p, question, answers)
        for p in pictures
        for question, answers in (("what is it?", "a circle"), ("is it red?", ["yes", "Yes!"]))
    ]
