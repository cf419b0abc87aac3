"""The pixels of a batch: its images opened, and processed in one call, as the model's processor batches them.

pixels = Pixels(processor, "bfloat16")
batch |= pixels.inputs(images, batch["input_ids"])     pixel_values and what else the model's forward pass takes

Every batch has an image, so that the workers that share a model's weights run the same layers: one without gets
a line with a blank image, and nothing of that line is in the loss.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from forgebook.data.image_tokens import PlacedImage
from forgebook.data.images import open_image
from forgebook.errors import TrainingError

__all__ = ["MOST_AHEAD", "Pixels", "StoredImage"]

StoredImage = tuple[PlacedImage, Path]
BLANK = (64, 64)
MOST_AHEAD = 4  # batches of pixels that wait for their step, at most
MASK = "pixel_attention_mask"  # SmolVLM's: of 8 bytes per pixel as its processor returns it, which any kind will do for
TYPES = ("mm_token_type_ids", "token_type_ids")  # of the positions, by which some models know images


class Pixels:
    """What a model's forward pass takes beside token ids, for several threads. dtype: of its weights."""

    def __init__(self, processor: Any, dtype: str):
        self.processor, self.dtype = processor, dtype
        self._own = threading.local()  # a call changes how the processor's tokenizer pads
        text = processor(images=[[self._blank()]], text=[processor.image_token])["input_ids"][0]
        self.blank_ids = np.asarray(text, np.int64)

    def _blank(self) -> Any:
        from PIL import Image as pillow

        return pillow.new("RGB", BLANK, "white")

    def inputs(self, images: Sequence[Sequence[StoredImage]], input_ids: Any) -> dict[str, Any]:
        """Return the tensors of a batch's images.

        images: of each line; none at all if the last line is of the blank image. input_ids: [lines, length].

        Raises TrainingError for an image that is not what it was when its example was tokenized.
        """
        import torch

        opened = [[open_image(one.file, store) for one, store in line] for line in images if line]
        opened = opened or [[self._blank()]]
        if not hasattr(self._own, "processor"):
            self._own.processor = copy.deepcopy(self.processor)
        processor, token = self._own.processor, self.processor.image_token
        outputs = processor(
            images=opened, text=[token * len(line) for line in opened], padding=True, return_tensors="pt"
        )
        ids = torch.tensor(processor.image_token_ids)
        if torch.isin(outputs["input_ids"], ids).sum() != torch.isin(input_ids, ids).sum():
            raise TrainingError("the images of a batch take another number of tokens than when it was tokenized")
        dtype = getattr(torch, self.dtype)
        inputs = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in outputs.items()
            if name not in ("input_ids", "attention_mask", *TYPES)
        }
        if MASK in inputs:
            inputs[MASK] = inputs[MASK].bool()
        if name := next((name for name in TYPES if name in outputs), None):
            inputs[name] = torch.tensor(processor.create_mm_token_type_ids(input_ids.tolist()))
        return inputs
