"""The six points at which a fine-tuning goes wrong, in the order to check them, and where a run stands.

steps = debugging_steps(config)     six, each with what the files of its runs show
next_step(steps)                    the first that is open, with the command to run

    1 look at the rendered examples     2 overfit a few examples        3 compare the first loss with guessing
    4 the learning rate                 5 evaluate generated answers    6 improve the data
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forgebook.models.shapes import find_shape
from forgebook.runs.atomic import read_json
from forgebook.runs.metrics import read_metrics
from forgebook.runs.run import Run, display_path, run_at

if TYPE_CHECKING:
    from forgebook.config.schema import FinetuneConfig

__all__ = ["DebuggingStep", "debugging_steps", "next_step"]

OVERFIT_EXAMPLES, OVERFIT_STEPS = 4, 60
LEARNED = 0.2  # of the first loss: what is left of it once a few examples are known by heart
GUESSING = 0.9  # of ln(vocabulary): a model that reads its prompt is far below
FLAT = 0.02  # a loss that changes by less has not moved


@dataclass(frozen=True)
class DebuggingStep:
    """One point. is_done: whether files of a run show it. problem: what they show to be wrong; empty if nothing."""

    title: str
    command: str
    is_done: bool = False
    evidence: str = ""
    problem: str = ""


def debugging_steps(config: FinetuneConfig) -> list[DebuggingStep]:
    """List the six points.

    They read the run of the config and the one that the second point's command makes, `RUN_NAME-overfit`, where these
    are stored on this machine.
    """
    source, name = config.source or "CONFIG", config.run_name or "run"
    run, trial = run_at(config.storage_path, name), run_at(config.storage_path, f"{name}-overfit")
    curve, trial_curve = _losses(run), _losses(trial)
    has_answers = (run.folder / "evaluation.json").exists()
    mistakes = display_path(run.folder / "evaluation" / "mistakes.jsonl")
    return [
        DebuggingStep(
            "Look at the examples: roles, end of turn, and exactly which tokens are in the loss",
            f"python main.py preview {source} n=5",
            is_done=bool(curve or trial_curve),
            evidence="runs were started after it" * bool(curve or trial_curve),
        ),
        _overfitting(source, name, config.learning_rate, trial_curve),
        _first_dpo_loss(source, curve or trial_curve)
        if config.preference_tuning_config is not None and config.preference_tuning_config.loss == "dpo"
        else _first_loss(source, curve or trial_curve, find_shape(config.model_id).vocab),
        _learning_rate(source, run, curve),
        DebuggingStep(
            "Evaluate generated answers, next to those of the base model: a loss shows neither format nor stopping",
            f"python main.py evaluate {name}",
            is_done=has_answers,
            evidence=_scores(run) if has_answers else "",
        ),
        DebuggingStep(
            "Improve the data: read the mistakes, find the examples that teach them, fix or add some; then run again",
            f"less {mistakes}" if has_answers else f"python main.py preview {source} n=20",
        ),
    ]


def next_step(steps: Sequence[DebuggingStep]) -> int:
    """Return the index of the first point that is open or shows a problem."""
    return next((k for k, step in enumerate(steps) if step.problem or not step.is_done), len(steps) - 1)


def _losses(run: Run) -> list[float]:
    """Read a run's training losses, step by step; none where it has not started."""
    if not run.metrics.exists():
        return []
    return [line["train_loss_batch"] for line in read_metrics(run.metrics) if "train_loss_batch" in line]


def _overfitting(source: str, name: str, rate: float | None, curve: list[float]) -> DebuggingStep:
    title = "Overfit a few examples: a loss that does not fall to nearly 0 is a bug, not a lack of data"
    command = (
        f"python main.py {source} run_name={name}-overfit on_existing=overwrite max_examples={OVERFIT_EXAMPLES} "
        f"num_epochs={OVERFIT_STEPS} max_steps={OVERFIT_STEPS} valid_path=null lr_scheduler_type=constant "
        "num_warmup_steps=0"
    )
    if not curve:
        return DebuggingStep(title, command)
    first, last = curve[0], curve[-1]
    evidence = f"loss {first:.3f} at step 1, {last:.3f} at step {len(curve)}"
    problem = ""
    if not last < LEARNED * first:
        problem = f"it does not fall: are the right tokens in the loss, is learning_rate {rate:g} too low or too high"
        problem += ", is anything trained at all (target_modules)?"
    return DebuggingStep(title, command, True, evidence, problem)


def _first_loss_command(source: str) -> str:
    return f"python main.py {source} max_steps=1 run_name=first-loss on_existing=overwrite"


def _first_dpo_loss(source: str, curve: list[float]) -> DebuggingStep:
    title = f"The loss at step 1 is ln(2) = {math.log(2):.2f}: model and reference still are the same"
    if not curve:
        return DebuggingStep(title, _first_loss_command(source))
    is_other = abs(curve[0] - math.log(2)) > FLAT
    problem = "the reference is another model than the one that training starts from" * is_other
    return DebuggingStep(title, _first_loss_command(source), True, f"{curve[0]:.3f}", problem)


def _first_loss(source: str, curve: list[float], vocabulary: int) -> DebuggingStep:
    guessing = math.log(vocabulary)
    title = f"The loss at step 1 is the base model's: far below guessing, which is ln({vocabulary:,}) = {guessing:.2f}"
    command = _first_loss_command(source)
    if not curve:
        return DebuggingStep(title, command)
    problem = ""
    if curve[0] > GUESSING * guessing:
        problem = "no better than guessing: weights and tokenizer do not belong together, or the weights are new"
    return DebuggingStep(title, command, True, f"{curve[0]:.3f}", problem)


def _learning_rate(source: str, run: Run, curve: list[float]) -> DebuggingStep:
    title = "The learning rate: the loss falls at once, and steadily"
    command = f"python main.py tune {source} 'learning_rate=loguniform(1.0e-5,1.0e-3)' samples=6"
    if len(curve) < 4:
        return DebuggingStep(title, command)
    part = max(1, len(curve) // 5)
    first, last = statistics.mean(curve[:part]), statistics.mean(curve[-part:])
    evidence = f"loss {first:.3f} in the first steps, {last:.3f} in the last"
    evaluations = [line["eval_loss"] for line in read_metrics(run.metrics) if line.get("eval_loss") is not None]
    problem = ""
    if not last < first:
        problem = "the loss rises: lower learning_rate by a factor of 3"
    elif last > (1 - FLAT) * first:
        problem = "the loss hardly moves: raise learning_rate by a factor of 3"
    elif evaluations and evaluations[-1] > (1 + FLAT) * min(evaluations):
        evidence += f"; evaluation loss {min(evaluations):.3f} at best, {evaluations[-1]:.3f} at the end"
        problem = "it learns the examples by heart: fewer epochs (early_stopping), or more examples"
    return DebuggingStep(title, command, True, evidence, problem)


def _scores(run: Run) -> str:
    """Write what evaluation.json says, such as `exact_match 0.10 -> 0.85`."""
    figures: dict[str, Any] = read_json(run.folder / "evaluation.json")
    names = [key.removesuffix("_after") for key in figures if key.endswith("_after")]
    pairs = [(name, figures.get(f"{name}_before"), figures[f"{name}_after"]) for name in names]
    return ", ".join(f"{name} {before:.3g} -> {after:.3g}" for name, before, after in pairs if before is not None)
