"""What an MLP takes of a layer's activations, which `tiled_mlp` holds of one tile at a time.

saved, working = mlp_bytes(lora_config, shape, kind, width, is_fused)        bytes per token
"""

from __future__ import annotations

from typing import Any

from forgebook.catalog import Shape
from forgebook.layer_counts import MLP_NAMES, LayerKind
from forgebook.planning.trainable import adapted_layers

__all__ = ["mlp_bytes"]


def mlp_bytes(
    lora_config: dict[str, Any] | None, shape: Shape, kind: LayerKind, width: int, is_fused: bool
) -> tuple[int, int]:
    """Count the bytes per token that the MLP of one layer saves, without its input, and that its backward pass adds.

    width: bytes of a number. is_fused: Liger's kernels run, which recompute the gate and write over what was saved.
    """
    inner = shape.inner
    if shape.counted:
        products = [(inputs, outputs) for name, inputs, outputs in kind.linears if _is_in_mlp(name)]
        saved = width * sum(outputs + inputs * (inputs != shape.hidden) for inputs, outputs in products)
    else:
        saved = (2 if is_fused else 3) * width * inner  # gate, its activation, up
    adapted = [] if lora_config is None else adapted_layers(lora_config, shape)
    if lora_config is None or any(_is_in_mlp(name) and inputs == inner for name, _, inputs, _ in adapted):
        saved += width * inner  # what enters the last product
    return saved, (1 if is_fused else 3) * width * inner


def _is_in_mlp(name: str) -> bool:
    return any(part in MLP_NAMES for part in name.split("."))
