"""The loop, once, for every way to run it: one process or many, plain DDP or DeepSpeed ZeRO 1-3.

`train_loop(config, run)` runs in each worker (forgebook.launch.ray_train starts them). It reads tokenised rows from the
run folder, writes metrics, checkpoints and its own training state there, and continues from the newest state
it finds: a restarted worker and a second `python main.py` are the same case.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from forgebook.config.blocks import ClassifierConfig
from forgebook.config.schema import ResolvedConfig
from forgebook.data import batching as batches
from forgebook.data import token_store as tokens
from forgebook.data.token_store import Tokens
from forgebook.errors import StoppedError
from forgebook.planning import hardware, schedule
from forgebook.planning.plan import running_figures
from forgebook.runs import atomic
from forgebook.runs.metrics import Progress
from forgebook.runs.run import Run
from forgebook.training import (  # fmt: skip
    checkpoints,
    classification,
    distributed,
    optimizers,
)
from forgebook.training.losses import check_isolation
from forgebook.training.objectives import Objective
from forgebook.training.reference import ExampleSet, with_reference
from forgebook.training.setup import Worker, base_overrides, make_accelerator, make_worker, prompt_format_text
from forgebook.training.step_metrics import EpochSums, Step, check_step

__all__ = ["train_loop"]

# Takes the figures of a step, and the name of the checkpoint that was saved after it, if one was. Collective.
Report = Callable[[dict[str, Any], str | None], None]
# Between the steps reported when nothing is evaluated: Ray takes reports every two seconds, and workers wait for it.
REPORT_SECONDS = 10.0
# What a worker sums over its micro batches: the loss, tokens with padding, and what the task measures.
Sums = collections.Counter[str]


def train_loop(config: ResolvedConfig, run: Run, report: Report = lambda metrics, checkpoint: None) -> dict[str, Any]:
    """Fine-tune as `config` says; return what summary.json reports, the same on every rank.

    config: with context length, batch sizes and epochs resolved. report: called after each evaluation, and every
    REPORT_SECONDS between, on all ranks. Collective: call it once per worker, inside an initialized process group or
    none.

    Raises TrainingError if the loss is not finite or the gradient is zero; CheckpointError; ModelError; StoppedError
    once the state is saved, if the run is asked to stop.
    """
    # (1) Place. The accelerator comes first: under ZeRO-3, DeepSpeed's config must exist before the weights.
    accelerator = make_accelerator(config)
    torch.manual_seed(config.seed)
    hardware.reset_peak()
    before, gpu = hardware.resident_memory()[0], hardware.this_gpu()
    saved = checkpoints.latest_resume(run.resume)
    place: dict[str, Any] = saved[1] if saved else {"step": 0, "trained_tokens": 0, "seconds": 0.0, "losses": {}}
    progress = Progress(run, place["step"], silent=not accelerator.is_main_process)
    began = time.perf_counter() - place["seconds"]

    # (2) Data: mapped into memory, tokenised before any worker started.
    train = tokens.load_view(run.tokens / "train.npz")
    valid = tokens.load_view(run.tokens / "valid.npz") if config.valid_path else None
    sequences = batches.make_sequences(train, config.padding, config.context_length, batches.group_size(config.task))
    steps_per_epoch = schedule.steps_per_epoch(len(sequences), config.global_batch_size)
    last_step = schedule.total_steps(config.num_epochs, steps_per_epoch, config.max_steps)

    # (3) Model, optimizer, and the learning rate of every step.
    compiles = config.deepspeed is not None and not saved
    stage = "loading the model" if saved else "loading the model, rehearsing a checkpoint"
    progress.stage(stage + compiles * "; DeepSpeed compiles an extension at its first use (a minute)")
    worker = make_worker(config, accelerator)
    # New weights, as an adapter's, are the same on every rank; dropout from here on is each rank's own.
    torch.manual_seed(config.seed + accelerator.process_index)
    rates = optimizers.learning_rates(
        config.lr_scheduler_type, config.learning_rate, config.num_warmup_steps, last_step
    )
    parameters, trainable = worker.parameters
    if config.padding == "packed":
        check_isolation(worker.wrapped, accelerator.device)
    objective = Objective(config.preference_tuning_config)
    pad_id, device = worker.tokenizer.pad_token_id, accelerator.device
    pad_to = config.context_length if config.padding == "max_length" else None
    train_set = ExampleSet(train, pad_id, device, pad_to, packed=config.padding == "packed")
    train_set = with_reference(config, run, worker, train_set, "training", progress)
    evaluate = None
    if valid is not None:
        valid_set = with_reference(config, run, worker, ExampleSet(valid, pad_id, device), "validation", progress)
        valid_sequences = batches.single_sequences(valid, batches.group_size(config.task))
        valid_sequences.sort(key=lambda sequence: -int(valid.lengths[sequence].sum()))
        batch_size = config.eval_batch_size_per_device * accelerator.num_processes
        evaluate = functools.partial(
            _evaluate, worker, objective, valid_set, valid_sequences, batch_size, config.classifier_config
        )

    # (4) Continue from the last complete state, or rehearse a save: a full disk shows now, not after the night.
    beside: dict[str, Any] = {
        "prompt_format": prompt_format_text(config.generation_config.prompt_format),
        "overrides": base_overrides(config.rope_scaling, config.quantization) if config.is_lora else None,
        "start": checkpoints.keep_start(worker.model, run.adapter_start, is_continued=bool(saved)),
    }
    if saved:
        is_elastic = config.min_devices is not None
        checkpoints.load_resume(*saved, worker.model, worker.optimizer, worker.deepspeed_engine, is_elastic=is_elastic)
    else:
        checkpoints.rehearse(
            worker.model, worker.tokenizer, run.checkpoints, copies=config.num_checkpoints_to_keep, **beside
        )
    if config.eval_first and evaluate and not saved:
        progress.evaluation(step=0, epoch=0, **evaluate())
    start, losses, trained_tokens = place["step"], dict(place["losses"]), place["trained_tokens"]
    step = start
    progress.stage(
        "training", steps=last_step, steps_per_epoch=steps_per_epoch, start=start, workers=accelerator.num_processes,
        parameters=parameters, trainable_parameters=trainable,
    )  # fmt: skip

    # (5) Steps, counted from 1 over the whole run. Their rows depend on the seed and the epoch alone.
    every = config.checkpoint_and_evaluation_frequency
    events = schedule.evaluation_steps(steps_per_epoch, last_step, *((every.unit, every.frequency) if every else ()))
    flops_of_token = atomic.read_json(run.plan)["flops_per_token"] if run.plan.exists() else None
    # Fewer workers than num_devices (min_devices) take more micro batches each: a step has the same examples.
    devices = max(1, config.num_devices)
    accumulation = math.ceil(config.gradient_accumulation_steps * devices / accelerator.num_processes)
    measured_step, step_memory = None, 0
    sums, epoch_order, saved_at = EpochSums(**place.get("epoch_sums", {})), None, time.perf_counter()
    reported_at = -math.inf  # the first step is reported at once
    while step < last_step:
        epoch, index = divmod(step, steps_per_epoch)
        if index == 0 or epoch_order is None:
            epoch_order = batches.epoch_batches(train, sequences, config.global_batch_size, config.seed, epoch)
        if index == 0:
            sums = EpochSums()
        if measured_step is None:
            measured_step = step - index + _widest_step(train, epoch_order, index, index + last_step - step)
        with _measure_memory(worker) if step == measured_step else contextlib.nullcontext() as memory:
            done = _train_step(
                worker, objective, train_set, epoch_order[index], rates[step], accumulation, config.max_grad_norm
            )
        step_memory = memory.peak if memory else step_memory
        step += 1
        check_step(done, step, is_first=step == start + 1)
        sums.add(done)
        trained_tokens += done.tokens

        # (6) Report.
        paced, seconds = sums.metrics(), time.perf_counter() - began
        world, pace = accelerator.num_processes, paced["trained_tokens_throughput"]
        latest: dict[str, Any] = {
            "step": step, "total_trained_steps": step, "epoch": epoch + 1, "num_iterations": steps_per_epoch,
            "learning_rate": rates[step - 1], **done.metrics(), **paced, "trained_tokens": trained_tokens,
            "time_total_s": seconds, **running_figures(gpu, world, flops_of_token, pace, seconds),
        }  # fmt: skip
        progress.step(**latest)

        # (7) Evaluate, then save. Between evaluations only the training state is saved, by the clock.
        if step in events:
            name = events[step]
            found = evaluate() if evaluate else {}
            if worker.deepspeed_engine:
                # ZeRO-3 may be prefetching the next batch's first weights, which a save could not gather.
                worker.deepspeed_engine.empty_partition_cache()
            # A warm-up begins at 0: a checkpoint after its first step alone is as it was made.
            moved = any(rates[:step]) or step == last_step
            folder = run.checkpoints / name
            checkpoints.save_checkpoint(worker.model, worker.tokenizer, folder, trained=moved, **beside)
            losses[name] = found.get("eval_loss")
            checkpoints.publish(run, folder, name)
            best = _keep_best(config, run, losses)
            evaluation = {**found, **sums.totals(), "checkpoint_dir_name": name, "is_best": name == best}
            progress.evaluation(step=step, epoch=epoch + 1, **evaluation)
            latest |= evaluation
        now = time.perf_counter()
        since_state, since_report, is_stopping = _agreed(worker, now - saved_at, now - reported_at, run)
        is_due = config.save_state_minutes and since_state > 60 * config.save_state_minutes
        if step in events or is_due or is_stopping:
            seconds = time.perf_counter() - began
            place = {"step": step, "trained_tokens": trained_tokens, "seconds": seconds, "losses": losses}
            place["epoch_sums"] = sums.state()
            checkpoints.save_resume(run, place, worker.model, worker.optimizer, worker.deepspeed_engine)
            saved_at = time.perf_counter()
        if step in events or since_report > REPORT_SECONDS:
            report(latest, events.get(step))
            reported_at = time.perf_counter()
        if is_stopping and step < last_step:
            raise StoppedError(f"stopped by SIGTERM; step {step} is saved, and the same command continues after it")

    best = _keep_best(config, run, losses)
    has_perplexity = losses[best] is not None and objective.preference is None
    return {
        "best_checkpoint": f"checkpoints/{best}",
        "eval_loss": losses[best],
        "perplexity": _perplexity(losses[best]) if has_perplexity else None,
        "steps": step,
        "epochs": round(step / steps_per_epoch, 4),
        "trained_tokens": trained_tokens,
        "training_seconds": time.perf_counter() - began,
        "parameters": parameters,
        "trainable_parameters": trainable,
        "workers": accelerator.num_processes,
        "zero_stage": worker.deepspeed_engine.zero_optimization_stage() if worker.deepspeed_engine else None,
        "device": accelerator.device.type,
        "device_name": gpu.name if gpu else hardware.cpu_share(1).name,
        "peak_memory_bytes_per_worker": _peak_memory(worker),
        "memory_before_bytes_per_worker": _gathered(worker, 0 if gpu else before),
        "step_memory_bytes_per_worker": _gathered(
            worker, torch.cuda.max_memory_allocated() if accelerator.device.type == "cuda" else step_memory
        ),
    }


# One step, one evaluation -------------------------------------------------------------------------------


def _train_step(
    worker: Worker,
    objective: Objective,
    train: ExampleSet,
    sequences: list[batches.Sequence],
    learning_rate: float,
    accumulation: int,
    max_grad_norm: float | None,
) -> Step:
    """Run forward, backward and the optimizer over the sequences of one global batch. Collective."""
    accelerator, started = worker.accelerator, time.perf_counter()
    for group in worker.optimizer.param_groups:
        group["lr"] = learning_rate
    examples = np.concatenate(sequences)
    units = objective.count_units(train.tokens, examples)
    parts = batches.split_batch(sequences, train.tokens, accelerator.num_processes, accumulation)
    sums, forward_seconds, backward_seconds = _forward_backward(
        worker, objective, train, parts[accelerator.process_index], units
    )
    if worker.deepspeed_engine:  # its optimizer ran within the last backward
        gradient = float(worker.deepspeed_engine.get_global_grad_norm() or 0.0)
    else:
        trained = [p for p in worker.model.parameters() if p.requires_grad]
        gradient = float(torch.nn.utils.clip_grad_norm_(trained, max_grad_norm or math.inf))
        worker.optimizer.step()
        worker.optimizer.zero_grad()
    totals = _summed(accelerator, sums, ("loss", "padded", *objective.metric_names))
    return Step(
        loss=totals.pop("loss") / units,
        gradient=gradient,
        forward_seconds=forward_seconds,
        backward_seconds=backward_seconds,
        seconds=time.perf_counter() - started,
        tokens=int(train.tokens.lengths[examples].sum()),
        supervised=int(train.tokens.supervised[examples].sum()),
        padded=int(totals.pop("padded")),
        task={name: value / units for name, value in totals.items()},
    )


def _forward_backward(
    worker: Worker, objective: Objective, train: ExampleSet, parts: list[list[batches.Sequence]], units: int
) -> tuple[Sums, float, float]:
    """Accumulate the gradients of this worker's micro batches; return its sums and the seconds of both passes."""
    accelerator, engine = worker.accelerator, worker.deepspeed_engine
    # DDP and DeepSpeed average over workers, DeepSpeed over micro batches too. The loss is to be the mean over all
    # supervised tokens (or pairs) of the global batch, wherever they are: so undo their averages and divide once.
    scale = accelerator.num_processes * (len(parts) if engine else 1) / units
    sums: Sums = collections.Counter()
    forward_seconds = backward_seconds = 0.0
    for index, part in enumerate(parts):
        batch = train.batch(part)
        is_last = index == len(parts) - 1
        # DDP sums gradients over the workers in the last micro batch alone; DeepSpeed decides that by itself.
        with contextlib.nullcontext() if engine or is_last else accelerator.no_sync(worker.wrapped):
            started = _now(accelerator)
            measurement = objective.measure(worker.wrapped, batch, train.reference_of(part))
            halfway = _now(accelerator)
            if engine:
                accelerator.deepspeed_engine_wrapped.backward(measurement.loss * scale, sync_gradients=is_last)
            else:
                (measurement.loss * scale).backward()
            ended = _now(accelerator)
        forward_seconds += halfway - started
        backward_seconds += ended - halfway
        sums.update({"loss": float(measurement.loss.detach()), "padded": batch["input_ids"].numel()})
        sums.update({name: float(value) for name, value in measurement.sums.items()})
    return sums, forward_seconds, backward_seconds


