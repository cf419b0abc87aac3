"""What carries a run: the GPUs or the processor of this machine, and the memory that its processes may have.

workers, device = hardware_for(config)      such as (8, Gpu) or (2, Cpu); None for a cluster that names no GPU
total, free = host_memory()                 bytes, within the limit of a container
now, peak = resident_memory()               bytes of this process
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from forgebook import ray_cluster
from forgebook.catalog import Gpu, hardware_of, read_catalog
from forgebook.errors import ConfigError

if TYPE_CHECKING:
    from forgebook.config.parse import FinetuneConfig

__all__ = [
    "Cpu",
    "cpu_share",
    "forget_peak",
    "found_hardware",
    "gpu_called",
    "hardware_for",
    "hardware_in",
    "has_gpu",
    "host_memory",
    "resident_memory",
    "this_gpu",
]

# The driver and torch count the memory of one GPU a little differently; another size of it differs by more.
SAME_MEMORY = 0.1


@dataclass(frozen=True)
class Cpu:
    """One worker's share of a machine without GPUs. memory: bytes that it may take; free: of these, now."""

    name: str
    memory: int
    free: int


# What a run is carried by -----------------------------------------------------------------------------


def hardware_in(config: FinetuneConfig) -> tuple[int, Gpu] | None:
    """Read `hardware: 8xA10G`, or `worker_resources: {accelerator_type:A10G: ...}`; None if neither is there."""
    if config.hardware is not None:
        return hardware_of(config.hardware)
    named = [name.partition(":")[2] for name in config.worker_resources if name.startswith("accelerator_type:")]
    gpus = read_catalog().gpus
    found = next((gpus[name] for name in named if name in gpus), None)
    return (max(1, config.num_devices), found) if found else None


def hardware_for(config: FinetuneConfig) -> tuple[int, Gpu | Cpu] | None:
    """Tell how many workers of which device a run has: those the config names, else this machine's.

    None for a cluster (RAY_ADDRESS) whose GPUs the config does not name: they show when the run has joined it.
    """
    named = hardware_in(config)
    if named is not None or ray_cluster.is_joined():
        return named
    workers = max(1, config.num_devices)
    return workers, this_gpu() or cpu_share(workers)


def found_hardware() -> tuple[int, Gpu] | None:
    """Count this machine's GPUs and name their kind, the smallest if they differ; None if there is none.

    Torch is imported only where there is a GPU. Raises ConfigError for a cluster, whose GPUs are not here.
    """
    if ray_cluster.is_joined():
        raise ConfigError("hardware: the run goes to a Ray cluster (RAY_ADDRESS): say what it has, such as 8xA100-80G")
    return _gpus()


def this_gpu() -> Gpu | None:
    """Find this machine's GPU in the catalog, the smallest if they differ; None if there is none."""
    found = _gpus()
    return found[1] if found else None


def _gpus() -> tuple[int, Gpu] | None:
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


def cpu_share(workers: int) -> Cpu:
    """Share this machine's processor and memory out among workers."""
    total, free = host_memory()
    return Cpu(f"{_processor()}, {os.cpu_count()} cores", total // workers, free // workers)


def _processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
        if found:
            return " ".join(found[1].split())
    return platform.processor() or platform.machine()


# Memory -----------------------------------------------------------------------------------------------


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Tell the bytes that this machine's processes may take together, and how many of them are free.

    The limits of the control groups that this process is in count, as containers set them: of version 2
    (memory.max) and 1 (memory.limit_in_bytes). Files kept in memory are free. root: of the file system to look in.
    """
    import psutil

    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for group in _control_groups(root):
        limit = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
        used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
        if limit is not None:
            total, free = min(total, limit), min(free, max(0, limit - used + _cached_files(group)))
    return total, free


def _control_groups(root: Path) -> list[Path]:
    """List the folders of this process's control group of memory and of those around it."""
    groups: list[Path] = []
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds == "" or "memory" in kinds.split(","):
                top = root / "sys/fs/cgroup" / ("memory" if kinds else "")
                inner = top / path.lstrip("/")
                groups += [group for group in (inner, *inner.parents) if group.is_relative_to(top)]
    return groups


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max": no limit
        return None


def _cached_files(group: Path) -> int:
    with contextlib.suppress(OSError):
        found = re.search(r"^(?:file|cache) (\d+)$", (group / "memory.stat").read_text(), flags=re.MULTILINE)
        return int(found[1]) if found else 0
    return 0


def resident_memory() -> tuple[int, int]:
    """Tell the bytes of memory that this process has, and its peak since it began or forget_peak."""
    import resource

    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux, where the peak includes that of a parent that started this process
        unit = 1 if platform.system() == "Darwin" else 1024
        return 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    now, peak = (int(status.split(f"{name}:")[1].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def forget_peak() -> None:
    """Begin resident_memory's peak anew, where the system lets it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
