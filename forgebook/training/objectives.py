"""What a task minimises: from a batch to the sum of its losses, and what is measured beside it.

task                   the mean of                 over
causal_lm              -log p(token)               all tokens
instruction_tuning     -log p(token)               the assistant's tokens
classification         -log p(label)               the last answer's label token
preference_tuning      DPO and its kin             pairs (a chosen and a rejected answer)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from forgebook.config.parse import FinetuneConfig
from forgebook.data.token_store import Tokens
from forgebook.training.losses import IGNORED
from forgebook.training.preference import METRICS, PairLogps, preference_loss, preference_metrics

__all__ = ["Measured", "count_units", "measure", "metric_names"]


@dataclass(frozen=True)
class Measured:
    """One forward pass over a part of a batch.

    loss: a scalar, summed over the units of the part. sums: figures summed over the same units.
    predictions: of a classifier, (probabilities of the labels, number of the right one) per row.
    """

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]
    predictions: list[tuple[list[float], int]]


def metric_names(task: str | None) -> tuple[str, ...]:
    """Return the names of what a task measures beside its loss, the keys of `Measured.sums`."""
    return METRICS if task == "preference_tuning" else ()


def count_units(config: FinetuneConfig, rows: Tokens, numbers: np.ndarray) -> int:
    """Count what the loss is the mean over: trained tokens, or pairs."""
    if config.task == "preference_tuning":
        return len(numbers) // 2
    return int(rows.supervised[numbers].sum())


def measure(
    config: FinetuneConfig,
    wrapped: nn.Module,
    batch: dict[str, torch.Tensor],
    reference: torch.Tensor | None = None,
    labels: list[int] | None = None,
) -> Measured:
    """Run the model on a batch and measure its task.

    reference: [rows of the batch] summed log-probabilities of the reference model, for preferences.
    labels: token ids of the labels; given, a classifier's predictions are measured, too.
    """
    if config.task == "preference_tuning":
        return _preference(config, wrapped, batch, reference)
    if labels is not None:
        return _classification(wrapped, batch, labels)
    return Measured(wrapped(**batch), {}, [])


def _classification(wrapped: nn.Module, batch: dict[str, torch.Tensor], labels: list[int]) -> Measured:
    targets = batch["labels"][batch["labels"] != IGNORED]
    logits = wrapped(**batch, want="logits")
    loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
    probabilities = torch.softmax(logits[:, labels], dim=1).tolist()
    return Measured(loss, {}, [(p, labels.index(int(t))) for p, t in zip(probabilities, targets, strict=True)])


def _preference(config, wrapped: nn.Module, batch: dict[str, torch.Tensor], reference) -> Measured:
    """Measure pairs: chosen answers are the even rows of the batch, rejected the odd."""
    logps = wrapped(**batch, want="rows")
    if len(logps) < 2:  # no pair for this worker in the epoch's last step: it still takes part in collectives
        return Measured(logps.sum() * 0, {}, [])
    options = config.preference_tuning_config
    counts = (batch["labels"] != IGNORED).sum(1)
    pairs = PairLogps(
        logps[0::2], logps[1::2], counts[0::2], counts[1::2],
        None if reference is None else reference[0::2], None if reference is None else reference[1::2],
    )  # fmt: skip
    smoothing: dict[str, Any] = {"label_smoothing": options.label_smoothing} if options.loss == "dpo" else {}
    loss = preference_loss(options.loss, pairs, options.beta, **smoothing)
    with torch.no_grad():
        sums = {name: values.sum() for name, values in preference_metrics(pairs, options.beta).items()}
    return Measured(loss.sum(), sums, [])
