"""The tokens of an example's images before anything is tokenized, by their sizes alone.

count, how = image_counter(config)      None for a task without images
tokens, pixels = count(example)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from forgebook.data.images import IMAGES, Image, ImageFile, image_size
from forgebook.data.row_formats import Example
from forgebook.errors import DataError

if TYPE_CHECKING:
    from forgebook.config.schema import FinetuneConfig

__all__ = ["image_counter"]


# Of an image where the model's processor is not on this machine: about what Gemma 3 and Qwen-VL take for a small photo.
ASSUMED_TOKENS = 256


def image_counter(config: FinetuneConfig) -> tuple[Callable[[Example], tuple[int, int]], str] | None:
    """Make a function from an example to the tokens of its images and their pixels as the processor resizes them.

    Also describes how it counts, where it assumes. An image that cannot be read counts nothing: `prepare` names it.
    """
    if config.vision_language_config is None:
        return None
    from forgebook.data.image_tokens import ImageTokens
    from forgebook.models.processor import processor_of
    from forgebook.models.tokenizer import is_here, tokenizer_of

    def images_of(example: Example) -> list[Image]:
        return [image for message in example.messages or () for image in message.get(IMAGES) or ()]

    if not is_here(config.model_id):
        return lambda example: (ASSUMED_TOKENS * len(images_of(example)), 0), f", {ASSUMED_TOKENS} tokens per image"

    images = ImageTokens(processor_of(config, tokenizer_of(config)))

    def count(example: Example) -> tuple[int, int]:
        try:
            files = [ImageFile("", "", *image_size(image)) for image in images_of(example)]
            return sum(images.token_counts(files)), sum(images.resized(file).pixels for file in files)
        except DataError:
            return 0, 0

    return count, ""
