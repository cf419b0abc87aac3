"""What the vision tower of a model takes in a run with images, counted on its class, which needs no weights.

shape = with_images(shape, source, config.vision_language_config, pixels)
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from forgebook.catalog import Shape, read_catalog
from forgebook.errors import ModelError
from forgebook.layer_counts import ImageLoad
from forgebook.models.families import projector_modules, tower_modules
from forgebook.models.load import load_skeleton
from forgebook.models.tokenizer import is_here, locate

if TYPE_CHECKING:
    from forgebook.config.schema import FinetuneConfig

__all__ = ["with_images"]


def with_images(shape: Shape, config: FinetuneConfig, pixels: float) -> Shape:
    """Add to the shape of a config's model what its images take; the shape as it is for another task.

    pixels: per token of an example, as the processor resizes images. A known shape stays as it is where the model's
    config is not on this machine, for a plan asks no hub. Raises ModelError for another model that cannot be read.
    """
    settings = config.vision_language_config
    if settings is None:
        return shape
    if config.model_id.lower() in read_catalog().shapes and not is_here(config.model_id):
        return shape
    model = load_skeleton(locate(config.model_id))
    vision = getattr(model.config, "vision_config", None)
    hidden = _first(vision, "hidden_size", "embed_dim")
    layers = _first(vision, "num_hidden_layers", "depth", "num_layers")
    if hidden is None or layers is None:
        raise ModelError(f"the size of the vision tower of {type(model).__name__} is not known")
    patch = _first(vision, "patch_size") or 14
    whole = _size(model, tower_modules(model))
    if not settings.freeze_vision_encoder:
        trained = whole
    else:
        trained = _size(model, projector_modules(model)) if settings.train_projector else 0
    inner = _first(vision, "intermediate_size") or 4 * hidden
    patches = pixels / (patch[0] * patch[1] if isinstance(patch, list | tuple) else patch**2)
    load = ImageLoad(layers, hidden, inner, patches, whole, trained, settings.freeze_vision_encoder)
    return replace(shape, images=load)


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _size(model: Any, names: list[str]) -> int:
    return sum(p.numel() for name in names for p in model.get_submodule(name).parameters())
