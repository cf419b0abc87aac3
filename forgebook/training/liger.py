"""Liger's fused Triton kernels (arXiv 2410.10989) for norms, rotary embeddings and MLPs, where they fit the model.

choice = choose_liger(config.liger_kernel, source, device)     before the model is loaded: whether, or why not
use_liger(model, config.liger_kernel.kwargs)                   patches a model in place
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from forgebook.config.blocks import LigerKernel
from forgebook.errors import ConfigError, ModelError, first_line
from forgebook.models.families import decoder_of
from forgebook.models.load import model_class
from forgebook.models.tokenizer import readable_model_errors
from forgebook.training.kernels import is_installed

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["LigerChoice", "choose_liger", "largest_difference", "use_liger"]

# Liger's own losses are part of the forward pass that computes logits, which our loss never calls.
OUR_LOSS = {"cross_entropy": False, "fused_linear_cross_entropy": False}
# Of hidden states and gradients in float32, relative to the largest: another order of additions differs by 1e-6.
TOLERANCE = 1e-3
LAYERS, TOKENS, VOCABULARY = 2, 64, 256  # of the model on which both are compared


@dataclass(frozen=True)
class LigerChoice:
    """Whether a run uses Liger's kernels; note: why not, where a reader would expect them."""

    is_used: bool
    note: str | None = None


def choose_liger(block: LigerKernel, source: str, device: torch.device) -> LigerChoice:
    """Decide whether to use Liger's kernels for a model on a device, by comparing them with its own forward pass.

    source: a local folder or a hub id.

    Raises ModelError or ConfigError if they are requested and have nothing for this model, or compute something else.
    """
    if block.enabled is False or (block.enabled == "auto" and device.type != "cuda"):
        return LigerChoice(False)
    if block.enabled == "auto" and not is_installed("liger_kernel"):
        return LigerChoice(False, "without Liger's fused kernels, which would be faster: pip install liger-kernel")
    from transformers import AutoConfig

    switches: dict[str, bool] = {str(name): on for name, on in block.kwargs.items()}
    with readable_model_errors(source, "model"):
        model_config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    try:
        _check_switches(model_config.model_type, switches)
        difference = largest_difference(model_config, switches, device)
        if not difference < TOLERANCE:
            raise ModelError(
                f"liger_kernel: its kernels change what {model_config.model_type} models compute (by {difference:.1g} "
                "of the largest value): set liger_kernel.enabled: false"
            )
    except ModelError as error:
        if block.enabled is True:
            raise
        return LigerChoice(False, f"without Liger's fused kernels: {error}".partition(": set liger_kernel")[0])
    return LigerChoice(True)


def use_liger(model: Any, switches: dict[str, bool]) -> None:
    """Apply Liger's kernels to a causal language model, in place; `switches` turns single kernels off or on.

    Raises ModelError if Liger has no kernels for this model, ConfigError for a kernel that it does not have.
    """
    from transformers.integrations.liger import apply_liger_kernel

    known = _check_switches(model.config.model_type, switches)
    ours = {name: value for name, value in OUR_LOSS.items() if name in known}
    apply_liger_kernel(model, {**switches, **ours})


def _check_switches(kind: str, switches: dict[str, bool]) -> list[str]:
    """List the kernels that Liger has for a type of model. Raises as `use_liger` does."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:  # Liger would log a line and change nothing
        raise ModelError(f"Liger has no kernels for {kind} models: set liger_kernel.enabled: false")
    known = list(inspect.signature(MODEL_TYPE_TO_APPLY_LIGER_FN[kind]).parameters)
    unknown = sorted(name for name in switches if name not in known and name not in OUR_LOSS)
    if unknown:
        raise ConfigError(f"liger_kernel.kwargs: Liger has no {', '.join(unknown)} kernel for {kind} models: remove it")
    return known


def largest_difference(model_config: PretrainedConfig, switches: dict[str, bool], device: torch.device) -> float:
    """Compare a model of two layers with random weights before and after Liger's kernels, forward and backward.

    Returns the largest difference of hidden states and of gradients, relative to their largest value, in float32.
    Raises ModelError if such a model cannot be built, or does not run.
    """
    kind = model_class(model_config)
    if kind is None:
        raise ModelError(f"transformers has no causal language model for {model_config.model_type}")
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device), _as_imported(kind):
            torch.manual_seed(0)
            # Called directly, as transformers' own ways to build a model partition its weights under ZeRO-3.
            model = kind(_shortened(model_config)).float().eval().requires_grad_(False)
            ids = torch.arange(TOKENS, device=device).remainder(VOCABULARY)[None]
            plain = _outcome(model, ids)
            use_liger(model, switches)
            return max(
                float((own - theirs).abs().max() / own.abs().max())
                for own, theirs in zip(plain, _outcome(model, ids), strict=True)
            )
    except (ConfigError, ModelError):
        raise
    except Exception as error:  # whatever transformers, Liger or Triton raise for a model they do not know
        raise ModelError(
            f"Liger's kernels could not be tried ({first_line(error)}): set liger_kernel.enabled: false"
        ) from error


def _outcome(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the hidden states, and the gradient that reaches the embeddings."""
    with torch.enable_grad():
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
        hidden = decoder_of(model)(inputs_embeds=inputs, use_cache=False).last_hidden_state
        # No sum or square: a norm makes those of its outputs constant, with a gradient of nothing but rounding.
        weights = torch.linspace(-1, 1, hidden.shape[-1], device=hidden.device)
        [gradient] = torch.autograd.grad((hidden @ weights).sum(), inputs)
    return hidden.detach(), gradient


def _shortened(model_config: PretrainedConfig) -> PretrainedConfig:
    """Copy a config with two layers and a small vocabulary."""
    short = copy.deepcopy(model_config)
    text = short.get_text_config()
    layers = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == layers:  # one entry per layer, as layer_types
            setattr(text, name, value[:LAYERS])
    text.num_hidden_layers = min(layers, LAYERS)
    text.vocab_size, text.pad_token_id = VOCABULARY, 0
    return short


@contextlib.contextmanager
def _as_imported(kind: type) -> Iterator[None]:
    """Put back what Liger replaces in the module of a model's class: another model may be built of it."""
    module = sys.modules[kind.__module__]
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).update(before)
