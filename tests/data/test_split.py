"""The share held out for validation: seeded, grouped, without duplicates, and the same whatever the order of files."""

import json

import numpy as np
import pytest

from conftest import chat, make_tokens
from forgebook.config.data_block import HeldOut
from forgebook.data import split
from forgebook.data.data_sources import find_sources
from forgebook.data.examples import read_examples
from forgebook.data.row_formats import Example
from forgebook.data.tokenize import EncodingOptions, encode_examples, tokenize_and_split
from forgebook.errors import DataError


def rows(count, copies=1):
    """Two answers to each question, and copies of the first."""
    pairs = [[chat(f"question {k}", "a"), chat(f"Question  {k}", "b")] for k in range(count)]
    return [row for pair in pairs for row in (*pair, *[pair[0]] * (copies - 1))]


def splits(paths, tokenizer, folder, share=0.1, seed=0, **options):
    sources = find_sources(paths)
    held_out = HeldOut(split=share, seed=seed)
    return tokenize_and_split(sources, tokenizer, EncodingOptions(**options), folder, held_out)


def texts(tokens, tokenizer):
    return [tokenizer.decode(tokens.example(k)[0]) for k in range(len(tokens))]


def test_sides_share_no_prompt_and_no_duplicate(write_rows, tokenizer, tmp_path):
    train, out, notes, counts = splits(write_rows(rows(50, copies=3)), tokenizer, tmp_path)
    valid = texts(out.tokens, tokenizer)
    assert len(valid) == len(set(valid)) == 10 and counts == {"prompts": 5, "duplicates_left_out": 10}
    assert len(train) == 200 - 20 and notes.rows == 200
    assert not set(train.group.tolist()) & set(out.tokens.group.tolist())
    assert not set(texts(train, tokenizer)) & set(valid)


def test_the_same_examples_whatever_the_order_and_the_files(write_rows, tokenizer, tmp_path):
    many = rows(40)
    one = splits(write_rows(many, "one.jsonl"), tokenizer, tmp_path)
    parts = [write_rows(part, f"{k}.jsonl") for k, part in enumerate((many[::-2], many[-2::-2]))]
    two = splits(parts, tokenizer, tmp_path)
    assert sorted(texts(one[1].tokens, tokenizer)) == sorted(texts(two[1].tokens, tokenizer))
    other = splits(write_rows(many, "one.jsonl"), tokenizer, tmp_path, seed=1)
    assert sorted(texts(one[1].tokens, tokenizer)) != sorted(texts(other[1].tokens, tokenizer))


def test_pairs_stay_together_under_weights(write_rows, tokenizer, tmp_path):
    pairs = [{"prompt": f"q{k}", "chosen": f"good {k}", "rejected": f"bad {k}"} for k in range(20)]
    source = {"path": write_rows(pairs), "weight": 1.5}
    from forgebook.config.data_block import DataSource

    train, out, _, _ = splits(DataSource(**source), tokenizer, tmp_path, task="preference_tuning")
    assert len(out.tokens) == 4 and len(train) == 2 * 27
    for tokens in (train, out.tokens):
        decoded = texts(tokens, tokenizer)
        assert all("good" in decoded[k] and "bad" in decoded[k + 1] for k in range(0, len(tokens), 2))
        assert (tokens.line[::2] == tokens.line[1::2]).all()


def test_a_group_much_larger_than_the_share_is_not_held_out(write_rows, tokenizer, tmp_path):
    """Documents in the system message, and two requests: half of the examples had been held out, for a share of 5%."""
    many = [
        chat(asked, f"a {k}", system=f"text {k}")
        for asked, n in (("Sum up.", 50), ("Translate.", 48))
        for k in range(n)
    ]
    message = r"valid_path\.split: 0\.05 of 98 distinct examples is 5, .* the smallest such group has 48: name a file"
    with pytest.raises(DataError, match=message):
        splits(write_rows(many), tokenizer, tmp_path, share=0.05)
    _, out, _, _ = splits(write_rows(many), tokenizer, tmp_path, share=0.3)
    assert len(out.tokens) == 48
    _, out, _, _ = splits(write_rows(rows(10)), tokenizer, tmp_path, share=0.05)
    assert len(out.tokens) == 2  # the two answers to one question


