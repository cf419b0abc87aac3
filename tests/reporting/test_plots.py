"""Figures show what they are given, legible on any page, in the one style."""

import base64

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


def test_the_legend_of_bars_covers_none_of_them():
    figure = plot_bars({name: {"x": 1.0, "y": 1.0} for name in ("base", "tuned")}, "accuracy")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    legend, highest = axes.get_legend().get_window_extent(), axes.patches[0].get_window_extent()
    assert legend.y0 >= axes.get_window_extent().y1 > highest.y1


def test_an_interval_is_plotted_with_the_value_above_it():
    (axes,) = plot_bars({"tuned": 0.9}, "accuracy", errors={"tuned": (0.85, 0.95)}).axes
    assert axes.texts[0].xy[1] == 0.95


def test_text_is_legible_on_light_and_dark_pages():
    """The contrast of the text on the figure's own ground is WCAG's 4.5:1 at least."""
    from matplotlib.colors import to_rgb

    def luminance(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    figure = plot_losses(METRICS)
    ground, text = figure.get_facecolor(), figure.axes[0].yaxis.label.get_color()
    assert ground[3] == 1 and (luminance(ground[:3]) + 0.05) / (luminance(text) + 0.05) >= 4.5


def test_a_notebook_displays_a_figure_with_the_text_that_stands_for_it(monkeypatch):
    """Also where %matplotlib has registered a way of its own to draw figures."""
    from IPython.core.formatters import DisplayFormatter

    displayed = []
    monkeypatch.setattr("IPython.display.publish_display_data", lambda *words: displayed.append(words))
    formatter = DisplayFormatter()
    formatter.formatters["image/png"].for_type_by_name(
        "matplotlib.figure", "Figure", lambda figure: b"without its text"
    )
    formatter.ipython_display_formatter(plot_bars({"base": 0.0, "tuned": 0.94}, "accuracy", form="{:.0%}"))
    assert formatter.format(plot_lines({"a": ([1, 2], [3.26, 0.04])}, "step", "loss")) == ({}, {})
    (bars, of_bars), (_, of_lines) = displayed
    assert base64.b64decode(bars["image/png"]).startswith(b"\x89PNG")
    assert of_bars["image/png"] == {"alt": "accuracy. base: 0%; tuned: 94%"}
    assert of_lines["image/png"] == {"alt": "loss by step. a: 3.26 to 0.04"}


def test_a_steep_fall_is_plotted_on_a_log_scale():
    falling = [{"step": step, "train_loss_batch": loss} for step, loss in enumerate((3.0, 0.5, 0.01))]
    assert plot_losses(falling).axes[0].get_yscale() == "log"
    assert plot_losses(falling[:2]).axes[0].get_yscale() == "linear"