def _summed(accelerator: Accelerator, sums: Sums, names: Sequence[str]) -> dict[str, float]:
    """Add named sums over the ranks; a rank without examples in a batch lacks names, which count as 0. Collective."""
    own = torch.tensor([sums.get(name, 0.0) for name in names], dtype=torch.float64)
    total = accelerator.reduce(own.to(accelerator.device), "sum")
    return dict(zip(names, total.tolist(), strict=True))


@torch.no_grad()
def _evaluate(
    worker: Worker,
    objective: Objective,
    valid: ExampleSet,
    sequences: list[batches.Sequence],
    batch_size: int,
    classifier: ClassifierConfig | None,
) -> dict[str, float]:
    """Measure the mean loss over the validation examples, and what the task measures beside it. Collective.

    sequences: the longest first, so that memory that does not suffice shows at once. batch_size: over all workers.
    """
    accelerator, started = worker.accelerator, time.perf_counter()
    label_ids = classification.label_ids(worker.tokenizer, classifier.label_tokens) if classifier else None
    sums: Sums = collections.Counter()
    predictions: list[tuple[list[float], int]] = []
    worker.wrapped.eval()
    for start in range(0, len(sequences), batch_size):
        batch = sequences[start : start + batch_size]
        [part] = batches.split_batch(batch, valid.tokens, accelerator.num_processes, 1)[accelerator.process_index]
        measurement = objective.measure(worker.wrapped, valid.batch(part), valid.reference_of(part), label_ids)
        sums.update({"loss": float(measurement.loss)})
        sums.update({name: float(value) for name, value in measurement.sums.items()})
        predictions += measurement.predictions
    worker.wrapped.train()
    units = objective.count_units(valid.tokens, np.arange(len(valid.tokens)))
    totals = _summed(accelerator, sums, ("loss", *objective.metric_names))
    means = {f"eval_{name}": total / units for name, total in totals.items()}
    if objective.preference is None:  # the loss of a pair is no token's
        means["perplexity"] = _perplexity(means["eval_loss"])
    if classifier:
        probabilities, truth = (np.array(column) for column in zip(*gather_object(predictions), strict=True))
        means |= classification.scores(probabilities, truth, classifier.eval_metrics)
    return {**means, "eval_time_per_epoch": time.perf_counter() - started}


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # above, exp overflows


