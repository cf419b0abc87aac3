"""Metrics of how likely a model finds held-out examples: the labels of a classifier, preference pairs, perplexity."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from forgebook.data.row_formats import Example
from forgebook.evaluation import statistics
from forgebook.evaluation.logprobs import Measured, Models, OnProgress, label_probabilities
from forgebook.evaluation.results import (
    Comparison,
    Evaluation,
    conversation_text,
    make_evaluation,
    share_score,
    statistic_score,
)
from forgebook.training.classification import score_predictions

__all__ = ["classification", "perplexity", "preference"]

# Resamples for metrics of scikit-learn, which take a thousand times as long as a mean.
CLASSIFIER_RESAMPLES = 999


def classification(
    examples: list[Example], labels: Sequence[str], metrics: Sequence[str], models: Models, on_progress: OnProgress
) -> Evaluation:
    """Compare how often the most likely label is right, and scikit-learn's metrics of the labels' probabilities."""
    truth = np.array([labels.index(example.conversation[-1]["content"]) for example in examples])
    probabilities = {}
    for name, loaded in models:
        report = functools.partial(_report, on_progress, name, len(examples))
        with loaded.active() as model:
            probabilities[name] = label_probabilities(
                model, loaded.tokenizer, examples, labels, loaded.prompt_format, report
            )
        del loaded, model
    before, after = probabilities["base"], probabilities["tuned"]
    scores = [share_score("accuracy", before.argmax(1) == truth, after.argmax(1) == truth)]
    for metric in metrics:
        if metric != "accuracy":
            columns = [before, truth], [after, truth]
            scores.append(statistic_score(metric, _classifier_metric(metric), *columns, CLASSIFIER_RESAMPLES))
    predicted = [[labels[label] for label in one.argmax(1)] for one in (before, after)]
    references = [labels[label] for label in truth]
    prompts = [conversation_text(example.conversation[:-1]) for example in examples]
    kinds = [
        [None if name == right else f"{right} taken for {name}" for name, right in zip(one, references, strict=True)]
        for one in predicted
    ]
    return make_evaluation("classification", scores, Comparison(prompts, references, *predicted), kinds)


def _classifier_metric(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    return lambda probabilities, truth: score_predictions(probabilities, truth, [name])[f"eval_{name}"]


def preference(measured: Measured) -> Evaluation:
    """Compare how often the chosen answer is more likely than the rejected one."""
    before, after = (sums[:, 0, 0] > sums[:, 1, 0] for sums in (measured.base, measured.tuned))
    score = share_score("chosen_likelier", before, after)
    chosen = [example.conversation[-1]["content"] for example in measured.examples]
    rejected = [(example.rejected or example.conversation)[-1]["content"] for example in measured.examples]
    preferred = [
        [good if is_right else bad for is_right, good, bad in zip(one, chosen, rejected, strict=True)]
        for one in (before, after)
    ]
    prompts = [conversation_text(example.conversation[:-1]) for example in measured.examples]
    kinds = [[None if is_right else "rejected more likely" for is_right in one] for one in (before, after)]
    compared = Comparison(prompts, chosen, *preferred)
    return make_evaluation("preference", [score], compared, kinds, left_out=measured.left_out)


def perplexity(measured: Measured) -> Evaluation:
    """Compare the perplexity of the tokens in the loss."""
    base, tuned = ([*sums[:, 0].T] for sums in (measured.base, measured.tuned))
    score = statistic_score("perplexity", _perplexity_of, base, tuned, statistics.RESAMPLES)
    before, after = (-logs / tokens for logs, tokens in (base, tuned))
    losses = [[f"{loss:.4f} per token" for loss in one] for one in (before, after)]
    texts = [
        conversation_text(example.conversation) if example.text is None else example.text
        for example in measured.examples
    ]
    worse = ["less likely than by the base" if one > other else None for other, one in zip(before, after, strict=True)]
    compared = Comparison(texts, [""] * len(texts), *losses)
    kinds: list[list[str | None]] = [[None] * len(texts), worse]
    return make_evaluation("perplexity", [score], compared, kinds, left_out=measured.left_out)


def _perplexity_of(logs: np.ndarray, tokens: np.ndarray) -> float:
    return float(np.exp(-logs.sum() / tokens.sum()))


def _report(on_progress: OnProgress, name: str, total: int, done: int) -> None:
    on_progress(name, done, total)
