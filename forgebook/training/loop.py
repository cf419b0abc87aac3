"""The loop, once, for every way to run it: one process or many, plain DDP or DeepSpeed ZeRO 1-3.

`train_loop(config, run)` runs in each worker (forgebook.launch.ray_train starts them). It reads tokenised rows from the
run folder, writes metrics, checkpoints and its own training state there, and continues from the newest state
it finds: a restarted worker and a second `python main.py` are the same case.
"""

from __future__ import annotations

import collections
import contextlib
import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from forgebook.config.parse import FinetuneConfig
from forgebook.data import batching as batches
from forgebook.data import token_store as tokens
from forgebook.data.token_store import Tokens
from forgebook.errors import ResourceError, StoppedError, TrainingError
from forgebook.planning import hardware
from forgebook.planning.plan import running_figures
from forgebook.runs import atomic
from forgebook.runs.metrics import Progress
from forgebook.runs.run import Run
from forgebook.training import (  # fmt: skip
    checkpoints,
    classification,
    distributed,
    objectives,
    optimizers,
    remote_run,
    signals,
)
from forgebook.training.losses import check_isolation
from forgebook.training.preference import needs_reference
from forgebook.training.reference import StagedReference, reference_logps
from forgebook.training.setup import Worker, base_overrides, make_accelerator, make_worker, prompt_format_text

__all__ = ["evaluation_steps", "total_steps", "train_loop"]

