"""What a run prints: before it starts, what it will do, its plan and warnings; at the end, its results."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from forgebook.planning import preflight, schedule
from forgebook.planning.auto_config import choices_of
from forgebook.planning.plan_report import choice_rows, compare_with_plan, plan_summary
from forgebook.planning.prepare import Prepared, report_rows
from forgebook.reporting.console import PAGE_WIDTH, make_table
from forgebook.reporting.divergence import all_warnings
from forgebook.reporting.plots import plot_losses
from forgebook.runs.atomic import read_json, write_json
from forgebook.runs.metrics import read_metrics
from forgebook.runs.run import display_path

if TYPE_CHECKING:
    from rich.console import Console

    from forgebook.config.schema import ResolvedConfig
    from forgebook.planning.plan import Plan
    from forgebook.runs.run import Run

__all__ = ["print_choices", "print_plan", "print_run", "print_summary", "profile_rows", "stopped_text", "write_summary"]

SUMMARY_KEYS = (
    "best_checkpoint",
    "eval_loss",
    "perplexity",
    "steps",
    "trained_tokens",
    "trained_tokens_throughput",
    "training_seconds",
)
PACKAGES = ("torch", "ray", "transformers", "peft", "accelerate", "deepspeed")


def print_choices(output: Console, prepared: Prepared) -> None:
    """Print what --default chose, and why."""
    choices = choice_rows(choices_of(prepared.config))
    output.print(make_table("Chosen (--default)", ["key", "value", "reason"], choices))


def print_run(output: Console, run: Run, prepared: Prepared, vllm: str | None) -> None:
    """Print in a few lines what is about to happen, and what the data or the config should make the user look at.

    vllm: whether vLLM can serve the adapter; None if there is none.
    """
    config, report = prepared.config, prepared.report
    method = "full fine-tuning" if config.lora_config is None else f"LoRA r={config.lora_config.get('r', 8)}"
    steps = schedule.steps_per_epoch(report["train"]["sequences"], config.global_batch_size)
    deepspeed = Path(config.deepspeed.config_path).stem if config.deepspeed else "no DeepSpeed"
    sharding = "FSDP2" if config.sharding == "fsdp" else deepspeed
    plural = "s" if config.num_devices > 1 else ""
    workers = f"{config.num_devices} worker{plural}" if config.num_devices else "this process"
    unit = "packed sequences" if config.padding == "packed" else "examples"
    many = "s" if config.num_epochs > 1 else ""
    capped = f", at most {config.max_steps}" if config.max_steps else ""
    output.print(f"[bold]{run.name}[/bold]  {config.model_id}, {method}, {config.task}, {config.dtype}")
    output.print(make_table("", ["", "training", "validation"][: len(report_rows(report)[0])], report_rows(report)))
    lost = sum(report[name]["answer_tokens_cut"] for name in ("train", "valid") if name in report)
    if lost:
        output.print(f"  [yellow]{lost:,} supervised tokens are cut off (truncation: {config.truncation})[/yellow]")
    if report.get("overlap", {}).get("rows"):
        output.print(
            f"  [yellow]{report['overlap']['rows']:,} validation examples are also training examples, so their loss "
            f"measures nothing ({report['overlap']['places'][0]})[/yellow]"
        )
    output.print(
        f"  steps  {config.num_epochs} epoch{many} of {steps}{capped}, {config.global_batch_size} {unit} each, "
        f"learning rate {config.learning_rate:g} {config.lr_scheduler_type}"
    )
    output.print(f"  where  {workers}, {sharding}; run folder {run.location}")
    if vllm is not None:
        output.print(f"  vLLM can serve the adapter: {escape(vllm)}")
    if config.is_lora and config.initial_base_model_ckpt_path and not config.initial_adapter_model_ckpt_path:
        output.print(
            "  [yellow]the adapter's base is a checkpoint of yours: serving it needs that whole checkpoint, which no "
            "other adapter shares[/yellow]"
        )
    if config.trainer_resources:
        output.print("  [yellow]trainer_resources are not reserved: Ray Train gives every worker the same[/yellow]")


def _print_parts(output: Console, start: str, text: str, is_bold: bool = False) -> None:
    """Print the parts of a text, as many in a line as a page shows without scrolling. is_bold: its start."""
    first, *others = text.split("; ")
    lines = [start + first]
    for part in others:
        joined = f"{lines[-1]}; {part}"
        lines[-1:] = [joined] if len(joined) <= PAGE_WIDTH else [lines[-1], " " * len(start) + part]
    printed = "\n".join(lines)
    output.print(f"[bold]{start}[/bold]{printed.removeprefix(start)}" if is_bold else printed)


def print_plan(output: Console, plan: Plan | None, warnings: list[str]) -> None:
    """Print the plan and its warnings."""
    if plan:
        _print_parts(output, "  plan   ", plan_summary(plan))
    for text in warnings:
        output.print(f"  [yellow]{escape(text)}[/yellow]")


def write_summary(run: Run, config: ResolvedConfig, plan: Plan | None, result: dict[str, Any], seconds: float) -> str:
    """Write summary.json, with planned and measured figures, and the loss curve; save the throughput for later plans.

    result: of the training loop. Returns a note if the throughput could not be saved, else "".
    """
    records = read_metrics(run.metrics)
    steps = [record for record in records if "train_loss_batch" in record]
    figures = preflight.compare_run(plan, run, result, steps)
    note = preflight.record_run(plan, config, result, figures)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    plot_losses(records, run.loss_curve)
    write_json(
        run.summary,
        {
            "run_name": run.name,
            "custom_model_tag": config.custom_model_tag,
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "job_id": _job_id(),
            **result,
            "total_seconds": round(seconds, 1),
            **figures,
            "warnings": all_warnings(records),
            "versions": versions,
        },
    )
    return note


def _job_id() -> str | None:
    """Return the id of the Ray job that this process is the entry point of; None outside a job."""
    settings = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return settings.get("metadata", {}).get("job_submission_id")


def print_summary(output: Console, run: Run) -> None:
    """Print a finished run's results in a few lines."""
    summary = read_json(run.summary, SUMMARY_KEYS)
    loss = ""
    if summary["eval_loss"] is not None:
        perplexity = f", perplexity {summary['perplexity']:.3f}" if summary["perplexity"] else ""
        loss = f"evaluation loss {summary['eval_loss']:.4f}{perplexity}; "
    speed = (
        f"{summary['steps']} steps, {summary['trained_tokens']:,} tokens in {summary['training_seconds']:.0f} s, "
        f"{summary['trained_tokens_throughput']:,.0f} tokens/s (excluding padding)"
    )
    _print_parts(output, "done  ", loss + speed, is_bold=True)
    if planned_steps := summary.get("steps_without_early_stopping"):
        output.print(
            f"  stopped early after step {summary['steps']} of {planned_steps}: the evaluation loss had stopped falling"
        )
    if skipped := summary.get("skipped_steps"):
        output.print(
            f"  {skipped} of {summary['steps']} steps were skipped: a gradient overflowed float16, and the loss scale "
            "was halved"
        )
    if "planned" in summary:
        _print_parts(output, "  ", compare_with_plan(summary["planned"], summary["measured"]))
    warnings = summary.get("warnings", [])
    for text in warnings:
        output.print(f"  [yellow]{escape(text)}[/yellow]")
    if summary.get("stop_check") and not warnings:  # what a run that got worse answers needs no advice of its own
        output.print(f"  {_stop_text(run, summary['stop_check'])}")
    if str(summary.get("vllm_serves")).startswith("no: "):
        reason = escape(summary["vllm_serves"].removeprefix("no: "))
        output.print(
            f"  [yellow]vLLM cannot serve the adapter: {reason}; merge it first (python main.py merge)[/yellow]"
        )
    if profile := summary.get("profile"):
        rows = profile_rows(profile)
        output.print(make_table(f"Where the time of {profile['steps']} steps goes", ["", "per step", "share"], rows))
        output.print(f"  trace            {display_path(run.folder / profile['trace'])} (open it in ui.perfetto.dev)")
    best = display_path(run.folder / summary["best_checkpoint"])
    _print_parts(output, "  ", f"best checkpoint  {best}; loss curve  {display_path(run.loss_curve)}")
    if run.uri:
        output.print(f"  stored in        {run.uri}")


