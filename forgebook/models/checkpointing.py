"""Gradient checkpointing: all of a layer, all but matrix products and attention, or all with its input on the host.

model.activation_checkpointing_enable(checkpointing_settings("selective"))     or True: recompute all
check_kept(wrapped, device)                                                    before the first step
offload_inputs(model)                                                          of the layers, beside checkpointing
drop_input_gradients(model)                                                    after both, and after an adapter is added

The products of experts are recomputed in each of them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from forgebook.errors import ModelError
from forgebook.models.families import decoder_of

__all__ = ["check_kept", "checkpointing_settings", "drop_input_gradients", "offload_inputs"]

# Operators whose results are kept: products, and fused attention. Not bmm: attention without a fused kernel would keep
# matrices of length^2. Nor the grouped products of experts, to which some models add their biases in place.
PRODUCTS = {"aten::mm", "aten::addmm", "forgebook::lora_product"}
ATTENTION = ("attention", "_varlen_attn", "flash_attn")
# A product over so few numbers is as cheap to compute again: the second of an adapter, whose result is large.
FEW = 256


def checkpointing_settings(kind: bool | str) -> dict[str, Any]:
    """Return the arguments of torch's checkpoint: "selective" keeps the products, others keep nothing."""
    # Reentrant checkpointing loses the gradients of LoRA when the inputs themselves need none.
    settings: dict[str, Any] = {"use_reentrant": False}
    return settings | ({"context_fn": _contexts} if kind == "selective" else {})


def drop_input_gradients(model: Any) -> None:
    """Undo that transformers and PEFT let embeddings require gradients, which reentrant checkpointing alone needs.

    Those of patches, too: a frozen vision tower would be recomputed and passed through backward, for nothing.
    """
    model.disable_input_require_grads()


def offload_inputs(model: Any) -> None:
    """Keep the inputs of a causal language model's checkpointed layers in the host's memory until the backward pass."""
    decoder = decoder_of(model)
    hidden, plain = decoder.get_input_embeddings().embedding_dim, decoder.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(functools.partial(_to_host, hidden), _from_host):
            return plain(*args, **kwargs)

    decoder.forward = forward


def _to_host(hidden: int, tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
    """Copy hidden states to the host. Masks and positions stay: each is one tensor, which all layers are given."""
    if tensor.dim() != 3 or tensor.shape[-1] != hidden:
        return tensor.device, tensor
    on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return tensor.device, on_host.copy_(tensor, non_blocking=True)


def _from_host(packed: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
    device, tensor = packed
    return tensor.to(device, non_blocking=True)


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name().partition(".")[0]
    if name in PRODUCTS:
        summed = args[-1].shape[0] if name in ("aten::mm", "aten::addmm") and torch.is_tensor(args[-1]) else FEW + 1
        return CheckpointPolicy.MUST_SAVE if summed > FEW else CheckpointPolicy.PREFER_RECOMPUTE
    is_attention = any(part in name for part in ATTENTION)
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE


@torch.no_grad()
def check_kept(wrapped: torch.nn.Module, device: torch.device) -> None:
    """Raise ModelError if a model changes a result in place that selective checkpointing keeps: it would be wrong.

    torch notices that in most cases, but not where a view was made in between, as every linear layer does. Collective
    under ZeRO-3. wrapped: returns the loss of input_ids and labels.
    """
    ids = torch.arange(5, 13, device=device)[None]
    with _KeptResults() as kept:
        wrapped(input_ids=ids, labels=ids)
    if kept.changed:
        raise ModelError(
            f"gradient_checkpointing: selective keeps a result that this model changes in place ({kept.changed[0]}): "
            "set gradient_checkpointing: true"
        )


class _KeptResults(TorchDispatchMode):
    """Remember the results that the policy keeps; list operators that write to one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.changed: list[str] = []
        self._kept: dict[int, torch.Tensor] = {}  # by address; held, so that no other tensor takes it

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        written = [
            value
            for value, argument in zip(args, function._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write and torch.is_tensor(value)
        ]
        self.changed += [function.name() for value in written if _address(value) in self._kept]
        written += [value for name, value in (kwargs or {}).items() if name == "out"]
        result = function(*args, **(kwargs or {}))
        is_kept = not written and _policy(None, function, *args) == CheckpointPolicy.MUST_SAVE
        for value in result if isinstance(result, tuple) else (result,):
            if is_kept and torch.is_tensor(value):
                self._kept[_address(value)] = value
        return result


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
