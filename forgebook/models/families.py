"""What sets one model apart from others: the context that its config.json states, the towers beside its decoder."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from forgebook.errors import ConfigError, ModelError
from forgebook.models.tokenizer import readable_model_errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "check_positions",
    "context_limit",
    "decoder_of",
    "freeze_towers",
    "image_reader_of",
    "native_context_length",
    "projector_modules",
    "tower_modules",
]

# What published models call the part between a vision tower and the text decoder.
PROJECTOR = re.compile(r"projector|connector|merger|embed_vision|aligner")


def native_context_length(source: str) -> int:
    """Read the longest context, in tokens, that a model was trained for. Raises ModelError if it has no such limit."""
    from transformers import AutoConfig

    with readable_model_errors(source, "model"):
        config: PretrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=False)
    native = getattr(config.get_text_config(), "max_position_embeddings", None)
    if native is None:  # Mamba has no such limit
        raise ModelError(f"the config of {source} has no max_position_embeddings: set context_length")
    return native


def context_limit(source: str, rope_scaling: dict[str, Any] | None = None) -> int | None:
    """Compute the longest context that the model's positions reach, extended by `rope_scaling`; None: no limit."""
    from transformers import AutoConfig

    with readable_model_errors(source, "model"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False).get_text_config()
    native = getattr(config, "max_position_embeddings", None)
    if native is None:
        return None
    # Without a rope_scaling of this run: the base may be a checkpoint whose context was extended.
    scaling = rope_scaling or getattr(config, "rope_parameters", None) or {}
    original = scaling.get("original_max_position_embeddings") or native
    return max(native, int(original * (scaling.get("factor") or 1)))


def check_positions(source: str, context_length: int, rope_scaling: dict[str, Any] | None = None) -> str | None:
    """Warn of a context beyond the positions that a model was trained on.

    Raises ConfigError if it has a learned vector per position, as GPT-2 and OPT: there is none beyond.
    """
    from transformers import AutoConfig

    limit = context_limit(source, rope_scaling)
    if limit is None or context_length <= limit:
        return None
    if (
        getattr(AutoConfig.from_pretrained(source, trust_remote_code=False).get_text_config(), "rope_parameters", None)
        is None
    ):
        raise ConfigError(
            f"context_length: {context_length:,} is beyond the {limit:,} positions that the model has learned a vector "
            f"for: set context_length to at most {limit}"
        )
    return (
        f"context_length {context_length:,} is beyond the {limit:,} positions that the model was trained on: set "
        f"rope_scaling, or context_length to at most {limit}"
    )


def decoder_of(causal: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a causal language model that turns ids into hidden states, for the output layer."""
    if causal.base_model is not causal:
        return causal.base_model
    decoder = causal.get_decoder()  # Llama 4's is a language model again, with its output layer
    return getattr(decoder, "model", decoder)


def image_reader_of(causal: PreTrainedModel) -> nn.Module:
    """Return the part that turns token ids and images into hidden states: the model without its output layer.

    Raises ModelError for a class that has no such part.
    """
    reader = getattr(causal, "model", None)
    if reader is None or causal.get_decoder() is reader:
        raise ModelError(f"{type(causal).__name__} reads images only together with its output layer: not supported")
    return reader


def tower_modules(model: PreTrainedModel) -> list[str]:
    """Name the outermost modules that no text passes through: vision and audio towers, projectors, image layers."""

    def outside(name: str, module: nn.Module) -> Iterator[str]:
        if text.isdisjoint(module.modules()):
            yield name
        elif module not in text:
            for child_name, child in module.named_children():
                yield from outside(f"{name}.{child_name}".lstrip("."), child)

    text, decoder = _text_modules(model), model.get_decoder()
    towers = list(outside("", model)) if _is_wrapped(model) else []
    # Mllama skips the layers that attend to an image where there is none.
    layers = getattr(model.config.get_text_config(), "cross_attention_layers", None) or ()
    [prefix] = (name for name, module in model.named_modules() if module is decoder)
    return towers + [f"{prefix}.layers.{layer}" for layer in layers]


def freeze_towers(model: PreTrainedModel) -> None:
    """Freeze what no text passes through: without a gradient, DDP would wait for it and weight decay would shrink it.

    model: plain or inside a PeftModel.
    """
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    for name in tower_modules(causal):
        causal.get_submodule(name).requires_grad_(False)
    if _is_wrapped(causal):  # a wrapper may hold one itself, such as the vector of a line break in an image
        fed = {id(p) for module in _text_modules(causal) for p in module.parameters()}
        for parameter in causal.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in fed)


def projector_modules(model: PreTrainedModel) -> list[str]:
    """Name the modules that map what a vision tower sees to the text decoder's embeddings. Raises ModelError."""
    towers = tuple(f"{name}." for name in tower_modules(model))
    inside = [
        name
        for name, _ in model.named_modules()
        if f"{name}.".startswith(towers) and PROJECTOR.search(name.rpartition(".")[2])
    ]
    outermost = [name for name in inside if not any(name.startswith(f"{other}.") for other in inside)]
    if not outermost:
        raise ModelError(
            f"vision_language_config.train_projector: {type(model).__name__} names no part as its projector: set it to "
            "false"
        )
    return outermost


def _is_wrapped(model: PreTrainedModel) -> bool:
    """Report whether the text decoder is one part among others."""
    return model.config.get_text_config() is not model.config


def _text_modules(model: PreTrainedModel) -> set[nn.Module]:
    """Return what a text passes through: embeddings, decoder, output layer."""
    modules = {model.get_input_embeddings(), model.get_decoder(), model.get_output_embeddings()}
    return {module for module in modules if module is not None}
