"""LoRA adapters: added, and saved so that they fit the public base model.

model = add_lora(model, config.lora_config)       a new adapter; only it trains

PiSSA (arXiv 2404.02948) takes the largest singular directions out of the base and trains those: W = W' + s B0 A0.
Its adapter fits W', which nobody else has. So it is saved as the difference from its start, which fits W itself:
s (B A - B0 A0) = s [B, -B0] [A; A0], an ordinary adapter of twice the rank.
"""

from __future__ import annotations

import functools
import json
import math
import re
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgebook.errors import CheckpointError, ModelError, first_line
from forgebook.models.families import tower_modules
from forgebook.models.lora_targets import ROUTERS, Layers, unmatched_targets
from forgebook.runs.atomic import read_json

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

__all__ = [
    "OVERRIDES",
    "add_lora",
    "align_base",
    "changes_base",
    "check_lora",
    "double_rank",
    "expert_tensors_of",
    "fit_original_base",
    "in_dtype_of_base",
    "layers_of",
    "needs_whole_base",
    "read_lora_config",
    "read_overrides",
    "start_of",
]

# Starts of an adapter that are computed without the weights of its base.
STARTS_WITHOUT_BASE = ("None", "True", "False", "gaussian", "orthogonal")
# How the base was loaded for training, where it differs from its own config.json.
OVERRIDES = "config_overrides.json"


def add_lora(model: PreTrainedModel, lora_config: dict[str, Any]):
    """Add a new LoRA adapter to a model; only the adapter trains. Raises ModelError if lora_config does not fit.

    It reaches no vision or audio tower: a text trains nothing there. Nor does all-linear reach routers.
    """
    from forgebook.models.checkpointing import drop_input_gradients
    from forgebook.models.expert_adapters import quiet_about_experts, use_low_rank_products
    from forgebook.models.fused_lora import use_fused_products
    from forgebook.models.peft_library import LoraConfig, get_peft_model, without_unused_bitsandbytes

    towers = tower_modules(model)
    _refuse_no_targets(model, lora_config)
    try:
        config = LoraConfig(**{"task_type": "CAUSAL_LM", **_without_routers(model, lora_config)})
        if towers:
            config.exclude_modules = _without(config.exclude_modules, towers)
        with quiet_about_experts(), without_unused_bitsandbytes():
            adapted = in_dtype_of_base(get_peft_model(model, config, autocast_adapter_dtype=False))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(f"lora_config does not fit this model: {first_line(error)}") from None
    drop_input_gradients(model)
    _refuse_tuples(adapted)
    use_low_rank_products(adapted)
    use_fused_products(adapted)
    return adapted


def _refuse_no_targets(model: PreTrainedModel, lora_config: dict[str, Any]) -> None:
    """Raise ModelError if no layers are named and PEFT names none for this architecture: it knows some forty."""
    from forgebook.models.peft_library import KNOWN_TARGETS

    named = lora_config.get("target_modules") or lora_config.get("target_parameters")
    if not named and model.config.model_type not in KNOWN_TARGETS:
        raise ModelError(
            f"lora_config names no target_modules, and PEFT has no default for {model.config.model_type}: add "
            "target_modules: all-linear"
        )


def _without_routers(model: PreTrainedModel, lora_config: dict[str, Any]) -> dict[str, Any]:
    """Spell out all-linear for a mixture of experts: a router that is adapted sends tokens to other experts."""
    if str(lora_config.get("target_modules")).lower() != "all-linear":
        return lora_config
    layers = layers_of(model)
    experts = _expert_names(model).keys()
    routers = {name for name in layers.linears if _is_router(model, name)}
    if not experts and not routers:
        return lora_config
    head = model.get_output_embeddings()
    linears = {name.rsplit(".", 1)[-1] for name in layers.linears if model.get_submodule(name) is not head}
    return lora_config | {"target_modules": sorted((linears | experts) - ROUTERS)}


