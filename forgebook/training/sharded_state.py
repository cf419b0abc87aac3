"""Weights and moments as torch.distributed.checkpoint saves them: each rank its own parts, loaded into any others.

state = named_state(model, optimizer)       by the names of the parameters, whatever divides them
write_state(copied(state), folder, group)   collective; in a thread, while training continues
read_state(folder, model, optimizer)        each rank reads what it needs: of any number of ranks, sharded or not
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.tensor import DTensor, distribute_tensor

from forgebook.errors import CheckpointError

__all__ = ["background_group", "copied", "is_sharded_state", "named_state", "read_state", "take_whole", "write_state"]

STEP = "step"
MOMENTS = ("exp_avg", "exp_avg_sq")


@functools.cache
def background_group() -> dist.ProcessGroup:
    """Return a group of all ranks, on their CPUs, whose collectives no training step shares. Collective at first."""
    return dist.new_group(backend="gloo")


def named_state(model: torch.nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """Return the float32 weights that train, and their moments, by name; moments of zero before the first step."""
    names = {id(p): name for name, p in model.named_parameters()}
    state: dict[str, torch.Tensor] = {STEP: torch.zeros(())}
    for p, master in zip(optimizer.trained, optimizer.masters, strict=True):
        name, own = names[id(p)], optimizer.inner.state.get(master, {})
        state[f"weights.{name}"] = master.detach()
        for moment in MOMENTS:
            state[f"{moment}.{name}"] = own.get(moment, torch.zeros_like(master.detach()))
        state[STEP] = own.get("step", state[STEP])
    return state


def copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy a state to the host's memory, so that training may change the original."""
    return {name: _copied(tensor) for name, tensor in state.items()}


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.detach().to("cpu", copy=True)
    mesh = tensor.device_mesh
    host = mesh if mesh.device_type == "cpu" else _host_mesh(mesh.size())
    local = tensor.to_local().detach().to("cpu", copy=True)
    return DTensor.from_local(
        local, host, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


@functools.cache
def _host_mesh(size: int) -> Any:
    return dist.device_mesh.DeviceMesh("cpu", torch.arange(size), _init_backend=False)


def write_state(state: dict[str, torch.Tensor], folder: Path, group: dist.ProcessGroup) -> None:
    """Write a state to a folder, re-open it and compare what it holds. Collective.

    Raises CheckpointError or what the file system raises, on all ranks.
    """
    try:
        saved = dcp.save(state, storage_writer=FileSystemWriter(folder, thread_count=1), process_group=group)
    except dcp.api.CheckpointException as error:
        # By rank; the errors of all ranks travel with it.
        raise next(failed for failed, _ in error.failures.values()) from None
    if dist.get_rank() > 0:  # rank 0 alone re-opens it: right after that it gives the folder its name
        return
    opened = FileSystemReader(folder).read_metadata().state_dict_metadata
    if opened.keys() != state.keys() or saved.state_dict_metadata.keys() != state.keys():
        missing = sorted(state.keys() - opened.keys())
        raise CheckpointError(f"the training state lacks {', '.join(missing[:3])} after it was written to {folder}")


def is_sharded_state(folder: Path) -> bool:
    """Return whether torch.distributed.checkpoint wrote a state."""
    return (folder / ".metadata").exists()


@torch.no_grad()
def read_state(folder: Path, model: torch.nn.Module, optimizer: Any) -> None:
    """Restore weights and optimizer from a state of `write_state`. Raises CheckpointError if it is of other weights."""
    state = {name: torch.zeros_like(tensor) for name, tensor in named_state(model, optimizer).items()}
    known = FileSystemReader(folder).read_metadata().state_dict_metadata
    if known.keys() != state.keys():
        other = sorted(known.keys() ^ state.keys())[0]
        raise CheckpointError(f"{folder} is the state of other weights ({other}): choose another run_name")
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    # Without collectives: a rank reads the parts that overlap with its own.
    dcp.load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    _restore(state, model, optimizer)


@torch.no_grad()
def take_whole(saved: dict[str, Any], model: torch.nn.Module, optimizer: Any) -> None:
    """Restore a sharded model from the whole state of an unsharded one, of which each rank takes its part.

    saved: what `training_state` saves without sharding.
    """
    moments = saved["optimizer"]["state"]
    names = {id(p): name for name, p in model.named_parameters()}
    whole: dict[str, torch.Tensor] = {}
    for number, p in enumerate(optimizer.trained):
        name = names[id(p)]
        whole[f"weights.{name}"] = saved["optimizer"]["masters"][number]
        for moment in MOMENTS:
            whole[f"{moment}.{name}"] = moments[number][moment]
        whole[STEP] = moments[number]["step"]
    state = named_state(model, optimizer)
    if whole.keys() != state.keys():
        raise CheckpointError("the saved state is of other weights: choose another run_name")
    _restore({name: _part_of(tensor, state[name]) for name, tensor in whole.items()}, model, optimizer)


def _part_of(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _restore(state: dict[str, torch.Tensor], model: torch.nn.Module, optimizer: Any) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    for p, master in zip(optimizer.trained, optimizer.masters, strict=True):
        name = names[id(p)]
        master.copy_(state[f"weights.{name}"])
        if master is not p:
            p.copy_(master)
        moments = {moment: state[f"{moment}.{name}"].clone() for moment in MOMENTS}
        optimizer.inner.state[master] = {STEP: state[STEP].clone(), **moments}
