"""Answers -> figures: which are right, how sure the share is, and whether two models differ.

An interval holds the true figure in 95 of 100 such samples: Wilson's for a share, the bootstrap's for anything
else. A test is paired: both models answered the same rows, so only the rows on which they differ say anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "Difference",
    "Figure",
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
Z = 1.959963984540054  # the normal distribution holds 95 % within so many standard deviations
RESAMPLES = 9_999
# The rule of the data set's authors, github.com/openai/grade-school-math.
GSM8K_NUMBER = re.compile(r"#### (\-?[0-9\.\,]+)")


@dataclass(frozen=True)
class Figure:
    """A figure with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """How far two models differ on the same rows. p: how likely so large a difference is if they do not."""

    value: float
    p: float
    test: str


def is_exact(answer: str, reference: str) -> bool:
    """Tell whether an answer is its reference, outer white space aside."""
    return answer.strip() == reference.strip()


def gsm8k_number(text: str) -> str | None:
    """Take the final number out of a GSM8K answer, without commas; None if it gives none.

    The first number after "#### ", matched by `\\-?[0-9.,]+`, as grade-school-math's own extract_answer does.
    """
    found = GSM8K_NUMBER.search(text)
    return found[1].strip().replace(",", "") if found else None


def is_gsm8k_right(answer: str, reference: str) -> bool:
    """Tell whether an answer gives its reference's final number, by the published rule: the texts are compared."""
    number = gsm8k_number(answer)
    return number is not None and number == gsm8k_number(reference)


def share(points: Sequence[float]) -> Figure:
    """Return the mean of points from 0 to 1, right answers or wins, with Wilson's interval.

    Of ties and half wins the interval is wider than it need be, never narrower.
    """
    rows, value = len(points), float(np.mean(points))
    z2 = Z * Z / rows
    centre = (value + z2 / 2) / (1 + z2)
    half = Z / (1 + z2) * np.sqrt(value * (1 - value) / rows + z2 / (4 * rows))
    return Figure(value, max(0.0, float(centre - half)), min(1.0, float(centre + half)))


def estimate(values: Sequence[float]) -> Figure:
    """Return the mean with its 95% interval: Wilson's for right or wrong (1, 0; a tie is 0.5), else the bootstrap's."""
    return share(values) if set(values) <= {0, 0.5, 1} else bootstrap(np.mean, values)


def compare_shares(before: Sequence[bool], after: Sequence[bool]) -> Difference:
    """Compare right answers row by row: McNemar's exact test.

    Of the rows that only one model got right, each is as likely to be either's if the models do not differ.
    """
    from scipy.stats import binomtest

    before, after = np.asarray(before, bool), np.asarray(after, bool)
    won, lost = int((after & ~before).sum()), int((before & ~after).sum())
    p = binomtest(won, won + lost).pvalue if won + lost else 1.0
    return Difference(float(after.mean() - before.mean()), float(p), "McNemar, exact")


def bootstrap(statistic: Callable[..., float], *columns: Sequence[float], resamples: int = RESAMPLES) -> Figure:
    """Return a statistic of rows with the percentile interval of resamples of the rows.

    columns: [rows, ...] each, resampled together; statistic: of the columns, one number.
    """
    return _figure(statistic, _arrays(columns), _resampled(statistic, _arrays(columns), resamples))


def compare_statistics(
    statistic: Callable[..., float],
    before: Sequence[Sequence[float]],
    after: Sequence[Sequence[float]],
    resamples: int = RESAMPLES,
) -> tuple[Figure, Figure, Difference]:
    """Compare a statistic of two models on the same rows: the paired bootstrap, two-sided.

    before, after: the columns of each model, [rows, ...] each; a resample takes the same rows of both.

    Returns each model's figure, and the difference.
    """
    both = [_arrays(before), _arrays(after)]
    drawn = [_resampled(statistic, columns, resamples) for columns in both]
    first, second = (_figure(statistic, *of) for of in zip(both, drawn, strict=True))
    apart = drawn[1] - drawn[0]
    # One is added: resamples of which none crosses zero only say that p is below one in so many.
    crossed = 1 + min((apart <= 0).sum(), (apart >= 0).sum())
    p = min(1.0, 2 * crossed / (resamples + 1))
    return first, second, Difference(second.value - first.value, float(p), "paired bootstrap")


def _arrays(columns: Sequence[Sequence[float]]) -> list[np.ndarray]:
    return [np.asarray(column) for column in columns]


def _figure(statistic: Callable[..., float], columns: list[np.ndarray], drawn: np.ndarray) -> Figure:
    low, high = np.nanquantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Figure(float(statistic(*columns)), float(low), float(high))


def _resampled(statistic: Callable[..., float], columns: list[np.ndarray], resamples: int) -> np.ndarray:
    """Compute a statistic on resamples of the rows: the same rows for the same number of rows, each time."""
    random, rows = np.random.default_rng(0), len(columns[0])
    draws = (random.integers(rows, size=rows) for _ in range(resamples))
    return np.array([statistic(*(column[draw] for column in columns)) for draw in draws])
