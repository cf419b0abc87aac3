"""Runs that got worse: the training loss, and the evaluations."""

import pytest

from forgebook.reporting.divergence import all_warnings, risen


@pytest.mark.parametrize(
    "losses",
    [
        [3.0] * 5 + [7.6] * 9,  # too few steps to say
        [3.0, 1.0, 0.2] + [0.1] * 40,
        [1.0, 0.4, 1.6, 0.8, 1.2, 1.6, 0.9, 1.7, 1.2, 1.5, 1.4, 1.3, 1.8, 1.1, 1.2],  # batches of one example
        [1.0] * 5 + [9.0] * 3 + [1.0] * 10,  # it has recovered
        [11.0, 10.0, 9.0, 8.5, 8.0] + [6.5] * 10,  # new weights
    ],
    ids=["short", "learns", "noise", "a spike", "from scratch"],
)
def test_what_is_no_divergence(losses):
    assert risen(losses) is None


@pytest.mark.parametrize(
    ("losses", "described"),
    [
        ([1.0] * 5 + [3.0] * 10, "from 1.0000 (first 5) to 3.0000 (latest 10)"),
        ([3.3] + [7.6] * 14, "from 3.3000 (first step) to 7.6000 (latest 10)"),  # at the second step
    ],
)
def test_a_loss_that_rose_is_described(losses, described):
    assert risen(losses).startswith(f"the training loss has risen {described}: the run has diverged; stop it and lower")


def test_a_finished_run_is_compared_with_its_start():
    steps = [{"step": k, "train_loss_batch": 2.0} for k in range(1, 21)]
    worse = [{"step": 0, "eval_loss": 1.5}, *steps, {"step": 10, "eval_loss": 1.9}, {"step": 20, "eval_loss": 1.6}]
    [warning] = all_warnings(worse)
    assert warning.startswith("no evaluation was better than the one before training (1.5000): the model is worse ")
    assert all_warnings([*worse, {"step": 21, "eval_loss": 1.4}]) == []
    assert all_warnings(worse[1:]) == []  # without eval_first nothing is known of the start
    assert all_warnings(worse[:1]) == []
    [rise] = all_warnings([{"step": k, "train_loss_batch": 2.0 + 6 * (k > 5)} for k in range(20)])
    assert "has risen from 2.0000" in rise and rise.endswith("has diverged; lower learning_rate")
