"""What came of a run: summary.json, written last, and the lines that a person reads at its end."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
from typing import TYPE_CHECKING, Any

from forgebook.models import load
from forgebook.planning import preflight
from forgebook.planning.plan_report import comparison
from forgebook.reporting import plots
from forgebook.runs import metrics
from forgebook.runs import run as storage

if TYPE_CHECKING:
    from rich.console import Console

    from forgebook.config.parse import FinetuneConfig
    from forgebook.planning.plan import Plan
    from forgebook.runs.run import Run

__all__ = ["print_summary", "write_summary"]

PACKAGES = ("torch", "ray", "transformers", "peft", "accelerate", "deepspeed")


def write_summary(run: Run, config: FinetuneConfig, told: Plan | None, result: dict[str, Any], seconds: float) -> str:
    """Write what came of the run beside what was planned, and draw its loss curve; keep its pace for later plans.

    Returns a note if that could not be.
    """
    steps = [row for row in metrics.read_metrics(run.metrics) if "train_loss_batch" in row]
    figures = preflight.figures_of(told, run, result, steps)
    note = preflight.keep(told, config, result, figures)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    plots.plot_losses(metrics.read_metrics(run.metrics), run.loss_curve)
    storage.write_json(
        run.summary,
        {
            "run_name": run.name,
            "custom_model_tag": config.custom_model_tag,
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "job_id": _job_id(),
            **result,
            "vllm_serves": load.vllm_serves(config.lora_config) if config.is_lora else None,
            "total_seconds": round(seconds, 1),
            **figures,
            "versions": versions,
        },
    )
    return note


def _job_id() -> str | None:
    """Name the Ray job that this process is the entry point of, if it is one's."""
    settings = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return settings.get("metadata", {}).get("job_submission_id")


def print_summary(output: Console, run: Run) -> None:
    """Tell in some lines what came of a run."""
    summary = storage.read_json(run.summary)
    peak = max(summary["peak_memory_bytes_per_worker"]) / 1e9
    if summary["eval_loss"] is not None:
        perplexity = f", perplexity {summary['perplexity']:.3f}" if summary["perplexity"] else ""
        output.print(f"[bold]done[/bold]  evaluation loss {summary['eval_loss']:.4f}{perplexity}")
    output.print(
        f"  {summary['steps']} steps, {summary['trained_tokens']:,} tokens in {summary['training_seconds']:.0f} s, "
        f"{summary['trained_tokens_throughput']:,.0f} real tokens/s, peak {peak:.1f} GB per worker"
    )
    if "planned" in summary:
        output.print(f"  {comparison(summary['planned'], summary['measured'])}")
    best = storage.shown(run.folder / summary["best_checkpoint"])
    output.print(f"  best checkpoint  {best}  loss curve  {storage.shown(run.loss_curve)}")
    if run.uri:
        output.print(f"  kept in          {run.uri}")
