"""The training loop, the same for every way to run it: one process or many, plain DDP or DeepSpeed ZeRO 1-3.

`train_loop(config, run)` runs in each worker (forgebook.launch starts them). It reads tokenized examples from
the run folder and writes metrics, checkpoints and its training state there. It resumes from the newest state that it
finds: a restarted worker and a second `python main.py` are the same case.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from forgebook.config.blocks import EarlyStopping
from forgebook.config.schema import ResolvedConfig
from forgebook.data import batching as batches
from forgebook.data import token_store as tokens
from forgebook.data.forked import cores
from forgebook.data.image_batches import Pixels
from forgebook.errors import StoppedError, TrainingError
from forgebook.models.checkpointing import check_kept
from forgebook.models.processor import processor_source
from forgebook.models.versions import check_versions
from forgebook.planning import hardware, schedule
from forgebook.planning.plan import running_figures
from forgebook.runs import atomic
from forgebook.runs.metrics import Progress
from forgebook.runs.run import Run
from forgebook.training import checkpoints, distributed, objectives, optimizers, training_state
from forgebook.training.background_save import BackgroundSave
from forgebook.training.evaluation_answers import EvaluationAnswers, metric_key
from forgebook.training.losses import check_isolation, check_slices
from forgebook.training.objectives import Objective
from forgebook.training.out_of_memory import explain_out_of_memory
from forgebook.training.profiler import StepProfiler
from forgebook.training.reference import ExampleSet, with_reference
from forgebook.training.setup import base_overrides, make_accelerator, make_worker, prompt_format_text
from forgebook.training.step import Ahead, Counts, QueuedStep, queue_step, read_steps
from forgebook.training.step_metrics import EpochSums, StepMemory, check_step
from forgebook.training.stop_check import check_stops
from forgebook.training.training_state import Position

__all__ = ["train_loop"]

# Takes the figures of a step, and the name of the checkpoint that was saved after it, if one was. Collective.
Report = Callable[[dict[str, Any], str | None], None]
# Between the steps reported when nothing is evaluated: Ray takes reports every two seconds, and workers wait for it.
REPORT_SECONDS = 10.0
# Between two looks at what the device has computed, for which the host waits; a CPU has always computed it.
READ_SECONDS = {"cuda": 1.0}
MOST_UNREAD = 50  # steps
# The sequences of each micro batch of one worker in one step.
Parts = list[list[batches.Sequence]]


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
    progress.stage(stage + compiles * "; at its first use DeepSpeed compiles for a minute")
    explain = partial(explain_out_of_memory, config, accelerator.num_processes)
    with distributed.raised_everywhere():
        about_data = atomic.read_json(run.data_report) if run.data_report.exists() else {}
        check_versions(about_data.get("models", {}), config)
    with explain("while the model was loaded", lambda: config.context_length):
        worker = make_worker(config, accelerator, last_step)
    # New weights, as an adapter's, are the same on every rank; dropout from here on is each rank's own.
    torch.manual_seed(config.seed + accelerator.process_index)
    rates = optimizers.learning_rates(
        config.lr_scheduler_type, config.learning_rate, config.num_warmup_steps, last_step, config.min_lr_ratio,
        config.lr_decay_ratio,
    )  # fmt: skip
    # One line holds a whole batch, without padding, where the attention kernel keeps examples apart by their lengths.
    pixels = Pixels(worker.processor, config.dtype) if worker.processor is not None else None
    takes_segments = worker.takes_segments and pixels is None
    for note in worker.notes:
        progress.stage(note)
    if config.padding == "packed" or takes_segments:
        check_isolation(worker.wrapped, accelerator.device, takes_segments)
    if config.sequence_parallel > 1:
        check_slices(worker.wrapped, accelerator.device)
    if config.gradient_checkpointing == "selective":
        check_kept(worker.wrapped, accelerator.device)
    objective = Objective(config.preference_tuning_config)
    pad_id, device = worker.tokenizer.pad_token_id, accelerator.device
    pad_to = config.context_length if config.padding == "max_length" else None
    train_set = ExampleSet(
        train, pad_id, device, pad_to, packed=config.padding == "packed", one_line=takes_segments and pad_to is None,
        pixels=pixels,
    )  # fmt: skip
    if train_set.threads:
        progress.stage(f"images are prepared in {train_set.threads} of {cores()} cores, as many batches ahead")
    train_set = with_reference(config, run, worker, train_set, "training", progress)
    evaluate = None
    if valid is not None:
        valid_set = with_reference(
            config,
            run,
            worker,
            ExampleSet(valid, pad_id, device, one_line=takes_segments, pixels=pixels),
            "validation",
            progress,
        )
        valid_sequences = batches.single_sequences(valid, batches.group_size(config.task))
        # Similar lengths share a batch, with little padding; memory that does not suffice shows in the first batch.
        valid_sequences.sort(key=lambda sequence: -int(valid.lengths[sequence].sum()))
        batch_size = config.eval_batch_size_per_device * worker.data_share[0]
        classifier = config.classifier_config
        in_evaluation = explain("in an evaluation", lambda: int(valid.lengths.max()), is_evaluation=True)
        evaluate = in_evaluation(
            partial(objectives.evaluate, objective, worker, valid_set, valid_sequences, batch_size, classifier)
        )

    answers = None
    if config.eval_generation is not None and valid is not None:
        answers = EvaluationAnswers(
            worker, valid, config.task, config.eval_generation, config.metrics, config.generation_config,
            config.eval_batch_size_per_device, bool(config.torch_compile),
        )  # fmt: skip

    def evaluated(number: int, is_last: bool) -> dict[str, Any]:
        figures = evaluate() if evaluate else {}
        return figures | (answers.figures(number, is_last) if answers else {})

    # (4) Resume from the last complete state, or test-save: a full disk shows now, not after hours of training.
    checkpoint_settings: dict[str, Any] = {
        "prompt_format": prompt_format_text(config.generation_config.prompt_format),
        "overrides": base_overrides(config.rope_scaling, config.quantization) if config.is_lora else None,
        "dtype": config.dtype,
        "processor": processor_source(config) if pixels else None,
        "start": checkpoints.save_start(worker.model, run.adapter_start, is_resumed=bool(saved)),
    }
    weights = worker.model, worker.optimizer, worker.deepspeed_engine
    if saved:
        training_state.load_state(*saved, *weights, is_elastic=config.min_devices is not None)
    else:
        copies = config.num_checkpoints_to_keep
        checkpoints.try_save(worker.model, worker.tokenizer, run.checkpoints, copies=copies, **checkpoint_settings)
    if config.eval_first and evaluate and not saved:
        progress.evaluation(step=0, epoch=0, **evaluated(0, is_last=False))
    step, losses, trained_tokens, skipped = start.step, dict(start.losses), start.trained_tokens, list(start.skipped)
    # By what checkpoints are ranked, the lowest first.
    scores = losses if config.best_metric == "eval_loss" else dict(start.scores)
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
    shares, share = worker.data_share
    planned_shares = max(1, config.num_devices) // config.sequence_parallel
    accumulation = math.ceil(config.gradient_accumulation_steps * planned_shares / shares)

    @lru_cache(maxsize=2)  # batches made ahead may be of the next epoch
    def steps_of(epoch: int) -> list[list[batches.Sequence]]:
        by_length = batches.groups_by_length(config.task)
        return batches.epoch_batches(
            train, sequences, config.global_batch_size, config.seed, epoch, by_length=by_length
        )

    def examples_of(number: int) -> list[batches.Sequence]:
        return steps_of(number // steps_per_epoch)[number % steps_per_epoch]

    def parts_of(number: int) -> Parts:
        return batches.split_batch(examples_of(number), train, shares, accumulation)[share]

    ahead = Ahead(train_set.batches(part for number in range(step, last_step) for part in parts_of(number)))
    sums, memory = EpochSums(**start.epoch_sums), StepMemory(worker)
    profiler = StepProfiler(run, config.profile and accelerator.is_main_process)
    saving = BackgroundSave()
    saved_at, reported_at = time.perf_counter(), -math.inf  # the first step is reported at once
    is_enough = _is_enough(config.early_stopping, losses)
    queued: list[QueuedStep] = []  # steps whose figures are not read yet
    steps_per_read, pace = 1, math.inf  # pace: seconds of a step
    while step < last_step and not is_enough:
        epoch, index = divmod(step, steps_per_epoch)
        batch, longest = examples_of(step), partial(_longest, train, examples_of(step), is_packed=train_set.packed)
        upcoming = steps_of(epoch)[index : index + last_step - step]
        counts = _counts(objective, train, batch)
        with explain(f"in step {step + 1}", longest), profiler.measured(step + 1 - start.step):
            with memory.measured(train.lengths, upcoming):
                queued.append(
                    queue_step(worker, objective, ahead, counts, rates[step], accumulation, config.max_grad_norm)
                )
            ahead.prepare()  # the next step's first batch, before the host waits for this step
        step += 1
        name = checkpoint_names.get(step)
        if len(queued) < steps_per_read and name is None and step < last_step:
            continue

        # (6) Read what the device has computed, together with rank 0's clocks and whether to stop: all ranks decide
        # alike. Report every step.
        now = time.perf_counter()
        own = [now - saved_at, min(now - reported_at, 1e9), pace, float(distributed.is_stop_requested(run.folder))]
        read, (since_state, since_report, pace, is_stopping) = read_steps(
            accelerator, queued, objective.metric_names, own
        )
        steps_per_read, pace = _steps_per_read(device, pace), sum(one.seconds for one in read) / len(read)
        first, seconds = step - len(queued), time.perf_counter() - started - sum(one.seconds for one in read)
        queued = []
        for number, measured in enumerate(read, first + 1):
            was_updated = number - 1 - start.step > sum(one > start.step for one in skipped)
            check_step(measured, number, is_first=not was_updated)
            skipped += [number] * measured.is_skipped
            epoch, index = divmod(number - 1, steps_per_epoch)
            if index == 0:
                sums = EpochSums()
            sums.add(measured)
            trained_tokens += measured.tokens
            averages, seconds = sums.metrics(), seconds + measured.seconds
            speed = averages["trained_tokens_throughput"]
            latest: dict[str, Any] = {
                "step": number, "total_trained_steps": number, "epoch": epoch + 1, "num_iterations": steps_per_epoch,
                "learning_rate": rates[number - 1], **measured.metrics(), **averages, "trained_tokens": trained_tokens,
                "time_total_s": seconds,
                **running_figures(gpu, accelerator.num_processes, flops_per_token, speed, seconds),
            }  # fmt: skip
            progress.step(**latest)

        # (7) Evaluate, then save. Between evaluations only the training state is saved, by the clock.
        evaluation = evaluated(len(losses), step == last_step) if name is not None else {}
        is_base = not any(rates[number - 1] and number not in skipped for number in range(1, step + 1))
        if is_base and step == last_step and skipped:
            raise TrainingError(
                f"all {len(skipped)} steps were skipped, as their gradients overflow float16, and nothing was trained: "
                "take more steps, or set dtype: float32 or bfloat16"
            )
        if is_base:
            # A warm-up starts at a learning rate of 0: after its first step this is still the base, and no result.
            name = None
            if evaluation:
                progress.evaluation(step=step, epoch=epoch + 1, **evaluation)
        if name is not None:
            losses[name] = evaluation.get("eval_loss")
            if scores is not losses:
                score = evaluation.get(metric_key(config.best_metric))
                scores[name] = None if score is None else -score
            if worker.deepspeed_engine:
                # ZeRO-3 may be prefetching the next batch's first weights, which a save could not gather.
                worker.deepspeed_engine.empty_partition_cache()
            folder = run.checkpoints / name
            checkpoints.save_checkpoint(worker.model, worker.tokenizer, folder, **checkpoint_settings)
            checkpoints.publish(run, folder, name)
            best = checkpoints.keep_best(run, scores, config.num_checkpoints_to_keep)
            evaluation |= {**sums.totals(), "checkpoint_dir_name": name, "is_best": name == best}
            progress.evaluation(step=step, epoch=epoch + 1, **evaluation)
            latest |= {key: value for key, value in evaluation.items() if key != "generated"}
            is_enough = _is_enough(config.early_stopping, losses)
        is_due = config.save_state_minutes and since_state > 60 * config.save_state_minutes
        if name is not None or is_due or is_stopping:
            position = Position(step, trained_tokens, time.perf_counter() - started, losses, sums.state())
            position.scores, position.skipped = {} if scores is losses else scores, skipped
            training_state.save_state(run, position, *weights, background=saving)
            saved_at = time.perf_counter()
        if name is not None or since_report > REPORT_SECONDS:
            report(latest, name)
            reported_at = time.perf_counter()
        if is_stopping and step < last_step and not is_enough:
            saving.wait()
            raise StoppedError(f"stopped by SIGTERM; step {step} is saved, and the same command resumes after it")

    # (8) What summary.json reports.
    saving.wait()
    best = checkpoints.keep_best(run, scores, config.num_checkpoints_to_keep)
    best_loss = losses[best]
    seconds = time.perf_counter() - started
    result = {
        "best_checkpoint": f"checkpoints/{best}",
        "eval_loss": best_loss,
        "perplexity": None
        if best_loss is None or objective.preference or config.classifier_config
        else objectives.perplexity(best_loss),
        **({} if scores is losses else {metric_key(config.best_metric): -(scores[best] or 0.0)}),
        "steps": step,
        "epochs": round(step / steps_per_epoch, 4),
        "steps_without_early_stopping": last_step if step < last_step else None,
        "skipped_steps": len(skipped) if config.dtype == "float16" else None,
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


# The steps ----------------------------------------------------------------------------------------------


def _counts(objective: Objective, train: tokens.Tokens, sequences: list[batches.Sequence]) -> Counts:
    """Count what the sequences of one global batch hold."""
    examples = np.concatenate(sequences)
    return Counts(
        objective.count_units(train, examples),
        int(train.lengths[examples].sum()),
        int(train.supervised[examples].sum()),
    )


def _longest(train: tokens.Tokens, sequences: list[batches.Sequence], is_packed: bool) -> int:
    """Count the tokens of the longest of some sequences: all of its examples, or the longest of a pair."""
    return max(int(train.lengths[one].sum() if is_packed else train.lengths[one].max()) for one in sequences)


def _steps_per_read(device: torch.device, seconds: float) -> int:
    """Return how many steps to queue before their figures are read; seconds: of one step."""
    return max(1, min(MOST_UNREAD, int(READ_SECONDS.get(device.type, 0.0) / seconds)))
