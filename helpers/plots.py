"""The figures that runs and notebooks show, in one style."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["plot_losses"]

TRAIN, EVALUATION = "#4c78a8", "#e45756"


def plot_losses(metrics: list[dict[str, Any]], path: Path | None = None):
    """Draw training and evaluation loss over steps; save as PNG if `path` is given. Returns the figure.

    metrics: the lines of a run's metrics.jsonl (helpers.progress.read_metrics).
    """
    # Figure without pyplot: no window, no global state, safe beside a notebook's own plots.
    from matplotlib.figure import Figure

    steps = [row for row in metrics if "train_loss_batch" in row]
    evaluations = [row for row in metrics if "eval_loss" in row]
    figure = Figure(figsize=(7, 3.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    losses = [row["train_loss_batch"] for row in steps]
    axes.plot(
        [row["step"] for row in steps],
        losses,
        color=TRAIN,
        alpha=0.35,
        linewidth=1,
        label="training, per step",
    )
    axes.plot(
        [row["step"] for row in steps],
        _smoothed(losses),
        color=TRAIN,
        linewidth=2,
        label="training, smoothed",
    )
    if evaluations:
        axes.plot(
            [row["step"] for row in evaluations],
            [row["eval_loss"] for row in evaluations],
            color=EVALUATION, marker="o", linewidth=2, label="evaluation",
        )  # fmt: skip
    axes.set(xlabel="optimizer step", ylabel="loss (nats per trained token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    if path is not None:
        figure.savefig(path)
    return figure


def _smoothed(values: list[float], weight: float = 0.9) -> list[float]:
    """Average exponentially, without the start's bias towards zero (as Adam does)."""
    mean, seen, smoothed = 0.0, 0.0, []
    for value in values:
        mean = weight * mean + (1 - weight) * value
        seen = weight * seen + (1 - weight)
        smoothed.append(mean / seen)
    return smoothed
