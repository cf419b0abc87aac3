"""Gradient checkpointing that keeps the results of matrix products and attention, and recomputes what is cheap.

The products of experts are recomputed as well.

model.activation_checkpointing_enable(checkpointing_settings("selective"))     or True: recompute all
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

__all__ = ["checkpointing_settings"]

# Operators whose results are kept: products, and fused attention. Not bmm: attention without a fused kernel would keep
# matrices of length^2. Nor the grouped products of experts, to which some models add their biases in place.
PRODUCTS = {"aten::mm", "aten::addmm", "forgebook::lora_product"}
ATTENTION = ("attention", "_varlen_attn", "flash_attn")
# A product over so few numbers is as cheap to compute again: the second of an adapter, whose result is large.
FEW = 256


def checkpointing_settings(kind: bool | str) -> dict[str, Any]:
    """Return the arguments of torch's checkpoint: "selective" keeps the products, True keeps nothing."""
    # Reentrant checkpointing loses the gradients of LoRA when the inputs themselves need none.
    settings: dict[str, Any] = {"use_reentrant": False}
    return settings | ({"context_fn": _contexts} if kind == "selective" else {})


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name().partition(".")[0]
    if name in PRODUCTS:
        summed = args[-1].shape[0] if name in ("aten::mm", "aten::addmm") and torch.is_tensor(args[-1]) else FEW + 1
        return CheckpointPolicy.MUST_SAVE if summed > FEW else CheckpointPolicy.PREFER_RECOMPUTE
    is_attention = any(part in name for part in ATTENTION)
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE
