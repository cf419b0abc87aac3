"""Label noise by a model's own loss: an answer that the tuned model finds far less likely than the others may be wrong.

    judge = make_loss_judge(find_model("quickstart"), config, on_progress)
    judged = judge({0: example, ...})       findings of high losses; the highest and the lowest ones to look at

A model that was trained for many epochs on the same examples has learned their mistakes, too: take one that was trained
for few, or on others.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from forgebook.config.curation_blocks import CurationConfig
from forgebook.config.schema import FinetuneConfig
from forgebook.curation.checks import Finding
from forgebook.curation.curate import Judge, Judged, OnProgress
from forgebook.data import tokenize
from forgebook.data.row_formats import Example
from forgebook.data.token_store import Tokens
from forgebook.data.truncation import fit_tokens
from forgebook.errors import ConfigError, DataError
from forgebook.evaluation.logprobs import log_probabilities
from forgebook.inference.loading import LoadedModel, load_together
from forgebook.runs.run import display_path

__all__ = ["losses", "make_loss_judge", "robust_limit"]

# Of normally distributed losses, the standard deviation is this many times the median deviation from the median.
DEVIATION = 1.4826


def make_loss_judge(
    source: str, config: FinetuneConfig, on_progress: OnProgress = lambda name, done, total: None
) -> Judge:
    """Make a judge that measures the loss of each example. source: a checkpoint or model folder, or a hub id.

    Raises ConfigError for pairs, which have no loss of their own.
    """
    if config.task == "preference_tuning":
        raise ConfigError("run: the loss of pairs says nothing about their labels: leave it out")
    settings = config.curation or CurationConfig()

    def judge(examples: dict[int, Example]) -> Judged:
        [loaded] = load_together([source])
        numbers = list(examples)
        with loaded.active():
            measured = losses(loaded, [examples[number] for number in numbers], config, on_progress)
        found = {number: loss for number, loss in zip(numbers, measured.tolist(), strict=True) if not np.isnan(loss)}
        if not found:
            raise DataError(f"{source} can measure none of {len(numbers)} examples: see task and context_length")
        limit = robust_limit(np.array(list(found.values())), settings.loss_deviations)
        order = sorted(found, key=lambda number: found[number])
        count = settings.examples_per_reason
        lists = {"highest loss": order[: -count - 1 : -1], "lowest loss": order[:count]}
        report: dict[str, Any] = {
            "model": display_path(Path(source)),
            "measured": len(found),
            "not_measured": len(numbers) - len(found),
            "median_loss": float(np.median(list(found.values()))),
            "high_from": limit,
            "lists": {name: [(number, _detail(found[number])) for number in part] for name, part in lists.items()},
            "shown": [number for part in lists.values() for number in part],
        }
        high = [Finding(k, "high_loss", _detail(loss)) for k, loss in found.items() if loss > limit]
        return Judged(high, report)

    return judge


def losses(
    loaded: LoadedModel,
    examples: list[Example],
    config: FinetuneConfig,
    on_progress: OnProgress = lambda name, done, total: None,
) -> np.ndarray:
    """Return [examples] the mean loss, in nats, of the tokens in the loss; NaN where an example cannot be encoded.

    Longer examples than the config's context length are cut as in training.
    """
    options = tokenize.EncodingOptions(
        _task(config.task), loaded.prompt_format, config.train_on, config.rewritten_turns,
    )  # fmt: skip
    owners, pieces = [], []
    for number, encoded in enumerate(tokenize.encode_examples(examples, loaded.tokenizer, options)):
        if not isinstance(encoded, DataError):
            pieces += encoded
            owners += [number] * len(encoded)
    totals = np.zeros((len(examples), 2))
    if pieces:
        tokens = Tokens.from_examples((one.input_ids, one.loss_mask) for one in pieces)
        longest = config.context_length or int(tokens.lengths.max())
        fitted = fit_tokens(tokens, longest, "drop" if config.truncation == "error" else config.truncation, 1)
        report = functools.partial(_report, on_progress, len(fitted.tokens))
        logs = log_probabilities(loaded.model, loaded.tokenizer, fitted.tokens, on_progress=report)
        stays = np.array(owners)[fitted.stays]
        np.add.at(totals, stays, np.stack([-logs, fitted.tokens.supervised], axis=1))
    with np.errstate(invalid="ignore"):
        return totals[:, 0] / totals[:, 1]


def robust_limit(values: np.ndarray, deviations: float) -> float:
    """Return the value that is so many robust standard deviations above the median.

    Outliers hardly move it: it is of the median deviation from the median.
    """
    median = float(np.median(values))
    return median + deviations * DEVIATION * float(np.median(np.abs(values - median)))


def _task(task: str | None) -> str:
    """Return the task by which examples are encoded: a label is a text here, as the model may lack its token."""
    return "instruction_tuning" if task in (None, "classification") else task


def _report(on_progress: OnProgress, total: int, done: int) -> None:
    on_progress("losses", done, total)


def _detail(loss: float) -> str:
    return f"loss {loss:.3f}"
