"""The six points: which is next, by what the files of a run show."""

import json
import math

import pytest

from conftest import TINY_MODEL, config_for
from forgebook.reporting.debugging import debugging_steps, next_step
from forgebook.runs.metrics import Progress
from forgebook.runs.run import run_at

GOOD = [3.0, 2.0, 1.0, 0.5, 0.2, 0.1]


@pytest.fixture
def steps_of(tmp_path):
    """Return the points of a config with two runs, by their losses; an evaluation if it has figures."""

    def make(trial=(), losses=(), evaluations=(), figures=None, **values):
        storage = str(tmp_path)
        for name, curve in (("r-overfit", trial), ("r", losses)):
            run = run_at(storage, name)
            if curve:
                progress = Progress(run)
                for step, loss in enumerate(curve, 1):
                    progress.step(step=step, train_loss_batch=loss)
                for loss in evaluations:
                    progress.evaluation(step=len(curve), eval_loss=loss)
        if figures:
            (run.folder / "evaluation.json").write_text(json.dumps(figures))
        return debugging_steps(config_for(str(TINY_MODEL), run_name="r", storage_path=storage, **values))

    return make


def test_a_config_without_runs_begins_with_its_examples(steps_of):
    steps = steps_of()
    assert len(steps) == 6 and next_step(steps) == 0 and not any(step.is_done for step in steps)
    assert steps[0].command == "python main.py preview CONFIG n=5"
    assert f"{math.log(2048):.2f}" in steps[2].title


def test_after_a_trial_that_learned_comes_the_learning_rate(steps_of):
    steps = steps_of(trial=GOOD)
    assert next_step(steps) == 3 and "loss 3.000 at step 1, 0.100 at step 6" in steps[1].evidence


def test_a_trial_that_does_not_learn_is_a_problem(steps_of):
    steps = steps_of(trial=[3.0, 2.9, 2.8])
    assert next_step(steps) == 1 and "does not fall" in steps[1].problem


@pytest.mark.parametrize(("first", "is_wrong"), [(7.6, True), (3.0, False)])
def test_a_first_loss_of_guessing_is_a_problem(steps_of, first, is_wrong):
    assert bool(steps_of(trial=[first, 0.1])[2].problem) is is_wrong


@pytest.mark.parametrize(("first", "is_wrong"), [(0.6931, False), (0.9, True)])
def test_the_first_loss_of_dpo(steps_of, first, is_wrong):
    step = steps_of(losses=[first, 0.5], task="preference_tuning")[2]
    assert "ln(2) = 0.69" in step.title and bool(step.problem) is is_wrong


@pytest.mark.parametrize(
    ("losses", "evaluations", "problem"),
    [
        (GOOD, [1.0, 0.5], ""),
        ([1.0, 1.1, 1.3, 1.5, 2.0], [], "lower learning_rate"),
        ([1.0, 1.0, 1.0, 0.999, 0.999], [], "raise learning_rate"),
        (GOOD, [1.0, 0.5, 0.9], "by heart"),
    ],
)
def test_the_learning_rate_is_judged_by_the_curve(steps_of, losses, evaluations, problem):
    steps = steps_of(trial=GOOD, losses=losses, evaluations=evaluations)
    assert problem in steps[3].problem and bool(steps[3].problem) is bool(problem)
    assert next_step(steps) == (3 if problem else 4)


def test_an_evaluated_run_leads_to_its_mistakes(steps_of):
    figures = {"rows": 5, "exact_match_before": 0.1, "exact_match_after": 0.85}
    steps = steps_of(trial=GOOD, losses=GOOD, figures=figures)
    assert next_step(steps) == 5 and steps[5].command.endswith("r/evaluation/mistakes.jsonl")
    assert steps[4].evidence == "exact_match 0.1 -> 0.85"
