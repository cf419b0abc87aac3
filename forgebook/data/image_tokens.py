"""The tokens that stand for images: how many the processor puts where the template writes one, and where they are.

tokens = ImageTokens(processor, store)
messages = tokens.checked(messages)          every image opened and decoded once
rendered = tokens.expanded(rendered, files)  a text with all tokens of its images

How many tokens an image takes, and which, is read off the processor for each combination of sizes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgebook.data.images import IMAGES, Image, ImageFile, check_image
from forgebook.errors import DataError, first_line

if TYPE_CHECKING:
    from forgebook.data.chat_template import RenderedText
    from forgebook.data.messages import Message

__all__ = ["ImageTokens", "PlacedImage", "Resized", "check_images", "files_of"]

Sizes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PlacedImage:
    """An image of an encoded example. start, stop: its tokens, those around it that its processor adds included."""

    file: ImageFile
    start: int
    stop: int


@dataclass(frozen=True)
class Resized:
    """What a processor makes of an image: so many parts of this size, in pixels."""

    parts: int
    width: int
    height: int

    @property
    def pixels(self) -> int:
        """Count the pixels of all parts."""
        return self.parts * self.width * self.height

    def __str__(self) -> str:
        return (f"{self.parts} of " if self.parts > 1 else "") + f"{self.width} x {self.height}"


class ImageTokens:
    """What a processor makes of images, for examples that are encoded. store: where `check_image` keeps them."""

    def __init__(self, processor: Any, store: Path | None = None):
        self.processor, self.store = processor, store
        self._texts = functools.lru_cache(maxsize=4096)(self._processed)
        self._sizes = functools.lru_cache(maxsize=4096)(self._resized)

    def __reduce__(self) -> tuple[type[ImageTokens], tuple[Any, Path | None]]:
        """Copy and send it without what it remembers."""
        return ImageTokens, (self.processor, self.store)

    @property
    def key(self) -> str:
        """Hash what the tokens of an image depend on."""
        own = {name: value for name, value in vars(self.processor).items() if isinstance(value, str | int | float)}
        parts = [type(self.processor).__name__, self.processor.image_processor.to_json_string(), json.dumps(own)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def checked(self, messages: list[Message]) -> list[Message]:
        """Open the images of messages; see `check_images`."""
        return check_images(messages, self.store)

    def expanded(self, rendered: RenderedText, files: list[ImageFile]) -> RenderedText:
        """Write all tokens of a text's images in the place of the one that the template writes for each.

        files: of the whole conversation, of which the text may be a beginning. Raises DataError if the template does
        not show them all, or the processor rejects one.
        """
        token = self.processor.image_token
        pieces = rendered.text.split(token)
        count = len(pieces) - 1
        if count > len(files) or (count < len(files) and not rendered.is_beginning):
            raise DataError(f"the chat template writes {token} {count} times for {len(files)} images")
        if not count:
            return rendered
        texts = self._texts(tuple((file.width, file.height) for file in files[:count]))
        ends, images, place, text = [], [], 0, pieces[0]
        for before, after, piece in zip(pieces, texts, pieces[1:], strict=False):
            place += len(before) + len(token)
            images.append((len(text), len(text) + len(after)))
            text += after + piece
            ends.append((place, len(after) - len(token)))

        def moved(character: int) -> int:
            return character + sum(growth for end, growth in ends if end <= character)

        spans = [(moved(start), moved(end)) for start, end in rendered.spans]
        return dataclasses.replace(rendered, text=text, spans=spans, images=images)

    def token_counts(self, files: list[ImageFile]) -> list[int]:
        """Count the tokens of each of an example's images."""
        texts = self._texts(tuple((file.width, file.height) for file in files)) if files else []
        return [len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]

    def resized(self, file: ImageFile) -> Resized:
        """Return what the processor makes of an image."""
        return self._sizes(file.width, file.height)

    def _resized(self, width: int, height: int) -> Resized:
        from PIL import Image as pillow

        picture = pillow.new("RGB", (width, height))
        outputs = self.processor(images=[[picture]], text=[self.processor.image_token], return_tensors="pt")
        shape = outputs["pixel_values"].shape
        if "image_grid_thw" in outputs:  # patches in one dimension
            patch = self.processor.image_processor.patch_size
            _, rows, columns = outputs["image_grid_thw"][0].tolist()
            return Resized(1, columns * patch, rows * patch)
        return Resized(shape[:-3].numel(), shape[-1], shape[-2])

    def _processed(self, sizes: Sizes) -> list[str]:
        """Return what the processor writes for each of an example's images, by their (width, height)."""
        from PIL import Image as pillow

        token = self.processor.image_token
        try:
            outputs = self.processor(
                images=[[pillow.new("RGB", size) for size in sizes]],
                text=[token * len(sizes)],
                return_text_replacement_offsets=True,
            )
            return [one["replacement"] for one in outputs["text_replacement_offsets"][0]]
        except Exception as error:  # a processor raises whatever its arithmetic does
            listed = ", ".join(f"{width} x {height}" for width, height in sizes)
            raise DataError(f"the model's processor rejects images of {listed} pixels: {first_line(error)}") from None


def check_images(messages: list[Message], store: Path | None) -> list[Message]:
    """Open those images of messages that are not checked yet; `store` keeps those that are no local files.

    Raises DataError with the number of the message and of its image.
    """
    checked = []
    for k, message in enumerate(messages):
        images, files = message.get(IMAGES) or (), []
        for number, image in enumerate(images, 1):
            try:
                files.append(check_image(image, store) if isinstance(image, Image) else image)
            except DataError as error:
                of = f"image {number} of {len(images)}" if len(images) > 1 else "image"
                raise DataError(f"messages[{k}]: {of}: {error}") from None
        checked.append(message | {IMAGES: files} if files else message)
    return checked


def files_of(messages: list[Message]) -> list[ImageFile]:
    """List the checked images of messages in order."""
    return list(itertools.chain.from_iterable(message.get(IMAGES) or () for message in messages))
