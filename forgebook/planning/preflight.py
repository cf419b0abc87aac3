"""The plan of a run that is about to start, from its data and hardware; at its end, planned and measured figures.

plan, warning = plan_run(prepared)                      Plan, or None and why there is none
warnings, vllm = check_settings(prepared)               settings without their effect; can vLLM serve it
warnings = check_plan(plan, run.folder, force=False)    ResourceError if the run cannot work, unless forced
figures = compare_run(plan, run, result, steps)         for summary.json: throughput, planned and measured
warning = record_run(plan, config, result, figures)     the throughput, for the next plan
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forgebook.catalog import read_catalog
from forgebook.config.blocks import labels_of
from forgebook.data import batching
from forgebook.errors import ModelError, ResourceError
from forgebook.models.adapters import check_lora
from forgebook.models.families import check_positions
from forgebook.models.image_load import with_images
from forgebook.models.load import check_attention, check_slices, load_skeleton
from forgebook.models.saved_adapters import check_reach
from forgebook.models.shapes import find_shape
from forgebook.models.tokenizer import label_pieces, locate, tokenizer_of
from forgebook.models.vllm_support import vllm_serves, vllm_serves_saved
from forgebook.planning import schedule
from forgebook.planning.feasibility import Work, has_padding, longest_first, settle_checkpointing
from forgebook.planning.hardware import cpu_share, hardware_for
from forgebook.planning.history import Throughput, read_throughputs, record_throughput
from forgebook.planning.plan import Plan, plan, run_kind, running_figures
from forgebook.planning.plan_report import verdict
from forgebook.planning.prepare import Prepared
from forgebook.planning.resharding import settle_resharding
from forgebook.planning.trainable import with_label_rows
from forgebook.runs.run import Run, display_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from forgebook.catalog import Shape
    from forgebook.config.schema import FinetuneConfig

__all__ = ["check_plan", "check_settings", "compare_run", "plan_run", "record_run"]

# Larger than the estimate's worst error against measured runs on CPUs (benchmarks/plan): on a CPU a run is refused only
# if it needs this many times the memory, as the system may swap. A GPU cannot: there the plan alone decides.
CERTAIN = 1.25
CONVENTIONS = {
    "memory_bytes_per_worker": "the largest worker's peak of tensors: weights, gradients, optimizer and activations. "
    "On a GPU what torch allocated over the run, the plan without CUDA's context; on a CPU the tensors of one step, "
    "the one with the longest sequences",
    "process_bytes_per_worker": "the largest worker's peak with what no tensor holds: planned for a GPU with CUDA's "
    "context, and not measured; on a CPU resident memory, with libraries and freed memory that malloc keeps",
    "step_seconds": "optimizer steps alone, without loading, evaluation and saving",
    "tokens_per_second": "tokens excluding padding over the seconds of steps; measured without the first step",
    "flops_per_token": "6 per trained parameter, 4 per frozen one, 6 per adapter one; causal attention; recomputation "
    "not counted",
    "flops_per_second_per_worker": "FLOPs of tokens including padding over the seconds of steps",
    "mfu": "FLOPs of tokens excluding padding per second over the bfloat16 peak of all GPUs, as in "
    "forgebook/catalog.yaml",
    "cost_usd": "catalog's price x GPUs x time: planned, that of the steps; measured, from the workers' start",
    "disk_bytes": "checkpoints and the training state: planned the most at once, measured what is left",
    "ratio": "measured / planned",
}


# Before -----------------------------------------------------------------------------------------------


def choose_checkpointing(prepared: Prepared) -> tuple[Prepared, list[str]]:
    """Choose `gradient_checkpointing: auto` for the hardware of a run, with a note why; anything else stays."""
    config = prepared.config
    if config.gradient_checkpointing != "auto":
        return prepared, []
    hardware = hardware_for(config)
    workers, device = hardware or (max(1, config.num_devices), None)
    try:
        shape = _shape_of(prepared)
    except ModelError:  # without a shape there is no plan
        config = config.resolve(gradient_checkpointing=True)
        return dataclasses.replace(prepared, config=config), ["gradient_checkpointing: true (the model has no plan)"]
    work = _work_of(prepared, has_padding(config, shape, device))
    config, notes = settle_checkpointing(config, shape, workers, work.longest, device, work.lengths)
    config = settle_resharding(config, shape, workers, work.longest, device, work.lengths)
    return dataclasses.replace(prepared, config=config), notes


def plan_run(prepared: Prepared) -> tuple[Plan | None, str]:
    """Plan a run from the exact lengths of its examples, for the hardware it will run on; and a warning, if any.

    None where the model's shape is not known, which the warning reports.
    """
    config = prepared.config
    try:
        shape = _shape_of(prepared)
    except ModelError as error:
        return None, f"no plan: {error}"
    throughputs, warning = read_throughputs()
    hardware = hardware_for(config)
    work = _work_of(prepared, has_padding(config, shape, hardware[1] if hardware else None))
    return plan(config, shape, hardware, work=work, throughputs=throughputs), warning


def _shape_of(prepared: Prepared) -> Shape:
    """Find the shape of a run's model, with what its images take."""
    config, train = prepared.config, prepared.report["train"]
    pixels = train.get("images", {}).get("resized_pixels", 0) / train["tokens"]
    return with_images(find_shape(config.model_id), config, pixels)


