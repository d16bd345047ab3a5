"""The embedded models: what they are made of, and how to build one that is not trained yet.

They are ordinary Transformers models of a size that a laptop trains in about an hour: a CLIP tower
and a Llama decoder in `LlavaForConditionalGeneration`, in `LlavaNextForConditionalGeneration` for
larger pictures; a SigLIP tower and a Qwen2 decoder in `LlavaOnevisionForConditionalGeneration`.
A processor with the kit's own small tokenizer belongs to each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Config,
    SiglipVisionConfig,
)

from frugalvlm.pocket.onevision import PocketOnevisionProcessor
from frugalvlm.pocket.scenes import COLORS, DIGITS, IMAGE_SIZE, SHAPES

PATCH_SIZE = 8  # pixels; 96 / 8 = 12, so 144 visual tokens
VISUAL_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2

IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"
PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"

# LLaVA-1.5's frame of a turn, without the system sentence.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}<video>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'user' %} {% else %}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

WORDS = (
    "user", "assistant", "a", "an", "the", "is", "are", "there", "what", "where", "which", "how",
    "many", "color", "kind", "thing", "things", "in", "image", "at", "of", "left", "right",
    "above", "below", "top", "middle", "bottom", "center", "nothing", "yes", "no", "number",
    "written", "on", "and", "or", "please", "answer", "with", "option", "letter", "from", "given",
    "choices", "directly", "describe", "digits", "digit", "shapes", "shape", "object", "objects",
    "same", "more", "than", "fewer", "b", "c", "d", "using", "single", "word", "phrase", "video",
    "first", "last", "before", "after", "moves", "up", "down", "it", "does", "circles", "squares",
    "triangles", "crosses", "to", "plate", "shown", "this", "that", "s", "move", "way", "stays",
    "still", "frame", "frames", "appears", "comes", "then", "new", "next", "end", "start", "big",
    "small", "print", "read", "see", "can", "you", "its", "one", "two", "every",
)  # fmt: skip


@dataclass(frozen=True)
class PocketSpec:
    """The shape of one embedded model. Widths are channels, layers are transformer layers."""

    name: str
    tower_width: int
    tower_layers: int
    tower_heads: int
    decoder_width: int
    decoder_layers: int
    decoder_heads: int
    decoder_ff: int
    family: Literal["llava", "llava_next", "llava_onevision"] = "llava"
    parent: str | None = None  # the model whose weights training starts from

    @property
    def side(self) -> int:
        """Pixels of the pictures that the model is made for."""
        return 2 * IMAGE_SIZE if self.family == "llava_next" else IMAGE_SIZE


SPECS: dict[str, PocketSpec] = {
    spec.name: spec
    for spec in (
        PocketSpec("pocket-llava-base", 128, 6, 4, 160, 12, 5, 432),
        PocketSpec("pocket-llava-small", 96, 4, 3, 96, 6, 3, 256),
        PocketSpec(
            "pocket-llava-hd", 128, 6, 4, 160, 12, 5, 432, "llava_next", "pocket-llava-base"
        ),
        PocketSpec(
            "pocket-siglip-base", 128, 5, 4, 160, 12, 5, 432, "llava_onevision", "pocket-llava-base"
        ),
        PocketSpec("pocket-llava-tiny", 64, 3, 2, 64, 8, 2, 128),  # for tests and teaching
    )
}


def spec(name: str) -> PocketSpec:
    """The shape of a pocket model.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    if name not in SPECS:
        raise ValueError(f"Unknown pocket model '{name}'. Known: {', '.join(SPECS)}.")
    return SPECS[name]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of about 150 entries; numbers are split into digits."""
    return tokenizer_of()


def tokenizer_of(new_words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """The tokenizer of `build_tokenizer` with further words behind its own."""
    pieces = [*WORDS, *SHAPES, *COLORS, *DIGITS, *[f"##{d}" for d in DIGITS], *"?.,:"]
    pieces += [word for word in dict.fromkeys(new_words) if word not in pieces]
    vocabulary = {
        w: i for i, w in enumerate([PAD, UNK, BOS, EOS, IMAGE_TOKEN, VIDEO_TOKEN, *pieces])
    }
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[IMAGE_TOKEN, VIDEO_TOKEN],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def build_processor(name: str = "pocket-llava-base") -> ProcessorMixin:
    """The processor of a pocket model: pixels to [-1, 1], `<image>` to as many placeholders.

    Args:
        name: the model; models of one family share a processor.
    """
    return processor_of(spec(name), build_tokenizer())


def processor_of(shape: PocketSpec, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    """The processor of a model of this shape and vocabulary."""
    family = shape.family
    pixels: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    text: dict[str, Any] = {
        "tokenizer": tokenizer,
        "chat_template": CHAT_TEMPLATE,
        "image_token": IMAGE_TOKEN,
    }
    pinpoints = [[shape.side] * 2]
    if family == "llava_onevision":
        whole = LlavaOnevisionImageProcessorPil(
            size=square, image_grid_pinpoints=pinpoints, **pixels
        )
        return PocketOnevisionProcessor(
            whole, num_image_tokens=VISUAL_TOKENS, vision_feature_select_strategy="full",
            video_token=VIDEO_TOKEN, **text,
        )  # fmt: skip
    text |= {
        "patch_size": PATCH_SIZE,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    if family == "llava_next":
        tiled = LlavaNextImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE}, crop_size=square, image_grid_pinpoints=pinpoints,
            **pixels,
        )  # fmt: skip
        return LlavaNextProcessor(image_processor=tiled, **text)
    plain = CLIPImageProcessorPil(size=square, crop_size=square, do_center_crop=False, **pixels)
    return LlavaProcessor(image_processor=plain, **text)


def build_config(name: str) -> PreTrainedConfig:
    """The Transformers configuration of a pocket model."""
    return config_of(spec(name), build_tokenizer())


def config_of(s: PocketSpec, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """The configuration of a model of this shape and vocabulary."""
    vision: dict[str, Any] = {
        "hidden_size": s.tower_width,
        "intermediate_size": 4 * s.tower_width,
        "num_hidden_layers": s.tower_layers,
        "num_attention_heads": s.tower_heads,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": s.decoder_width,
        "intermediate_size": s.decoder_ff,
        "num_hidden_layers": s.decoder_layers,
        "num_attention_heads": s.decoder_heads,
        "num_key_value_heads": s.decoder_heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    shared: dict[str, Any] = {
        "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    pinpoints = [[s.side, s.side]]
    if s.family == "llava_onevision":
        return LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**vision),
            text_config=Qwen2Config(**text),
            video_token_id=tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
            image_grid_pinpoints=pinpoints,
            **shared,
        )
    shared |= {
        "vision_config": CLIPVisionConfig(projection_dim=s.tower_width, **vision),
        "text_config": LlamaConfig(**text),
        "image_seq_length": VISUAL_TOKENS,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    if s.family == "llava_next":
        return LlavaNextConfig(image_grid_pinpoints=pinpoints, **shared)
    return LlavaConfig(**shared)


CLASSES: dict[str, type[PreTrainedModel]] = {
    "llava": LlavaForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
}


def build_model(name: str) -> PreTrainedModel:
    """A pocket model with fresh random weights (seed with `torch.manual_seed`)."""
    return CLASSES[spec(name).family](build_config(name))
