"""What a saved adapter needs besides its weights: a base that it fits, made as it was in training.

PiSSA (arXiv 2404.02948) takes the largest singular directions out of the base and trains those: W = W' + s B0 A0.
Its adapter fits W', which nobody has. So it is saved as the difference from its start, which fits W itself:
s (B A - B0 A0) = s [B, -B0] [A; A0], an ordinary adapter of twice the rank.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from forgebook.errors import CheckpointError

__all__ = [
    "OVERRIDES",
    "align_base",
    "changes_base",
    "double_rank",
    "fit_original_base",
    "read_overrides",
    "start_of",
]

# How the base was made for training, where it was not as its own config.json says.
OVERRIDES = "config_overrides.json"


def read_overrides(folder: str | Path) -> dict[str, Any]:
    """Read how an adapter's base was made: rope_scaling, quantization; empty where it was taken as it is."""
    path = Path(folder) / OVERRIDES
    return json.loads(path.read_text()) if path.exists() else {}


def changes_base(model) -> bool:
    """Say whether the model's adapter was begun by taking something out of its base."""
    config = model.peft_config["default"] if hasattr(model, "peft_config") else None
    return config is not None and str(config.init_lora_weights).startswith("pissa")


def start_of(model) -> dict[str, torch.Tensor]:
    """Copy the matrices of a fresh adapter, by name."""
    return {
        name: p.detach().to("cpu", copy=True)
        for name, p in model.named_parameters()
        if p.requires_grad and _axis(name) is not None
    }


@torch.no_grad()
def align_base(model, start: dict[str, torch.Tensor]) -> None:
    """Make the base what it was when `start` was taken out of it: another machine finds other directions.

    model: loaded anew, its adapter fresh. Where the directions are the same, nothing changes.
    """
    for name, layer in model.named_modules():
        if f"{name}.lora_A.default.weight" not in start:
            continue
        now = [layer.lora_B["default"].weight, layer.lora_A["default"].weight]
        then = [start[f"{name}.lora_{x}.default.weight"].to(now[0].device) for x in "BA"]
        if all(torch.equal(one, other) for one, other in zip(now, then, strict=True)):
            continue
        change = layer.scaling["default"] * (now[0].float() @ now[1].float() - then[0].float() @ then[1].float())
        weight = layer.get_base_layer().weight
        weight.copy_(weight.float() + (change.T if layer.fan_in_fan_out else change))


def fit_original_base(
    weights: dict[str, torch.Tensor], start: dict[str, torch.Tensor], trained: bool
) -> dict[str, torch.Tensor]:
    """Turn an adapter of a changed base into one of the original base; its settings: `double_rank`.

    Raises CheckpointError if it should be trained and is as it began.
    """
    if trained and all(torch.equal(weights[name], first) for name, first in start.items()):
        raise CheckpointError("the adapter is what it was at the start: it would change nothing")
    joined = dict(weights)
    for name, first in start.items():
        axis = _axis(name)
        joined[name] = torch.cat([weights[name], first if axis == 0 else -first], dim=axis)
    return joined


def double_rank(adapter_config: Path) -> None:
    """Write into an adapter_config.json what holds of the adapter that `fit_original_base` made."""
    settings = json.loads(adapter_config.read_text())
    # The scale is alpha / r, with rsLoRA alpha / sqrt(r); it stays.
    growth = math.sqrt(2) if settings["use_rslora"] else 2
    settings["r"] *= 2
    settings["lora_alpha"] *= growth
    settings["rank_pattern"] = {name: 2 * rank for name, rank in (settings["rank_pattern"] or {}).items()}
    settings["alpha_pattern"] = {name: growth * alpha for name, alpha in (settings["alpha_pattern"] or {}).items()}
    settings["init_lora_weights"] = True
    adapter_config.write_text(json.dumps(settings, indent=2, sort_keys=True))


def _axis(name: str) -> int | None:
    """Tell along which axis a matrix of the adapter has its rank; None for any other parameter."""
    if name.endswith((".lora_A.default.weight", ".lora_embedding_A.default")):
        return 0
    return 1 if name.endswith((".lora_B.default.weight", ".lora_embedding_B.default")) else None
