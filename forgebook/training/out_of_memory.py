"""An allocation that fails while a run trains: the error names the batch, its length and what the plan would change.

with explain_out_of_memory(config, workers, "in step 3", lengths): ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from forgebook.errors import ModelError, ResourceError
from forgebook.models.shapes import find_shape
from forgebook.planning.feasibility import cheapest_change, device_of
from forgebook.planning.memory import memory_of
from forgebook.planning.plan_report import format_bytes
from forgebook.training import distributed

if TYPE_CHECKING:
    from forgebook.config.schema import ResolvedConfig

__all__ = ["explain_out_of_memory", "is_out_of_memory"]

# What CUDA, NCCL, cuBLAS and torch's CPU allocator write; only the first has an exception class of its own.
TEXTS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory", "not enough memory")
# The change has to save at least this share of what the plan needs, since the plan itself is off by some percent.
SAVED = 0.1


@contextlib.contextmanager
def explain_out_of_memory(
    config: ResolvedConfig, workers: int, stage: str, longest: Callable[[], int], *, is_evaluation: bool = False
) -> Iterator[None]:
    """Raise ResourceError for a failed allocation within the block; other errors as they are.

    stage: where the run is, for the message. longest: counts the tokens of the longest sequence that was computed.
    is_evaluation: the batches are those of eval_batch_size_per_device.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        batch_key = "eval_batch_size_per_device" if is_evaluation else "train_batch_size_per_device"
        batch, length = getattr(config, batch_key), longest()
        if is_evaluation and batch > 1:
            advice = f"set {batch_key}={batch // 2}"
        else:
            advice = _planned_change(config, workers, length)
        device = "GPU" if torch.cuda.is_available() else "machine"
        raise ResourceError(
            f"the {device} ran out of memory {stage}, with a micro batch of {batch} and sequences of up to {length:,} "
            f"tokens ({batch_key}, context_length): {advice} ({distributed.describe(error)})"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is an allocation that failed, on the GPU or the host."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in TEXTS)


def _planned_change(config: ResolvedConfig, workers: int, length: int) -> str:
    """Describe what the plan would change to need less memory."""
    on_gpu = torch.cuda.is_available()
    with contextlib.suppress(ModelError):  # a model of unknown shape
        shape = find_shape(config.model_id)
        need = memory_of(config, shape, workers=workers, length=length, on_gpu=on_gpu)
        smaller = device_of(int((1 - SAVED) * need.total), on_gpu=on_gpu)
        changes, changed = cheapest_change(config, shape, workers, length, smaller)
        if changed is not None:
            return (
                f"set {' '.join(changes)}, which by the plan needs {format_bytes(changed.total)} per worker "
                f"instead of {format_bytes(need.total)}"
            )
    return "lower train_batch_size_per_device or context_length, or use more or larger GPUs"
