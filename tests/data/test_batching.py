"""Which rows make up a step, who computes them, packing, and the tensors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_tokens
from forgebook.data import batching
from forgebook.data.token_store import Tokens


def single(tokens):
    """Each row its own sequence."""
    return list(np.arange(len(tokens))[:, None])


def epoch(tokens, batch, seed=0, number=0):
    return batching.epoch_batches(tokens, single(tokens), batch, seed, number)


@pytest.mark.parametrize(("rows", "batch"), [(64, 8), (61, 8), (3, 8), (1000, 16)])
def test_an_epoch_holds_every_example_once(rows, batch):
    steps = epoch(make_tokens(np.random.default_rng(0).integers(2, 90, rows)), batch, seed=1)
    assert sorted(np.concatenate([row for step in steps for row in step])) == list(range(rows))
    assert [len(step) for step in steps[:-1]] == [batch] * (len(steps) - 1)


def test_epochs_and_seeds_differ_and_repeat():
    tokens = make_tokens(range(2, 66))
    orders = [
        np.concatenate([row for step in epoch(tokens, 8, seed, number) for row in step]).tolist()
        for seed, number in [(1, 0), (1, 1), (2, 0), (1, 0)]
    ]
    assert orders[0] == orders[3] and orders[0] != orders[1] and orders[0] != orders[2]


@pytest.mark.parametrize("count", [16, 13, 1])
@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 4)])
def test_a_step_has_the_same_examples_however_it_is_divided(count, world, accumulation):
    rows = list(np.arange(count)[:, None])
    parts = batching.split_batch(rows, make_tokens(range(2, 30)), world, accumulation)
    assert [len(part) for part in parts] == [accumulation] * world
    assert sorted(row for part in parts for micro in part for [row] in micro) == list(range(count))


def test_like_lengths_share_a_batch():
    lengths = np.random.default_rng(0).integers(2, 500, 2000)
    steps = [np.concatenate(step) for step in epoch(make_tokens(lengths), 8)]
    assert sum(lengths[step].max() * len(step) for step in steps) < 1.15 * lengths.sum()


def test_a_classifiers_steps_hold_short_and_long_examples():
    """Those of one label may all be longer: a step of one label alone would pull their balance its way."""
    tokens = make_tokens([10, 60] * 100)
    assert batching.groups_by_length("instruction_tuning") and not batching.groups_by_length("classification")
    steps = batching.epoch_batches(tokens, single(tokens), 16, seed=0, epoch=0, by_length=False)
    longer = [sum(tokens.lengths[np.concatenate(step)] == 60) / len(step) for step in steps]
    assert min(longer) > 0.1 and max(longer) < 0.9
    assert sorted(np.concatenate([row for step in steps for row in step])) == list(range(200))


def test_collate_predicts_the_next_token_and_stops_at_the_last_trained_one():
    tokens = Tokens.from_examples([([7, 8, 9, 10, 11], [False, False, True, True, False]), ([5, 6], [False, True])])
    batch = batching.collate(tokens, single(tokens), pad_id=0)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, batching.WIDTH_STEP)
    assert batch["input_ids"][:, :4].tolist() == [[7, 8, 9, 0], [5, 0, 0, 0]]
    assert batch["labels"][:, :4].tolist() == [[-100, 9, 10, -100], [6, -100, -100, -100]]
    assert not batch["input_ids"][:, 3:].any() and (batch["labels"][:, 3:] == -100).all()
    assert batch["supervised"].tolist() == [1, 2, batching.WIDTH_STEP]  # of all lines together


def test_collate_of_no_examples_is_one_dead_token():
    batch = batching.collate(make_tokens([5]), [], pad_id=3)
    assert (batch["input_ids"] == 3).all() and (batch["labels"] == -100).all() and len(batch["labels"]) == 1


# Packing ----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_packing_holds_every_example_once_within_its_room_and_near_the_fewest_bins(lengths):
    lengths = np.array(lengths)
    packed = batching.pack(lengths, 64)
    assert sorted(np.concatenate(packed)) == list(range(len(lengths)))
    assert all(lengths[rows].sum() <= 64 for rows in packed)
    fewest = -(-int(lengths.sum()) // 64)  # no packing can do with less
    largest_alone = int((lengths > 32).sum())  # nor with less than this
    assert len(packed) <= max(fewest, largest_alone) * 11 / 9 + 1


def test_positions_restart_with_every_packed_example():
    tokens = Tokens.from_examples([([7, 8, 9], [False, False, True]), ([5, 6], [False, True])])
    batch = batching.collate(tokens, [np.array([0, 1])], pad_id=0, pad_to=6, packed=True)
    assert batch["input_ids"].tolist() == [[7, 8, 5, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 9, 6, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2]]


def test_packing_leaves_little_padding():
    tokens = make_tokens(np.random.default_rng(0).integers(4, 60, 300))
    shares = {}
    for padding in ("packed", "longest", "max_length"):
        steps = batching.epoch_batches(tokens, batching.make_sequences(tokens, padding, 128), 2, seed=0, epoch=0)
        shares[padding] = batching.padding_share(tokens, steps, 1, 1, 128 if padding == "max_length" else None)
    assert shares["packed"] < 0.05 and shares["packed"] < shares["max_length"] and shares["longest"] < 0.3
