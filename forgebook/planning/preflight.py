"""The plan of a run that is about to start, from its own data and hardware; afterwards, what it said beside the truth.

told, note = forecast(prepared)                             Plan, or None and why there is none
warnings = check(told, config, run.folder)                  ResourceError if it cannot be, unless force
figures = figures_of(told, run, result, steps)              for summary.json: paces, planned and measured
note = keep(told, config, result, figures)                  the pace, for the next plan
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from forgebook.catalog import Shape, read_catalog, shape_of
from forgebook.config.parse import FinetuneConfig
from forgebook.errors import ModelError, ResourceError
from forgebook.models.tokenizer import locate
from forgebook.planning import schedule
from forgebook.planning.feasibility import Work
from forgebook.planning.hardware import cpu_share, hardware_for
from forgebook.planning.history import Pace, keep_pace, method_of, past_paces
from forgebook.planning.memory import CONTEXT_BYTES
from forgebook.planning.plan import Plan, plan, running_figures
from forgebook.planning.plan_report import verdict
from forgebook.planning.prepare import Prepared
from forgebook.runs.run import Run, display_path

__all__ = ["check", "figures_of", "forecast", "keep"]

# Above the estimate's worst error against measured runs on CPUs (benchmarks/plan): a run is refused only if it
# is beyond this many times the memory. A GPU has an allocator that says no, and no swap: there the plan is enough.
SURE = 1.25
CONVENTIONS = {
    "memory_bytes_per_worker": "the largest worker's peak; on a GPU what torch allocated, the plan without CUDA's "
    "context; on a CPU resident memory above what the process held at its start: loading, saving, and some 0.3 GB of "
    "libraries and their kernels included",
    "step_seconds": "optimizer steps alone, without loading, evaluation and saving",
    "tokens_per_second": "real tokens (no padding) over the seconds of steps; measured without the first step",
    "flops_per_token": "6 per trained parameter, 4 per frozen one, 6 per adapter one; causal attention; no recomputing",
    "flops_per_second_per_worker": "FLOPs of real tokens and padding over the seconds of steps",
    "mfu": "FLOPs of real tokens per second over the bfloat16 peak of all GPUs, as in forgebook/catalog.yaml",
    "cost_usd": "catalog's price x GPUs x time: planned, that of the steps; measured, from the workers' start",
    "disk_bytes": "checkpoints and the state for continuing: planned the most at once, measured what is left",
    "ratio": "measured / planned",
}


# Before -----------------------------------------------------------------------------------------------


def forecast(prepared: Prepared) -> tuple[Plan | None, str]:
    """Plan a run from the exact lengths of its rows, for the hardware that will carry it; and a note, if any.

    None where the model's shape is not known: the note says so.
    """
    config = prepared.config
    try:
        shape = _shape(config)
    except ModelError as error:
        return None, f"no plan: {error}"
    paces, note = past_paces()
    return plan(config, shape, hardware_for(config), work=_work(prepared), paces=paces), note


def _shape(config: FinetuneConfig) -> Shape:
    """Find the model's shape in the catalog or its folder, else in the config.json that the hub has of it."""
    try:
        return shape_of(config.model_id)
    except ModelError:
        source = locate(config.model_id)
        if not Path(source).is_dir():
            from transformers.utils import cached_file

            # The tokenizer was read from there already; None: no such file, or none to be had.
            kinds = ("missing_entries", "connection_errors", "gated_repo")
            found = cached_file(source, "config.json", **{f"_raise_exceptions_for_{kind}": False for kind in kinds})
            source = str(Path(found).parent) if found else source
        if source == config.model_id:
            raise
        return shape_of(source)


def _work(prepared: Prepared) -> Work:
    """Count what the run goes through, from its own rows."""
    config, lengths, told = prepared.config, prepared.train.lengths, prepared.report["train"]
    epoch_steps = schedule.steps_per_epoch(told["sequences"], config.global_batch_size)
    steps = schedule.total_steps(config.num_epochs, epoch_steps, config.max_steps)
    tokens = int(lengths.sum()) * steps / epoch_steps
    longest = int(lengths.max()) if config.padding == "longest" else config.context_length
    mean = float((lengths.astype(float) ** 2).sum() / lengths.sum())
    return Work(steps, round(tokens), round(tokens / (1 - told["padding_share"])), longest, mean)


