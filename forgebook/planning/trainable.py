"""Which parameters train: all, or those of the adapter, counted from the shape of the model alone.

count = trainable_parameters(lora_config, shape)      what PEFT counts on the model itself
"""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Any

from forgebook.config.blocks import labels_of
from forgebook.models.lora_targets import EXPERT_LAYERS, EXPERT_PARTS, ROUTERS

if TYPE_CHECKING:
    from forgebook.catalog import Shape
    from forgebook.config.schema import FinetuneConfig

__all__ = ["adapted_layers", "trainable_parameters", "trained_parameters", "trains_label_rows", "with_label_rows"]


def trainable_parameters(lora: dict[str, Any] | None, shape: Shape, labels: int = 0) -> int:
    """Count the trainable parameters: all that a text passes through, or those of the adapter.

    lora: `lora_config`, None for full fine-tuning. labels: how many tokens a classifier learns.
    """
    if lora is None:
        return shape.text_parameters
    count = sum(_adapter_size(rank, inputs, outputs, lora) for _, rank, inputs, outputs in adapted_layers(lora, shape))
    count += _expert_adapters(lora, shape)
    saved = lora.get("modules_to_save") or []
    tables = {"embed_tokens", "lm_head"} & set(saved)
    count += shape.embedding_parameters * len(tables)
    if trains_label_rows(lora, labels):
        # One vector per label, in the embeddings and, if it is a separate layer, in the output layer.
        count += labels * shape.hidden * (1 if shape.tied else 2)
    return count


def trained_parameters(config: FinetuneConfig, shape: Shape) -> int:
    """Count the trainable parameters of a config: as `trainable_parameters`, and those of its vision tower."""
    count = trainable_parameters(config.lora_config, shape, len(labels_of(config.classifier_config)))
    return count + (shape.images.trained if shape.images else 0)


def trains_label_rows(lora: dict[str, Any] | None, labels: int) -> bool:
    """Check whether an adapter trains the embeddings of a classifier's labels, and no others."""
    if lora is None or not labels:
        return False
    tables = {"embed_tokens", "lm_head"} & set(lora.get("modules_to_save") or [])
    return "trainable_token_indices" not in lora and not tables


def with_label_rows(lora: dict[str, Any], labels: int) -> dict[str, Any]:
    """Add to a lora_config what training adds for a classifier's labels, whose ids are not known yet."""
    return lora | ({"trainable_token_indices": list(range(labels))} if trains_label_rows(lora, labels) else {})


def _adapter_size(rank: int, inputs: int, outputs: int, lora: dict[str, Any]) -> int:
    extras = (outputs if lora.get("use_dora") else 0) + (outputs if lora.get("lora_bias") else 0)
    return rank * (inputs + outputs) + extras


def adapted_layers(lora: dict[str, Any], shape: Shape) -> list[tuple[str, int, int, int]]:
    """List the layers that get an adapter, as (full name, rank, inputs, outputs)."""
    targets = _targets_of(lora, shape)
    layers = lora.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    adapted = []
    for kind in shape.kinds:
        for layer in kind.layers if layers is None else set(kind.layers) & set(layers):
            for name, inputs, outputs in kind.linears:
                full = f"{shape.layers_name}.{layer}.{name}"
                if _is_target(full, targets) and not _is_skipped(name, targets, shape):
                    adapted.append((full, _rank_of(full, lora), inputs, outputs))
    # PEFT leaves the tables out of all-linear, and layers_to_transform names decoder layers alone.
    decoder = shape.layers_name.rpartition(".")[0]
    tables = ((f"{decoder}.embed_tokens", shape.vocab, shape.hidden), ("lm_head", shape.hidden, shape.vocab))
    for full, inputs, outputs in [
        *tables * (targets != "all-linear"),
        *(shape.counted.others if shape.counted else ()),
    ]:
        if layers is None and _is_target(full, targets):
            adapted.append((full, _rank_of(full, lora), inputs, outputs))
    return [target for target in adapted if not _is_target(target[0], lora.get("exclude_modules") or [])]


def _targets_of(lora: dict[str, Any], shape: Shape) -> str | list[str]:
    """Return target_modules; in a mixture whose experts PEFT renames, a pattern becomes the last names it matches."""
    targets = lora.get("target_modules") or ["q_proj", "v_proj"]
    if not isinstance(targets, str) or targets == "all-linear" or not shape.adapts_experts:
        return targets
    matched = set()
    for kind in shape.kinds:
        holders = {name.rpartition(".")[0] for name, *_ in kind.experts}
        names = [name for name, _, _ in kind.linears]
        names += [f"{holder}.{part}" for holder in holders for part in itertools.chain(*EXPERT_PARTS.values())]
        names += [f"{holder.rpartition('.')[0]}.gate" for holder in holders]
        wholes = (f"{shape.layers_name}.{layer}.{name}" for layer in kind.layers for name in names)
        matched |= {whole.rsplit(".", 1)[-1] for whole in wholes if _is_target(whole, targets)}
    return sorted(matched)


def _is_skipped(name: str, targets: str | list[str], shape: Shape) -> bool:
    """Report whether a linear layer is a router, out of reach of all-linear, or PEFT gives its name to the experts."""
    last = name.rsplit(".", 1)[-1]
    is_router = targets == "all-linear" and shape.experts > 1 and last in ROUTERS
    return is_router or (shape.adapts_experts and last in EXPERT_LAYERS)


def _is_target(full: str, targets: str | list[str]) -> bool:
    """Match a module as PEFT does: a pattern against the whole name, the names of a list against its end."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, full) is not None
    return any(full == name or full.endswith(f".{name}") for name in targets)


def _rank_of(full: str, lora: dict[str, Any]) -> int:
    for pattern, rank in (lora.get("rank_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", full):
            return rank
    return lora.get("r", 8)


def _expert_adapters(lora: dict[str, Any], shape: Shape) -> int:
    """Count the adapters of a mixture's experts and routers that all-linear, names of layers or parameters reach."""
    parameters, targets, rank = lora.get("target_parameters") or [], _targets_of(lora, shape), lora.get("r", 8)
    last_names = set() if isinstance(targets, str) else {name.rsplit(".", 1)[-1] for name in targets}
    total = 0
    for kind in shape.kinds:
        for name, experts, inputs, outputs in kind.experts:
            parts = EXPERT_PARTS.get(name.rsplit(".", 1)[-1], ())
            is_renamed = shape.adapts_experts and (targets == "all-linear" or bool(last_names & set(parts)))
            if is_renamed or _is_target(f"{shape.layers_name}.0.{name}", parameters):
                # Each expert has an adapter; where PEFT joins those of gate and up, theirs has twice the rank.
                own = rank * (2 if is_renamed and name.endswith("gate_up_proj") else 1)
                total += len(kind.layers) * experts * own * (inputs + outputs)
        if kind.experts and shape.adapts_experts and "gate" in last_names:
            total += len(kind.layers) * rank * (shape.hidden + shape.experts)
    return total
