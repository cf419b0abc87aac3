"""The hardware of a run: the GPUs or the processor of this machine, and the memory that its processes may use.

workers, device = hardware_for(config)      such as (8, Gpu) or (2, Cpu); None for a cluster that names no GPU
total, free = host_memory()                 bytes, within the limit of a container
now, peak = resident_memory()               bytes of this process
with TensorMemory() as memory: ...          memory.peak: bytes of the tensors in it
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from forgebook import ray_cluster
from forgebook.catalog import Gpu, hardware_of, read_catalog
from forgebook.errors import ConfigError

if TYPE_CHECKING:
    from forgebook.config.schema import FinetuneConfig

__all__ = [
    "Cpu",
    "TensorMemory",
    "cpu_share",
    "gpu_named",
    "hardware_for",
    "hardware_in",
    "has_gpu",
    "host_memory",
    "local_hardware",
    "reset_peak",
    "resident_memory",
    "this_gpu",
]

# The driver and torch count the memory of one GPU a little differently; another size of it differs by more.
SAME_MEMORY = 0.1
OLDEST_BFLOAT16 = 8  # compute capability of Ampere; the V100 has 7.0, the T4 7.5


@dataclass(frozen=True)
class Cpu:
    """One worker's share of a machine without GPUs. memory: bytes that it may use; free: bytes of these free now."""

    name: str
    memory: int
    free: int


# The devices of a run ---------------------------------------------------------------------------------


def hardware_in(config: FinetuneConfig) -> tuple[int, Gpu] | None:
    """Read `hardware: 8xA10G`, or `worker_resources: {accelerator_type:A10G: ...}`; None if neither is set.

    Raises ConfigError for a GPU that the catalog does not have.
    """
    if config.hardware is not None:
        return hardware_of(config.hardware)
    names = [name.partition(":")[2] for name in config.worker_resources if name.startswith("accelerator_type:")]
    gpus = read_catalog().gpus
    gpu = next((gpus[name] for name in names if name in gpus), None)
    return (max(1, config.num_devices), gpu) if gpu else None


def hardware_for(config: FinetuneConfig) -> tuple[int, Gpu | Cpu] | None:
    """Return how many workers on which device a run has: those the config names, else this machine's.

    None for a cluster (RAY_ADDRESS) whose GPUs the config does not name: they are known once the run has joined it.
    """
    configured = hardware_in(config)
    if configured is not None or ray_cluster.is_joined():
        return configured
    workers = max(1, config.num_devices)
    return workers, this_gpu() or cpu_share(workers)


def local_hardware() -> tuple[int, Gpu] | None:
    """Count this machine's GPUs and name their kind, the smallest if they differ; None if there is none.

    Torch is imported only where there is a GPU. Raises ConfigError for a cluster, whose GPUs are on other machines.
    """
    if ray_cluster.is_joined():
        raise ConfigError(
            "hardware: the run goes to a Ray cluster (RAY_ADDRESS): set what it has, such as hardware=8xA100-80G"
        )
    return _gpus()


def this_gpu() -> Gpu | None:
    """Find this machine's GPU in the catalog, the smallest if they differ; None if there is none."""
    gpus = _gpus()
    return gpus[1] if gpus else None


def _gpus() -> tuple[int, Gpu] | None:
    if not has_gpu():
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    devices = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
    smallest = min(devices, key=lambda device: device.total_memory)
    return len(devices), gpu_named(smallest.name, smallest.total_memory, bfloat16=smallest.major >= OLDEST_BFLOAT16)


def gpu_named(name: str, memory: int, *, bfloat16: bool = True) -> Gpu:
    """Find a GPU in the catalog by its driver's name, such as `NVIDIA A100-SXM4-80GB`, and its bytes of memory.

    A GPU that is not in the catalog, or a slice of one (MIG), has no peak and no price. bfloat16: whether such a one
    computes in that format itself.
    """
    parts = re.split(r"[\s-]+", name.upper())
    for gpu in read_catalog().gpus.values():
        if gpu.name.partition("-")[0].upper() in parts and abs(gpu.memory - memory) < SAME_MEMORY * gpu.memory:
            return dataclasses.replace(gpu, memory=memory)
    return Gpu(name, memory, peak=None, price=None, bfloat16=bfloat16)


def has_gpu() -> bool:
    """Check, without torch, whether this machine has an NVIDIA GPU."""
    return any(Path("/proc/driver/nvidia/gpus").glob("*"))


def cpu_share(workers: int) -> Cpu:
    """Divide this machine's processor and memory among workers."""
    total, free = host_memory()
    return Cpu(f"{_processor()}, {os.cpu_count()} cores", total // workers, free // workers)


def _processor() -> str:
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
        if match:
            return " ".join(match[1].split())
    return platform.processor() or platform.machine()


# Memory -----------------------------------------------------------------------------------------------


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Return the bytes that this machine's processes may use together, and how many of them are free.

    The limits of this process's control groups apply, as containers set them: of version 2 (memory.max) and 1
    (memory.limit_in_bytes). Cached files count as free. root: of the file system to look in.
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
        match = re.search(r"^(?:file|cache) (\d+)$", (group / "memory.stat").read_text(), flags=re.MULTILINE)
        return int(match[1]) if match else 0
    return 0


def resident_memory() -> tuple[int, int]:
    """Return the bytes of memory that this process holds, and their peak since its start or reset_peak."""
    import resource

    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux, where the peak includes that of a parent that started this process
        unit = 1 if platform.system() == "Darwin" else 1024
        return 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    now, peak = (int(status.split(f"{name}:")[1].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def reset_peak() -> None:
    """Restart resident_memory's peak from now, where the system allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class TensorMemory:
    """Measure the peak bytes of CPU tensors while a block runs: those that exist before it, and what it allocates.

    Resident memory does not show them: with a small model most of it is libraries, their kernels, and freed memory that
    malloc has not returned. torch keeps no statistics of CPU tensors either, but its profiler sees every allocation.

    hidden: bytes of tensors that Python cannot see, such as the buckets of DDP. filled: how much of an allocation of a
    size is ever written (bytes); pages that are not take no memory. peak: 0 where it was not measured, because another
    profiler was running.
    """

    def __init__(self, hidden: int = 0, filled: Mapping[int, int] | None = None):
        self.peak = 0
        self._before = hidden
        self._filled = {sign * size: sign * part for size, part in (filled or {}).items() for sign in (1, -1)}
        self._profile: Any = None

    def __enter__(self) -> Self:
        from torch.autograd import profiler
        from torch.profiler import ProfilerActivity, profile

        if profiler._is_profiler_enabled:  # a second one in it crashes the process
            return self
        self._before += _bytes_of_tensors()
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if self._profile is None:
            return
        self._profile.__exit__(kind, error, traceback)
        # Allocations are positive, releases negative; the backward pass makes its own in another thread.
        events = [event for event in self._profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += self._filled.get(event.nbytes(), event.nbytes())
            most = max(most, held)
        self.peak = self._before + most


def _bytes_of_tensors() -> int:
    """Count the bytes of all CPU tensors in this process, shared storage once."""
    import torch

    # Not isinstance: a proxy object may import or compute something when asked for its class. And looked up, not
    # asked for: there may be millions of objects.
    kinds = {torch.Tensor}
    while more := {kind for known in kinds for kind in type.__subclasses__(known)} - kinds:
        kinds |= more
    storages = {}
    for item in [item for item in gc.get_objects() if type(item) in kinds]:
        if item.device.type == "cpu":
            with contextlib.suppress(RuntimeError, NotImplementedError):  # a tensor without storage
                storage = item.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
