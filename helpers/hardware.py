"""What carries a run: the GPUs of this machine, as the catalog knows them.

count, gpu = found_hardware()       None on a machine without GPUs
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

from helpers.catalog import Gpu, read_catalog
from helpers.errors import ConfigError

__all__ = ["found_hardware", "gpu_called", "has_gpu"]

# The driver and torch count the memory of one GPU a little differently; another size of it differs by more.
SAME_MEMORY = 0.1


def found_hardware() -> tuple[int, Gpu] | None:
    """Count this machine's GPUs and name their kind, the smallest if they differ; None if there is none.

    Torch is imported only where there is a GPU. Raises ConfigError for a cluster, whose GPUs are not here.
    """
    if os.environ.get("RAY_ADDRESS"):
        raise ConfigError("hardware: the run goes to a Ray cluster (RAY_ADDRESS): say what it has, such as 8xA100-80G")
    if not has_gpu():
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    found = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
    smallest = min(found, key=lambda one: one.total_memory)
    return len(found), gpu_called(smallest.name, smallest.total_memory)


def gpu_called(name: str, memory: int) -> Gpu:
    """Find a GPU in the catalog by its driver's name, such as `NVIDIA A100-SXM4-80GB`, and its bytes of memory.

    One that is not there, or a slice of one, has no peak and no price.
    """
    words = re.split(r"[\s-]+", name.upper())
    for gpu in read_catalog().gpus.values():
        if gpu.name.partition("-")[0].upper() in words and abs(gpu.memory - memory) < SAME_MEMORY * gpu.memory:
            return dataclasses.replace(gpu, memory=memory)
    return Gpu(name, memory, peak=None, price=None)


def has_gpu() -> bool:
    """Tell, without torch, whether this machine has an NVIDIA GPU."""
    return any(Path("/proc/driver/nvidia/gpus").glob("*"))
