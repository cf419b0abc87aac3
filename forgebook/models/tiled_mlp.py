"""MLPs computed tile by tile, for contexts whose inner activations would not fit.

tile_mlps(model)        those of its decoder's layers, in place

An MLP sees one token at a time, so the tokens of a batch can pass through it in tiles, each of as many as the model is
wide. Of a tile its input alone is kept; the rest is computed again in its backward pass. As the tiled MLP of ALST
(arXiv 2506.13996), by torch's own checkpointing, which FSDP2 and DDP understand.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from forgebook.errors import ModelError
from forgebook.layer_counts import MLP_NAMES

__all__ = ["tile_mlps"]


def tile_mlps(model: Any) -> None:
    """Let the MLPs of a causal language model, plain or inside a PeftModel, take their tokens tile by tile.

    Raises ModelError for a model whose MLPs route tokens to experts, or that has none under a known name.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    # Not those of a vision tower, which sees patches.
    mlps = [module for name, module in causal.get_decoder().named_modules() if name.rpartition(".")[2] in MLP_NAMES]
    tiled = [mlp for mlp in mlps if _takes_hidden_alone(mlp)]
    if any("expert" in name for mlp in mlps for name, _ in mlp.named_modules()):
        raise ModelError("tiled_mlp is for dense MLPs, and those of this model route tokens to experts: remove it")
    if not tiled:
        raise ModelError("tiled_mlp finds no MLP in the layers of this model: remove it")
    for mlp in tiled:
        mlp.forward = functools.partial(_tile_by_tile, mlp.forward)


def _takes_hidden_alone(mlp: nn.Module) -> bool:
    return len(inspect.signature(mlp.forward).parameters) == 1


def _tile_by_tile(forward: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Compute `forward` of [..., width] in tiles of `width` tokens."""
    width = hidden.shape[-1]
    tokens = hidden.reshape(-1, width)
    if len(tokens) <= width:
        return forward(hidden)
    results = [checkpoint(forward, tile, use_reentrant=False) for tile in tokens.split(width)]
    return torch.cat(results).view(hidden.shape)