def check(told: Plan, config: FinetuneConfig, folder: Path) -> list[str]:
    """Say what of a plan should worry. folder: where the run will write.

    Raises ResourceError for what cannot be, unless `force` is set: memory that the GPU or the whole host does not
    have, a disk that does not hold a single checkpoint.
    """
    impossible, warnings = [], []
    need = told.memory.total
    if told.fits is False:
        is_sure = told.cpu is None or need > SURE * told.capacity
        (impossible if is_sure else warnings).append(verdict(told))
    elif told.cpu is not None and need > (free := cpu_share(told.workers).free):
        warnings.append(f"memory: {need / 1e9:,.1f} GB per worker are planned, {free / 1e9:,.1f} GB are free now")
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < told.disk_bytes:
        needed = max(told.checkpoint_bytes, told.disk_bytes * (free >= told.checkpoint_bytes))
        what = "one checkpoint" if free < told.checkpoint_bytes else "its checkpoints and state"
        text = (
            f"storage_path: {display_path(place)} has {free / 1e9:,.1f} GB free, {what} may take {needed / 1e9:,.1f} GB"
        )
        (impossible if free < told.checkpoint_bytes else warnings).append(text)
    if impossible and not config.force:
        raise ResourceError("\n".join(impossible) + "\nforce=true starts all the same")
    return impossible + warnings


# Afterwards -------------------------------------------------------------------------------------------


def figures_of(told: Plan | None, run: Run, result: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Tell a run's paces, and what was measured beside what was planned, for summary.json.

    result: what train_loop returned. steps: the lines of metrics.jsonl of optimizer steps.
    """
    # The warm-up step is left out of paces: it compiles, allocates and waits for the slowest worker.
    paced = steps[1:] or steps
    seconds = sum(row["train_time_per_step"] for row in paced)
    names = {"trained": "trained_tokens", "supervised": "supervised_tokens", "padded": "padded_tokens"}
    pace = {
        f"{kind}_tokens_throughput": round(sum(row[f"{name}_this_iter"] for row in paced) / seconds, 1)
        for kind, name in names.items()
    }
    real, padded = (sum(row[f"{name}_tokens_this_iter"] for row in steps) for name in ("trained", "padded"))
    paces = {**pace, "padding_share": round(max(0.0, 1 - real / padded), 4)}
    if told is None:
        return paces
    measured = {
        "memory_bytes_per_worker": max(
            peak - before
            for peak, before in zip(
                result["peak_memory_bytes_per_worker"], result["memory_before_bytes_per_worker"], strict=True
            )
        ),
        "step_seconds": round(sum(row["train_time_per_step"] for row in steps), 3),
        "steps": result["steps"],
        "tokens": result["trained_tokens"],
        "tokens_per_second": pace["trained_tokens_throughput"],
        "flops_per_token": told.flops_per_token,
        "flops_per_second_per_worker": told.flops_per_token * pace["padded_tokens_throughput"] / result["workers"],
        "mfu": None,
        "cost_usd": None,
        "disk_bytes": _bytes_in(run.checkpoints) + _bytes_in(run.resume),
        **running_figures(
            read_catalog().gpus.get(result["device_name"]), result["workers"], told.flops_per_token,
            pace["trained_tokens_throughput"], result["training_seconds"],
        ),
    }  # fmt: skip
    planned = _planned(told)
    ratio = {
        name: round(measured[name] / value, 3)
        for name, value in planned.items()
        if value and measured[name] is not None and name != "flops_per_token"
    }
    return {**paces, "planned": planned, "measured": measured, "ratio": ratio, "conventions": CONVENTIONS}


def _planned(told: Plan) -> dict[str, Any]:
    """Tell a plan's figures as they can be measured; None where the plan does not know."""
    known = told.seconds is not None
    return {
        "memory_bytes_per_worker": told.memory.total - (CONTEXT_BYTES if told.cpu is None else 0),
        "step_seconds": round(told.seconds, 3) if known else None,
        "steps": told.steps,
        "tokens": told.tokens,
        "tokens_per_second": round(told.tokens / told.seconds, 1) if known else None,
        "flops_per_token": told.flops_per_token,
        "flops_per_second_per_worker": told.flops / told.seconds / told.workers if known else None,
        "mfu": round(told.mfu * told.tokens / told.positions, 4) if known and told.mfu else None,
        "cost_usd": told.cost,
        "disk_bytes": told.disk_bytes,
    }


def keep(told: Plan | None, config: FinetuneConfig, result: dict[str, Any], figures: dict[str, Any]) -> str:
    """Keep a complete run's pace for the plans of later ones; return a note if that failed.

    A run of a single step has no pace: that step warms up.
    """
    if told is None or result["steps"] < 2:
        return ""
    return keep_pace(
        Pace(
            device=result["device_name"],
            model_id=config.model_id,
            parameters=told.parameters,
            method=method_of(config),
            dtype=config.dtype,
            workers=result["workers"],
            recomputes=config.gradient_checkpointing,
            flops_per_second=figures["measured"]["flops_per_second_per_worker"],
            date=time.strftime("%Y-%m-%d"),
        )
    )


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