def _now(accelerator: Accelerator) -> float:
    """Read the clock once the device has finished its queue."""
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _agreed(worker: Worker, since_state: float, since_report: float, run: Run) -> tuple[float, float, bool]:
    """Take rank 0's clocks (seconds), and its word on whether to stop, so that all ranks decide alike."""
    own = [0.0, 0.0, 0.0]
    if worker.accelerator.is_main_process:
        own = [since_state, since_report, float(distributed.is_stop_requested(run.folder))]
    if worker.accelerator.num_processes > 1:
        own = worker.accelerator.reduce(torch.tensor(own, device=worker.accelerator.device), "sum").tolist()
    return own[0], own[1], bool(own[2])


def _keep_best(config: ResolvedConfig, run: Run, losses: dict[str, float | None]) -> str:
    """Delete all but the best checkpoints; every rank learns the best one's name."""
    uri = f"{run.uri}/{run.checkpoints.name}" if run.uri else None
    with distributed.raised_everywhere():
        return checkpoints.keep_best(run.checkpoints, losses, config.num_checkpoints_to_keep, uri)


def _peak_memory(worker: Worker) -> list[int]:
    """List each worker's peak: of GPU memory, or on a CPU of the process's resident memory (bytes)."""
    if worker.accelerator.device.type == "cuda":
        return _gathered(worker, torch.cuda.max_memory_allocated())
    return _gathered(worker, hardware.resident_memory()[1])


def _widest_step(train: Tokens, steps: list[list[batches.Sequence]], first: int, end: int) -> int:
    """Return the index of the step with the longest sequence, from `first` on: the one that needs the most memory."""
    return max(range(first, min(end, len(steps))), key=lambda k: max(train.lengths[s].sum() for s in steps[k]))


def _measure_memory(worker: Worker) -> contextlib.AbstractContextManager[hardware.TensorMemory | None]:
    """Measure the tensors of a step on a CPU; a GPU's allocator keeps this statistic by itself."""
    if worker.accelerator.device.type == "cuda":
        return contextlib.nullcontext()
    # After a step, DDP's buckets are the only trace of the gradients, and Python does not see them.
    has_buckets = worker.accelerator.num_processes > 1 and worker.deepspeed_engine is None
    trained = [p for p in worker.model.parameters() if p.requires_grad and p.grad is None]
    return hardware.TensorMemory(hidden=has_buckets * sum(p.numel() * p.element_size() for p in trained))


def _gathered(worker: Worker, size: int) -> list[int]:
    """List a number of every worker."""
    shared = torch.tensor([size], dtype=torch.int64, device=worker.accelerator.device)
    return worker.accelerator.gather(shared).tolist()
