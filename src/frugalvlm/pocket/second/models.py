"""The models of the second generation: the shapes of the first, with a larger vocabulary."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from frugalvlm.pocket.models import CLASSES, PocketSpec, config_of, processor_of, tokenizer_of
from frugalvlm.pocket.second import questions, texts

PARENT = "pocket-llava-base"
SPECS: dict[str, PocketSpec] = {
    spec.name: spec
    for spec in (
        PocketSpec("pocket-llava-base", 128, 6, 4, 160, 12, 5, 432),
        PocketSpec("pocket-llava-small", 96, 4, 3, 96, 8, 3, 256),
        PocketSpec("pocket-llava-hd", 128, 6, 4, 160, 12, 5, 432, "llava_next", PARENT),
        PocketSpec("pocket-siglip-base", 128, 5, 4, 160, 12, 5, 432, "llava_onevision", PARENT),
        PocketSpec("pocket-llava-tiny", 32, 2, 2, 32, 4, 2, 64),  # for tests
    )
}


def spec(name: str) -> PocketSpec:
    """The shape of a model of the second generation.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    if name not in SPECS:
        raise ValueError(f"Unknown pocket model '{name}'. Known: {', '.join(SPECS)}.")
    return SPECS[name]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer of the first generation with the words that came since."""
    return tokenizer_of((*questions.NEW_WORDS, *texts.NEW_WORDS))


def build_processor(name: str = "pocket-llava-base") -> ProcessorMixin:
    """The processor of a model: pixels to [-1, 1], `<image>` to as many placeholders."""
    return processor_of(spec(name), build_tokenizer())


def build_model(name: str) -> PreTrainedModel:
    """A model with fresh random weights (seed with `torch.manual_seed`)."""
    shape = spec(name)
    return CLASSES[shape.family](config_of(shape, build_tokenizer()))
