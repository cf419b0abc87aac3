"""Sampling and stop strings, without a model."""

import collections
import math

import pytest
import torch

from forgebook.errors import ConfigError
from forgebook.inference.sampling import (
    LEAST,
    Sampler,
    Sampling,
    StopStrings,
    TokenSampling,
    generator_of,
    prompt_seed,
)

LOGITS = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))


def make_sampler(*settings: TokenSampling) -> Sampler:
    return Sampler(settings, [generator_of(one, "cpu") for one in settings], "cpu")


def sample(settings: list[TokenSampling], steps: int = 1, logits=LOGITS) -> list[list[int]]:
    """Sample so many tokens of each answer, with the same logits at each step."""
    sampler = make_sampler(*settings)
    scores = logits.repeat(len(settings), 1) if len(logits) == 1 else logits
    return torch.stack([sampler(None, scores).argmax(-1) for _ in range(steps)], 1).tolist()


def shares(settings: TokenSampling, count: int = 2500) -> list[float]:
    [tokens] = sample([settings], count)
    counts = collections.Counter(tokens)
    return [counts[token] / count for token in range(4)]


def test_tokens_are_sampled_with_their_probabilities():
    assert shares(TokenSampling(temperature=1.0, seed=1)) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.04)
    # At temperature 1/2 probabilities are squared: 0.25, 0.09, 0.0225, 0.0025 of 0.365.
    cold = [0.685, 0.247, 0.062, 0.007]
    assert shares(TokenSampling(temperature=0.5, seed=1)) == pytest.approx(cold, abs=0.04)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.75}, [0.625, 0.375, 0, 0]),
        ({"top_p": 1e-6}, [1, 0, 0, 0]),
        # Of what top_k leaves (0.625, 0.375), the first is above 0.6 by itself.
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.99}, [0.526, 0.316, 0.158, 0]),
    ],
    ids="top_k top_p tiny both both-loose".split(),
)
def test_top_k_and_top_p_limit_what_is_sampled(limits, expected):
    assert shares(TokenSampling(temperature=1.0, seed=2, **limits)) == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", value) for value in (-1, 1e-320, 1e-9, 101, 1e308, math.inf, math.nan)]
    + [("top_p", value) for value in (0, 1e-320, 1.01, math.nan)],
)
def test_what_float32_cannot_sample_with_is_refused(name, value):
    """Every token would have the probability NaN or 0, and the first of the vocabulary be taken."""
    with pytest.raises(ConfigError, match=f"{name} must be"):
        Sampling(**{name: value})


@pytest.mark.parametrize("settings", [TokenSampling(LEAST, seed=1), TokenSampling(1.0, LEAST, seed=1)])
def test_the_smallest_values_are_greedy(settings):
    assert sample([settings], 20, LOGITS * 100) == [[0] * 20]


def test_limits_are_those_of_transformers():
    from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 3
    for temperature, top_k, top_p in ((0.7, 10, 0.8), (1.5, 5, 0.95), (1.0, 40, 0.5)):
        scores = TemperatureLogitsWarper(temperature)(None, logits)
        scores = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, scores))
        allowed = set(torch.isfinite(scores[0]).nonzero().flatten().tolist())
        [tokens] = sample([TokenSampling(temperature, top_p, top_k, seed=0)], 600, logits)
        assert set(tokens) <= allowed and len(set(tokens)) > len(allowed) / 2


def test_an_answer_does_not_depend_on_its_neighbors():
    alone = TokenSampling(temperature=1.0, top_p=0.9, seed=7)
    [expected] = sample([alone], 50)
    beside = sample([TokenSampling(), alone, TokenSampling(temperature=3.0, top_k=2, seed=1), alone], 50)
    assert beside[1] == beside[3] == expected and beside[0] == [0] * 50


def test_greedy_scores_are_left_as_they_are():
    assert torch.equal(make_sampler(TokenSampling())(None, LOGITS), LOGITS)
    mixed = make_sampler(TokenSampling(), TokenSampling(temperature=1.0, seed=1))(None, LOGITS.repeat(2, 1))
    assert torch.equal(mixed[0], LOGITS[0])


def test_seeds():
    assert prompt_seed(5) == prompt_seed(5, 0) != prompt_seed(5, 1) != prompt_seed(6, 1)
    one, other = (sample([TokenSampling(temperature=1.0, seed=prompt_seed(3, number))], 40) for number in (0, 1))
    assert one != other
    # Without a seed each answer has random numbers of its own.
    assert sample([TokenSampling(temperature=1.0)], 40) != sample([TokenSampling(temperature=1.0)], 40)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"temperature": -1}, "temperature must be"), ({"top_p": 0}, "top_p must be"), ({"batch_size": 0}, "batch_size")],
    ids="temperature top_p batch_size".split(),
)
def test_impossible_sampling_is_rejected(values, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**values)


# Stop strings -----------------------------------------------------------------------------------------


def test_a_complete_answer_ends_before_its_first_stop_string():
    stops = StopStrings(["###", "", "END", "###"])
    assert stops.stops == ("###", "END")
    assert stops.cut("a END b ### c") == "a " and stops.cut("a ### b END") == "a " and stops.cut("a") == "a"
    assert stops.find("none") is None and StopStrings([]).find("a") is None


@pytest.mark.parametrize(
    ("text", "settled"),
    [("", 0), ("abc", 3), ("ab#", 2), ("ab##", 2), ("ab##c", 5), ("abE", 2), ("abEN#", 4), ("ab###cd", 2), ("#", 0)],
)
def test_text_that_may_begin_a_stop_string_is_held_back(text, settled):
    assert StopStrings(["###", "END"]).settled(text) == settled


def test_settled_text_is_never_taken_back():
    stops, text = StopStrings(["aab", "b a"]), "abba aab b"
    counts = [stops.settled(text[:k]) for k in range(len(text) + 1)]
    assert counts == sorted(counts) and all(text[:count] == stops.cut(text)[:count] for count in counts)
