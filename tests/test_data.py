"""Reading, refusing, tokenising and batching rows."""

import json

import numpy as np
import pytest

from conftest import chat, uneven_rows
from helpers import data
from helpers.errors import DataError, StorageError

GOOD = json.dumps(chat("q", "a"))


def make_tokens(lengths, trained=1):
    """Make rows of given lengths of which the last `trained` tokens are trained."""
    return data.Tokens.from_rows([(range(n), [k >= n - trained for k in range(n)]) for n in lengths])


# Reading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"rows\.jsonl:2: not valid JSON .*one JSON object"),
        ("[1]", r"rows\.jsonl:2: got a JSON list, need an object"),
        ('{"prompt": "x"}', r"rows\.jsonl:2: no 'messages' \(its keys: prompt\)"),
        ('{"messages": []}', r"rows\.jsonl:2: messages: need a non-empty list"),
        ('{"messages": "hi"}', r"rows\.jsonl:2: messages: need a non-empty list"),
        ('{"messages": ["hi"]}', r"rows\.jsonl:2: messages\[0\]: need an object with role and content"),
        (
            '{"messages": [{"role": "bot", "content": "x"}]}',
            r'messages\[0\]\.role: got "bot", need one of system, user',
        ),
        ('{"messages": [{"role": "user", "content": 3}]}', r"messages\[0\]\.content: need a string, got 3"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\]\.content: need a string, got null"),
        (
            '{"messages": [{"role": "user", "content": "x"}]}',
            r"no assistant turn, so nothing to train on: add the answer",
        ),
        (
            json.dumps({"messages": [*chat("q", "a")["messages"], {"role": "system", "content": "s"}]}),
            r"messages\[3\]\.role: a system message can only come first",
        ),
    ],
)
def test_a_bad_row_is_named_with_its_place_and_mend(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(DataError, match=message):
        data.read_rows(str(path))


def test_all_bad_rows_are_found_in_one_pass(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([GOOD, *["{"] * 25]))
    with pytest.raises(DataError) as refused:
        data.read_rows(str(path))
    text = str(refused.value)
    assert text.startswith("25 of 26 rows") and "rows.jsonl:21:" in text and "... and 5 more" in text


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        data.read_rows(str(tmp_path / "empty.jsonl"))
    with pytest.raises(StorageError, match="does not exist"):
        data.read_rows(str(tmp_path / "none.jsonl"))
    with pytest.raises(StorageError, match="is a folder"):
        data.read_rows(str(tmp_path))


def test_byte_order_mark_windows_lines_and_bad_bytes(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n" + GOOD.encode())
    assert [row.where for row in data.read_rows(str(path))] == ["rows.jsonl:1", "rows.jsonl:3"]
    path.write_bytes(GOOD.encode() + b"\n\xff\xfe")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not UTF-8"):
        data.read_rows(str(path))


def test_text_rows_are_for_causal_lm_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "hello"}')
    assert data.read_rows(str(path), "causal_lm")[0].text == "hello"
    with pytest.raises(DataError, match="no 'messages'"):
        data.read_rows(str(path))


# Tokenising -------------------------------------------------------------------------------------------


def test_an_empty_answer_still_trains_its_end_token(tokenizer):
    rows = [data.Row("f:1", messages=chat("q", "")["messages"])]
    assert data.tokenize_rows(rows, tokenizer).supervised.tolist() == [1]


def test_a_row_without_a_trained_token_is_refused(tokenizer):
    from helpers.config import PromptFormat

    silent = PromptFormat(system="{instruction}", user="{instruction}", assistant="{instruction}")
    rows = [data.Row("f:7", messages=chat("q", "")["messages"])]
    with pytest.raises(DataError, match="f:7: no token of this row would be trained"):
        data.tokenize_rows(rows, tokenizer, silent)


def test_statistics(tokenizer):
    stats = data.token_statistics(make_tokens([10] * 99 + [110], trained=5))
    assert stats == {
        "rows": 100, "tokens": 1100, "supervised_tokens": 500, "supervised_share": 0.4545,
        "tokens_p50": 10, "tokens_p95": 10, "tokens_p99": 10, "tokens_max": 110,
    }  # fmt: skip


def test_tokens_survive_a_file(tmp_path, tokenizer):
    rows = [data.Row(f"f:{k}", messages=row["messages"]) for k, row in enumerate(uneven_rows(7))]
    tokens = data.tokenize_rows(rows, tokenizer)
    data.save_tokens(tokens, tmp_path / "a" / "t.arrow")
    loaded = data.load_tokens(tmp_path / "a" / "t.arrow")
    assert len(loaded) == 7
    for name in ("input_ids", "trained", "offsets"):
        assert np.array_equal(getattr(tokens, name), getattr(loaded, name))


# Truncation -------------------------------------------------------------------------------------------


def test_truncation_error_names_the_length_that_loses_nothing():
    with pytest.raises(DataError, match=r"1 of 2 rows .* lose 4 trained tokens: set context_length to 20"):
        data.fit_context(make_tokens([5, 20], trained=4), 10, "error")


@pytest.mark.parametrize(
    ("policy", "lengths", "report"),
    [
        ("drop", [5], {"rows_cut": 0, "rows_dropped": 1, "tokens_cut": 20, "answer_tokens_cut": 12}),
        ("left", [5, 10], {"rows_cut": 1, "rows_dropped": 0, "tokens_cut": 10, "answer_tokens_cut": 3}),
        ("right", [5, 10], {"rows_cut": 1, "rows_dropped": 0, "tokens_cut": 10, "answer_tokens_cut": 10}),
    ],
)
def test_truncation_policies_say_what_they_cut(policy, lengths, report):
    fitted, done = data.fit_context(make_tokens([5, 20], trained=12), 10, policy)
    assert fitted.lengths.tolist() == lengths
    assert done == report


def test_truncation_that_leaves_nothing_is_an_error():
    with pytest.raises(DataError, match="no row of x has a trained token within context_length 3"):
        data.fit_context(make_tokens([20, 30]), 3, "right", "x")


# Batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "batch"), [(64, 8), (61, 8), (3, 8), (1000, 16)])
def test_an_epoch_holds_every_row_once(rows, batch):
    steps = data.epoch_batches(make_tokens(np.random.default_rng(0).integers(2, 90, rows)), batch, seed=1, epoch=0)
    assert sorted(np.concatenate(steps)) == list(range(rows))
    assert [len(step) for step in steps[:-1]] == [batch] * (len(steps) - 1)


def test_epochs_and_seeds_differ_and_repeat():
    tokens = make_tokens(range(2, 66))
    orders = [
        np.concatenate(data.epoch_batches(tokens, 8, seed, epoch)).tolist()
        for seed, epoch in [(1, 0), (1, 1), (2, 0), (1, 0)]
    ]
    assert orders[0] == orders[3] and orders[0] != orders[1] and orders[0] != orders[2]


@pytest.mark.parametrize("count", [16, 13, 1])
@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 4)])
def test_a_step_has_the_same_rows_however_it_is_divided(count, world, accumulation):
    rows = np.arange(count)
    parts = data.split_batch(rows, make_tokens(range(2, 30)), world, accumulation)
    assert [len(part) for part in parts] == [accumulation] * world
    assert sorted(np.concatenate([micro for part in parts for micro in part])) == rows.tolist()


def test_like_lengths_share_a_batch():
    lengths = np.random.default_rng(0).integers(2, 500, 2000)
    tokens = make_tokens(lengths)
    padded = sum(lengths[step].max() * len(step) for step in data.epoch_batches(tokens, 8, 0, 0))
    assert padded < 1.15 * lengths.sum()


def test_collate_predicts_the_next_token_and_stops_at_the_last_trained_one():
    tokens = data.Tokens.from_rows([([7, 8, 9, 10, 11], [False, False, True, True, False]), ([5, 6], [False, True])])
    batch = data.collate(tokens, np.array([0, 1]), pad_id=0)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, data.WIDTH_STEP)
    assert batch["input_ids"][:, :4].tolist() == [[7, 8, 9, 0], [5, 0, 0, 0]]
    assert batch["labels"][:, :4].tolist() == [[-100, 9, 10, -100], [6, -100, -100, -100]]
    assert not batch["input_ids"][:, 3:].any() and (batch["labels"][:, 3:] == -100).all()


def test_collate_of_no_rows_is_one_dead_token():
    batch = data.collate(make_tokens([5]), np.array([], int), pad_id=3)
    assert (batch["input_ids"] == 3).all() and (batch["labels"] == -100).all() and len(batch["labels"]) == 1
