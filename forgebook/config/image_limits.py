"""What does not go with vision_language_config: rows of the table in `rules`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forgebook.config.schema import FinetuneConfig

__all__ = ["IMAGE_LIMITS"]


def _trains_encoder(config: FinetuneConfig) -> bool:
    return config.vision_language_config is not None and not config.vision_language_config.freeze_vision_encoder


# The other key that takes part, when the two do not work together, why, and the fix.
IMAGE_LIMITS: tuple[tuple[str, Callable[[FinetuneConfig], bool], str, str], ...] = (
    (
        "padding",
        lambda config: config.padding == "packed",
        "padding: packed does not pack examples with images",
        "set padding: longest",
    ),
    (
        "attention",
        lambda config: config.attention == "varlen",
        "attention: varlen joins the examples of a batch, and one with images needs a line of its own",
        "set attention: auto or sdpa",
    ),
    (
        "lora_config",
        lambda config: config.is_lora and _trains_encoder(config),
        "freeze_vision_encoder: false trains the whole encoder, and an adapter is for the language model",
        "remove lora_config, or set train_projector: true instead",
    ),
    (
        "eval_generation",
        lambda config: config.eval_generation is not None,
        "eval_generation lets the model answer during training, and would show it no images",
        "remove it, and let evaluate answer after training",
    ),
    (
        "generation_config",
        lambda config: config.generation_config.prompt_format is not None,
        "a prompt_format writes no images",
        "remove it, so that the model's own chat template is used",
    ),
    (
        "liger_kernel",
        lambda config: config.liger_kernel.enabled is True,
        "Liger's kernels are compared on text alone, and not used for models that read images",
        "set liger_kernel.enabled: auto",
    ),
    (
        "torch_compile",
        lambda config: bool(config.torch_compile),
        "torch_compile does not work with images, whose number and sizes differ between batches",
        "remove it",
    ),
)
