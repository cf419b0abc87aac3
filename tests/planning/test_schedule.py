"""Steps of a run: one count for the plan, --default and the loop."""

import math

import pytest

from forgebook.errors import ConfigError
from forgebook.planning import schedule


@pytest.mark.parametrize(("sequences", "steps"), [(64, 2), (65, 3), (1, 1), (32.5, 2)])
def test_a_short_last_batch_is_a_step(sequences, steps):
    assert schedule.steps_per_epoch(sequences, 32) == steps


@pytest.mark.parametrize(("max_steps", "steps"), [(None, 30), (12, 12), (50, 30)])
def test_max_steps_ends_a_run_early_and_never_prolongs_it(max_steps, steps):
    assert schedule.total_steps(3, 10, max_steps) == steps


@pytest.mark.parametrize(("epoch_steps", "epochs"), [(100, 1), (99, 2), (1, 100), (300, 1)])
def test_epochs_reach_the_fewest_steps(epoch_steps, epochs):
    assert schedule.epochs_for(100, epoch_steps) == epochs
    assert epochs * epoch_steps >= 100 > (epochs - 1) * epoch_steps


@pytest.mark.parametrize(("steps", "warmup"), [(5, 0), (50, 5), (200, 10), (1_000, 30), (3_000, 90), (10_000, 100)])
def test_the_warm_up_is_a_few_percent_within_bounds(steps, warmup):
    assert schedule.warmup_steps(steps) == warmup


@pytest.mark.parametrize(("steps", "interval"), [(39, None), (40, 10), (41, 11), (1_000, 250)])
def test_an_epoch_is_interrupted_only_if_it_is_long(steps, interval):
    assert schedule.evaluation_interval(steps, 4) == interval


@pytest.mark.parametrize(
    ("arguments", "checkpoints"),
    [
        ((10, 30), {10: "epoch-1", 20: "epoch-2", 30: "epoch-3"}),
        ((10, 30, "epochs", 2), {20: "epoch-2", 30: "epoch-3"}),
        ((10, 25), {10: "step-10", 20: "step-20", 25: "step-25"}),  # stopped within an epoch by max_steps
        ((10, 25, "steps", 10), {10: "step-10", 20: "step-20", 25: "step-25"}),
        ((10, 20, "steps", 10), {10: "step-10", 20: "step-20"}),
        ((10, 5, "epochs", 1), {5: "step-5"}),
        ((10, 10, "steps", 99), {10: "step-10"}),
    ],
)
def test_the_last_step_is_always_evaluated(arguments, checkpoints):
    assert schedule.evaluation_steps(*arguments) == checkpoints


@pytest.mark.parametrize(
    "warmup, steps, words", [(0, 1, None), (9, 10, None), (10, 10, "is 10, the run has 10"), (50, 30, "at most 3")]
)
def test_a_warmup_longer_than_the_run_is_a_warning(warmup, steps, words):
    warned = schedule.check_warmup(warmup, steps)
    assert warned is None if words is None else words in warned


def test_a_single_step_at_a_learning_rate_of_zero_is_an_error():
    with pytest.raises(ConfigError, match="num_warmup_steps: 10 starts the learning rate at 0"):
        schedule.check_warmup(10, 1)


@pytest.mark.parametrize(
    ("losses", "settings", "expected"),
    [
        ([], (1,), False),
        ([3.0, 2.0, 1.0], (1,), False),
        ([3.0, 2.0, 2.0], (1,), True),
        ([3.0, 2.0, 2.5], (2,), False),
        ([3.0, 2.0, 2.5, 2.1], (2,), True),
        ([3.0, 2.0, 2.5, 1.9], (2,), False),
        ([3.0, 2.95, 2.91], (2, 0.1), True),
        ([3.0, 2.95, 2.85], (2, 0.1), False),
        ([3.0, None, math.nan], (2,), True),
    ],
)
def test_a_run_ends_early_once_no_loss_is_lower(losses, settings, expected):
    assert schedule.stops_early(losses, *settings) is expected
