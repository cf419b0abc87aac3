"""A run that got worse while its figures stayed finite: nothing else would stop it, or say so at its end.

warning = risen(losses)             of the training loss so far, or None
warnings = all_warnings(records)    of a finished run
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["all_warnings", "risen"]

# The first steps and the latest ones are compared. Single batches differ, most of all small ones, so that less than
# FACTOR is noise; a run that diverges ends near the loss of guessing, several times what it started from.
FIRST, LATEST, FACTOR = 5, 10, 1.5
# Nats per token: no single batch of a model that has learned anything has so high a loss. The run may have diverged in
# its second step, so that this is compared with the first one alone.
GUESSING = 6.0


def risen(losses: Sequence[float]) -> str | None:
    """Describe how the training loss has risen; None where it has not, or where there are too few steps to say.

    losses: of every step so far.
    """
    if len(losses) < FIRST + LATEST:
        return None
    latest = sum(losses[-LATEST:]) / LATEST
    first, steps = (losses[0], "first step") if latest > GUESSING else (sum(losses[:FIRST]) / FIRST, f"first {FIRST}")
    if latest <= FACTOR * first:
        return None
    return (
        f"the training loss has risen from {first:.4f} ({steps}) to {latest:.4f} (latest {LATEST}): the run has "
        "diverged; stop it and lower learning_rate"
    )


def all_warnings(records: Sequence[dict[str, Any]]) -> list[str]:
    """List what says that a finished run made the model worse; records: lines of its metrics.jsonl."""
    rise = risen([record["train_loss_batch"] for record in records if "train_loss_batch" in record])
    found = [rise.replace("stop it and lower", "lower")] if rise else []
    evaluated = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
    before = evaluated.pop(0, None)
    if before is not None and evaluated and min(evaluated.values()) > before:
        found.append(
            f"no evaluation was better than the one before training ({before:.4f}): the model is worse than the one it "
            "started from; lower learning_rate, or look at the data"
        )
    return found
