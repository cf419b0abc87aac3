"""What the vision tower of a model takes in a run with images, counted on its class, which needs no weights.

shape = with_images(shape, source, config.vision_language_config, pixels)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from forgebook.catalog import Shape, read_catalog
from forgebook.errors import ModelError
from forgebook.layer_counts import ImageLoad
from forgebook.models.families import projector_modules, tower_modules
from forgebook.models.load import load_skeleton
from forgebook.models.tokenizer import is_here, locate

if TYPE_CHECKING:
    from torch import nn

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
    towers = tower_modules(model)
    layer = next((one for name in towers for one in _layer_lists(model.get_submodule(name), layers)), None)
    if hidden is None or layers is None or layer is None:
        raise ModelError(f"the size of the vision tower of {type(model).__name__} is not known")
    patch = _first(vision, "patch_size") or 14
    area = patch[0] * patch[1] if isinstance(patch, list | tuple) else patch**2
    whole = _size(model, towers)
    if not settings.freeze_vision_encoder:
        trained = whole
    else:
        trained = _size(model, projector_modules(model)) if settings.train_projector else 0
    kept, forward, backward = _numbers_per_patch(layer, hidden)
    values = area * (_first(vision, "num_channels", "in_channels") or 3) * (_first(vision, "temporal_patch_size") or 1)
    return replace(
        shape,
        images=ImageLoad(
            layers, hidden, kept, forward, backward, values, pixels / area, whole, trained,
            settings.freeze_vision_encoder,
        ),
    )  # fmt: skip


def _layer_lists(tower: nn.Module, layers: int) -> Iterator[nn.Module]:
    """Yield the first layer of each list of so many layers."""
    from torch import nn

    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            yield module[0]


def _numbers_per_patch(layer: nn.Module, hidden: int) -> tuple[int, int, int]:
    """Count what a layer keeps for its backward pass, holds at once without one, and what a backward pass adds.

    As autograd keeps them in transformers' encoders, with an attention kernel that keeps no matrix of length^2.
    """
    from torch import nn

    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    inner = max(module.in_features for module in linears)
    is_gated = sum(module.out_features == inner for module in linears) > 1 and inner != hidden
    is_fused = any(module.out_features == 3 * module.in_features for module in linears if module.out_features != inner)
    # A LayerNorm keeps its input; one in transformers' own code what it normalized, too. Its result enters products.
    own_norms = not any(isinstance(module, nn.LayerNorm) for module in layer.modules())
    norms = 2 * (3 if own_norms else 2) * hidden
    # Queries, keys and values; turned by their positions, they are copies, and one product's result stays for the
    # values. There, images of different sizes are computed one by one, and what attention returns is joined in a copy.
    attention = (3 + 1) * hidden + (2 + 1) * hidden * is_fused
    # What enters the activation and the product after it; gated: gate, its activation, up, and their product. CLIP's
    # activation is two operators.
    is_quick = any(type(module).__name__ == "QuickGELUActivation" for module in layer.modules())
    mlp = ((4 if is_gated else 2) + is_quick) * inner
    working = 2 * hidden + (3 if is_gated else 2) * inner  # with the layer's input and what its norm returns
    return norms + attention + mlp, max(working, 2 * hidden + attention), working


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _size(model: Any, names: list[str]) -> int:
    return sum(p.numel() for name in names for p in model.get_submodule(name).parameters())
