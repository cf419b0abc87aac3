"""Tokenized examples: files, views, statistics."""

import numpy as np
import pytest

from conftest import make_tokens, uneven_rows
from forgebook.data import masking, token_store
from forgebook.data.masking import Encoded


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


@pytest.mark.parametrize(("weight", "count"), [(1, 10), (2, 20), (0.5, 5), (1.3, 13), (0.01, 1)])
def test_a_weight_says_how_often_examples_are_repeated(weight, count):
    taken = token_store.repeat_examples(np.arange(10), weight, seed=1)
    assert len(taken) == count
    assert {np.sum(taken == row) for row in range(10)} <= {int(weight), int(weight) + 1}
    assert np.array_equal(taken, token_store.repeat_examples(np.arange(10), weight, seed=1))
    assert not len(token_store.repeat_examples(np.arange(0), weight, seed=1))


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