def _work_of(prepared: Prepared, padded: bool) -> Work:
    """Count what the run processes, from its own examples."""
    config, lengths, report = prepared.config, prepared.train.lengths, prepared.report["train"]
    epoch_steps = _epoch_steps(prepared)
    steps = schedule.total_steps(config.num_epochs, epoch_steps, config.max_steps)
    share = steps / epoch_steps
    if share < 1:  # the longest example may come after the run's end
        sequences = batching.make_sequences(
            prepared.train, config.padding, config.context_length, batching.group_size(config.task)
        )
        by_length = batching.groups_by_length(config.task)
        batches = batching.epoch_batches(
            prepared.train, sequences, config.global_batch_size, config.seed, 0, by_length=by_length
        )
        lengths, share = lengths[np.concatenate([one for batch in batches[:steps] for one in batch])], 1.0
    tokens = int(lengths.sum()) * share
    longest = int(lengths.max()) if config.padding == "longest" else config.context_length
    mean = float((lengths.astype(float) ** 2).sum() / lengths.sum())
    positions = round(tokens / (1 - report["padding_share"])) if padded else round(tokens)
    unpadded = () if padded else longest_first(lengths.tolist())
    return Work(steps, round(tokens), positions, longest, mean, unpadded)


def check_settings(prepared: Prepared) -> tuple[list[str], str | None]:
    """List warnings about settings that do not have their effect with this model and this data.

    Returns them, and whether vLLM can serve the adapter ("yes" or "no: why"); None if the run trains none.

    Raises ConfigError or ModelError for those with which nothing, or not the right thing, would be trained.
    """
    config = prepared.config
    base = locate(config.initial_base_model_ckpt_path or config.model_id)
    check_attention(base, config.attention)
    if config.sequence_parallel > 1:
        check_slices(base, config.sequence_parallel)
    steps = schedule.total_steps(config.num_epochs, _epoch_steps(prepared), config.max_steps)
    warnings = [
        schedule.check_warmup(config.num_warmup_steps, steps),
        check_positions(base, config.context_length, config.rope_scaling),
    ]
    unmatched: list[str] = []
    vllm = None
    if config.initial_adapter_model_ckpt_path is not None:
        adapter = locate(config.initial_adapter_model_ckpt_path)
        check_reach(partial(load_skeleton, base), adapter, config.lora_config or {})
        _refuse_new_labels(tokenizer_of(config), labels_of(config.classifier_config))
        vllm = vllm_serves_saved(adapter) if Path(adapter).is_dir() else vllm_serves(config.lora_config or {})
    elif config.lora_config is not None:
        skeleton = load_skeleton(base)
        unmatched = check_lora(skeleton, config.lora_config)
        names = [name for name, _ in skeleton.named_parameters()]
        lora_config = with_label_rows(config.lora_config, len(labels_of(config.classifier_config)))
        vllm = vllm_serves(lora_config, names, base, skeleton)
    return [*filter(None, warnings), *unmatched], vllm


