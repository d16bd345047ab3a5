"""How a model is asked: its own chat template around the question, and its picture's form.

LLaVA-1.5 and -NeXT on Vicuna were trained and evaluated with a sentence about the two who talk
before the first turn (`vicuna_v1` of LLaVA's conversation.py), which the templates of the Hub's
checkpoints leave out; it is put back. LLaVA-1.5 saw pictures padded to a square with the mean
colour, where the Hub's processor crops them; they are padded again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import PIL.Image
from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm.errors import FrugalError

__all__ = ["VICUNA", "Frame", "TemplateError", "frame_of"]

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)
_QUESTION = "\x00"


class TemplateError(FrugalError, ValueError):
    """A checkpoint that does not say how it is asked; the message names the remedy."""


@dataclass(frozen=True)
class Frame:
    """What stands around a question, and what becomes of a picture.

    Attributes:
        name: in records.
        before: text before the question, the picture's placeholder in it.
        after: text behind it.
        ground: colour that a picture is padded to a square with; None: it stays as it is.
    """

    name: str
    before: str
    after: str
    ground: tuple[int, int, int] | None = None

    def text(self, question: str) -> str:
        """The whole prompt."""
        return f"{self.before}{question}{self.after}"

    def picture(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """The picture as the processor gets it."""
        if self.ground is None or image.width == image.height:
            return image
        side = max(image.size)
        square = PIL.Image.new("RGB", (side, side), self.ground)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square


def frame_of(model: PreTrainedModel, processor: ProcessorMixin) -> Frame:
    """The frame of a checkpoint.

    Raises:
        TemplateError: it has no chat template for a picture and a text.
    """
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _QUESTION}]}]
    try:
        whole = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # no template, or one that takes no pictures
        raise TemplateError(
            f"The processor of {model.config.name_or_path} has no chat template for a picture and "
            f"a text ({str(error).splitlines()[0]}): take a checkpoint that brings one."
        ) from error
    before, _, after = str(whole).partition(_QUESTION)
    before = before.removeprefix(processor.tokenizer.bos_token or "")  # the tokenizer adds it
    name, ground = "chat template", None
    if before.startswith("USER:"):
        name, before = "vicuna_v1", VICUNA + before
    if model.config.model_type == "llava":
        name += ", padded to a square"
        ground = _mean_colour(processor)
    return Frame(name, before, after, ground)


def _mean_colour(processor: Any) -> tuple[int, int, int]:
    red, green, blue = (int(255 * part) for part in processor.image_processor.image_mean)
    return red, green, blue
