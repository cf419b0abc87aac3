"""What a person reads before a run: what it trains on and how, what it will take, what of it should worry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from forgebook.models import load
from forgebook.planning.choices import choice_rows, choices_of
from forgebook.planning.plan_report import in_short
from forgebook.planning.prepare import Prepared, report_rows, steps_per_epoch
from forgebook.reporting.console import table
from forgebook.runs.run import shown

if TYPE_CHECKING:
    from rich.console import Console

    from forgebook.planning.plan import Plan
    from forgebook.runs.run import Run

__all__ = ["print_choices", "print_forecast", "print_run"]


def print_choices(output: Console, prepared: Prepared) -> None:
    """Say what --default chose, and why."""
    choices = choice_rows(choices_of(prepared.config))
    output.print(table("Chosen (--default)", ["key", "value", "reason"], choices))


def print_run(output: Console, run: Run, prepared: Prepared) -> None:
    """Say in a few lines what is about to happen."""
    config, report = prepared.config, prepared.report
    method = f"LoRA r={config.lora_config.get('r', 8)}" if config.is_lora else "full parameter"
    steps = steps_per_epoch(config, prepared.train)
    sharding = Path(config.deepspeed.config_path).stem if config.deepspeed else "no DeepSpeed"
    workers = f"{config.num_devices} worker{'s' * (config.num_devices > 1)}" if config.num_devices else "this process"
    unit = "packed sequences" if config.padding == "packed" else "rows"
    capped = f", at most {config.max_steps}" if config.max_steps else ""
    output.print(f"[bold]{run.name}[/bold]  {config.model_id}, {method}, {config.task}, {config.dtype}")
    output.print(table("", ["", "training", "validation"][: len(report_rows(report)[0])], report_rows(report)))
    lost = sum(report[name]["answer_tokens_cut"] for name in ("train", "valid") if name in report)
    if lost:
        output.print(f"  [yellow]{lost:,} trained tokens are lost (truncation: {config.truncation})[/yellow]")
    if report.get("overlap", {}).get("rows"):
        output.print(
            f"  [yellow]{report['overlap']['rows']:,} validation rows are training rows, too: their loss says nothing "
            f"({report['overlap']['places'][0]})[/yellow]"
        )
    output.print(
        f"  steps  {config.num_epochs} epochs of {steps}{capped}, {config.global_batch_size} {unit} each, "
        f"learning rate {config.learning_rate:g} {config.lr_scheduler_type}"
    )
    base = load.locate(config.initial_base_model_ckpt_path or config.model_id)
    limit = load.context_limit(base, config.rope_scaling)
    if limit is not None and config.context_length > limit:
        cure = "raise its factor" if config.rope_scaling else "rope_scaling stretches it"
        output.print(
            f"  [yellow]context_length {config.context_length:,} is beyond the {limit:,} positions of "
            f"{shown(Path(base))}: {cure}[/yellow]"
        )
    output.print(f"  where  {workers}, {sharding}; run folder {run.place}")
    if config.is_lora:
        output.print(f"  vLLM can serve the adapter: {load.vllm_serves(config.lora_config)}")
    if config.is_lora and config.initial_base_model_ckpt_path and not config.initial_adapter_model_ckpt_path:
        output.print(
            "  [yellow]a LoRA adapter on a checkpoint of its own: whoever serves it needs that whole checkpoint as its "
            "base, which no other adapter shares[/yellow]"
        )
    if config.trainer_resources:
        output.print("  [yellow]trainer_resources are not reserved: Ray Train gives every worker the same[/yellow]")


def print_forecast(output: Console, told: Plan | None, worries: list[str]) -> None:
    """Tell the plan, and what of it should worry."""
    if told:
        output.print(f"  plan   {in_short(told)}")
    for text in worries:
        output.print(f"  [yellow]{escape(text)}[/yellow]")
