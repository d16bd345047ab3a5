"""A real processor, with a tokenizer made here, saved and loaded with its model by `load_vlm`."""

import numpy as np
import torch
from PIL import Image
from tiny_units import build, enliven
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Idefics3ImageProcessorPil, Idefics3Processor, PreTrainedTokenizerFast

from frugalvlm import load_vlm
from frugalvlm.methods import FastV, VisionZip

TAGS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}


def a_processor(image_id):
    """Words, tags of tiles, and pictures in tiles of 24 pixels."""
    rows = [f"<row_{row}_col_{col}>" for row in (1, 2, 3) for col in (1, 2, 3)]
    words = ["<pad>", "<s>", "<unk>", "what", "is", "this", "\n", *rows]
    words += [tag for name, tag in TAGS.items() if name != "image_token"]
    vocabulary = {word: number for number, word in enumerate(words)} | {"<image>": image_id}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>",
        extra_special_tokens=TAGS,
    )  # fmt: skip
    fast.add_special_tokens({"additional_special_tokens": rows})
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": 48}, max_image_size={"longest_edge": 24}
    )
    return Idefics3Processor(pictures, fast, image_seq_len=9)


def test_pictures_of_a_real_processor_are_reduced_tile_by_tile(tmp_path):
    torch.manual_seed(0)
    model = build("idefics3")
    enliven(model, 3)
    model.save_pretrained(tmp_path)
    a_processor(model.config.image_token_id).save_pretrained(tmp_path)
    model, processor = load_vlm(str(tmp_path))
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    inputs = processor(images=[[Image.fromarray(noise)]], text=["what <image> this"],
                       return_tensors="pt")  # fmt: skip
    tiles = inputs["pixel_values"].shape[1]
    marks = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert tiles > 1
    assert marks == 9 * tiles, "placeholders and features do not agree"
    with VisionZip(3, 1).on(model) as trace:
        model.generate(**inputs, max_new_tokens=2)
    assert trace.tokens_per_layer == [4] * 4
    assert len(trace.kept) == tiles
    with FastV.for_share(0.34).on(model) as trace:
        model.generate(**inputs, max_new_tokens=2)
    assert trace.tokens_per_layer == [9, 9, 3, 3]
