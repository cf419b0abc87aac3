"""The figures that runs and notebooks show, in one style."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["plot_losses", "plot_trials"]

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


def plot_trials(curves: dict[str, list[tuple[int, float]]], path: Path | None = None):
    """Draw the evaluation losses of a sweep's trials over steps, the first one's in colour. Returns the figure.

    curves: (step, evaluation loss) of each trial by its label, the best trial first.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for k, (label, curve) in enumerate(curves.items()):
        steps, losses = zip(*curve, strict=True)
        style = {"color": EVALUATION, "linewidth": 2, "zorder": 3} if k == 0 else {"color": TRAIN, "alpha": 0.45}
        axes.plot(steps, losses, marker="o", markersize=4, label=label if k == 0 else None, **style)
        if k:  # named where it ends: a legend of many like lines says nothing
            axes.annotate(label, (steps[-1], losses[-1]), fontsize=6, xytext=(4, 2), textcoords="offset points")
    axes.set(xlabel="optimizer step", ylabel="evaluation loss (nats per trained token)")
    axes.grid(alpha=0.3)
    if curves:
        axes.legend(frameon=False, title="best")
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
