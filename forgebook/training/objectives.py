"""What a task minimizes: from a batch to the sum of its losses, and the metrics measured with it.

task                   the mean of                 over
causal_lm              -log p(token)               all tokens
instruction_tuning     -log p(token)               the assistant's tokens
classification         -log p(label)               the last answer's label token
preference_tuning      DPO and its variants        pairs (a chosen and a rejected answer)
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn

from forgebook.config.blocks import ClassifierConfig, PreferenceTuningConfig
from forgebook.data import batching
from forgebook.data.batching import IGNORED
from forgebook.data.token_store import Tokens
from forgebook.training import classification
from forgebook.training.preference import METRICS, PairLogps, preference_loss, preference_metrics

if TYPE_CHECKING:
    from forgebook.training.reference import ExampleSet
    from forgebook.training.setup import Worker

__all__ = ["Measurement", "Objective", "evaluate", "perplexity"]


@dataclass(frozen=True)
class Measurement:
    """One forward pass over a part of a batch.

    loss: a scalar, summed over the units of the part. sums: figures summed over the same units.
    predictions: of a classifier, (probabilities of the labels, index of the correct one) per example.
    """

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]
    predictions: list[tuple[list[float], int]]

    def figures(self, names: Sequence[str]) -> torch.Tensor:
        """Return the loss and the named sums, float64, on the device: reading them would make the host wait."""
        loss = self.loss.detach()
        nothing = torch.zeros_like(loss)  # a rank without examples in a batch measures no sums
        return torch.stack([loss, *(self.sums.get(name, nothing) for name in names)]).double()


@dataclass(frozen=True)
class Objective:
    """What a task minimizes; `preference` is set for preference tuning alone."""

    preference: PreferenceTuningConfig | None = None

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Return the names of the metrics besides the loss, the keys of `Measurement.sums`."""
        return METRICS if self.preference else ()

    def count_units(self, tokens: Tokens, examples: np.ndarray) -> int:
        """Count what the loss of these examples is the mean over: supervised tokens, or pairs."""
        if self.preference:
            return len(examples) // 2
        return int(tokens.supervised[examples].sum())

    def measure(
        self,
        wrapped: nn.Module,
        batch: batching.Batch,
        reference: torch.Tensor | None = None,
        label_ids: list[int] | None = None,
    ) -> Measurement:
        """Run the model on a batch.

        reference: [examples of the batch] summed log-probabilities of the reference model, for preferences.
        label_ids: token ids of a classifier's labels, to return its predictions too.
        """
        if self.preference:
            return _measure_pairs(self.preference, wrapped, batch, reference)
        if label_ids is not None:
            return _measure_labels(wrapped, batch, label_ids)
        return Measurement(wrapped(**batch), {}, [])


def _measure_labels(wrapped: nn.Module, batch: batching.Batch, label_ids: list[int]) -> Measurement:
    targets = batch["labels"][batch["labels"] != IGNORED]
    logits = wrapped(**batch, output="logits")
    # Over the whole vocabulary, as in training; the probabilities compare the labels alone.
    loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
    probabilities = torch.softmax(logits[:, label_ids], dim=1).tolist()
    predictions = [(p, label_ids.index(int(t))) for p, t in zip(probabilities, targets, strict=True)]
    return Measurement(loss, {}, predictions)


def _measure_pairs(
    preference: PreferenceTuningConfig,
    wrapped: nn.Module,
    batch: batching.Batch,
    reference: torch.Tensor | None,
) -> Measurement:
    """Measure pairs: chosen answers are the even examples of the batch, rejected the odd."""
    logps = wrapped(**batch, output="examples")
    if len(logps) < 2:  # no pair for this worker in the epoch's last step: it still takes part in collectives
        return Measurement(logps.sum() * 0, {}, [])
    counts = batch["counts"]
    pairs = PairLogps(
        logps[0::2], logps[1::2], counts[0::2], counts[1::2],
        None if reference is None else reference[0::2], None if reference is None else reference[1::2],
    )  # fmt: skip
    smoothing: dict[str, Any] = {}
    if preference.loss == "dpo":
        smoothing = {"label_smoothing": preference.label_smoothing}
    loss = preference_loss(preference.loss, pairs, preference.beta, **smoothing)
    with torch.no_grad():
        sums = {name: values.sum() for name, values in preference_metrics(pairs, preference.beta).items()}
    return Measurement(loss.sum(), sums, [])


# Over all workers ---------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    objective: Objective,
    worker: Worker,
    valid: ExampleSet,
    sequences: list[batching.Sequence],
    batch_size: int,
    classifier: ClassifierConfig | None,
) -> dict[str, float]:
    """Measure the mean loss over the validation examples, and the task's other metrics. Collective.

    sequences: the longest first, so that memory that does not suffice shows at once. batch_size: over all workers.
    """
    accelerator, started = worker.accelerator, time.perf_counter()
    shares, share = worker.data_share
    label_ids = classification.label_ids(worker.tokenizer, classifier.label_tokens) if classifier else None
    names = objective.metric_names
    sums = torch.zeros(1 + len(names), dtype=torch.float64, device=accelerator.device)
    predictions: list[tuple[list[float], int]] = []
    worker.wrapped.eval()
    groups = (sequences[start : start + batch_size] for start in range(0, len(sequences), batch_size))
    parts = (batching.split_batch(group, valid.tokens, shares, 1)[share][0] for group in groups)
    for batch, reference in valid.batches(parts):
        measurement = objective.measure(worker.wrapped, batch, reference, label_ids)
        sums += measurement.figures(names)
        predictions += measurement.predictions
    worker.wrapped.train()
    units = objective.count_units(valid.tokens, np.arange(len(valid.tokens)))
    totals = accelerator.reduce(sums, "sum").tolist()
    means = {f"eval_{name}": total / units for name, total in zip(("loss", *names), totals, strict=True)}
    if objective.preference is None and classifier is None:  # the loss of a pair or a label is not that of a text
        means["perplexity"] = perplexity(means["eval_loss"])
    if classifier:
        probabilities, truth = (np.array(column) for column in zip(*gather_object(predictions), strict=True))
        means |= classification.score_predictions(probabilities, truth, classifier.eval_metrics)
    return {**means, "eval_time_per_epoch": time.perf_counter() - started}


def perplexity(loss: float) -> float:
    """Return exp(loss) of a mean loss per token."""
    return math.exp(min(loss, 700.0))  # above, exp overflows
