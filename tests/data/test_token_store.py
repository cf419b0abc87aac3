"""Tokenized examples: files, views, statistics, truncation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_tokens, uneven_rows
from forgebook.data import masking, token_store
from forgebook.data.masking import Encoded
from forgebook.data.token_store import Tokens
from forgebook.errors import DataError


def test_statistics():
    stats = token_store.token_statistics(make_tokens([10] * 99 + [110], trained=5))
    assert stats == {
        "rows": 100, "tokens": 1100, "supervised_tokens": 500, "supervised_share": 0.4545,
        "tokens_p50": 10, "tokens_p95": 10, "tokens_p99": 10, "tokens_max": 110, "duplicate_rows": 98,
    }  # fmt: skip


def test_examples_survive_shards_and_views(tmp_path, tokenizer):
    encoded = [masking.encode(row["messages"], tokenizer) for row in uneven_rows(7)]
    for k, part in enumerate((encoded[:4], encoded[4:])):
        token_store.write_shard(
            [(one, line, None) for line, one in enumerate(part, 1)], tmp_path / f"{k}.arrow", f"{k}.jsonl"
        )
    mapped = token_store.map_shards([tmp_path / "0.arrow", tmp_path / "1.arrow"])
    token_store.save_view(mapped.select(np.array([6, 0, 0])), tmp_path / "a" / "view.npz")
    loaded = token_store.load_view(tmp_path / "a" / "view.npz")
    assert len(mapped) == 7 and len(loaded) == 3
    for k, source in enumerate((6, 0, 0)):
        ids, trained = loaded.example(k)
        assert ids.tolist() == encoded[source].input_ids and trained.tolist() == encoded[source].loss_mask
        assert loaded.supervised[k] == sum(encoded[source].loss_mask)
    assert [loaded.where(k) for k in range(3)] == ["1.jsonl:3", "0.jsonl:1", "0.jsonl:1"]
    assert not loaded.example(0)[0].flags.owndata  # mapped, not copied


@pytest.mark.parametrize(("weight", "count"), [(1, 10), (2, 20), (0.5, 5), (1.3, 13)])
def test_a_weight_says_how_often_examples_are_repeated(weight, count):
    taken = token_store.repeat_examples(np.arange(10), weight, seed=1)
    assert len(taken) == count
    assert {np.sum(taken == row) for row in range(10)} <= {int(weight), int(weight) + 1}
    assert np.array_equal(taken, token_store.repeat_examples(np.arange(10), weight, seed=1))


# Truncation -------------------------------------------------------------------------------------------


def test_truncation_error_names_the_length_that_loses_nothing():
    """Peers' point 4."""
    with pytest.raises(DataError, match=r"1 of 2 examples .* lose 4 tokens of the loss: set context_length to 20"):
        token_store.fit_context(make_tokens([5, 20], trained=4), 10, "error")


@pytest.mark.parametrize(
    ("policy", "lengths", "report"),
    [
        ("drop", [5], {"rows_cut": 0, "rows_dropped": 1, "tokens_cut": 20, "answer_tokens_cut": 12}),
        ("left", [5, 10], {"rows_cut": 1, "rows_dropped": 0, "tokens_cut": 10, "answer_tokens_cut": 3}),
        ("right", [5, 10], {"rows_cut": 1, "rows_dropped": 0, "tokens_cut": 10, "answer_tokens_cut": 10}),
    ],
)
def test_truncation_policies_say_what_they_cut(policy, lengths, report):
    fitted, done = token_store.fit_context(make_tokens([5, 20], trained=12), 10, policy)
    assert fitted.lengths.tolist() == lengths
    assert done == report


def test_truncation_that_leaves_nothing_is_an_error():
    with pytest.raises(DataError, match="no example of x has a token in the loss within context_length 3"):
        token_store.fit_context(make_tokens([20, 30]), 3, "right", "x")


def test_what_each_policy_would_lose_is_reported():
    losses = token_store.truncation_losses(make_tokens([5, 20], trained=12), 10)
    assert losses == {
        "longer_rows": 1, "answer_tokens_lost_drop": 12, "answer_tokens_lost_left": 3, "answer_tokens_lost_right": 10,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("truncation", "part"),
    [("error", slice(0, 4)), ("right", slice(0, 4)), ("left", slice(2, 6)), ("drop", None)],
)
def test_the_tokens_that_stay_of_a_long_example(truncation, part):
    assert token_store.fit_length(6, 4, truncation) == part
    assert token_store.fit_length(4, 4, truncation) == slice(0, 4)


@given(
    st.lists(st.lists(st.booleans(), min_size=2, max_size=12), min_size=1, max_size=6),
    st.integers(1, 10),
    st.sampled_from(["error", "drop", "left", "right"]),
)
def test_truncation_keeps_what_fits_and_counts_what_it_cuts(masks, context_length, truncation):
    masks = [[False, *mask[1:-1], True] for mask in masks]  # every example has a token in the loss
    tokens = Tokens.from_examples((range(len(mask)), mask) for mask in masks)
    fitted = token_store.fit_tokens(tokens, context_length, truncation)
    assert (fitted.tokens.lengths <= context_length).all() and len(fitted.tokens) == fitted.stays.sum()
    left = [fitted.tokens.example(k)[1][1:].sum() for k in range(len(fitted.tokens))]
    assert left == fitted.tokens.supervised.tolist() and all(left)
    assert sum(left) + fitted.lost[fitted.stays].sum() == tokens.supervised[fitted.stays].sum()
    short = tokens.lengths <= context_length
    assert fitted.stays[short].all() and not fitted.lost[short].any()
    if truncation == "error":
        assert not fitted.lost[fitted.stays].any()
    else:
        lost = token_store.truncation_losses(tokens, context_length)[f"answer_tokens_lost_{truncation}"]
        assert fitted.lost.sum() == lost


def test_both_answers_of_a_pair_are_dropped_together():
    fitted, counts = token_store.fit_context(make_tokens([5, 20, 6, 7]), 10, "drop", group=2)
    assert fitted.lengths.tolist() == [6, 7]
    assert counts == {"rows_cut": 0, "rows_dropped": 2, "tokens_cut": 25, "answer_tokens_cut": 2}


def test_a_view_collects_its_shards(tmp_path):
    for name in ("a", "b"):
        token_store.write_shard(
            [(Encoded([1, 2, 3], [False, True, True]), 1, None)], tmp_path / name / "000000.arrow", name
        )
    token_store.write_shard([], tmp_path / "empty.arrow", "empty")
    assert not (tmp_path / "empty.arrow").exists()
    tokens = token_store.map_shards([tmp_path / name / "000000.arrow" for name in ("a", "b")])
    token_store.save_view(tokens, tmp_path / "view.npz")
    token_store.collect_shards(tmp_path / "view.npz", tmp_path / "shards")
    for name in ("a", "b"):
        (tmp_path / name / "000000.arrow").unlink()
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["a-000000.arrow", "b-000000.arrow"]
    collected = token_store.load_view(tmp_path / "view.npz")
    assert [collected.where(k) for k in range(2)] == ["a:1", "b:1"]
    assert [collected.example(k)[0].tolist() for k in range(2)] == [[1, 2, 3]] * 2
