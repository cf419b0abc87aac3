"""Figures show what they are given, without a background, in the one style."""

import pytest

from forgebook.reporting.plots import plot_bars, plot_lines, plot_losses

METRICS = [{"step": k, "train_loss_batch": 3.0 / k} for k in range(1, 9)] + [{"step": 4, "eval_loss": 1.0}]


def test_losses_show_every_step_and_evaluation(tmp_path):
    figure = plot_losses(METRICS, tmp_path / "loss.png")
    (axes,) = figure.axes
    steps, smoothed, evaluation = axes.get_lines()
    assert list(steps.get_ydata()) == [3.0 / k for k in range(1, 9)] and len(smoothed.get_ydata()) == 8
    assert list(evaluation.get_xdata()) == [4] and "loss" in axes.get_ylabel() and "step" in axes.get_xlabel()
    assert (tmp_path / "loss.png").stat().st_size < 200_000


def test_lines_have_their_names_and_units():
    (axes,) = plot_lines({"a": ([0, 1], [2, 3]), "b": ([0, 1], [4, 5])}, "time (s)", "loss", from_zero=True).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert axes.get_xlabel() == "time (s)" and axes.get_ylim()[0] == 0


@pytest.mark.parametrize("groups", [{"base": 0.1, "tuned": 0.9}, {"base": {"x": 0.1}, "tuned": {"x": 0.2, "y": 0.9}}])
def test_bars_carry_their_values(groups):
    (axes,) = plot_bars(groups, "accuracy", form="{:.0%}").axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["base", "tuned"]
    assert {"10%", "90%"} <= {text.get_text() for text in axes.texts}


def test_an_interval_is_drawn_and_the_value_stands_above_it():
    (axes,) = plot_bars({"tuned": 0.9}, "accuracy", errors={"tuned": (0.85, 0.95)}).axes
    assert axes.texts[0].xy[1] == 0.95


def test_the_page_shows_through():
    figure = plot_losses(METRICS)
    assert figure.get_facecolor()[3] == 0 and figure.axes[0].get_facecolor()[3] == 0


def test_a_notebook_shows_a_figure_without_being_told():
    from IPython.core.formatters import PNGFormatter

    assert PNGFormatter()(plot_losses(METRICS)).startswith(b"\x89PNG")
