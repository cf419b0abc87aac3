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
# What configs call the layers of an expert: however many experts there are, these share a tensor in training.
EXPERT_LAYERS = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate_up_proj", "experts"}
# Tensors of all experts, by the names of the layers that PEFT translates into them.
EXPERT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"), "down_proj": ("down_proj", "w2")}
ROUTERS = {"gate", "router"}


@dataclass(frozen=True)
class Layers:
    """The modules of a model that a text passes through.

    names: whole names of all; linears: of those that an adapter can be added to, in order. parameters: last parts of
    parameters' names. is_expert: whether a name is that of an expert's layer, which PEFT translates. experts: whole
    names of tensors that hold the weights of all experts.
    """

    names: Sequence[str]
    linears: Sequence[str]
    parameters: Collection[str]
    is_expert: Callable[[str], bool]
    experts: Collection[str] = ()


def layers_of_shape(shape: Shape) -> Layers:
    """Name the modules of a model whose shape is known."""
    if shape.counted:
        names = list(shape.counted.modules)
        outside = [name for name, _, _ in shape.counted.others]
    else:
        decoder = shape.layers_name.rpartition(".")[0]
        names = [decoder, *(f"{decoder}.{name}" for name in ("embed_tokens", "layers", "norm")), "lm_head"]
        outside = ["lm_head"]
    linears: list[str] = []
    for kind in shape.kinds:
        for layer in kind.layers:
            own = f"{shape.layers_name}.{layer}"
            names += [own, *(f"{own}.{name}" for name in kind.modules)]
            linears += [f"{own}.{name}" for name, _, _ in kind.linears]
    experts = EXPERT_LAYERS | ROUTERS if shape.adapts_experts else set()
    tensors = [f"{shape.layers_name}.{kind.layers[0]}.{name}" for kind in shape.kinds for name, *_ in kind.experts]
    parameters = {name.rsplit(".", 1)[-1] for name in tensors}
    return Layers(names, [*linears, *outside], parameters, lambda name: name.rsplit(".", 1)[-1] in experts, tensors)


def unmatched_targets(lora_config: dict[str, Any], layers: Layers) -> list[str]:
    """List the names in target_modules, modules_to_save and layers_to_transform that no layer has, and what to name."""
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
            elif wanted.lower() == "all-linear" and not lora_config.get("target_parameters"):
                problems += _left_out(layers)
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


def left_out_of_all_linear(layers: Layers) -> list[str]:
    """List the linear layers that all-linear does not reach beside the experts whose names PEFT translates."""
    if not layers.is_expert("gate_proj") and not layers.is_expert("w1"):
        return []
    return [name for name in layers.linears if layers.is_expert(name)]


def _left_out(layers: Layers) -> list[str]:
    """List the weights that all-linear leaves frozen in a mixture of experts."""

    def short(names: Collection[str]) -> str:
        return ", ".join(dict.fromkeys(re.sub(r"^.*?\.\d+\.", "", name) for name in names))

    if layers.experts and not layers.is_expert("down_proj") and not layers.is_expert("w2"):
        return [
            f"lora_config.target_modules: all-linear leaves {short(layers.experts)} frozen, which hold the experts: "
            "name them in lora_config.target_parameters to train them, too"
        ]
    if frozen := left_out_of_all_linear(layers):
        return [
            f"lora_config.target_modules: all-linear leaves {short(frozen)} frozen: PEFT gives these names to the "
            "experts alone"
        ]
    return []


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
