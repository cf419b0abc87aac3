"""The figures that runs and notebooks show, in one style: legible at README width, each with a text of what is seen.

plot_losses(read_metrics(run.metrics))                          training and evaluation loss of one run
plot_lines({"LoRA": (steps, losses)}, "step", "loss (nats)")    any curves to compare
plot_bars({"base": 0.02, "tuned": 0.94}, "accuracy")            one figure per name
"""

from __future__ import annotations

import base64
import functools
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLORS", "plot_bars", "plot_histogram", "plot_lines", "plot_losses"]

# Distinguishable with color-blind eyes, on white and on black; after Okabe and Ito (2008).
COLORS = ("#4c8fd0", "#e0703c", "#3aa17e", "#c86fa8", "#c9a227", "#7c7cd0", "#8a8f98")
# Text and lines, 6.4:1 on white: no gray is legible on white and on GitHub's dark page, so figures have a white ground.
GRAY, BACKGROUND = "#57606a", "white"
WIDTH, HEIGHT = 7.0, 3.5  # inches
LOG_RANGE = 20  # losses that fall by more than this factor are drawn on a log scale


def _new_figure(panels: int = 1, height: float = HEIGHT) -> tuple[Figure, list[Axes]]:
    """Make an empty figure of panels side by side. height: inches."""
    figure = _figure_class()(figsize=(WIDTH, height), dpi=120, layout="constrained", facecolor=BACKGROUND)
    all_axes = [figure.add_subplot(1, panels, k + 1, facecolor=BACKGROUND) for k in range(panels)]
    for axes in all_axes:
        axes.tick_params(colors=GRAY)
        for line in axes.spines.values():
            line.set_color(GRAY)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, color=GRAY)
        axes.set_axisbelow(True)
        for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
            label.set_color(GRAY)
    return figure, all_axes


@functools.cache
def _figure_class() -> type[Figure]:
    """Make a figure class without pyplot (no window, no global state) that a notebook still displays."""
    from matplotlib.figure import Figure

    class DisplayedFigure(Figure):
        # By itself, because %matplotlib has a way of its own to draw a figure as PNG, without its text.
        def _ipython_display_(self) -> None:
            from IPython.display import publish_display_data

            png = io.BytesIO()
            self.savefig(png, format="png")
            text = str(self.get_label())  # says in words what is seen, for those who do not see it
            data = {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": f"<{text}>"}
            publish_display_data(data, {"image/png": {"alt": text}})

    return DisplayedFigure


def plot_lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    *,
    markers: bool = False,
    from_zero: bool = False,
    path: Path | None = None,
) -> Figure:
    """Draw curves, each a pair (x values, y values) under its name; save as PNG if there is a `path`.

    from_zero: start the y axis at 0.
    """
    figure, (axes,) = _new_figure()
    for (label, (x, y)), color in zip(series.items(), _colors(len(series)), strict=True):
        axes.plot(x, y, color=color, linewidth=2, marker="o" if markers else None, label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if from_zero:
        axes.set_ylim(0, None)
    if len(series) > 1:
        axes.legend(frameon=False, labelcolor=GRAY)
    ends = [f"{label}: {y[0]:.3g} to {y[-1]:.3g}" for label, (_, y) in series.items() if len(y)]
    return _finished(figure, f"{ylabel} by {xlabel}. {'; '.join(ends)}", path)


def plot_bars(
    groups: Mapping[str, float | Mapping[str, float]],
    ylabel: str,
    *,
    errors: Mapping[str, tuple[float, float]] | None = None,
    form: str = "{:.3g}",
    path: Path | None = None,
) -> Figure:
    """Draw one bar per name, or per name a group of named bars, each labeled with its value in the format `form`.

    errors: for names with one bar, the ends (low, high) of an interval around the value.
    """
    figure, (axes,) = _new_figure()
    nested = {name: value if isinstance(value, Mapping) else {"": value} for name, value in groups.items()}
    kinds = list(dict.fromkeys(kind for values in nested.values() for kind in values))
    width = 0.8 / len(kinds)
    for k, (kind, color) in enumerate(zip(kinds, _colors(len(kinds)), strict=True)):
        positions = [position + (k - (len(kinds) - 1) / 2) * width for position in range(len(nested))]
        values = [one.get(kind, 0.0) for one in nested.values()]
        axes.bar(positions, values, width * 0.92, color=color, label=kind)
        for name, position, value in zip(nested, positions, values, strict=True):
            low, high = (errors or {}).get(name, (value, value))
            if high > low:
                axes.errorbar(position, value, yerr=[[value - low], [high - value]], color=GRAY, capsize=4)
            axes.annotate(
                form.format(value),
                (position, high),
                (0, 3),
                textcoords="offset points",
                ha="center",
                color=GRAY,
                size=9,
            )
    axes.set_xticks(range(len(nested)), list(nested))
    axes.set_ylabel(ylabel)
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.15)
    if len(kinds) > 1:  # above the bars: high ones leave no room between them
        above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": len(kinds)}
        axes.legend(frameon=False, labelcolor=GRAY, **above)
    bars = [
        f"{name}: " + ", ".join(f"{kind} {form.format(value)}".strip() for kind, value in values.items())
        for name, values in nested.items()
    ]
    return _finished(figure, f"{ylabel}. {'; '.join(bars)}", path)