def _refuse_new_labels(tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> None:
    """Raise ModelError for a continued adapter and labels that it has no embeddings for.

    They would be neither trained nor saved: whoever loads the checkpoint would get others.
    """
    if new := [tokenizer.convert_ids_to_tokens(number) for number in label_pieces(tokenizer, labels)]:
        raise ModelError(
            f"classifier_config.label_tokens: {', '.join(new)} are new to the adapter of "
            "initial_adapter_model_ckpt_path, and a continued adapter learns no new tokens: merge it first (python "
            "main.py merge) and name the merged model in initial_base_model_ckpt_path instead"
        )


def _epoch_steps(prepared: Prepared) -> int:
    return schedule.steps_per_epoch(prepared.report["train"]["sequences"], prepared.config.global_batch_size)


def check_plan(plan: Plan, folder: Path, *, force: bool) -> list[str]:
    """List warnings about a plan. folder: where the run will write.

    Raises ResourceError for what cannot work, unless forced: more memory than the GPU or the whole host has, a disk
    that does not hold a single checkpoint.
    """
    impossible: list[str] = []
    warnings: list[str] = []
    need = plan.memory.total
    if plan.fits is False and plan.capacity is not None:
        is_certain = plan.cpu is None or need > CERTAIN * plan.capacity
        (impossible if is_certain else warnings).append(verdict(plan))
    elif plan.cpu is not None and need > (free := cpu_share(plan.workers).free):
        warnings.append(f"memory: {need / 1e9:,.1f} GB per worker are planned, {free / 1e9:,.1f} GB are free now")
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < plan.disk_bytes:
        no_checkpoint_fits = free < plan.checkpoint_bytes
        needed = plan.checkpoint_bytes if no_checkpoint_fits else plan.disk_bytes
        what = "one checkpoint" if no_checkpoint_fits else "its checkpoints and training state"
        problem = (
            f"storage_path: {display_path(existing)} has {free / 1e9:,.1f} GB free, "
            f"{what} may take {needed / 1e9:,.1f} GB"
        )
        (impossible if no_checkpoint_fits else warnings).append(problem)
    if impossible and not force:
        raise ResourceError("\n".join(impossible) + "\nforce=true starts the run anyway")
    return impossible + warnings


# Afterwards -------------------------------------------------------------------------------------------


def compare_run(plan: Plan | None, run: Run, result: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Compute a run's throughput, and the measured and the planned figures, for summary.json.

    result: what train_loop returned. steps: the lines of metrics.jsonl of optimizer steps.
    """
    # The first step is left out of throughputs: it compiles, allocates and waits for the slowest worker.
    timed = steps[1:] or steps
    seconds = sum(step["train_time_per_step"] for step in timed)
    throughput = {
        f"{kind}_tokens_throughput": round(sum(step[f"{kind}_tokens_this_iter"] for step in timed) / seconds, 1)
        for kind in ("trained", "supervised", "padded")
    }
    tokens, padded = (sum(step[f"{kind}_tokens_this_iter"] for step in steps) for kind in ("trained", "padded"))
    figures = {**throughput, "padding_share": round(max(0.0, 1 - tokens / padded), 4)}
    if plan is None:
        return figures
    planned = _planned(plan)
    measured = _measured(plan, run, result, throughput)
    measured["step_seconds"] = round(sum(step["train_time_per_step"] for step in steps), 3)
    ratio = {
        name: round(measured[name] / value, 3)
        for name, value in planned.items()
        if value and measured[name] is not None and name != "flops_per_token"
    }
    return {**figures, "planned": planned, "measured": measured, "ratio": ratio, "conventions": CONVENTIONS}


def _measured(plan: Plan, run: Run, result: dict[str, Any], throughput: dict[str, float]) -> dict[str, Any]:
    """Name a run's own figures as the plan's; None where they are not known."""
    tokens_per_second, workers = throughput["trained_tokens_throughput"], result["workers"]
    gpu = read_catalog().gpus.get(result["device_name"])
    return {
        "memory_bytes_per_worker": max(result["step_memory_bytes_per_worker"]) or None,
        # Of a GPU, torch counts tensors alone.
        "process_bytes_per_worker": max(result["peak_memory_bytes_per_worker"]) if plan.cpu is not None else None,
        "step_seconds": None,
        "steps": result["steps"],
        "tokens": result["trained_tokens"],
        "tokens_per_second": tokens_per_second,
        "flops_per_token": plan.flops_per_token,
        "flops_per_second_per_worker": plan.flops_per_token * throughput["padded_tokens_throughput"] / workers,
        "mfu": None,
        "cost_usd": None,
        "disk_bytes": _bytes_in(run.checkpoints) + _bytes_in(run.resume),
        **running_figures(gpu, workers, plan.flops_per_token, tokens_per_second, result["training_seconds"]),
    }


def _planned(plan: Plan) -> dict[str, Any]:
    """Name a plan's figures as they can be measured; None where the plan does not know."""
    speed: dict[str, float | None] = dict.fromkeys(
        ("step_seconds", "tokens_per_second", "flops_per_second_per_worker", "mfu")
    )
    if plan.seconds is not None and plan.tokens is not None and plan.positions is not None and plan.flops is not None:
        speed = {
            "step_seconds": round(plan.seconds, 3),
            "tokens_per_second": round(plan.tokens / plan.seconds, 1),
            "flops_per_second_per_worker": plan.flops / plan.seconds / plan.workers,
            "mfu": round(plan.mfu * plan.tokens / plan.positions, 4) if plan.mfu else None,
        }
    return {
        "memory_bytes_per_worker": plan.memory.tensors,
        "process_bytes_per_worker": plan.memory.total,
        "step_seconds": speed["step_seconds"],
        "steps": plan.steps,
        "tokens": plan.tokens,
        "tokens_per_second": speed["tokens_per_second"],
        "flops_per_token": plan.flops_per_token,
        "flops_per_second_per_worker": speed["flops_per_second_per_worker"],
        "mfu": speed["mfu"],
        "cost_usd": plan.cost,
        "disk_bytes": plan.disk_bytes,
    }


def record_run(plan: Plan | None, config: FinetuneConfig, result: dict[str, Any], figures: dict[str, Any]) -> str:
    """Record a complete run's throughput for the plans of later ones; return a warning if that failed.

    A run of a single step has none: the first step warms up.
    """
    if plan is None or result["steps"] < 2:
        return ""
    kind = dataclasses.asdict(run_kind(config, plan.parameters)) | {"workers": result["workers"]}
    return record_throughput(
        Throughput(
            device=result["device_name"],
            **kind,
            flops_per_second=figures["measured"]["flops_per_second_per_worker"],
            date=time.strftime("%Y-%m-%d"),
        )
    )


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
