"""What the benchmarks share: the memory that the tensors of a step take."""

import gc
from collections.abc import Callable

from forgebook.planning.hardware import TensorMemory


def step_peak(step: Callable[[], object]) -> int:
    """Return the bytes that tensors on the CPU hold at most during a step, beyond those that it begins with."""
    gc.collect()
    with TensorMemory() as before:
        pass
    with TensorMemory() as during:
        step()
    return during.peak - before.peak
