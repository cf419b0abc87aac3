"""Preference and perplexity from log-probabilities, compared with figures computed by hand."""

import math

import numpy as np
import pytest

from conftest import chat
from forgebook.data.row_formats import parse_row
from forgebook.evaluation.likelihood_metrics import perplexity, preference
from forgebook.evaluation.logprobs import Measured


def examples_of(rows, task):
    return [parse_row(row, f"test.jsonl:{k}", task)[0] for k, row in enumerate(rows, 1)]


def test_a_preference_is_the_likelier_answer_whatever_the_lengths():
    pairs = examples_of([{"prompt": "q", "chosen": "good", "rejected": "bad"}] * 3, "preference_tuning")
    tokens = [[2, 3]] * 3
    base = np.stack([[[-4.0, -3.0], [-2.0, -9.0], [-5.0, -1.0]], tokens], axis=2)
    # The first chosen answer is likelier as a whole, though not per token.
    tuned = np.stack([[[-5.0, -6.0], [-2.0, -9.0], [-5.0, -1.0]], tokens], axis=2)
    result = preference(Measured(pairs, base, tuned, left_out=2))
    [score] = result.scores
    assert score.before.value == pytest.approx(1 / 3) and score.after.value == pytest.approx(2 / 3)
    assert result.kinds == {"rejected more likely": (2, 1)} and result.left_out == 2
    assert result.comparison.tuned == ["good", "good", "bad"]


def test_perplexity_is_over_tokens_not_examples():
    texts = examples_of([chat("q", "a"), chat("q", "a long answer")], "instruction_tuning")
    base = np.array([[[-2.0, 1]], [[-12.0, 3]]])
    tuned = np.array([[[-1.0, 1]], [[-15.0, 3]]])
    result = perplexity(Measured(texts, base, tuned, left_out=0))
    [score] = result.scores
    assert score.before.value == pytest.approx(math.exp(14 / 4)) and score.after.value == pytest.approx(
        math.exp(16 / 4)
    )
    # Of each example the mean per token is listed; the second one became less likely.
    assert result.comparison.base == ["2.0000 per token", "4.0000 per token"]
    [mistake] = result.mistakes
    assert (mistake["kind"], mistake["tuned"]) == ("less likely than by the base", "5.0000 per token")
