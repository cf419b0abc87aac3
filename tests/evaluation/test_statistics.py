"""Figures of answers: against published rules and against other implementations of the same statistics."""

import warnings

import numpy as np
import pytest

from conftest import REPOSITORY
from forgebook.evaluation.statistics import (
    Figure,
    anls,
    bootstrap,
    compare_shares,
    compare_statistics,
    gsm8k_number,
    is_exact,
    is_gsm8k_right,
    share,
)


def test_exact_is_but_for_outer_space():
    assert is_exact(" a b\n", "a b") and not is_exact("a  b", "a b") and not is_exact("A", "a")


def test_gsm8k_agrees_with_itself_on_300_published_answers():
    lines = (REPOSITORY / "tests/oracles/gsm8k_answers.txt").read_text().splitlines()
    answers = [f"3 x 6 = <<3*6=18>>18.\n{line}" for line in lines]
    assert len(answers) == 300
    assert sum(is_gsm8k_right(answer, answer) for answer in answers) == 300
    # Each ends with its number; read there without the rule, it is the same.
    assert [gsm8k_number(answer) for answer in answers] == [a.split("#### ")[1].replace(",", "") for a in answers]
    assert sum("," in answer.split("#### ")[1] for answer in answers) > 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 1\n#### 1,234", "1234"),
        ("#### -5", "-5"),
        ("#### 3.5 apples", "3.5"),
        ("#### 18\n#### 20", "18"),
        ("the answer is 18", None),
        ("####18", None),
        ("#### $18", None),
        ("", None),
    ],
    ids="commas minus decimals first bare tight dollar empty".split(),
)
def test_the_rule_of_gsm8k(text, number):
    assert gsm8k_number(text) == number
    assert is_gsm8k_right(text, "#### " + (number or "18")) == (number is not None)


@pytest.mark.parametrize(("right", "rows"), [(7, 40), (0, 5), (5, 5), (1, 1)], ids="some none all one".split())
def test_wilson_is_scipys(right, rows):
    from scipy.stats import binomtest

    theirs = binomtest(right, rows).proportion_ci(method="wilson")
    found = share([True] * right + [False] * (rows - right))
    assert [found.value, found.low, found.high] == pytest.approx([right / rows, theirs.low, theirs.high], abs=1e-12)


def test_mcnemar_counts_only_rows_that_differ():
    # 9 won, 1 lost: 2 * (1 + 10) / 2^10.
    before = [True] * 50 + [False] * 9 + [True] * 1
    after = [True] * 50 + [True] * 9 + [False] * 1
    found = compare_shares(before, after)
    assert found.p == pytest.approx(2 * 11 / 1024) and found.value == pytest.approx(8 / 60)
    assert compare_shares(before, before).p == 1.0


def test_the_bootstrap_of_a_mean_is_near_the_normal_interval():
    values = np.random.default_rng(1).normal(3, 2, size=200)
    found = bootstrap(np.mean, values)
    half = 1.96 * values.std(ddof=1) / np.sqrt(200)
    assert found.value == values.mean()
    assert [found.low, found.high] == pytest.approx([values.mean() - half, values.mean() + half], abs=half / 10)
    assert bootstrap(np.mean, values) == found


def test_columns_are_resampled_together():
    """A ratio of sums: its interval is that of whole examples, not of two independent columns."""
    random = np.random.default_rng(2)
    tokens = random.integers(1, 100, size=50)
    exact = bootstrap(lambda logs, counts: logs.sum() / counts.sum(), 2.0 * tokens, tokens)
    assert exact.low == exact.value == exact.high == 2.0
    probabilities = random.dirichlet([1, 1, 1], size=50)
    wide = bootstrap(lambda shares, counts: shares[:, 0].mean(), probabilities, tokens)
    assert wide == bootstrap(np.mean, probabilities[:, 0])


def test_resamples_without_a_value_are_left_out_of_the_interval():
    values = [0.0] * 5 + [1.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = bootstrap(lambda column: np.mean(column) if column.max() > 0 else float("nan"), values)
    assert 0 < figure.low <= figure.value <= figure.high
    assert bootstrap(np.mean, [0.25]) == Figure(0.25, 0.25, 0.25)


def test_pairs_show_what_single_samples_hide():
    random = np.random.default_rng(3)
    hard = random.normal(0, 5, size=60)  # examples differ far more than models
    better = hard + 0.3 + random.normal(0, 0.2, size=60)
    before, after, difference = compare_statistics(np.mean, [hard], [better], 1_999)
    assert difference.value == pytest.approx(0.3, abs=0.1) and difference.p <= 0.001
    assert before.high > after.low and before == bootstrap(np.mean, hard, resamples=1_999)
    assert compare_statistics(np.mean, [hard], [hard], 999)[2].p == 1.0
    assert compare_statistics(np.mean, [hard], [random.permutation(hard) + 0.01], 999)[2].p > 0.3


def test_the_permutation_test_of_few_examples_is_exact():
    # Four of four better: 2 of the 16 ways to swap give so large a difference. Fewer cannot be significant.
    before, after = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 3.5, 4.2, 6.0])
    _, _, difference = compare_statistics(np.mean, [before], [after])
    assert difference.p == 2 / 16 and difference.test == "paired permutation test"
    assert compare_statistics(np.mean, [[1.0]], [[2.0]])[2].p == 1.0
    # The sign test's own case: the permutation test of right and wrong is McNemar's.
    right, wrong = np.ones(8), np.zeros(8)
    assert compare_statistics(np.mean, [wrong], [right])[2].p == compare_shares(wrong, right).p


def test_labels_and_truth_are_swapped_example_by_example():
    """[examples, labels] and [examples] in one statistic; the truth is the same for both models."""
    truth = np.array([0, 1] * 10)
    good, coin = np.eye(2)[truth], np.full((20, 2), 0.5)

    def accuracy(probabilities, labels):
        return float((probabilities[:, 1] > 0.5).astype(int)[labels == 1].mean()) if (labels == 1).any() else 0.0

    before, after, difference = compare_statistics(accuracy, [coin, truth], [good, truth], 999)
    assert (before.value, after.value) == (0, 1) and difference.p < 0.01


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("12.50 EUR", "12.50 eur", 1.0),
        (" a  b ", "a b", 1.0),
        ("12.60", "12.50", 0.8),
        ("12,5", "12.5", 0.75),
        ("ab", "abcd", 0.0),  # half of it, where the published rule begins to count nothing
        ("", "abc", 0.0),
        ("abc", "xyz", 0.0),
    ],
)
def test_anls_costs_slips_of_reading_a_part(answer, reference, score):
    assert anls(answer, reference) == pytest.approx(score)
    assert anls(reference, answer) == pytest.approx(score)
