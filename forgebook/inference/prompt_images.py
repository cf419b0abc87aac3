"""Prompts with images: encoded as in training, with what the model's forward pass takes beside their tokens.

images = PromptImages(base, tokenizer, "float32")                   loads the model's processor with the first image
prompt = encode_prompt(messages, tokenizer, images, store)          EncodedPrompt(input_ids, images)
model(input_ids, **images.inputs([prompt.images], input_ids))
"""

from __future__ import annotations

import copy
import functools
import shutil
import tempfile
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgebook.data import masking
from forgebook.data.image_batches import Pixels, StoredImage
from forgebook.data.image_parts import TASK, image_count, place_images
from forgebook.data.image_tokens import ImageTokens, check_images
from forgebook.data.messages import Message, read_messages
from forgebook.errors import DataError
from forgebook.models.processor import load_processor, reads_images

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from forgebook.config.blocks import PromptFormat

__all__ = ["EncodedPrompt", "PromptImages", "TemporaryStore", "encode_prompt", "read_conversation"]


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt's token ids, and its images with where their bytes are."""

    input_ids: list[int]
    images: tuple[StoredImage, ...] = ()


class TemporaryStore:
    """A folder for images, which is deleted with the last reference to this."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="forgebook-images-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def read_conversation(messages: list[Message], base: str | None = ".") -> list[Message]:
    """Read the content lists of messages, as those of a training example; without one, messages stay as they are.

    base: the folder that relative paths of images begin at. Raises DataError.
    """
    if not any(isinstance(message.get("content"), list) for message in messages):
        return messages
    read = read_messages(messages, "messages", set())
    place_images({}, read, TASK, base and str(Path(base).resolve()))
    return read


def encode_prompt(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    images: PromptImages | None,
    store: Path | None,
    prompt_format: PromptFormat | None = None,
    tools: list[dict] | None = None,
) -> EncodedPrompt:
    """Encode the conversation so far, up to where the assistant's answer begins.

    images: of the model. store: where images that are no local files are kept; it must outlive the answer.

    Raises DataError for an image that cannot be read, and for any image if the model reads text alone.
    """
    if not image_count(messages):
        return EncodedPrompt(masking.encode_prompt(messages, tokenizer, prompt_format, tools))
    if images is None or store is None:
        raise DataError("an image, and the model was loaded without its image processor: use load_together")
    return images.encode(messages, store, prompt_format, tools)


class PromptImages:
    """What one model makes of images. source: its base model; dtype: of its weights."""

    def __init__(self, source: str, tokenizer: PreTrainedTokenizerBase, dtype: str):
        self._source, self._tokenizer, self._dtype = source, tokenizer, dtype
        self._lock = threading.RLock()  # a server encodes prompts in several threads

    def encode(
        self,
        messages: list[Message],
        store: Path,
        prompt_format: PromptFormat | None = None,
        tools: list[dict] | None = None,
    ) -> EncodedPrompt:
        """Encode a conversation with images; see `encode_prompt`."""
        checked = check_images(messages, store)
        with self._lock:
            encoded = masking.encode_image_prompt(checked, self._tokenizer, self._tokens, prompt_format, tools)
        return EncodedPrompt(encoded.input_ids, tuple((one, store) for one in encoded.images))

    def inputs(self, images: Sequence[Sequence[StoredImage]], input_ids: Any) -> dict[str, Any]:
        """Return the tensors of a batch's images. images: of each line; input_ids: [lines, length], on the CPU."""
        return self._pixels.inputs(images, input_ids)

    # Two processors with tokenizers of their own: a call changes how its tokenizer pads, and prompts are encoded while
    # others are answered.

    @functools.cached_property
    def _tokens(self) -> ImageTokens:
        return ImageTokens(self._load())

    @functools.cached_property
    def _pixels(self) -> Pixels:
        return Pixels(self._load(), self._dtype)

    def _load(self) -> Any:
        with self._lock:
            if not reads_images(self._source):
                raise DataError(f"an image, and {self._source} reads text alone: leave it out, or use another model")
            return load_processor(self._source, copy.deepcopy(self._tokenizer))
