"""One optimizer step, for which the host never waits, and the figures of several steps, read at once.

ahead = Ahead(batches)                          micro batches, the next of which is made while this one is computed
queued = [queue_step(worker, ..., ahead)]       the device may still be computing it
steps, numbers = read_steps(accelerator, queued, names, numbers)
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from forgebook.training import fsdp, optimizers
from forgebook.training.objectives import Objective
from forgebook.training.profiler import phase
from forgebook.training.step_metrics import Step

if TYPE_CHECKING:
    from forgebook.training.setup import Worker

__all__ = ["Ahead", "Counts", "MicroBatch", "QueuedStep", "queue_step", "read_steps"]

# A micro batch on its device, and the reference model's log-probabilities of its examples.
MicroBatch = tuple[dict[str, Any], torch.Tensor | None]


class Ahead:
    """Micro batches in order, of which the next one is made as soon as `prepare` is called."""

    def __init__(self, batches: Iterator[MicroBatch]):
        self._batches = batches
        self._next: MicroBatch | None = None

    def prepare(self) -> None:
        """Make the next micro batch, if there is one and it is not made yet."""
        if self._next is None:
            self._next = next(self._batches, None)

    def take(self) -> MicroBatch:
        """Return the next micro batch."""
        self.prepare()
        taken, self._next = self._next, None
        if taken is None:
            raise ValueError("no micro batch is left")
        return taken


@dataclass(frozen=True)
class Counts:
    """What the host knows of a step's examples, over all workers.

    units: what its loss is the mean over. tokens, supervised: without padding, and in the loss.
    """

    units: int
    tokens: int
    supervised: int


@dataclass(frozen=True)
class QueuedStep:
    """A step whose figures may not have been computed yet.

    figures: this worker's sums of the loss and the task's metrics, and the norm of the gradient, float64 on the device;
    with a scaled loss also whether the step was skipped, and the scale.
    padded: its tokens with padding. begins, ends: of the step; passes: of each micro batch, when its forward pass
    begins, its backward pass begins and ends.
    """

    counts: Counts
    figures: torch.Tensor
    padded: int
    begins: Any
    ends: Any
    passes: list[tuple[Any, Any, Any]]


def queue_step(
    worker: Worker,
    objective: Objective,
    ahead: Ahead,
    counts: Counts,
    learning_rate: float,
    accumulation: int,
    max_grad_norm: float | None,
) -> QueuedStep:
    """Run forward, backward and the optimizer over this worker's micro batches of one global batch. Collective."""
    accelerator, deepspeed_engine = worker.accelerator, worker.deepspeed_engine
    begins = _mark(accelerator.device)
    optimizers.set_rate(worker.optimizer.param_groups, learning_rate)
    # DDP, FSDP2 and DeepSpeed average over workers, DeepSpeed over micro batches too. But the loss is the mean over all
    # supervised tokens (or pairs) of the global batch, on any worker: undo those averages and divide once.
    scale = accelerator.num_processes * (accumulation if deepspeed_engine else 1) / counts.units
    scaler = None if deepspeed_engine else worker.optimizer.scaler
    names = objective.metric_names
    sums = torch.zeros(1 + len(names), dtype=torch.float64, device=accelerator.device)
    padded, passes = 0, []
    for index in range(accumulation):
        batch, reference = ahead.take()
        is_last = index == accumulation - 1
        # DDP and FSDP2 sum gradients over the workers in the last micro batch alone; DeepSpeed decides that by itself.
        if worker.is_fsdp:
            fsdp.sync_gradients(worker.wrapped, is_last)
        syncs = deepspeed_engine or worker.is_fsdp or is_last
        with contextlib.nullcontext() if syncs else accelerator.no_sync(worker.wrapped):
            forward = _mark(accelerator.device)
            with phase("forward"):
                measurement = objective.measure(worker.wrapped, batch, reference)
            backward = _mark(accelerator.device)
            # DeepSpeed's optimizer runs within the last backward.
            with phase("backward, optimizer" if deepspeed_engine else "backward"):
                if deepspeed_engine:
                    accelerator.deepspeed_engine_wrapped.backward(measurement.loss * scale, sync_gradients=is_last)
                elif scaler is not None:
                    scaler.scale(measurement.loss * scale).backward()
                else:
                    (measurement.loss * scale).backward()
            passes.append((forward, backward, _mark(accelerator.device)))
        sums += measurement.figures(names)
        padded += batch["input_ids"].numel() // worker.sequence_parallel
    if deepspeed_engine:  # its optimizer ran within the last backward
        gradient = deepspeed_engine.get_global_grad_norm() or 0.0
    elif scaler is not None:
        with phase("optimizer"):
            gradient = worker.optimizer.scaled_step(max_grad_norm or math.inf)
            worker.optimizer.zero_grad()
    else:
        # Without max_grad_norm, too: the norm is a metric, and a gradient of zero ends the run.
        with phase("gradient norm"):
            clip = fsdp.clip_gradients if worker.is_fsdp else torch.nn.utils.clip_grad_norm_
            gradient = clip(worker.optimizer.trained, max_grad_norm or math.inf)
        with phase("optimizer"):
            worker.optimizer.step()
            worker.optimizer.zero_grad()
    norm = torch.as_tensor(gradient, dtype=torch.float64, device=accelerator.device).detach()
    return QueuedStep(counts, torch.cat([sums, norm.reshape(-1)]), padded, begins, _mark(accelerator.device), passes)


