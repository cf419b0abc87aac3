"""Answers -> figures: which answers are right, how certain a share is, and whether two models differ.

An interval contains the true figure in 95 of 100 such samples: Wilson's for a share, the bootstrap's for anything
else. Tests are paired: both models answered the same examples, so only those on which they differ count.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "Difference",
    "Figure",
    "anls",
    "bootstrap",
    "compare_shares",
    "compare_statistics",
    "estimate",
    "gsm8k_number",
    "is_exact",
    "is_gsm8k_right",
    "share",
]

CONFIDENCE = 0.95
Z = 1.959963984540054  # the normal distribution holds 95% within so many standard deviations
RESAMPLES = 9_999
ANLS_THRESHOLD = 0.5  # up to here an answer is another one, and no slip of reading
# The rule of the data set's authors, github.com/openai/grade-school-math.
GSM8K_NUMBER = re.compile(r"#### (\-?[0-9\.\,]+)")

# One value per example: numbers or truth values [examples], or probabilities [examples, labels].
Column = Any


@dataclass(frozen=True)
class Figure:
    """A figure with the ends of its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """How far two models differ on the same examples. p: how likely so large a difference is by chance."""

    value: float
    p: float
    test: str


def is_exact(answer: str, reference: str) -> bool:
    """Return whether an answer is its reference, outer white space aside."""
    return answer.strip() == reference.strip()


def anls(answer: str, reference: str) -> float:
    """Return the normalized Levenshtein similarity of an answer to its reference: 0 up to 0.5; case does not count.

    ANLS is its mean (Biten et al. 2019, Scene Text Visual Question Answering, arXiv 1905.13648).
    """
    from rapidfuzz.distance import Levenshtein

    similarity = Levenshtein.normalized_similarity(*(" ".join(text.lower().split()) for text in (answer, reference)))
    return similarity if similarity > ANLS_THRESHOLD else 0.0


def gsm8k_number(text: str) -> str | None:
    """Extract the final number of a GSM8K answer, without commas; None if there is none.

    The first number after "#### ", matched by `\\-?[0-9.,]+`, as in grade-school-math's own extract_answer.
    """
    match = GSM8K_NUMBER.search(text)
    return match[1].strip().replace(",", "") if match else None


def is_gsm8k_right(answer: str, reference: str) -> bool:
    """Return whether an answer has its reference's final number, by the published rule: the texts are compared."""
    number = gsm8k_number(answer)
    return number is not None and number == gsm8k_number(reference)


def share(points: Sequence[float] | np.ndarray) -> Figure:
    """Return the mean of points from 0 to 1, right answers or wins, with Wilson's interval.

    With ties and half wins the interval is wider than necessary, never narrower.
    """
    count, value = len(points), float(np.mean(points))
    z2 = Z * Z / count
    center = (value + z2 / 2) / (1 + z2)
    half = Z / (1 + z2) * np.sqrt(value * (1 - value) / count + z2 / (4 * count))
    return Figure(value, max(0.0, float(center - half)), min(1.0, float(center + half)))


def estimate(values: Sequence[float] | np.ndarray) -> Figure:
    """Return the mean with its 95% interval: Wilson's for right or wrong (1, 0; a tie is 0.5), else the bootstrap's."""
    return share(values) if set(values) <= {0, 0.5, 1} else bootstrap(np.mean, values)


def compare_shares(before: Sequence[bool] | np.ndarray, after: Sequence[bool] | np.ndarray) -> Difference:
    """Compare right answers example by example: McNemar's exact test.

    If the models do not differ, an example that only one of them got right is equally likely to be either's.
    """
    from scipy.stats import binomtest

    first, second = np.asarray(before, bool), np.asarray(after, bool)
    won, lost = int((second & ~first).sum()), int((first & ~second).sum())
    p = binomtest(won, won + lost).pvalue if won + lost else 1.0
    return Difference(float(second.mean() - first.mean()), float(p), "McNemar, exact")


def bootstrap(statistic: Callable[..., float], *columns: Column, resamples: int = RESAMPLES) -> Figure:
    """Return a statistic of examples with the percentile interval of the bootstrap (scipy.stats.bootstrap).

    columns: [examples, ...] each, resampled together; statistic: of the columns, one number.
    """
    from scipy.stats import DegenerateDataWarning
    from scipy.stats import bootstrap as scipy_bootstrap

    arrays = [np.asarray(column) for column in columns]
    value, count = float(statistic(*arrays)), len(arrays[0])
    if count < 2:  # nothing to resample, which scipy rejects
        return Figure(value, value, value)
    # What is resampled is the examples' numbers: columns may have several values per example.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # about scipy's own interval, which is not used
        result = scipy_bootstrap(
            (np.arange(count),),
            lambda chosen: statistic(*(array[chosen] for array in arrays)),
            n_resamples=resamples,
            batch=100,  # bounds memory
            vectorized=False,
            method="percentile",
            rng=np.random.default_rng(0),
        )
    # Not scipy's own interval: a resample may lack the examples that a statistic needs, which makes it NaN.
    low, high = np.nanquantile(result.bootstrap_distribution, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Figure(value, float(low), float(high))


def compare_statistics(
    statistic: Callable[..., float],
    before: Sequence[Column],
    after: Sequence[Column],
    resamples: int = RESAMPLES,
) -> tuple[Figure, Figure, Difference]:
    """Compare a statistic of two models on the same examples: the paired permutation test, two-sided.

    If the models do not differ, swapping their values on any examples gives equally likely differences
    (scipy.stats.permutation_test; exact for few examples).

    before, after: the columns of each model, [examples, ...] each. Returns each model's figure, and the difference.
    """
    from scipy.stats import permutation_test

    pairs = [(np.asarray(one), np.asarray(other)) for one, other in zip(before, after, strict=True)]
    count = len(pairs[0][0])

    def value(is_after: np.ndarray) -> float:
        """Compute the statistic of a mixture of both models; is_after: whose values each example has."""
        wide = (is_after.reshape(-1, *[1] * (one.ndim - 1)) for one, _ in pairs)
        return statistic(*(np.where(choice, other, one) for choice, (one, other) in zip(wide, pairs, strict=True)))

    first, second = (bootstrap(statistic, *columns, resamples=resamples) for columns in (before, after))
    p = 1.0
    # One example shows nothing, and NaN is no difference.
    if count > 1 and np.isfinite(second.value - first.value):
        result = permutation_test(
            (np.zeros(count, bool), np.ones(count, bool)),
            lambda swapped, rest: value(rest) - value(swapped),
            permutation_type="samples",
            n_resamples=resamples,
            batch=100,
            vectorized=False,
            rng=np.random.default_rng(0),
        )
        p = float(result.pvalue)
    return first, second, Difference(second.value - first.value, p, "paired permutation test")
