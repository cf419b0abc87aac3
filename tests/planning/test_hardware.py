"""What carries a run: GPUs found by their driver's names, the memory of a machine or of its container."""

import subprocess
import sys
import types

import pytest

from conftest import REPOSITORY, config_for
from forgebook.catalog import read_catalog
from forgebook.planning.hardware import (
    Cpu,
    TensorMemory,
    cpu_share,
    gpu_named,
    hardware_for,
    hardware_in,
    host_memory,
    this_gpu,
)

GIB = 2**30


@pytest.mark.parametrize(
    ("driver", "gib", "name"),
    [
        ("Tesla T4", 14.6, "T4"), ("NVIDIA L4", 22.0, "L4"), ("NVIDIA L40S", 44.4, "L40S"),
        ("NVIDIA A10G", 22.1, "A10G"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40G"), ("NVIDIA A100 80GB PCIe", 79.1, "A100-80G"),
        ("NVIDIA H100 80GB HBM3", 79.1, "H100"), ("NVIDIA H200", 139.8, "H200"),
    ],
)  # fmt: skip
def test_gpus_are_found_by_their_drivers_names(driver, gib, name):
    found, known = gpu_named(driver, int(gib * GIB)), read_catalog().gpus[name]
    assert (found.name, found.peak, found.price, found.memory) == (name, known.peak, known.price, int(gib * GIB))


@pytest.mark.parametrize("driver", ["NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"])
def test_other_gpus_have_memory_but_neither_peak_nor_price(driver):
    found = gpu_named(driver, 10 * GIB)
    assert (found.name, found.memory, found.peak, found.price, found.bfloat16) == (driver, 10 * GIB, None, None, True)


def test_a_gpu_older_than_ampere_has_no_bfloat16(monkeypatch):
    devices = {"Tesla V100-SXM2-16GB": (7, 0), "NVIDIA RTX A6000": (8, 6)}
    monkeypatch.setattr("forgebook.planning.hardware.has_gpu", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for name, (major, minor) in devices.items():
        facts = types.SimpleNamespace(name=name, total_memory=16 * GIB, major=major, minor=minor)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda k, facts=facts: facts)
        gpu = this_gpu()
        assert gpu is not None and gpu.bfloat16 == (major >= 8)


def test_hardware_is_what_the_config_names_else_this_machine(monkeypatch):
    named = config_for("tiny", worker_resources={"accelerator_type:A10G": 0.001}, num_devices=4)
    assert hardware_for(named) == hardware_in(named) == (4, read_catalog().gpus["A10G"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    workers, cpu = hardware_for(config_for("tiny", num_devices=2))
    assert workers == 2 and isinstance(cpu, Cpu) and cpu.name == cpu_share(1).name
    assert 0 < cpu.memory == host_memory()[0] // 2
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert hardware_for(config_for("tiny")) is None and hardware_for(named) == hardware_in(named)


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/a/b\n", {"sys/fs/cgroup/a/memory.max": GIB, "sys/fs/cgroup/a/memory.current": GIB // 2,
                       "sys/fs/cgroup/a/memory.stat": f"anon 1\nfile {GIB // 4}\n",
                       "sys/fs/cgroup/a/b/memory.max": "max"}),
        ("0::/somewhere/else\n", {"sys/fs/cgroup/memory.max": GIB, "sys/fs/cgroup/memory.current": GIB // 4}),
        ("3:cpu:/x\n2:memory:/x\n", {"sys/fs/cgroup/memory/x/memory.limit_in_bytes": GIB,
                                     "sys/fs/cgroup/memory/x/memory.usage_in_bytes": GIB // 4}),
    ],
    ids=["v2", "v2-container", "v1"],
)  # fmt: skip
def test_a_containers_limit_counts(tmp_path, groups, files):
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(str(text))
    total, free = host_memory(tmp_path)
    assert total == min(GIB, host_memory()[0]) and free <= GIB * 3 // 4
    assert free == GIB * 3 // 4 or free == pytest.approx(host_memory()[1], rel=0.2)


def test_without_control_groups_the_machine_counts(tmp_path):
    assert host_memory(tmp_path)[0] >= host_memory()[0]


PEAKS = """
from forgebook.planning.hardware import reset_peak, resident_memory
before = resident_memory()
held = bytearray(b"1") * 10**8
largest = resident_memory()
del held
reset_peak()
print(*before, *largest, *resident_memory())
"""


def test_the_peak_of_memory_is_seen_and_forgotten():
    """In a small process: a system short of memory takes pages away from one that has run many tests."""
    printed = subprocess.run([sys.executable, "-c", PEAKS], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    before, _, during, seen, now, peak = (int(figure) for figure in printed.stdout.split())
    assert before + 9 * 10**7 < during <= seen
    assert now <= peak < before + 5 * 10**7


# -- the memory of tensors


def test_tensors_are_measured_at_their_peak():
    import torch

    before = torch.zeros(1_000_000)
    with TensorMemory() as none:
        pass
    with TensorMemory(hidden=1000) as memory:
        large = torch.ones(5_000_000)
        del large
        small = torch.ones(1_000)
    assert none.peak >= before.nbytes
    # The large tensor is gone at the end, but was there; what existed before counts, too, and its views count once.
    assert memory.peak - none.peak == pytest.approx(20_000_000 + 1000, abs=100_000)
    with TensorMemory() as views:
        kept = [before[k:] for k in range(10)]
    assert views.peak - none.peak < 100_000 and len(kept) == 10 and small.numel() == 1_000


def test_a_bucket_counts_as_far_as_it_is_filled():
    """DeepSpeed's buckets of 2 GB take, with few gradients, a few pages of memory."""
    import torch

    with TensorMemory(filled={4_000_000_000: 8_000}) as memory:
        bucket = torch.empty(1_000_000_000)
        del bucket
    with TensorMemory() as nothing:
        pass
    assert memory.peak - nothing.peak == pytest.approx(8_000, abs=1_000)


def test_the_backward_pass_is_measured_too():
    import torch

    weights = torch.ones(1_000_000, requires_grad=True)
    with TensorMemory() as nothing:
        pass
    with TensorMemory() as memory:
        (weights * 2).exp().sum().backward()
    # weights * 2 and its exp; in the backward pass of exp one more, then the gradient.
    assert memory.peak - nothing.peak == pytest.approx(3 * weights.nbytes, rel=0.4)


def test_a_profiler_that_runs_already_costs_the_figure_alone():
    import torch

    with torch.profiler.profile(), TensorMemory() as memory:
        torch.ones(1_000_000)
    assert memory.peak == 0 or memory.peak >= 4_000_000