def read_steps(
    accelerator: Accelerator, queued: Sequence[QueuedStep], names: Sequence[str], numbers: Sequence[float]
) -> tuple[list[Step], list[float]]:
    """Wait for some steps and return them, summed over all workers; and rank 0's `numbers`, on every rank. Collective.

    names: of the task's metrics. All is read from the device at once, after one sum over the workers.
    """
    is_main = accelerator.is_main_process
    figures = torch.stack([step.figures for step in queued])
    if not is_main:
        figures[:, 1 + len(names) :] = 0  # the norm of the gradient and what follows it are the same everywhere
    host = [*(step.padded for step in queued), *(numbers if is_main else [0.0] * len(numbers))]
    own = torch.cat([figures.flatten(), torch.tensor(host, dtype=torch.float64).to(accelerator.device)])
    values = (accelerator.reduce(own, "sum") if accelerator.num_processes > 1 else own).tolist()
    width = figures.shape[1]
    padded = values[len(queued) * width :][: len(queued)]
    steps = [_step(step, values[k * width : (k + 1) * width], int(padded[k]), names) for k, step in enumerate(queued)]
    return steps, values[len(values) - len(numbers) :]


def _step(queued: QueuedStep, figures: list[float], padded: int, names: Sequence[str]) -> Step:
    """Put together what the host knows of a step and what it has read from the device."""
    loss, metrics, (gradient, *scaling) = figures[0], figures[1 : 1 + len(names)], figures[1 + len(names) :]
    is_skipped, loss_scale = scaling or (0.0, None)
    return Step(
        loss=loss / queued.counts.units,
        gradient=gradient,
        forward_seconds=sum(_seconds(forward, backward) for forward, backward, _ in queued.passes),
        backward_seconds=sum(_seconds(backward, end) for _, backward, end in queued.passes),
        seconds=_seconds(queued.begins, queued.ends),
        tokens=queued.counts.tokens,
        supervised=queued.counts.supervised,
        padded=padded,
        is_skipped=bool(is_skipped),
        loss_scale=loss_scale,
        task={name: value / queued.counts.units for name, value in zip(names, metrics, strict=True)},
    )


def _mark(device: torch.device) -> Any:
    """Note this moment of the device's queue, without waiting for it: an event of a GPU, or the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Any, end: Any) -> float:
    """Return the seconds between two marks that the device has passed."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
