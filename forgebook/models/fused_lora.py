"""LoRA on a linear layer as one function with a backward pass of its own, where PEFT chains six operators.

    use_fused_products(model)      a PeftModel; its plain adapters on linear layers run fused from then on

y = x W' + b + s (x A') B'. PEFT writes (x A') B', s times it, and the sum, each as large as y, and in the backward pass
two gradients of x and their sum. Here the second product is added into the first as it is computed, both ways; x A', of
rank r, is computed again instead of kept. Parameters, their names and what is saved stay PEFT's. Dropout, DoRA, packed
weights, ZeRO-3's shards and weights offloaded for inference keep PEFT's own forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from forgebook.models.peft_library import LoraLinear, PeftModel

__all__ = ["use_fused_products"]


def use_fused_products(model: PeftModel) -> None:
    """Let the plain LoRA layers of a model run fused; each call decides whether it can."""
    for module in model.modules():
        # Not subclasses: these, such as those of quantized layers, compute something else.
        if type(module) is LoraLinear and type(module.base_layer) is nn.Linear:
            module.__class__ = _FusedLinear


class _FusedLinear(LoraLinear):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = self._only_adapter()
        if name is None or args or kwargs or not self._is_plain(name, x):
            return super().forward(x, *args, **kwargs)
        base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        return _LoraProduct.apply(x, base.weight, base.bias, a, b, self.scaling[name])

    def _only_adapter(self) -> str | None:
        """Name the adapter that is active, if it is the only one and neither switched off nor merged."""
        if self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        return active[0] if len(active) == 1 and active[0] not in self.lora_variant else None

    def _is_plain(self, name: str, x: torch.Tensor) -> bool:
        """Report whether nothing but the two products happens here, in one dtype, on weights that are whole."""
        base, dropout = self.base_layer, self.lora_dropout[name]
        weights = (base.weight, self.lora_A[name].weight, self.lora_B[name].weight)
        return (
            not (self.training and getattr(dropout, "p", 0.0) > 0)
            and self.lora_A[name].bias is None
            and self.lora_B[name].bias is None
            and not base.weight.requires_grad
            and not (base.bias is not None and base.bias.requires_grad)
            and all(weight.dtype == x.dtype for weight in weights)
            and all(weight.device == x.device for weight in weights)  # offloaded ones arrive when the layers are called
            and not torch.is_autocast_enabled(x.device.type)
            and not hasattr(base.weight, "ds_id")  # ZeRO-3 gathers its shards when the layers themselves are called
        )


def _lora_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    y = nn.functional.linear(x, weight, bias)
    y.view(-1, y.shape[-1]).addmm_(nn.functional.linear(x, a).view(-1, a.shape[0]), b.t(), alpha=scale)
    return y


_lora_operator = torch.library.custom_op(
    "forgebook::lora_product",
    _lora_product,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale) -> Tensor",
)


class _LoraProduct(torch.autograd.Function):
    """x: [..., inputs]; weight: [outputs, inputs], frozen; a: [rank, inputs]; b: [outputs, rank]."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        # Whoever watches operators, as selective checkpointing does, sees one whose result nothing changes afterwards.
        # The compiler sees the operators inside.
        is_watched = not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0
        return (_lora_operator if is_watched else _lora_product)(x, weight, bias, a, b, scale)

    @staticmethod
    def backward(ctx, grad):
        x, weight, a, b = ctx.saved_tensors
        grad, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        inner = grad @ b  # [tokens, rank]
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(inner, a, alpha=ctx.scale).view(x.shape)
        if ctx.needs_input_grad[3]:
            grad_a = torch.empty_like(a).addmm_(inner.t(), rows, beta=0, alpha=ctx.scale)
        if ctx.needs_input_grad[4]:
            grad_b = torch.empty_like(b).addmm_(grad.t(), rows @ a.t(), beta=0, alpha=ctx.scale)
        return grad_x, None, None, grad_a, grad_b, None
