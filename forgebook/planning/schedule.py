"""How many optimizer steps a run has, when it evaluates, and how long its learning rate warms up.

Plain numbers in, plain numbers out: the plan, `--default` and the training loop all call these functions, so that
what is planned is what is run.

    steps = steps_per_epoch(7473, 64)             117
    last = total_steps(3, steps)                  351
    evaluation_steps(steps, last)                 {117: "epoch-1", 234: "epoch-2", 351: "epoch-3"}
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from forgebook.errors import ConfigError

__all__ = [
    "check_warmup",
    "epochs_for",
    "evaluation_interval",
    "evaluation_steps",
    "steps_per_epoch",
    "stops_early",
    "total_steps",
    "warmup_steps",
]

# Linear warm-up for a few percent of the run is the usual choice with AdamW: long enough for its second moments to
# settle, bounded so that neither very short nor very long runs spend their steps on it.
WARMUP_SHARE, FEWEST_WARMUP_STEPS, MOST_WARMUP_STEPS = 0.03, 10, 100


def steps_per_epoch(sequences: float, global_batch_size: int) -> int:
    """Count the optimizer steps of an epoch.

    sequences: what a batch counts: examples, pairs or packed sequences; an estimate may be a fraction. The last batch
    of an epoch may be short, but it is a step of its own.
    """
    return math.ceil(sequences / global_batch_size)


def epochs_for(min_update_steps: int, steps_per_epoch: int) -> int:
    """Count the epochs that give at least so many optimizer steps."""
    return math.ceil(min_update_steps / steps_per_epoch)


def total_steps(num_epochs: int, steps_per_epoch: int, max_steps: int | None = None) -> int:
    """Count the optimizer steps of a run; max_steps ends it early."""
    steps = num_epochs * steps_per_epoch
    return min(steps, max_steps) if max_steps else steps


def warmup_steps(total_steps: int) -> int:
    """Choose the steps of the warm-up: 3% of the run within 10 to 100 steps, but never more than a tenth of it."""
    usual = round(WARMUP_SHARE * total_steps)
    return min(total_steps // 10, max(FEWEST_WARMUP_STEPS, min(MOST_WARMUP_STEPS, usual)))


def check_warmup(num_warmup_steps: int, total_steps: int) -> str | None:
    """Warn if the learning rate never reaches its peak.

    Raises ConfigError if it is 0 in the only step: the base model would be saved as the result.
    """
    if num_warmup_steps and total_steps == 1:
        raise ConfigError(
            f"num_warmup_steps: {num_warmup_steps} starts the learning rate at 0, and the run has a single optimizer "
            "step: nothing would be trained. Set num_warmup_steps: 0, or a higher num_epochs or max_steps"
        )
    if num_warmup_steps >= total_steps:
        return (
            f"num_warmup_steps is {num_warmup_steps}, the run has {total_steps} optimizer steps: the learning rate "
            f"never reaches its peak; set num_warmup_steps to at most {warmup_steps(total_steps) or 1}"
        )
    return None


def stops_early(losses: Iterable[float | None], patience: int, min_delta: float = 0.0) -> bool:
    """Decide whether a run ends: the last `patience` evaluation losses were not lower than the lowest before them.

    losses: of all evaluations, oldest first; one that is missing or not finite is not lower. min_delta: by how much a
    loss has to be lower to count.
    """
    lowest, since = math.inf, 0
    for loss in losses:
        if loss is not None and math.isfinite(loss) and loss < lowest - min_delta:  # infinity less a little is infinity
            lowest, since = loss, 0
        else:
            since += 1
    return since >= patience


def evaluation_interval(total_steps: int, evaluations: int) -> int | None:
    """Choose the steps between evaluations of a run of one epoch; None if it is too short to be interrupted.

    Ten steps per evaluation at least: more often, evaluating and saving would cost more than training.
    """
    return math.ceil(total_steps / evaluations) if total_steps >= 10 * evaluations else None


def evaluation_steps(steps_per_epoch: int, last_step: int, unit: str = "epochs", frequency: int = 1) -> dict[int, str]:
    """Map each step after which to evaluate and save to the checkpoint's name; the last step is always one.

    unit, frequency: `checkpoint_and_evaluation_frequency` of the config. Checkpoints are named after the epoch where
    all of them end with one, else after the step.
    """
    by_steps = unit == "steps"
    interval = frequency * (1 if by_steps else steps_per_epoch)
    steps = [*range(interval, last_step, interval), last_step]
    if by_steps or last_step % steps_per_epoch:
        return {step: f"step-{step}" for step in steps}
    return {step: f"epoch-{step // steps_per_epoch}" for step in steps}