def test_examples_of_one_prompt_cannot_be_divided(write_rows, tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"valid_path\.split: all examples have the same first user message"):
        splits(write_rows([chat("q", "a"), chat("q", "b")]), tokenizer, tmp_path)


def test_a_large_group_stays_in_training():
    tokens = make_tokens(range(2, 102))
    group = np.where(np.arange(100) < 90, 7, np.arange(100)).astype(np.uint64)
    from dataclasses import replace

    train, valid, counts = split.hold_out(replace(tokens, group=group), 0.05, 0)
    assert len(valid) == 5 == counts["prompts"] and (valid >= 90).all() and len(train) == 95


def test_text_belongs_with_its_copies_alone():
    one, other, copy = (split.group_of(Example("f:1", text=text)) for text in ("x", "X", "x"))
    assert one == copy != other
    same = [split.group_of(Example("f:1", messages=chat(text, "a")["messages"])) for text in ("A  b", "a b\n")]
    assert same[0] == same[1] is not None


def write_rows_of(path, lines, task, target):
    """Write the examples of some lines of a file as a run's own copy."""
    every = read_examples(path, task, on_bad_rows="drop")
    rows = {(one.line, split.group_of(one)) for one in every if one.line in lines}
    split.write_examples({find_sources(path)[0]: rows}, task, (), target)


def written_of(paths, tokenizer, folder, task="instruction_tuning"):
    """Hold out a share, and return its texts and those of the copy that is written of it."""
    sources = find_sources(paths)
    _, out, _, _ = splits(paths, tokenizer, folder, share=0.3, task=task)
    split.write_examples(split.rows_of(out.tokens, out.source, sources), task, (), folder / "written.jsonl")
    options = EncodingOptions(task=task)
    encoded = encode_examples(read_examples(str(folder / "written.jsonl"), task), tokenizer, options)
    return sorted(texts(out.tokens, tokenizer)), sorted(tokenizer.decode(one.input_ids) for [one] in encoded)


@pytest.mark.parametrize("task", ["instruction_tuning", "causal_lm"])
def test_of_a_json_array_in_one_line_no_training_example_is_written(tokenizer, tmp_path, task):
    chats = [row | {"id": k} for k, row in enumerate([*rows(5, copies=2), chat("last", "a")])]
    every = [{"text": f"text {k // 2}"} for k in range(20)] if task == "causal_lm" else chats
    (tmp_path / "array.json").write_text(json.dumps(every))
    held_out, written = written_of(str(tmp_path / "array.json"), tokenizer, tmp_path, task)
    assert written == held_out and 2 <= len(held_out) <= 3


def test_a_file_that_is_listed_twice_is_written_once(write_rows, tokenizer, tmp_path):
    path = write_rows(rows(10))
    held_out, written = written_of([path, path], tokenizer, tmp_path)
    assert written == held_out and len(held_out) == 6


def test_written_examples_have_the_same_tokens(write_rows, tokenizer, tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}]}
    tools = [{"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}]
    many = [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        {"prompt": [*chat("x", "y")["messages"], {"role": "user", "content": "z"}], "completion": "c"},
        {"messages": [{"role": "user", "content": "?"}, call], "tools": tools},
        {"bad": 1},
    ]
    path = write_rows(many)
    write_rows_of(path, {1, 2, 3}, "instruction_tuning", tmp_path / "out.jsonl")
    encoded = [
        encode_examples(read_examples(source, on_bad_rows="drop"), tokenizer, EncodingOptions())
        for source in (path, str(tmp_path / "out.jsonl"))
    ]
    assert encoded[0] == encoded[1] and len(encoded[0]) == 3
    pairs = write_rows([{"prompt": "q", "chosen": "a", "rejected": "b"}], "p.jsonl")
    write_rows_of(pairs, {1}, "preference_tuning", tmp_path / "pairs.jsonl")
    [pair] = read_examples(str(tmp_path / "pairs.jsonl"), "preference_tuning")
    assert pair.messages[-1]["content"] == "a" and pair.rejected[-1]["content"] == "b"
    assert json.loads((tmp_path / "pairs.jsonl").read_text()).keys() == {"chosen", "rejected"}
