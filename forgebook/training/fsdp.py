"""FSDP2: each rank holds a part of every weight, of its gradient and of its two moments.

shard(wrapped, dtype, device)           before the optimizer is made; trainable weights become float32
sync_gradients(wrapped, is_last)        before each micro batch
norm = clip_gradients(trained, 1.0)     over all ranks

torch's own `fully_shard`, not accelerate's: that one takes the whole model from rank 0, and only optimizers of torch.
The sharded weights are the optimizer's masters, so they are float32; a layer is gathered in the run's dtype, and
gradients are summed over the ranks in float32.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from forgebook.errors import ModelError

__all__ = [
    "clip_gradients",
    "gathered",
    "has_shards",
    "is_shard",
    "is_sharded",
    "shard",
    "sync_gradients",
    "with_whole_root",
]

CLIP_EPSILON = 1e-6  # as torch's clip_grad_norm_


def shard(
    wrapped: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    *,
    reshards: bool = True,
    offloads: bool = False,
) -> None:
    """Divide the weights of a wrapped model among the ranks, decoder layer by decoder layer, in place. Collective.

    wrapped: holds the same model on each rank, or its rows as `models.parts` reads them; its forward pass gathers what
    it needs. reshards: a layer's weights are freed after its forward pass, not kept for its backward pass. offloads:
    the parts, their gradients and moments are in the host's memory.

    Raises ModelError for a model that computes with several dtypes.
    """
    model: Any = wrapped.model
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    others = {name: p.dtype for name, p in model.named_parameters() if p.dtype != dtype}
    if others:
        name, other = next(iter(others.items()))
        raise ModelError(
            f"this model keeps {name} in {other}, which sharding: fsdp would gather in {dtype}: set sharding: zero_2"
        )
    read = _take_parts(wrapped)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if offloads else OffloadPolicy(),
    }
    layer_classes = set(causal._no_split_modules or ())
    for module in reversed(list(causal.modules())):  # the inner ones first
        if type(module).__name__ in layer_classes:
            fully_shard(module, reshard_after_forward=reshards, **settings)
    fully_shard(wrapped, **settings)
    _give_parts(read, torch.device("cpu") if offloads else device)
    for buffer_owner in wrapped.modules():
        for name, buffer in buffer_owner.named_buffers(recurse=False):
            buffer_owner._buffers[name] = buffer.to(device)
    wrapped.register_forward_hook(_reshard_without_backward)


# Where a weight is in a model: its module, and its name there.
_Place = tuple[nn.Module, str]


def _take_parts(wrapped: nn.Module) -> list[tuple[list[_Place], torch.Tensor]]:
    """Take out the parts that were read, with the places of each, and leave weights without memory there."""
    taken: dict[int, tuple[nn.Parameter, list[_Place]]] = {}
    for module in wrapped.modules():
        for name, p in module._parameters.items():
            if isinstance(p, DTensor):
                taken.setdefault(id(p), (p, []))[1].append((module, name))
    for p, places in taken.values():
        empty = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=p.requires_grad)
        for module, name in places:
            module._parameters[name] = empty
    return [(places, p.to_local().detach()) for p, places in taken.values()]


def _give_parts(read: list[tuple[list[_Place], torch.Tensor]], device: torch.device) -> None:
    """Put the parts that were read where FSDP2 has divided weights without memory."""
    while read:  # what is moved frees what was read
        places, part = read.pop()
        module, name = places[0]
        empty: Any = module._parameters[name]
        local = part.to(device, empty.dtype).contiguous()
        whole = DTensor.from_local(
            local, empty.device_mesh, empty.placements, run_check=False, shape=empty.shape, stride=empty.stride()
        )
        p = nn.Parameter(whole, requires_grad=empty.requires_grad)
        for module, name in places:
            module._parameters[name] = p


def _reshard_without_backward(wrapped: nn.Module, inputs: Any, output: Any) -> None:
    """Free gathered weights after a forward pass without a backward pass, before they are outdated."""
    if not torch.is_grad_enabled():
        _reshard(wrapped)


def _reshard(wrapped: nn.Module) -> None:
    for module in wrapped.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(wrapped: nn.Module) -> bool:
    """Return whether FSDP2 divides the weights of a wrapped model."""
    return isinstance(wrapped, FSDPModule)


def is_shard(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is this rank's part of one."""
    return isinstance(tensor, DTensor)


def has_shards(model: nn.Module) -> bool:
    """Return whether FSDP2 divides the weights of a model, inside of what it wraps."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def sync_gradients(wrapped: nn.Module, is_last: bool) -> None:
    """Let the next backward pass sum the gradients over the ranks, or only add them up on each rank."""
    assert isinstance(wrapped, FSDPModule)
    wrapped.set_requires_gradient_sync(is_last)


@contextlib.contextmanager
def with_whole_root(wrapped: nn.Module) -> Iterator[None]:
    """Gather what lies outside the layers (embeddings, output layer) for a block that calls the inner model.

    Collective, as is every forward pass inside.
    """
    if not isinstance(wrapped, FSDPModule):
        yield
        return
    wrapped.unshard()
    try:
        yield
    finally:
        _reshard(wrapped)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whole: gathered from all ranks if it is sharded. Collective."""
    if not isinstance(tensor, DTensor):
        return tensor
    # Parts in the host's memory are gathered by the devices.
    return tensor.to(tensor.device_mesh.device_type).full_tensor()


@torch.no_grad()
def clip_gradients(trained: Sequence[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale the gradients to a norm of at most `max_norm`; return their norm before, float32. Collective.

    One sum over the ranks, where torch's clip_grad_norm_ has one for each tensor.
    """
    shards = [p.grad for p in trained if isinstance(p.grad, DTensor)]
    gradients = [shard.to_local() for shard in shards]
    # Of parts in the host's memory, too, the sum is one of the devices.
    squares = torch.stack(torch._foreach_norm(gradients)).square().sum().to(shards[0].device_mesh.device_type)
    dist.all_reduce(squares)
    norm = squares.sqrt()
    if math.isfinite(max_norm):
        torch._foreach_mul_(gradients, (max_norm / (norm + CLIP_EPSILON)).clamp(max=1.0).to(gradients[0].device))
    return norm
