"""Bytes of activations in a vision tower, which are there before those of the text, or as long as they.

saved, working, layer = with_tower(activations of the text, run)
"""

from __future__ import annotations

from typing import Any

from forgebook.layer_counts import ImageLoad

__all__ = ["with_tower"]

# Numbers per patch that a layer keeps for its backward pass, in multiples of its width: the inputs of both norms and
# what they return, queries, keys and values, the output of attention, which is what the product after it needs; a part
# is freed before the peak. The MLP keeps its product and the activation of it. Measured on a CPU: SmolVLM's tower.
SAVED_OF_HIDDEN, SAVED_OF_INNER = 7, 2
# Without a backward pass: the input of an MLP, and that of its norm.
FORWARD_OF_HIDDEN = 2
CHANNELS, PATCH = 3, 14


def with_tower(activations: tuple[int, int, int], run: Any) -> tuple[int, int, int]:
    """Add a vision tower's bytes to those of the text: saved, allocated by the backward pass, and of one layer.

    run: what `memory.memory_of` counts.
    """
    saved, working, layer = activations
    if run.shape.images is None:
        return activations
    kept, forward = _tower_bytes(run.shape.images, run.tokens, run.width, bool(run.config.gradient_checkpointing))
    return max(saved + kept, forward), working, layer


def _tower_bytes(load: ImageLoad, tokens: int, width: int, is_recomputed: bool) -> tuple[int, int]:
    """Count the bytes that a tower saves for the backward pass, and those that its forward pass holds at once.

    tokens: of a micro batch. width: bytes of a number. is_recomputed: whether layers are, in the backward pass.
    """
    patches = load.patches * tokens
    layer = patches * width * (SAVED_OF_HIDDEN * load.hidden + SAVED_OF_INNER * load.inner)
    pixels = patches * width * CHANNELS * PATCH**2
    if load.is_frozen:  # what enters the projector stays if that trains
        moment = patches * width * (FORWARD_OF_HIDDEN * load.hidden + SAVED_OF_INNER * load.inner)
        kept = 2 * patches * width * load.hidden if load.trained else 0
        return int(pixels + kept), int(pixels + moment)
    if is_recomputed:
        return int(pixels + load.layers * patches * width * load.hidden), int(pixels + layer)
    return int(pixels + load.layers * layer), int(pixels + layer)
