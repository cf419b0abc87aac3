"""What one optimizer step measured, and the averages over an epoch, under LLMForge's metric names.

step = Step(...)              one optimizer step, summed over all workers
check_step(step, number)      raises where the run is worth nothing
sums = EpochSums()            sums.add(step) after each step; sums.metrics(), sums.totals()
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from forgebook.data import batching
from forgebook.errors import TrainingError
from forgebook.planning import hardware

if TYPE_CHECKING:
    from forgebook.training.setup import Worker

__all__ = ["EpochSums", "Step", "StepMemory", "check_step"]

# float16's range is reached from 2^16 by one step that overflows for each power of two; below 1 nothing is gained.
SMALLEST_LOSS_SCALE = 1.0


@dataclass(frozen=True)
class Step:
    """One optimizer step over all workers.

    loss: the mean over the supervised tokens (or pairs) of the global batch. gradient: its norm before clipping.
    tokens, supervised, padded: tokens without padding, in the loss, and with padding. task: the task's
    metrics besides its loss. is_skipped, loss_scale: with float16, whether a gradient overflowed, so that nothing was
    updated, and what the loss was multiplied by.
    """

    loss: float
    gradient: float
    forward_seconds: float
    backward_seconds: float
    seconds: float
    tokens: int
    supervised: int
    padded: int
    task: dict[str, float] = field(default_factory=dict)
    is_skipped: bool = False
    loss_scale: float | None = None

    def metrics(self) -> dict[str, float]:
        """Return the figures of this step alone, as a line of metrics.jsonl names them."""
        scaling: dict[str, float] = {} if self.loss_scale is None else {"loss_scale": self.loss_scale}
        return {
            "train_loss_batch": self.loss,
            **({"skipped": 1} if self.is_skipped else {"grad_norm": self.gradient}),
            **scaling,
            "fwd_time": self.forward_seconds,
            "bwd_time": self.backward_seconds,
            "train_time_per_step": self.seconds,
            "trained_tokens_this_iter": self.tokens,
            "supervised_tokens_this_iter": self.supervised,
            "padded_tokens_this_iter": self.padded,
            "padding_share": round(max(0.0, 1 - self.tokens / self.padded), 4),
            "trained_tokens_throughput_this_iter": self.tokens / self.seconds,
            **self.task,
        }


def check_step(step: Step, number: int, *, is_first: bool) -> None:
    """Raise TrainingError if step `number` has a loss or gradient that is not finite, or the first one no gradient.

    is_first: that updates, of this process. A zero gradient later on may be a batch that is learned already. A gradient
    beyond float16's range is no error: the step is skipped, and the next one has a smaller scale; down to a limit.
    """
    if not math.isfinite(step.loss) or not (step.is_skipped or math.isfinite(step.gradient)):
        is_float16 = step.loss_scale is not None
        raise TrainingError(
            f"step {number}: the loss is {step.loss}, the gradient norm {step.gradient}: training has diverged"
            + ", or the model's values exceed float16 (65,504): set dtype: float32 or bfloat16" * is_float16
            + ". Lower learning_rate, or look at the examples of this step; the last good checkpoint is saved"
        )
    if step.is_skipped and step.loss_scale is not None and step.loss_scale < SMALLEST_LOSS_SCALE:
        raise TrainingError(
            f"step {number}: the gradients overflow float16 however small the loss scale is ({step.loss_scale:g}): set "
            "dtype: float32 or bfloat16"
        )
    if step.is_skipped:
        return
    if is_first and step.gradient == 0:
        raise TrainingError(
            "the gradient of the first step is zero: the trainable parameters do not affect the loss "
            "(a frozen adapter, or target_modules that are never called?)"
        )


@dataclass
class EpochSums:
    """Sums over an epoch's steps, saved with the training state so that a resumed run reports the same averages.

    untimed_seconds, untimed_tokens: of the first step of the epoch and of each resumed process. It compiles, allocates
    and waits for the slowest worker, so that throughput leaves it out.
    """

    steps: int = 0
    loss: float = 0.0
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    seconds: float = 0.0
    tokens: dict[str, int] = field(default_factory=dict)
    untimed_seconds: float = 0.0
    untimed_tokens: dict[str, int] = field(default_factory=dict)
    is_timed: bool = False

    def add(self, step: Step) -> None:
        """Add the next step."""
        counts = {"trained": step.tokens, "supervised": step.supervised, "padded": step.padded}
        self.steps += 1
        self.loss += step.loss
        self.forward_seconds += step.forward_seconds
        self.backward_seconds += step.backward_seconds
        self.seconds += step.seconds
        self.tokens = _added(self.tokens, counts)
        if not self.is_timed:
            self.untimed_seconds += step.seconds
            self.untimed_tokens = _added(self.untimed_tokens, counts)
            self.is_timed = True

    def metrics(self) -> dict[str, float]:
        """Return the mean loss, and tokens per second: without padding (trained), supervised, and with padding."""
        seconds, left_out = self.seconds - self.untimed_seconds, self.untimed_tokens
        if seconds <= 0:  # the first step is all there is
            seconds, left_out = self.seconds, {}
        throughput = {
            f"{kind}_tokens_throughput": (count - left_out.get(kind, 0)) / seconds
            for kind, count in self.tokens.items()
        }
        return {"avg_train_loss_epoch": self.loss / self.steps, **throughput}

    def totals(self) -> dict[str, float]:
        """Return the epoch's averages and its seconds so far, as an evaluation reports them."""
        return {
            "avg_train_loss_epoch": self.loss / self.steps,
            "avg_fwd_time_per_epoch": self.forward_seconds / self.steps,
            "avg_bwd_time_per_epoch": self.backward_seconds / self.steps,
            "train_time_per_epoch": self.seconds,
        }

    def state(self) -> dict[str, Any]:
        """Return the sums as JSON values; `EpochSums(**state)` in another process continues them."""
        return asdict(self) | {"is_timed": False}


