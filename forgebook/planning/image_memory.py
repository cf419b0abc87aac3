"""Bytes of activations in a vision tower, which are there before those of the text, or as long as they.

saved, working, layer = with_tower(activations of the text, run)
bytes = at_tower(run)               when the backward pass has come to it

How much a layer keeps is counted on the model's class (models/image_load.py). Of frozen weights nothing is kept: no
input of theirs requires a gradient (models/checkpointing.py: drop_input_gradients).
"""

from __future__ import annotations

from typing import Any

__all__ = ["at_tower", "with_tower"]

# Batches of pixels in the device's memory: of this step and the next; of a CPU also one that is being made.
BATCHES, BATCHES_ON_CPU = 2, 3


def with_tower(activations: tuple[int, int, int], run: Any) -> tuple[int, int, int]:
    """Add a vision tower's bytes to those of the text: saved, allocated by the backward pass, and of one layer.

    run: what `memory.memory_of` counts.
    """
    saved, working, layer = activations
    load = run.shape.images
    if load is None:
        return activations
    patches = load.patches * run.tokens * run.width
    kept, one = _kept(run)
    # Before there is anything of the text. Some towers copy the pixels; embeddings of patches begin with them, too.
    forward = patches * (_pixels(run) + max(load.forward + load.pixels, 2 * load.pixels + 2 * load.hidden))
    return max(saved + kept, int(forward)), working, layer if load.is_frozen else max(layer, one)


def at_tower(run: Any) -> int:
    """Count the bytes when the backward pass comes to a tower that trains: the text's gradients are there by then."""
    load = run.shape.images
    if load is None or load.is_frozen:
        return 0
    kept, one = _kept(run)
    return (run.trained - load.trained) * run.width + kept + one


def _pixels(run: Any) -> int:
    """Count the numbers of pixels that are there all the time, per patch of a batch."""
    return run.shape.images.pixels * (BATCHES if run.on_gpu else BATCHES_ON_CPU)


def _kept(run: Any) -> tuple[int, int]:
    """Count the bytes that a tower keeps for the backward pass, and those that this adds for one layer."""
    load = run.shape.images
    patches = load.patches * run.tokens * run.width
    # What enters the last norm, and the projector.
    ends = 2 * load.hidden if load.trained else 0
    if load.is_frozen:
        return int(patches * (_pixels(run) + ends)), 0
    if run.config.gradient_checkpointing:  # layers are recomputed one at a time
        each, again = load.hidden, load.kept + load.backward
    else:
        each, again = load.kept, load.backward
    return int(patches * (_pixels(run) + ends + load.layers * each)), int(patches * again)
