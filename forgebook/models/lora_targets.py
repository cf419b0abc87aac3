"""Names in a `lora_config` that no layer of the model has, and what to name instead.

problems = unmatched_targets(lora_config, layers_of_shape(shape))     before the run, without torch
problems = unmatched_targets(lora_config, Layers(names, ...))          of a real model (adapters.py)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from forgebook.catalog import Shape

__all__ = ["EXPERT_LAYERS", "Layers", "layers_of_shape", "unmatched_targets"]

# Names that Llama's family gives to layers, and what other families call a layer that holds them together.
FUSED = (
    (("q_proj", "k_proj", "v_proj"), ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "qkv")),
    (("gate_proj", "up_proj", "w1", "w3"), ("gate_up_proj",)),
)
# Beside the linear layers of one decoder layer, for the families that the catalog counts.
NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
)  # fmt: skip
# What configs call the layers of an expert: however many experts there are, these share a tensor in training.
EXPERT_LAYERS = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate_up_proj", "experts"}
ROUTERS = {"gate", "router"}


@dataclass(frozen=True)
class Layers:
    """The modules of a model that a text passes through.

    names: whole names of all; linears: of those that an adapter can be added to, in order. parameters: last parts of
    parameters' names. is_expert: whether a name is that of an expert's layer, which PEFT translates.
    """

    names: Sequence[str]
    linears: Sequence[str]
    parameters: Collection[str]
    is_expert: Callable[[str], bool]


def layers_of_shape(shape: Shape) -> Layers:
    """Name the modules of a model whose shape the catalog or a config.json states."""
    decoder = "model.language_model" if shape.towers else "model"
    names = [decoder, f"{decoder}.embed_tokens", f"{decoder}.layers", f"{decoder}.norm", "lm_head"]
    linears = []
    for layer in range(shape.layers):
        own = f"{decoder}.layers.{layer}"
        linears += [
            f"{own}.{'self_attn' if linear.holder == 'attention' else 'mlp'}.{name}"
            for name, linear in shape.linears.items()
        ]
        names += [own, f"{own}.self_attn", f"{own}.mlp", *(f"{own}.{norm}" for norm in NORMS)]
        names += [f"{own}.self_attn.{norm}" for norm in ("q_norm", "k_norm") if shape.family.qk_norm]
    experts = EXPERT_LAYERS | ROUTERS if shape.experts > 1 else set()
    return Layers([*names, *linears], [*linears, "lm_head"], (), lambda name: name.rsplit(".", 1)[-1] in experts)


def unmatched_targets(lora_config: dict[str, Any], layers: Layers) -> list[str]:
    """Say which names of target_modules, modules_to_save and layers_to_transform no layer has, and what to name."""
    linears = {name.rsplit(".", 1)[-1] for name in layers.linears}
    listed = f"its linear layers are {', '.join(sorted(linears))}"
    problems = []
    for key in ("target_modules", "modules_to_save"):
        wanted = lora_config.get(key) or []
        if isinstance(wanted, str):
            if wanted.lower() != "all-linear" and not any(re.fullmatch(wanted, name) for name in layers.names):
                example = f"such as {layers.linears[0]} and matches none"
                text = f"lora_config.{key}: {wanted} is a pattern over whole names {example}"
                problems.append(f"{text}; a list takes names of layers: {listed}")
            continue
        unknown = [one for one in wanted if not any(f".{name}".endswith(f".{one}") for name in layers.names)]
        unknown = [one for one in unknown if not layers.is_expert(one)]
        if unknown:
            text = f"lora_config.{key}: no layer that a text passes through is named {', '.join(unknown)}"
            fixes = _fused(unknown, linears, layers.parameters)
            problems.append("; ".join([text, *(fixes or [listed])]))
    numbers = lora_config.get("layers_to_transform")
    for layer in [numbers] if isinstance(numbers, int) else numbers or []:
        if not any(f".{layer}." in name for name in layers.names):
            problems.append(f"lora_config.layers_to_transform: there is no layer {layer}; the first one is 0")
    return problems


def _fused(unknown: Sequence[str], linears: Collection[str], parameters: Collection[str]) -> list[str]:
    """Name the fused layers that hold those which were named."""
    fixes = []
    for parts, wholes in FUSED:
        fused, whole = set(parts) & set(unknown), next((one for one in wholes if one in {*linears, *parameters}), None)
        if fused and whole:
            verb = "are" if len(fused) > 1 else "is"
            place = "" if whole in linears else " in target_parameters"
            fixes.append(f"{', '.join(sorted(fused))} {verb} fused into {whole}: name that instead{place}")
    return fixes
