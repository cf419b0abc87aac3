"""Examples longer than the context: what stays, what each policy loses."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_tokens
from forgebook.data.image_tokens import PlacedImage
from forgebook.data.images import ImageFile
from forgebook.data.masking import Encoded
from forgebook.data.token_store import Tokens
from forgebook.data.truncation import fit_context, fit_length, fit_tokens, truncation_losses
from forgebook.errors import DataError


def test_truncation_error_names_the_length_that_loses_nothing():
    """Peers' point 4."""
    with pytest.raises(DataError, match=r"1 of 2 examples .* lose 4 tokens of the loss: set context_length to 20"):
        fit_context(make_tokens([5, 20], trained=4), 10, "error")


@pytest.mark.parametrize(
    ("policy", "lengths", "report"),
    [
        ("drop", [5], {"rows_cut": 0, "rows_dropped": 1, "tokens_cut": 20, "answer_tokens_cut": 12}),
        ("left", [5, 10], {"rows_cut": 1, "rows_dropped": 0, "tokens_cut": 10, "answer_tokens_cut": 3}),
        ("right", [5, 10], {"rows_cut": 1, "rows_dropped": 0, "tokens_cut": 10, "answer_tokens_cut": 10}),
    ],
)
def test_truncation_policies_say_what_they_cut(policy, lengths, report):
    fitted, done = fit_context(make_tokens([5, 20], trained=12), 10, policy)
    assert fitted.lengths.tolist() == lengths
    assert done == report


def test_truncation_that_leaves_nothing_is_an_error():
    with pytest.raises(DataError, match="no example of x has a token in the loss within context_length 3"):
        fit_context(make_tokens([20, 30]), 3, "right", "x")


def test_what_each_policy_would_lose_is_reported():
    losses = truncation_losses(make_tokens([5, 20], trained=12), 10)
    assert losses == {
        "longer_rows": 1, "answer_tokens_lost_drop": 12, "answer_tokens_lost_left": 3, "answer_tokens_lost_right": 10,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("truncation", "part"),
    [("error", slice(0, 4)), ("right", slice(0, 4)), ("left", slice(2, 6)), ("drop", None)],
)
def test_the_tokens_that_stay_of_a_long_example(truncation, part):
    assert fit_length(6, 4, truncation) == part
    assert fit_length(4, 4, truncation) == slice(0, 4)


@given(
    st.lists(st.lists(st.booleans(), min_size=2, max_size=12), min_size=1, max_size=6),
    st.integers(1, 10),
    st.sampled_from(["error", "drop", "left", "right"]),
)
def test_truncation_keeps_what_fits_and_counts_what_it_cuts(masks, context_length, truncation):
    masks = [[False, *mask[1:-1], True] for mask in masks]  # every example has a token in the loss
    tokens = Tokens.from_examples((range(len(mask)), mask) for mask in masks)
    fitted = fit_tokens(tokens, context_length, truncation)
    assert (fitted.tokens.lengths <= context_length).all() and len(fitted.tokens) == fitted.stays.sum()
    left = [fitted.tokens.example(k)[1][1:].sum() for k in range(len(fitted.tokens))]
    assert left == fitted.tokens.supervised.tolist() and all(left)
    assert sum(left) + fitted.lost[fitted.stays].sum() == tokens.supervised[fitted.stays].sum()
    short = tokens.lengths <= context_length
    assert fitted.stays[short].all() and not fitted.lost[short].any()
    if truncation == "error":
        assert not fitted.lost[fitted.stays].any()
    else:
        lost = truncation_losses(tokens, context_length)[f"answer_tokens_lost_{truncation}"]
        assert fitted.lost.sum() == lost


def test_both_answers_of_a_pair_are_dropped_together():
    fitted, counts = fit_context(make_tokens([5, 20, 6, 7]), 10, "drop", group=2)
    assert fitted.lengths.tolist() == [6, 7]
    assert counts == {"rows_cut": 0, "rows_dropped": 2, "tokens_cut": 25, "answer_tokens_cut": 2}


def with_image(length, start, stop):
    """Make an example of which tokens from `start` to `stop` are an image, and the last four are in the loss."""
    placed = PlacedImage(ImageFile("a.png", "d", 4, 4), start, stop)
    return Encoded(list(range(length)), [k >= length - 4 for k in range(length)], (placed,))


@pytest.mark.parametrize(
    ("start", "stop", "policy", "kept", "images"),
    [
        (2, 8, "left", (8, 20), []),  # the cut would be at 5
        (6, 8, "left", (5, 20), [(1, 3)]),
        (2, 5, "left", (5, 20), []),
        (2, 8, "right", (0, 15), [(2, 8)]),
    ],
)
def test_no_image_is_cut(start, stop, policy, kept, images):
    encoded = with_image(20, start, stop)
    if policy == "right":  # with an answer before the cut, too
        encoded = replace(encoded, loss_mask=[k > 8 for k in range(20)])
    fitted = fit_tokens(Tokens.from_encoded([encoded]), 15, policy).tokens
    assert fitted.example(0)[0].tolist() == list(range(*kept))
    assert [(one.start, one.stop) for one in fitted.images_of(0)] == images


def test_an_image_at_the_cut_on_the_right_is_left_out_whole():
    encoded = replace(with_image(20, 12, 18), loss_mask=[4 < k < 8 for k in range(20)])
    fitted = fit_tokens(Tokens.from_encoded([encoded]), 15, "right").tokens
    assert fitted.lengths.tolist() == [12] and fitted.images_of(0) == []