def _is_router(model: PreTrainedModel, name: str) -> bool:
    text = model.config.get_text_config()
    experts = {getattr(text, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")}
    return name.rsplit(".", 1)[-1] in ROUTERS and getattr(model.get_submodule(name), "out_features", None) in experts


def _refuse_tuples(model) -> None:
    """Raise ModelError if an adapter is on a layer that returns more than its product, where PEFT fails when used."""
    import torch

    from forgebook.models.peft_library import LoraLayer

    for name, module in model.named_modules():
        base = module.get_base_layer() if isinstance(module, LoraLayer) else None
        is_own = type(base).__module__.startswith("transformers.models.")
        if isinstance(base, torch.nn.Linear) and is_own and type(base).forward is not torch.nn.Linear.forward:
            leaf = name.rsplit(".", 1)[-1]
            raise ModelError(
                f"lora_config: {leaf} computes more than a product in this model, and PEFT cannot adapt it: leave it "
                "out of target_modules"
            )


def check_lora(model: PreTrainedModel, lora_config: dict[str, Any]) -> list[str]:
    """Add an adapter to a model without weights; list warnings about settings that reach nothing in it.

    Raises ModelError if lora_config does not fit, or no layer gets an adapter.
    """
    unmatched = unmatched_targets(lora_config, layers_of(model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapted = add_lora(model, lora_config | {"init_lora_weights": False})  # there is nothing to start from
        except ModelError:
            if unmatched:
                raise ModelError("; ".join(unmatched)) from None
            raise
    keys = [key for key in ("exclude_modules", "target_parameters") if key in lora_config]
    ignored = dict.fromkeys(str(one.message) for one in caught if any(key in str(one.message) for key in keys))
    tuner = adapted.base_model
    reached = [*tuner.targeted_module_names, *tuner.targeted_parameter_names]
    for key in ("rank_pattern", "alpha_pattern"):
        # As PEFT matches them.
        patterns = [one for one in lora_config.get(key) or {} if not _matches_any(one, reached)]
        ignored |= dict.fromkeys(f"{key}: nothing that gets an adapter matches {one!r}" for one in patterns)
    return [*unmatched, *(f"lora_config: {text}" for text in ignored)]


def _matches_any(pattern: str, names: Sequence[str]) -> bool:
    return any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)


def layers_of(model: PreTrainedModel) -> Layers:
    """Name the modules of a model; those of a vision or audio tower do not count: no text passes through them."""
    towers = tuple(f"{name}." for name in tower_modules(model))
    names = [name for name, _ in model.named_modules() if name and not f"{name}.".startswith(towers)]
    linears = [name for name in names if _is_linear(model.get_submodule(name))]
    parameters = {name.rsplit(".", 1)[-1] for name, _ in model.named_parameters()}
    experts = [name for name in expert_tensors_of(model) if not name.startswith(towers)]
    return Layers(names, linears, parameters, functools.partial(_is_expert, model), experts)


def expert_tensors_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Find the tensors that hold the weights of all experts of a layer, by name."""
    from torch.nn.modules.conv import _ConvNd

    return {
        f"{holder_name}.{name}": p
        for holder_name, holder in module.named_modules()
        for name, p in holder.named_parameters(recurse=False)
        if p.dim() == 3 and not isinstance(holder, _ConvNd)
    }


def _is_linear(module: nn.Module) -> bool:
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | Conv1D)


def _is_expert(model: PreTrainedModel, name: str) -> bool:
    """Report whether PEFT translates a name of an expert's layer."""
    return name.rsplit(".", 1)[-1] in _expert_names(model)


def _expert_names(model: PreTrainedModel) -> dict[str, str]:
    """List the names of experts' layers that PEFT translates: transformers 5 holds all experts in one tensor."""
    from forgebook.models.peft_library import transformers_weight_conversion as peft_names

    kind = peft_names._MODEL_TO_CONVERSION_PATTERN.get(  # type: ignore[attr-defined]  # PEFT has no public name for it
        model.config.model_type
    )
    return peft_names._MOE_TARGET_MODULE_MAPPING.get(kind, {})


def _without(excluded: str | Collection[str] | None, towers: Sequence[str]) -> str:
    """Add towers to the pattern or names of modules that get no adapter; return a pattern over whole names."""
    inside = f"(?:{'|'.join(map(re.escape, towers))})(?:\\..*)?"
    if not excluded:
        return inside
    named = excluded if isinstance(excluded, str) else rf"(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(excluded)))})"
    return f"{named}|{inside}"


def in_dtype_of_base(model):
    """Cast the adapter to the base's dtype, which PEFT cannot see in packed weights; the optimizer keeps float32."""
    for p in model.parameters():
        if p.requires_grad and p.dtype != model.dtype:
            p.data = p.data.to(model.dtype)
    return model


def read_overrides(folder: str | Path) -> dict[str, Any]:
    """Read how an adapter's base was loaded for training (rope_scaling, quantization); empty if unchanged."""
    path = Path(folder) / OVERRIDES
    return read_json(path) if path.exists() else {}


def read_lora_config(folder: str | Path) -> dict[str, Any] | None:
    """Read the adapter_config.json of a checkpoint folder; None of a full model's folder or a hub id."""
    path = Path(folder) / "adapter_config.json"
    return read_json(path) if path.exists() else None


def trains_biases(folder: str | Path) -> bool:
    """Check whether a checkpoint's adapter holds biases, which replace its base's: no other model can share it."""
    return (read_lora_config(folder) or {}).get("bias", "none") != "none"


def needs_whole_base(settings: dict[str, Any], is_continued: bool = False) -> str | None:
    """Name the setting of an adapter that cannot be made of a part of each weight of its base; None if none is.

    settings: as in lora_config. is_continued: the adapter is loaded, not made.
    """
    start = settings.get("init_lora_weights")
    needs = {
        "use_dora": bool(settings.get("use_dora")),
        f"init_lora_weights: {start}": not is_continued and str(start) not in STARTS_WITHOUT_BASE,
        "modules_to_save": is_continued and bool(settings.get("modules_to_save")),
    }
    return next((name for name, is_needed in needs.items() if is_needed), None)


def changes_base(model) -> bool:
    """Check whether the model's adapter was initialized by taking directions out of its base (PiSSA)."""
    config = model.peft_config["default"] if hasattr(model, "peft_config") else None
    return config is not None and str(config.init_lora_weights).startswith("pissa")


def start_of(model) -> dict[str, torch.Tensor]:
    """Copy the matrices of a fresh adapter, by name."""
    return {
        name: p.detach().to("cpu", copy=True)
        for name, p in model.named_parameters()
        if p.requires_grad and _axis(name) is not None
    }


def align_base(model, start: dict[str, torch.Tensor]) -> None:
    """Make the base what it was when `start` was taken out of it: another machine computes other directions.

    model: freshly loaded, with a fresh adapter. Where the directions are the same, nothing changes.
    """
    import torch

    with torch.no_grad():
        for name, layer in model.named_modules():
            if f"{name}.lora_A.default.weight" not in start:
                continue
            b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            start_b, start_a = (start[f"{name}.lora_{x}.default.weight"].to(b.device) for x in "BA")
            if torch.equal(b, start_b) and torch.equal(a, start_a):
                continue
            change = layer.scaling["default"] * (b.float() @ a.float() - start_b.float() @ start_a.float())
            weight = layer.get_base_layer().weight
            weight.copy_(weight.float() + (change.T if layer.fan_in_fan_out else change))


def fit_original_base(
    weights: dict[str, torch.Tensor], start: dict[str, torch.Tensor], trained: bool
) -> dict[str, torch.Tensor]:
    """Turn an adapter of a changed base into one of the original base, of twice the rank (see `double_rank`).

    trained: raise CheckpointError if the adapter equals its start.
    """
    import torch

    if trained and all(torch.equal(weights[name], first) for name, first in start.items()):
        raise CheckpointError("the adapter equals its start: it would change nothing")
    joined = dict(weights)
    for name, first in start.items():
        axis = _axis(name)
        joined[name] = torch.cat([weights[name], first if axis == 0 else -first], dim=axis)
    return joined


def double_rank(adapter_config: Path) -> None:
    """Update an adapter_config.json to the adapter that `fit_original_base` returns."""
    settings = read_json(adapter_config)
    # The scale must stay: it is alpha / r, with rsLoRA alpha / sqrt(r).
    growth = math.sqrt(2) if settings["use_rslora"] else 2
    settings["r"] *= 2
    settings["lora_alpha"] *= growth
    settings["rank_pattern"] = {name: 2 * rank for name, rank in (settings["rank_pattern"] or {}).items()}
    settings["alpha_pattern"] = {name: growth * alpha for name, alpha in (settings["alpha_pattern"] or {}).items()}
    settings["init_lora_weights"] = True
    adapter_config.write_text(json.dumps(settings, indent=2, sort_keys=True))


def _axis(name: str) -> int | None:
    """Return the axis along which a matrix of the adapter has its rank; None for any other parameter."""
    if name.endswith((".lora_A.default.weight", ".lora_embedding_A.default")):
        return 0
    return 1 if name.endswith((".lora_B.default.weight", ".lora_embedding_B.default")) else None
