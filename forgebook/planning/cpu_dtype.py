"""float32 or bfloat16 on a machine without a GPU: whichever its processor multiplies faster, measured once.

dtype, reason = choose_cpu_dtype(shape.hidden, shape.intermediate)

Processors with instructions for bfloat16 (AMX, AVX-512 BF16) compute it a few times faster than float32, others
slower, and a processor's name does not tell which. The measurement takes half a second and is saved in the cache,
so that only the first plan of a machine imports torch.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import time
from typing import Any

from forgebook.errors import StorageError
from forgebook.planning.hardware import cpu_share
from forgebook.runs.atomic import read_json, write_json
from forgebook.runs.download import cache_folder

__all__ = ["bfloat16_speedup", "choose_cpu_dtype"]

# float32 is exact, and the rest of a step (norms, the optimizer) gains less than its matrix products do.
WORTHWHILE = 1.3
# The products of a wider model are measured on a part of it: the ratio is the same, and the time half a second.
TOKENS, WIDEST, WIDEST_INNER = 256, 1024, 2816
ROUNDS, SECONDS = 3, 0.4


def choose_cpu_dtype(hidden: int, inner: int) -> tuple[str, str]:
    """Choose the dtype of a run on this machine's CPU, with the reason. hidden, inner: as in `bfloat16_speedup`."""
    speedup = bfloat16_speedup(hidden, inner)
    if speedup is None:
        return "float32", "exact; the speed of bfloat16 on this CPU is not measured, as torch is not installed"
    if speedup >= WORTHWHILE:
        return "bfloat16", f"measured on this CPU: its matrix products are {speedup:.1f} times faster than float32's"
    how = f"{1 / speedup:.1f} times slower" if speedup < 0.95 else f"only {max(speedup, 1):.1f} times faster"
    return "float32", f"exact; measured on this CPU: bfloat16's matrix products are {how}"


def bfloat16_speedup(hidden: int, inner: int) -> float | None:
    """Return how many times faster than float32 this machine's CPU multiplies bfloat16; None without torch.

    hidden, inner: the model's hidden and intermediate sizes. Measured once per machine, torch version and sizes.
    """
    hidden, inner = min(hidden, WIDEST), min(inner, WIDEST_INNER)
    try:
        torch_version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    key = f"{cpu_share(1).name}, torch {torch_version}, {hidden} x {inner}"
    file = cache_folder() / "bfloat16_speedups.json"
    known: dict[str, Any] = {}
    with contextlib.suppress(StorageError):
        known = read_json(file)
    if not isinstance(known.get(key), float):
        known[key] = round(_measure(hidden, inner), 2)
        with contextlib.suppress(OSError):  # it is measured again next time
            write_json(file, known)
    return known[key]


def _measure(hidden: int, inner: int) -> float:
    """Time the products of a linear layer, forward and backward, in both dtypes in turn; return the ratio."""
    import torch

    from forgebook.models import cpu_bfloat16

    through_float32 = cpu_bfloat16.is_needed()

    def seconds(dtype: torch.dtype) -> float:
        x, w, grad = (torch.ones(*size, dtype=dtype) for size in ((TOKENS, hidden), (hidden, inner), (TOKENS, inner)))
        started = time.thread_time()
        for a, b in ((x, w), (grad, w.T), (x.T, grad)):
            if dtype is torch.bfloat16 and through_float32:  # as training computes it on such a CPU
                (a.float() @ b.float()).bfloat16()
            else:
                a @ b
        return time.thread_time() - started

    # In one thread, by the time that it computes: what other processes do meanwhile does not count.
    threads, began = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(1)
    times: list[tuple[float, float]] = []
    while len(times) <= ROUNDS or time.perf_counter() - began < SECONDS:
        times.append((seconds(torch.float32), seconds(torch.bfloat16)))
    torch.set_num_threads(threads)
    float32, bfloat16 = (min(column) for column in zip(*times[1:], strict=True))  # the first round warms up
    return float32 / bfloat16