def _added(totals: dict[str, int], counts: dict[str, int]) -> dict[str, int]:
    return {kind: totals.get(kind, 0) + count for kind, count in counts.items()}


class StepMemory:
    """Measure the memory of the largest step that a process runs: the one with the most tokens, padding included.

    On a GPU the allocator keeps this statistic. On a CPU the tensors of that one step are measured, since the resident
    memory of the process is mostly libraries.
    """

    def __init__(self, worker: Worker):
        self._worker = worker
        self._is_gpu = worker.accelerator.device.type == "cuda"
        self._largest: int | None = None  # steps from the first one
        self._count = 0
        self._tensors: hardware.TensorMemory | None = None

    def measured(
        self, lengths: np.ndarray, steps: list[list[batching.Sequence]]
    ) -> contextlib.AbstractContextManager[Any]:
        """Return a context for the next step, which measures it if it is the largest.

        lengths: of all examples. steps: the next one and those after it in its epoch.
        """
        if self._largest is None:
            # An epoch's last step may have a few sequences only, however long.
            sizes = [len(step) * max(lengths[sequence].sum() for sequence in step) for step in steps]
            self._largest = int(np.argmax(sizes))
        self._count += 1
        if self._is_gpu or self._count != self._largest + 1:
            return contextlib.nullcontext()
        # After a step, DDP's buckets are the only trace of the gradients, and Python does not see them.
        worker = self._worker
        is_ddp = worker.deepspeed_engine is None and not worker.is_fsdp
        has_buckets = worker.accelerator.num_processes > 1 and is_ddp
        trained = [p for p in self._worker.model.parameters() if p.requires_grad and p.grad is None]
        hidden = has_buckets * sum(p.numel() * p.element_size() for p in trained)
        self._tensors = hardware.TensorMemory(hidden, self._filled_buckets())
        return self._tensors

    def _filled_buckets(self) -> dict[int, int]:
        """Return the bytes of a bucket in which DeepSpeed reduces gradients, and how many of them it ever fills."""
        deepspeed_engine = self._worker.deepspeed_engine
        if deepspeed_engine is None:
            return {}
        trained = [p for p in self._worker.model.parameters() if p.requires_grad]
        size = deepspeed_engine.zero_reduce_bucket_size() * trained[0].element_size()
        return {size: min(size, sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in trained))}

    def step_peak(self) -> int:
        """Return the bytes of tensors at the peak of the largest step; 0 where it was not measured."""
        if self._is_gpu:
            return torch.cuda.max_memory_allocated()
        return self._tensors.peak if self._tensors else 0

    def process_peak(self) -> int:
        """Return the peak of GPU memory, or on a CPU of the process's resident memory (bytes)."""
        return torch.cuda.max_memory_allocated() if self._is_gpu else hardware.resident_memory()[1]
