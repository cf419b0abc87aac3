"""The training loop, the same for every way to run it: one process or many, plain DDP or DeepSpeed ZeRO 1-3.

`train_loop(config, run)` runs in each worker (forgebook.launch starts them). It reads tokenized examples from
the run folder and writes metrics, checkpoints and its training state there. It resumes from the newest state that it
finds: a restarted worker and a second `python main.py` are the same case.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from forgebook.config.blocks import EarlyStopping
from forgebook.config.schema import ResolvedConfig
from forgebook.data import batching as batches
from forgebook.data import token_store as tokens
from forgebook.errors import StoppedError
from forgebook.models.versions import check_versions
from forgebook.planning import hardware, schedule
from forgebook.planning.plan import running_figures
from forgebook.runs import atomic
from forgebook.runs.metrics import Progress
from forgebook.runs.run import Run
from forgebook.training import checkpoints, distributed, objectives, optimizers, training_state
from forgebook.training.losses import check_isolation
from forgebook.training.objectives import Objective, Sums
from forgebook.training.out_of_memory import explain_out_of_memory
from forgebook.training.profiler import StepProfiler, phase
from forgebook.training.reference import ExampleSet, with_reference
from forgebook.training.setup import Worker, base_overrides, make_accelerator, make_worker, prompt_format_text
from forgebook.training.step_metrics import EpochSums, Step, StepMemory, check_step
from forgebook.training.stop_check import check_stops
from forgebook.training.training_state import Position

__all__ = ["train_loop"]

# Takes the figures of a step, and the name of the checkpoint that was saved after it, if one was. Collective.
Report = Callable[[dict[str, Any], str | None], None]
# Between the steps reported when nothing is evaluated: Ray takes reports every two seconds, and workers wait for it.
REPORT_SECONDS = 10.0


def train_loop(config: ResolvedConfig, run: Run, report: Report = lambda metrics, checkpoint: None) -> dict[str, Any]:
    """Fine-tune as `config` says; return what summary.json reports, the same on every rank.

    report: called on all ranks after each evaluation and every REPORT_SECONDS between. Collective: call it once per
    worker, inside an initialized process group or none.

    Raises TrainingError if the loss is not finite or the gradient is zero; CheckpointError; ModelError; StoppedError
    once the state is saved, if the run is requested to stop.
    """
    # (1) The process group. Under ZeRO-3, DeepSpeed's config must exist before the weights are loaded.
    accelerator = make_accelerator(config)
    torch.manual_seed(config.seed)
    hardware.reset_peak()
    memory_before, gpu = hardware.resident_memory()[0], hardware.this_gpu()
    saved = training_state.latest_state(run.resume)
    start = saved[1] if saved else Position()
    progress = Progress(run, start.step, silent=not accelerator.is_main_process)
    # A resumed run's clock includes the time of the processes before.
    started = time.perf_counter() - start.seconds

    # (2) Data: mapped into memory, tokenized before any worker started.
    train = tokens.load_view(run.tokens / "train.npz")
    valid = tokens.load_view(run.tokens / "valid.npz") if config.valid_path else None
    sequences = batches.make_sequences(train, config.padding, config.context_length, batches.group_size(config.task))
    steps_per_epoch = schedule.steps_per_epoch(len(sequences), config.global_batch_size)
    last_step = schedule.total_steps(config.num_epochs, steps_per_epoch, config.max_steps)

    # (3) Model, optimizer, and the learning rate of every step.
    compiles = config.deepspeed is not None and not saved
    stage = "loading the model" if saved else "loading the model, test-saving a checkpoint"
    progress.stage(stage + compiles * "; DeepSpeed compiles an extension at its first use (a minute)")
    explain = partial(explain_out_of_memory, config, accelerator.num_processes)
    with distributed.raised_everywhere():
        about_data = atomic.read_json(run.data_report) if run.data_report.exists() else {}
        check_versions(about_data.get("models", {}), config)
    with explain("while the model was loaded", lambda: config.context_length):
        worker = make_worker(config, accelerator)
    # New weights, as an adapter's, are the same on every rank; dropout from here on is each rank's own.
    torch.manual_seed(config.seed + accelerator.process_index)
    rates = optimizers.learning_rates(
        config.lr_scheduler_type, config.learning_rate, config.num_warmup_steps, last_step, config.min_lr_ratio,
        config.lr_decay_ratio,
    )  # fmt: skip
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
        # Similar lengths share a batch, with little padding; memory that does not suffice shows in the first batch.
        valid_sequences.sort(key=lambda sequence: -int(valid.lengths[sequence].sum()))
        batch_size = config.eval_batch_size_per_device * accelerator.num_processes
        classifier = config.classifier_config
        in_evaluation = explain("in an evaluation", lambda: int(valid.lengths.max()), is_evaluation=True)
        evaluate = in_evaluation(
            partial(objectives.evaluate, objective, worker, valid_set, valid_sequences, batch_size, classifier)
        )

    # (4) Resume from the last complete state, or test-save: a full disk shows now, not after hours of training.
    checkpoint_settings: dict[str, Any] = {
        "prompt_format": prompt_format_text(config.generation_config.prompt_format),
        "overrides": base_overrides(config.rope_scaling, config.quantization) if config.is_lora else None,
        "start": checkpoints.save_start(worker.model, run.adapter_start, is_resumed=bool(saved)),
    }
    weights = worker.model, worker.optimizer, worker.deepspeed_engine
    if saved:
        training_state.load_state(*saved, *weights, is_elastic=config.min_devices is not None)
    else:
        copies = config.num_checkpoints_to_keep
        checkpoints.try_save(worker.model, worker.tokenizer, run.checkpoints, copies=copies, **checkpoint_settings)
    if config.eval_first and evaluate and not saved:
        progress.evaluation(step=0, epoch=0, **evaluate())
    step, losses, trained_tokens = start.step, dict(start.losses), start.trained_tokens
    parameters, trainable = worker.parameters
    progress.stage(
        "training", steps=last_step, steps_per_epoch=steps_per_epoch, start=step, workers=accelerator.num_processes,
        parameters=parameters, trainable_parameters=trainable,
    )  # fmt: skip

    # (5) Steps, counted from 1 over the whole run. Their examples depend on the seed and the epoch alone.
    every = config.checkpoint_and_evaluation_frequency
    checkpoint_names = schedule.evaluation_steps(steps_per_epoch, last_step, every.unit, every.frequency)
    flops_per_token = atomic.read_json(run.plan)["flops_per_token"] if run.plan.exists() else None
    # Fewer workers than num_devices (min_devices) take more micro batches each: a step has the same examples.
    devices = max(1, config.num_devices)
    accumulation = math.ceil(config.gradient_accumulation_steps * devices / accelerator.num_processes)
    sums, epoch_order, memory = EpochSums(**start.epoch_sums), None, StepMemory(worker)
    profiler = StepProfiler(run, config.profile and accelerator.is_main_process)
    saved_at, reported_at = time.perf_counter(), -math.inf  # the first step is reported at once
    is_enough = _is_enough(config.early_stopping, losses)
    while step < last_step and not is_enough:
        epoch, index = divmod(step, steps_per_epoch)
        if index == 0 or epoch_order is None:
            epoch_order = batches.epoch_batches(train, sequences, config.global_batch_size, config.seed, epoch)
        if index == 0:
            sums = EpochSums()
        longest = partial(_longest, train, epoch_order[index], is_packed=train_set.packed)
        with (
            explain(f"in step {step + 1}", longest),
            profiler.measured(step + 1 - start.step),
            memory.measured(train.lengths, epoch_order[index : index + last_step - step]),
        ):
            measured = _train_step(
                worker, objective, train_set, epoch_order[index], rates[step], accumulation, config.max_grad_norm
            )
        step += 1
        check_step(measured, step, is_first=step == start.step + 1)
        sums.add(measured)
        trained_tokens += measured.tokens

        # (6) Report.
        averages, seconds = sums.metrics(), time.perf_counter() - started
        speed = averages["trained_tokens_throughput"]
        latest: dict[str, Any] = {
            "step": step, "total_trained_steps": step, "epoch": epoch + 1, "num_iterations": steps_per_epoch,
            "learning_rate": rates[step - 1], **measured.metrics(), **averages, "trained_tokens": trained_tokens,
            "time_total_s": seconds,
            **running_figures(gpu, accelerator.num_processes, flops_per_token, speed, seconds),
        }  # fmt: skip
        progress.step(**latest)

        # (7) Evaluate, then save. Between evaluations only the training state is saved, by the clock.
        name = checkpoint_names.get(step)
        evaluation: dict[str, Any] = evaluate() if name is not None and evaluate else {}
        if not any(rates[:step]):
            # A warm-up starts at a learning rate of 0: after its first step this is still the base, and no result.
            name = None
            if evaluation:
                progress.evaluation(step=step, epoch=epoch + 1, **evaluation)
        if name is not None:
            losses[name] = evaluation.get("eval_loss")
            if worker.deepspeed_engine:
                # ZeRO-3 may be prefetching the next batch's first weights, which a save could not gather.
                worker.deepspeed_engine.empty_partition_cache()
            folder = run.checkpoints / name
            checkpoints.save_checkpoint(worker.model, worker.tokenizer, folder, **checkpoint_settings)
            checkpoints.publish(run, folder, name)
            best = checkpoints.keep_best(run, losses, config.num_checkpoints_to_keep)
            evaluation |= {**sums.totals(), "checkpoint_dir_name": name, "is_best": name == best}
            progress.evaluation(step=step, epoch=epoch + 1, **evaluation)
            latest |= evaluation
            is_enough = _is_enough(config.early_stopping, losses)
        now = time.perf_counter()
        since_state, since_report, is_stopping = _agreed(accelerator, now - saved_at, now - reported_at, run)
        is_due = config.save_state_minutes and since_state > 60 * config.save_state_minutes
        if name is not None or is_due or is_stopping:
            position = Position(step, trained_tokens, time.perf_counter() - started, losses, sums.state())
            training_state.save_state(run, position, *weights)
            saved_at = time.perf_counter()
        if name is not None or since_report > REPORT_SECONDS:
            report(latest, name)
            reported_at = time.perf_counter()
        if is_stopping and step < last_step and not is_enough:
            raise StoppedError(f"stopped by SIGTERM; step {step} is saved, and the same command resumes after it")

    # (8) What summary.json reports.
    best = checkpoints.keep_best(run, losses, config.num_checkpoints_to_keep)
    best_loss = losses[best]
    seconds = time.perf_counter() - started
    result = {
        "best_checkpoint": f"checkpoints/{best}",
        "eval_loss": best_loss,
        "perplexity": None
        if best_loss is None or objective.preference or config.classifier_config
        else objectives.perplexity(best_loss),
        "steps": step,
        "epochs": round(step / steps_per_epoch, 4),
        "steps_without_early_stopping": last_step if step < last_step else None,
        "trained_tokens": trained_tokens,
        "training_seconds": seconds,
        "parameters": parameters,
        "trainable_parameters": trainable,
        "workers": accelerator.num_processes,
        "zero_stage": worker.deepspeed_engine.zero_optimization_stage() if worker.deepspeed_engine else None,
        "device": accelerator.device.type,
        "device_name": gpu.name if gpu else hardware.cpu_share(1).name,
        "peak_memory_bytes_per_worker": distributed.gathered(memory.process_peak()),
        "memory_before_bytes_per_worker": distributed.gathered(0 if gpu else memory_before),
        "step_memory_bytes_per_worker": distributed.gathered(memory.step_peak()),
        "vllm_serves": checkpoints.vllm_verdict(worker.model),
        "stop_check": None,
        "profile": distributed.gathered(profiler.finish())[0],
    }
    if start.step < last_step:  # else an earlier process has taken the last step, and may have failed in this check
        generation, is_compiled = config.generation_config, bool(config.torch_compile)
        result["stop_check"] = check_stops(worker, train, config.task, generation, seconds, is_compiled)
    return result


def _is_enough(early_stopping: EarlyStopping | None, losses: dict[str, float | None]) -> bool:
    """Decide whether the run ends before its last step; losses: of its evaluations, the same on every rank."""
    if early_stopping is None:
        return False
    return schedule.stops_early(losses.values(), early_stopping.patience, early_stopping.min_delta)


# One step ---------------------------------------------------------------------------------------------


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
    optimizers.set_rate(worker.optimizer.param_groups, learning_rate)
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
        # Without max_grad_norm, too: the norm is a metric, and a gradient of zero ends the run.
        with phase("gradient norm"):
            gradient = float(torch.nn.utils.clip_grad_norm_(trained, max_grad_norm or math.inf))
        with phase("optimizer"):
            worker.optimizer.step()
            worker.optimizer.zero_grad()
    totals = objectives.summed(accelerator, sums, ("loss", "padded", *objective.metric_names))
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
    accelerator, deepspeed_engine = worker.accelerator, worker.deepspeed_engine
    # DDP and DeepSpeed average over workers, DeepSpeed over micro batches too. The loss is to be the mean over all
    # supervised tokens (or pairs) of the global batch, wherever they are: so undo their averages and divide once.
    scale = accelerator.num_processes * (len(parts) if deepspeed_engine else 1) / units
    sums: Sums = Counter()
    forward_seconds = backward_seconds = 0.0
    for index, part in enumerate(parts):
        with phase("batch"):
            batch = train.batch(part)
        is_last = index == len(parts) - 1
        # DDP sums gradients over the workers in the last micro batch alone; DeepSpeed decides that by itself.
        with contextlib.nullcontext() if deepspeed_engine or is_last else accelerator.no_sync(worker.wrapped):
            started = _now(accelerator)
            with phase("forward"):
                measurement = objective.measure(worker.wrapped, batch, train.reference_of(part))
                halfway = _now(accelerator)
            # DeepSpeed's optimizer runs within the last backward.
            with phase("backward, optimizer" if deepspeed_engine else "backward"):
                if deepspeed_engine:
                    accelerator.deepspeed_engine_wrapped.backward(measurement.loss * scale, sync_gradients=is_last)
                else:
                    (measurement.loss * scale).backward()
                ended = _now(accelerator)
        forward_seconds += halfway - started
        backward_seconds += ended - halfway
        sums.update({"loss": float(measurement.loss.detach()), "padded": batch["input_ids"].numel()})
        sums.update({name: float(value) for name, value in measurement.sums.items()})
    return sums, forward_seconds, backward_seconds


def _longest(train: tokens.Tokens, sequences: list[batches.Sequence], is_packed: bool) -> int:
    """Count the tokens of the longest of some sequences: all of its examples, or the longest of a pair."""
    return max(int(train.lengths[one].sum() if is_packed else train.lengths[one].max()) for one in sequences)


def _now(accelerator: Accelerator) -> float:
    """Read the clock once the device has finished its queue."""
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _agreed(accelerator: Accelerator, since_state: float, since_report: float, run: Run) -> tuple[float, float, bool]:
    """Return rank 0's clocks (seconds) and whether to stop, so that all ranks decide alike. Collective."""
    own = [0.0, 0.0, 0.0]
    if accelerator.is_main_process:
        own = [since_state, since_report, float(distributed.is_stop_requested(run.folder))]
    if accelerator.num_processes > 1:
        own = accelerator.reduce(torch.tensor(own, device=accelerator.device), "sum").tolist()
    return own[0], own[1], bool(own[2])