def plot_histogram(
    values: Sequence[float], xlabel: str, ylabel: str, *, marks: Mapping[str, float] | None = None, bins: int = 30
) -> Figure:
    """Draw how often values occur. marks: values under their names, each a line across the figure."""
    figure, (axes,) = _new_figure(height=2.8)
    axes.hist(values, bins=bins, color=COLORS[0])
    for (name, value), color in zip((marks or {}).items(), itertools.cycle(COLORS[1:])):
        axes.axvline(value, color=color, linewidth=2, linestyle="--")
        axes.annotate(f" {name} {value:,}", (value, 0.93), xycoords=("data", "axes fraction"), color=color)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    lines = "".join(f"; {name} {value:,}" for name, value in (marks or {}).items())
    return _finished(figure, f"{ylabel} by {xlabel}, {min(values):,} to {max(values):,}{lines}", None)


def plot_losses(metrics: list[dict[str, Any]], path: Path | None = None) -> Figure:
    """Draw training and evaluation loss over steps; save as PNG if there is a `path`.

    metrics: the lines of a run's metrics.jsonl (forgebook.runs.metrics.read_metrics).
    """
    steps = [record for record in metrics if "train_loss_batch" in record]
    evaluations = [record for record in metrics if "eval_loss" in record]
    figure, (axes,) = _new_figure()
    numbers, losses = [record["step"] for record in steps], [record["train_loss_batch"] for record in steps]
    train, evaluation = COLORS[:2]
    axes.plot(numbers, losses, color=train, alpha=0.35, linewidth=1, label="training, per step")
    axes.plot(numbers, _smoothed(losses), color=train, linewidth=2, label="training, smoothed")
    if evaluations:
        evaluated_at = [record["step"] for record in evaluations]
        axes.plot(
            evaluated_at,
            [record["eval_loss"] for record in evaluations],
            color=evaluation,
            marker="o",
            linewidth=2,
            label="evaluation",
        )
    axes.set(xlabel="optimizer step", ylabel="loss (nats per supervised token)")
    if min(losses, default=0) > 0 and max(losses) > LOG_RANGE * min(losses):
        axes.set_yscale("log")  # else the steep start is all that is seen
    else:
        axes.set_ylim(0, None)
    axes.legend(frameon=False, labelcolor=GRAY)
    return _finished(figure, "Training and evaluation loss by optimizer step", path)


def _colors(count: int) -> list[str]:
    return [COLORS[k % len(COLORS)] for k in range(count)]


def _finished(figure: Figure, text: str, path: Path | None) -> Figure:
    """Give a figure the text that stands for it where it is not seen, and save it."""
    figure.set_label(" ".join(text.split()))
    if path is not None:
        figure.savefig(path)
    return figure


def _smoothed(values: list[float], weight: float = 0.9) -> list[float]:
    """Average exponentially, without the start's bias towards zero (as Adam does)."""
    mean, weight_sum = 0.0, 0.0
    smoothed: list[float] = []
    for value in values:
        mean = weight * mean + (1 - weight) * value
        weight_sum = weight * weight_sum + (1 - weight)
        smoothed.append(mean / weight_sum)
    return smoothed