def profile_rows(profile: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Lay a profile out as lines of a table: what, milliseconds per step, share of the time of a step."""

    def line(name: str, seconds: float) -> tuple[str, str, str]:
        return name, f"{1000 * seconds / profile['steps']:,.1f} ms", f"{seconds / profile['seconds']:.0%}"

    phases = [line(name, seconds) for name, seconds in profile["phases"].items()]
    operators = [
        line(f"  {name} ({facts['calls'] // profile['steps']} calls)", facts["seconds"])
        for name, facts in profile["operators"].items()
    ]
    return [*phases, (f"largest operators, on the {profile['operators_on'].upper()}", "", ""), *operators]


def _stop_text(run: Run, check: dict[str, Any]) -> str:
    """Report whether answers to training prompts stopped, and what to do where they did not."""
    if check["note"]:
        return f"[yellow]not checked whether answers stop: {escape(check['note'])}[/yellow]"
    counted = f"{check['stopped']} of {check['prompts']} answers to training prompts stopped"
    if check["stopped"] == check["prompts"]:
        return counted
    return (
        f"[yellow]{counted} within {check['max_new_tokens']} tokens (trained answers: up to "
        f"{check['trained_answer_tokens']}): the model has not learned to end its answers; train for more epochs or "
        f"with a higher learning_rate, and read some: python main.py generate {escape(str(display_path(run.folder)))} "
        "-p PROMPT[/yellow]"
    )


def stopped_text(run: Run) -> str:
    """Describe what an interrupted run has saved, and how to resume it."""
    if run.uri:
        return f"stopped; the same command resumes from the last complete state in {run.uri}"
    if not run.saved_step:
        return f"stopped before a state was saved in {run.location}; the same command starts the run again"
    names = ", ".join(sorted(path.name for path in run.checkpoints.glob("[!.]*")))
    checkpoints = f" (checkpoints: {names})" if names else ""
    return (
        f"stopped; step {run.saved_step} is saved in {run.location}{checkpoints}, and the same command resumes after it"
    )
