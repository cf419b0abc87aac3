"""LoRA on the experts of a mixture by products of low rank, where PEFT adds every expert's dense change to its weights.

    use_low_rank_products(model)      a PeftModel with adapters of experts' tensors (target_parameters)

transformers holds all experts of a layer in one tensor, and PEFT replaces it during the forward pass by W + s B A: a
second tensor of that size, and in the backward pass a gradient of it. Here the tokens of each expert are multiplied
with its A and B in turn, x W + s (x A) B, through the interface that transformers has for other ways to run experts.
Parameters, their names and what is saved stay PEFT's.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import nn
from transformers.integrations import moe

from forgebook.models.peft_library import ParamWrapper, PeftModel

__all__ = ["quiet_about_experts", "use_low_rank_products"]

NAME = "low_rank_adapters"
# Where an experts module finds its adapters while its wrapper runs: {parameter: (A, B, scale)}.
FACTORS = "_low_rank_factors"


def use_low_rank_products(model: PeftModel) -> None:
    """Let the experts of a model run their adapters by products of low rank, where transformers can run them otherwise.

    Llama 4 has experts of its own kind: they stay with PEFT's way.
    """
    moe.ALL_EXPERTS_FUNCTIONS.register(NAME, _experts_forward)
    inner = {id(module.base_layer) for module in model.modules() if isinstance(module, ParamWrapper)}
    for module in model.modules():
        experts = module.get_base_layer() if isinstance(module, ParamWrapper) and id(module) not in inner else None
        # What transformers' decorator for experts sets.
        if experts is not None and hasattr(experts, "is_transposed") and hasattr(experts, "has_gate"):
            module.__class__ = _ExpertsWrapper
            experts.config._experts_implementation = NAME


@contextlib.contextmanager
def quiet_about_experts() -> Iterator[None]:
    """Drop PEFT's warning of patterns that match no module, which is false of those for experts' parameters.

    `adapters.check_lora` has one of its own.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys .* ignored", RuntimeWarning)
        yield


class _ExpertsWrapper(ParamWrapper):
    """The outermost wrapper of an experts module, which runs all of its adapters."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        factors = self._factors()
        if factors is None:
            return super().forward(x, *args, **kwargs)
        experts = self.get_base_layer()
        setattr(experts, FACTORS, factors)
        try:
            return experts(x, *args, **kwargs)  # a call, for hooks as DeepSpeed's, which gathers weights
        finally:
            delattr(experts, FACTORS)

    def _factors(self) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]] | None:
        """Collect the adapters of all tensors; None if PEFT is to run: adapters are off, merged or several."""
        factors, wrapper = {}, self
        while isinstance(wrapper, ParamWrapper):
            active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
            if wrapper.disable_adapters or wrapper.merged or len(active) != 1 or wrapper.num_experts == 1:
                return None
            if wrapper.get_param().is_cuda and wrapper.r[active[0]] * wrapper.get_param().element_size() % 16:
                return None  # its kernels take rows of a multiple of 16 bytes
            factors[wrapper.parameter_name] = _by_expert(wrapper, active[0])
            wrapper = wrapper.base_layer
        return factors


def _by_expert(wrapper: ParamWrapper, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return A as [experts, inputs, rank], B as [experts, rank, outputs] and the scale, in the layouts of PEFT."""
    a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    first = a.reshape(wrapper.num_experts, -1, a.shape[-1]).transpose(1, 2)
    second = b.reshape(b.shape[0], -1, wrapper.num_experts).permute(2, 1, 0).contiguous()
    dtype = wrapper.get_param().dtype
    return first.to(dtype), second.to(dtype), wrapper.scaling[name]


def _experts_forward(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Run experts by grouped products, as transformers' own `grouped_mm`, with their adapters.

    hidden_states: [tokens, hidden]; top_k_index and top_k_weights: [tokens, experts per token].
    """
    factors = experts.__dict__.get(FACTORS)
    if factors is None or experts._is_expert_parallel:
        return moe.grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    tokens, chosen = top_k_index.shape
    expert_ids, order = torch.sort(top_k_index.reshape(-1))
    numbers = torch.arange(experts.num_experts, device=expert_ids.device)
    ends = torch.searchsorted(expert_ids, numbers, right=True, out_int32=True)

    def product(x: torch.Tensor, name: str) -> torch.Tensor:
        bias = getattr(experts, f"{name}_bias")[expert_ids] if experts.has_bias else None
        result = moe._grouped_linear(x, getattr(experts, name), ends, bias, experts.is_transposed)
        if name not in factors:
            return result
        a, b, scale = factors[name]
        return result + scale * moe._grouped_mm(moe._grouped_mm(x, a, ends), b, ends)

    x = hidden_states[order // chosen]
    inner = product(x, "gate_up_proj" if experts.has_gate else "up_proj")
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    outputs = product(inner, "down_proj")
    if experts.has_post_expert_norm:
        outputs = experts.post_expert_norm(outputs)
    weighted = outputs * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    restored = torch.empty_like(weighted).index_copy(0, order, weighted)
    return restored.view(tokens, chosen, -1).sum(dim=1).to(hidden_states.dtype)
