"""LLaVA-OneVision's processor for pictures and lists of frames, without a video library.

The library's own needs torchvision to resize videos. Pocket clips are lists of PIL frames, and a
frame is what the image processor makes of a picture's base crop: the whole picture at one size.
"""

from __future__ import annotations

from typing import Any

from transformers import BatchFeature, LlavaOnevisionProcessor
from transformers.video_utils import make_batched_videos


class Frames:
    """What stands in a processor's place for videos: frames through its image processor."""

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor

    def __call__(self, videos: Any, return_tensors: Any = None, **kwargs: Any) -> BatchFeature:
        """Pixels of videos with equally many frames.

        Args:
            videos: a list of frames (PIL pictures), or a list of such lists.
            return_tensors: "pt", "np" or None.
            kwargs: settings of the library's video processors; ignored.

        Returns:
            `pixel_values_videos`: [videos, frames, 3, height, width].
        """
        crops = [
            [c[0] for c in self.image_processor(list(frames))["pixel_values"]]
            for frames in make_batched_videos(videos)
        ]
        return BatchFeature({"pixel_values_videos": crops}, tensor_type=return_tensors)


class PocketOnevisionProcessor(LlavaOnevisionProcessor):
    """`LlavaOnevisionProcessor` with `Frames` for videos; saved and loaded without them."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None, chat_template: str | None = None,
        image_token: str = "<image>", video_token: str = "<video>",
        vision_aspect_ratio: str = "anyres_max_9", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            image_processor, tokenizer, None, num_image_tokens, vision_feature_select_strategy,
            chat_template, image_token, video_token, vision_aspect_ratio, **kwargs,
        )  # fmt: skip

    @property
    def video_processor(self) -> Frames:
        """Makes pixels of videos."""
        return Frames(self.image_processor)