# What a task measures beside its loss: means over the pairs of a batch.
TASK_SUMS = {"preference_tuning": ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")}


def train_loop(config: FinetuneConfig, run: Run) -> dict[str, Any]:
    """Fine-tune as `config` says; return what summary.json reports, the same on every rank.

    config: with context length, batch sizes and epochs resolved. Collective: call it once per worker, inside
    an initialised process group or none.

    Raises TrainingError if the loss is not finite or the gradient is zero; CheckpointError; ModelError; StoppedError
    once the state is saved, if the run is asked to stop.
    """
    # (1) Place. The accelerator comes first: under ZeRO-3, DeepSpeed's config must exist before the weights.
    accelerator = make_accelerator(config)
    remote_run.fetch(run.home)
    torch.manual_seed(config.seed)
    hardware.forget_peak()
    before, gpu = hardware.resident_memory()[0], hardware.this_gpu()
    saved = checkpoints.latest_resume(run.resume)
    place = saved[1] if saved else {"step": 0, "trained_tokens": 0, "seconds": 0.0, "losses": {}}
    progress = Progress(run, place["step"], silent=not accelerator.is_main_process)
    began = time.perf_counter() - place["seconds"]

    # (2) Data: mapped into memory, tokenised before any worker started.
    train = tokens.load_view(run.tokens / "train.npz")
    valid = tokens.load_view(run.tokens / "valid.npz") if config.valid_path else None
    sequences = batches.make_sequences(train, config)
    steps_per_epoch = math.ceil(len(sequences) / config.global_batch_size)
    last_step = total_steps(config, steps_per_epoch)

    # (3) Model, optimizer, and the learning rate of every step.
    compiles = config.deepspeed is not None and not saved
    stage = "loading the model" if saved else "loading the model, rehearsing a checkpoint"
    progress.stage(stage + compiles * "; DeepSpeed compiles an extension at its first use (a minute)")
    worker = make_worker(config, accelerator)
    # New weights are the same on every rank; dropout from here on is each rank's own.
    torch.manual_seed(config.seed + accelerator.process_index)
    rates = optimizers.learning_rates(
        config.lr_scheduler_type, config.learning_rate, config.num_warmup_steps, last_step
    )
    parameters, trainable = worker.parameters
    if config.padding == "packed":
        check_isolation(worker.wrapped, accelerator.device)
    train_set = _with_reference(worker, run, train, "training", progress)
    valid_set = _with_reference(worker, run, valid, "validation", progress)

    # (4) Continue from the last complete state, or rehearse a save: a full disk shows now, not after the night.
    beside = {
        "prompt_format": prompt_format_text(config),
        "overrides": base_overrides(config),
        "start": checkpoints.keep_start(worker.model, run.adapter_start, is_continued=bool(saved)),
    }
    if saved:
        is_elastic = config.min_devices is not None
        checkpoints.load_resume(*saved, worker.model, worker.optimizer, worker.engine, is_elastic=is_elastic)
    else:
        checkpoints.rehearse(
            worker.model, worker.tokenizer, run.checkpoints, copies=config.num_checkpoints_to_keep, **beside
        )
    if config.eval_first and valid_set and not saved:
        progress.evaluation(step=0, epoch=0, **_evaluate(worker, valid_set))
    step, losses, trained_tokens = place["step"], dict(place["losses"]), place["trained_tokens"]
    progress.stage(
        "training", steps=last_step, steps_per_epoch=steps_per_epoch, start=step, workers=accelerator.num_processes,
        parameters=parameters, trainable_parameters=trainable,
    )  # fmt: skip

    # (5) Steps, counted from 1 over the whole run. Their rows depend on the seed and the epoch alone.
    events = evaluation_steps(config, steps_per_epoch, last_step)
    flops_of_token = atomic.read_json(run.plan)["flops_per_token"] if run.plan.exists() else None
    epoch_so_far, saved_at = _EpochSoFar(), time.perf_counter()
    while step < last_step:
        epoch, index = divmod(step, steps_per_epoch)
        if index == 0 or not epoch_so_far.batches:
            epoch_so_far = _EpochSoFar(
                batches.epoch_batches(train, sequences, config.global_batch_size, config.seed, epoch)
            )
        done = _train_step(worker, train_set, epoch_so_far.batches[index], rates[step])
        step += 1
        _check(step, done, is_first=step == place["step"] + 1)
        epoch_so_far.add(done)
        trained_tokens += done.tokens

        # (6) Report.
        paced, seconds = epoch_so_far.metrics(), time.perf_counter() - began
        world, pace = accelerator.num_processes, paced["trained_tokens_throughput"]
        progress.step(
            step=step, total_trained_steps=step, epoch=epoch + 1, num_iterations=steps_per_epoch,
            learning_rate=rates[step - 1], **done.metrics(), **paced, trained_tokens=trained_tokens,
            time_total_s=seconds, **running_figures(gpu, world, flops_of_token, pace, seconds),
        )  # fmt: skip

        # (7) Evaluate, then save. Between evaluations only the training state is saved, by the clock.
        if step in events:
            name = events[step]
            found = _evaluate(worker, valid_set) if valid_set else {}
            if worker.engine:  # ZeRO-3 may be fetching the next batch's first weights, which no save can gather
                worker.engine.empty_partition_cache()
            # A warm-up begins at 0: a checkpoint after its first step alone is as it was made.
            moved = any(rates[:step]) or step == last_step
            folder = run.checkpoints / name
            checkpoints.save_checkpoint(worker.model, worker.tokenizer, folder, trained=moved, **beside)
            losses[name] = found.get("eval_loss")
            remote_run.bring_home(run.home, run.checkpoints / name)
            best = _keep_best(config, run, losses)
            progress.evaluation(
                step=step, epoch=epoch + 1, **found, **epoch_so_far.totals(),
                checkpoint_dir_name=name, is_best=name == best,
            )  # fmt: skip
        elapsed, is_stopping = _agreed(worker, time.perf_counter() - saved_at, run)
        is_due = config.save_state_minutes and elapsed > 60 * config.save_state_minutes
        if step in events or is_due or is_stopping:
            seconds = time.perf_counter() - began
            place = {"step": step, "trained_tokens": trained_tokens, "seconds": seconds, "losses": losses}
            checkpoints.save_resume(run.resume, place, worker.model, worker.optimizer, worker.engine, run.home)
            saved_at = time.perf_counter()
        if is_stopping and step < last_step:
            raise StoppedError(f"stopped by SIGTERM; step {step} is saved, and the same command continues after it")

    best = _keep_best(config, run, losses)
    return {
        "best_checkpoint": f"checkpoints/{best}",
        "eval_loss": losses[best],
        "perplexity": None if config.task == "preference_tuning" else _perplexity(losses[best]),
        "steps": step,
        "epochs": round(step / steps_per_epoch, 4),
        "trained_tokens": trained_tokens,
        "training_seconds": time.perf_counter() - began,
        "parameters": parameters,
        "trainable_parameters": trainable,
        "workers": accelerator.num_processes,
        "zero_stage": worker.engine.zero_optimization_stage() if worker.engine else None,
        "device": accelerator.device.type,
        "device_name": gpu.name if gpu else hardware.cpu_share(1).name,
        "peak_memory_bytes_per_worker": _peak_memory(worker),
        "memory_before_bytes_per_worker": _gathered(worker, 0 if gpu else before),
    }


def total_steps(config: FinetuneConfig, steps_per_epoch: int) -> int:
    """Count the optimizer steps of a run."""
    steps = config.num_epochs * steps_per_epoch
    return min(steps, config.max_steps) if config.max_steps else steps


def evaluation_steps(config: FinetuneConfig, steps_per_epoch: int, last_step: int) -> dict[int, str]:
    """Map each step after which to evaluate and save to its checkpoint's name; the last step always is one."""
    frequency = config.checkpoint_and_evaluation_frequency
    by_steps = frequency is not None and frequency.unit == "steps"
    every = (frequency.frequency if frequency else 1) * (1 if by_steps else steps_per_epoch)
    steps = [*range(every, last_step, every), last_step]
    if by_steps or last_step % steps_per_epoch:
        return {step: f"step-{step}" for step in steps}
    return {step: f"epoch-{step // steps_per_epoch}" for step in steps}


# Rows with what the task compares them with ------------------------------------------------------------


@dataclass(frozen=True)
class _Set:
    """Rows to train on or to evaluate; with the reference model's log-probabilities [rows], for preferences."""

    rows: Tokens
    reference: np.ndarray | StagedReference | None = None

    def batch(self, worker: Worker, part: list[batches.Sequence], width: int | None = None, packed: bool = False):
        """Make the tensors of some sequences, on the worker's device."""
        made = batches.collate(self.rows, part, worker.tokenizer.pad_token_id, width, packed=packed)
        return {name: tensor.to(worker.accelerator.device) for name, tensor in made.items()}

    def reference_of(self, worker: Worker, part: list[batches.Sequence]) -> torch.Tensor | None:
        """Pick the reference's figures for the rows of a batch, in its order."""
        if self.reference is None or not part:
            return None
        return torch.from_numpy(self.reference[np.concatenate(part)]).to(worker.accelerator.device)


def _with_reference(worker: Worker, run: Run, rows: Tokens | None, name: str, progress: Progress) -> _Set | None:
    """Add what the task compares with: once, before the first step, or as an earlier start of the run kept it."""
    config = worker.config
    if rows is None or config.task != "preference_tuning" or not needs_reference(config.preference_tuning_config.loss):
        return None if rows is None else _Set(rows)
    processor = config.preference_tuning_config.logprob_processor_scaling_config
    if processor and name == "training" and config.num_devices:
        with distributed.raised_everywhere():
            if run.home:
                raise ResourceError(
                    "logprob_processor_scaling_config needs a disk that all machines share, and one of them does not "
                    "see the run's folder: set storage_path to such a disk, or leave the block out"
                )
        return _Set(rows, StagedReference(config, run, rows))
    progress.stage(f"computing the reference model's log-probabilities of the {name} pairs")
    batch_size = 2 * ((processor and processor.batch_size) or config.eval_batch_size_per_device)
    kept = run.tokens / f"reference-{name}.npy"
    pad_id = worker.tokenizer.pad_token_id
    return _Set(rows, reference_logps(worker.wrapped, worker.accelerator, rows, batch_size, pad_id, kept))


# One step ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """What one optimizer step was: loss is the mean over the supervised tokens of the global batch."""

    loss: float
    gradient: float
    forward_seconds: float
    backward_seconds: float
    seconds: float
    tokens: int
    supervised: int
    padded: int
    task: dict[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        return {
            "train_loss_batch": self.loss,
            "grad_norm": self.gradient,
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


def _train_step(worker: Worker, train: _Set, sequences: list[batches.Sequence], rate: float) -> _Step:
    """Forward, backward and update over the rows of one global batch."""
    config, accelerator = worker.config, worker.accelerator
    started = time.perf_counter()
    for group in worker.optimizer.param_groups:
        group["lr"] = rate
    world = accelerator.num_processes
    rows = np.concatenate(sequences)
    units = objectives.count_units(config, train.rows, rows)
    # Fewer workers than num_devices (min_devices) take more micro batches each: the same rows make an update.
    accumulation = math.ceil(config.gradient_accumulation_steps * max(1, config.num_devices) / world)
    micros = batches.split_batch(sequences, train.rows, world, accumulation)
    micros = micros[accelerator.process_index]
    # DDP and DeepSpeed average over workers, DeepSpeed over micro batches too. The loss is to be the mean over
    # all supervised tokens (or pairs) of the global batch, wherever they are: so undo their averages, divide once.
    scale = world * (len(micros) if worker.engine else 1) / units
    sums: dict[str, float] = collections.Counter()
    forward_seconds = backward_seconds = 0.0
    for k, part in enumerate(micros):
        batch = train.batch(worker, part, _width(config), packed=config.padding == "packed")
        is_last = k == len(micros) - 1
        with contextlib.nullcontext() if worker.engine or is_last else accelerator.no_sync(worker.wrapped):
            begun = _now(accelerator)
            found = objectives.measure(config, worker.wrapped, batch, train.reference_of(worker, part))
            halfway = _now(accelerator)
            if worker.engine:
                accelerator.deepspeed_engine_wrapped.backward(found.loss * scale, sync_gradients=is_last)
            else:
                (found.loss * scale).backward()
            ended = _now(accelerator)
        forward_seconds += halfway - begun
        backward_seconds += ended - halfway
        sums.update({"loss": float(found.loss), "padded": batch["input_ids"].numel()})
        sums.update({name: float(value) for name, value in found.sums.items()})
    if worker.engine:  # its update was part of the last backward
        gradient = float(worker.engine.get_global_grad_norm() or 0.0)
    else:
        trained = [p for p in worker.model.parameters() if p.requires_grad]
        gradient = float(torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm or math.inf))
        worker.optimizer.step()
        worker.optimizer.zero_grad()
    totals = _summed(worker, sums)
    return _Step(
        loss=totals.pop("loss") / units,
        gradient=gradient,
        forward_seconds=forward_seconds,
        backward_seconds=backward_seconds,
        seconds=time.perf_counter() - started,
        tokens=int(train.rows.lengths[rows].sum()),
        supervised=int(train.rows.supervised[rows].sum()),
        padded=int(totals.pop("padded")),
        task={name: value / units for name, value in totals.items()},
    )


def _summed(worker: Worker, sums: dict[str, float]) -> dict[str, float]:
    """Add sums up over the ranks; one that had nothing to measure lacks names, and counts as 0."""
    names = ["loss", "padded", *TASK_SUMS.get(worker.config.task, ())]
    shared = torch.tensor([sums.get(name, 0.0) for name in names], dtype=torch.float64)
    shared = worker.accelerator.reduce(shared.to(worker.accelerator.device), "sum")
    return dict(zip(names, shared.tolist(), strict=True))


def _check(step: int, done: _Step, is_first: bool) -> None:
    """Stop at the first sign that the run is worth nothing."""
    if not math.isfinite(done.loss) or not math.isfinite(done.gradient):
        raise TrainingError(
            f"step {step}: the loss is {done.loss}, the gradient norm {done.gradient}: nothing more can be learnt. "
            "Lower learning_rate, or look at the rows of this step; the last good checkpoint is kept"
        )
    if is_first and done.gradient == 0:
        raise TrainingError(
            "the gradient of the first step is zero: the trainable parameters do not touch the loss "
            "(a frozen adapter, or target_modules that are never called?)"
        )


@torch.no_grad()
def _evaluate(worker: Worker, valid: _Set) -> dict[str, float]:
    """Measure the mean loss over the validation rows, and what the task measures beside it."""
    config, accelerator = worker.config, worker.accelerator
    started = time.perf_counter()
    batch_size = config.eval_batch_size_per_device * accelerator.num_processes
    sequences = batches.single_sequences(valid.rows, config)
    sequences.sort(key=lambda rows: -int(valid.rows.lengths[rows].sum()))
    labels = None
    if config.task == "classification":
        labels = classification.label_ids(worker.tokenizer, config.classifier_config.label_tokens)
    sums: dict[str, float] = collections.Counter()
    predictions: list[tuple[list[float], int]] = []
    worker.wrapped.eval()
    for start in range(0, len(sequences), batch_size):
        dealt = batches.split_batch(sequences[start : start + batch_size], valid.rows, accelerator.num_processes, 1)
        part = dealt[accelerator.process_index][0]
        reference = valid.reference_of(worker, part)
        found = objectives.measure(config, worker.wrapped, valid.batch(worker, part), reference, labels)
        sums.update({"loss": float(found.loss), **{name: float(value) for name, value in found.sums.items()}})
        predictions += found.predictions
    worker.wrapped.train()
    totals = _summed(worker, sums)
    units = objectives.count_units(config, valid.rows, np.arange(len(valid.rows)))
    loss = totals["loss"] / units
    measured = {"eval_loss": loss}
    if config.task != "preference_tuning":  # whose loss is no token's
        measured["perplexity"] = _perplexity(loss)
    measured |= {f"eval_{name}": totals[name] / units for name in TASK_SUMS.get(config.task, ())}
    if labels is not None:
        everyones = gather_object(predictions)
        probabilities, truth = (np.array(column) for column in zip(*everyones, strict=True))
        measured |= classification.scores(probabilities, truth, config.classifier_config.eval_metrics)
    return {**measured, "eval_time_per_epoch": time.perf_counter() - started}


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else math.exp(min(loss, 700.0))


def _width(config: FinetuneConfig) -> int | None:
    return config.context_length if config.padding == "max_length" else None


def _now(accelerator: Accelerator) -> float:
    """Read the clock when the device has done what it was given."""
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _agreed(worker: Worker, seconds: float, run: Run) -> tuple[float, bool]:
    """Take rank 0's measure of time, and its word on whether to stop, so that all ranks decide alike."""
    own = [0.0, 0.0]
    if worker.accelerator.is_main_process:
        own = [seconds, float(remote_run.at_home(run.home, signals.is_asked, run.folder))]
    if worker.accelerator.num_processes == 1:
        return own[0], bool(own[1])
    shared = worker.accelerator.reduce(torch.tensor(own, device=worker.accelerator.device), "sum").tolist()
    return shared[0], bool(shared[1])


def _keep_best(config: FinetuneConfig, run: Run, losses: dict[str, float | None]) -> str:
    """Delete all but the best checkpoints where they are kept; every rank learns the best one's name."""
    home = run.home if distributed.is_main() else None
    return remote_run.at_home(home, checkpoints.keep_best, run.checkpoints, losses, config.num_checkpoints_to_keep)


def _peak_memory(worker: Worker) -> list[int]:
    """List each worker's peak: of GPU memory, or on a CPU of the process's resident memory (bytes)."""
    if worker.accelerator.device.type == "cuda":
        return _gathered(worker, torch.cuda.max_memory_allocated())
    return _gathered(worker, hardware.resident_memory()[1])


def _gathered(worker: Worker, size: int) -> list[int]:
    """List a number of every worker."""
    shared = torch.tensor([size], dtype=torch.int64, device=worker.accelerator.device)
    return worker.accelerator.gather(shared).tolist()


@dataclass
class _EpochSoFar:
    """Running sums over an epoch's steps, reported under LLMForge's names."""

    batches: list[list[batches.Sequence]] = field(default_factory=list)
    steps: int = 0
    loss: float = 0.0
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    seconds: float = 0.0
    tokens: dict[str, int] = field(default_factory=collections.Counter)
    start: tuple[dict[str, int], float] = ({}, 0.0)

    def add(self, step: _Step) -> None:
        self.steps += 1
        self.loss += step.loss
        self.forward_seconds += step.forward_seconds
        self.backward_seconds += step.backward_seconds
        self.seconds += step.seconds
        kinds = {"trained": step.tokens, "supervised": step.supervised, "padded": step.padded}
        self.tokens.update(kinds)
        if self.steps == 1:
            # The first step compiles, allocates and waits for the slowest worker: not part of the pace.
            self.start = (kinds, step.seconds)

    def metrics(self) -> dict[str, float]:
        """Tell the mean loss, and tokens per second: real ones (trained), supervised ones, and with padding."""
        first, seconds = self.start if self.steps > 1 else ({}, 0.0)
        pace = {
            f"{kind}_tokens_throughput": (count - first.get(kind, 0)) / (self.seconds - seconds)
            for kind, count in self.tokens.items()
        }
        return {"avg_train_loss_epoch": self.loss / self.steps, **pace}

    def totals(self) -> dict[str, float]:
        return {
            "avg_train_loss_epoch": self.loss / self.steps,
            "avg_fwd_time_per_epoch": self.forward_seconds / self.steps,
            "avg_bwd_time_per_epoch": self.backward_seconds / self.steps,
            "train_time_per_epoch": self.seconds,
        }
