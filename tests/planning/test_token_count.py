"""The tokens of the training data, counted without torch."""

import json

import pytest

from conftest import TINY_MODEL, chat, config_for
from forgebook.planning import token_count
from forgebook.planning.token_count import Statistics, count_data, data_is_here


def test_statistics_are_scaled_to_the_whole_data():
    data = Statistics((10, 30, 20, 40), 2.5, "a part")
    assert (data.examples, data.tokens, data.longest) == (10, 250, 40)
    assert data.p95 == 40 and Statistics(tuple(range(1, 101)), 1.0, "").p95 == 95


def test_characters_are_counted_where_the_tokenizer_is_not_here(write_rows):
    path = write_rows([{"text": "x" * 40}, chat("y" * 12, "z" * 8, system=None), {"text": ""}])
    data = count_data(config_for("owner/elsewhere", train_path=path, task="causal_lm"))
    assert data.lengths == (10 + 1, 5 + 2 * token_count.TOKENS_PER_MESSAGE)  # the empty text is a bad example
    assert data.how.startswith("estimated from 4 characters per token") and data.scale == 1


def test_the_tokenizer_of_a_local_model_counts_contents(write_rows, tokenizer):
    question = "Where is the lamp of Maria?"
    path = write_rows([chat(question, "On the table.", system=None)])
    data = count_data(config_for(str(TINY_MODEL), train_path=path, task="instruction_tuning"))
    contents = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in (question, "On the table.")]
    assert data.lengths == (sum(contents) + 2 * token_count.TOKENS_PER_MESSAGE,)
    assert "the model's tokenizer" in data.how


def test_tools_and_thoughts_are_part_of_the_prompt(write_rows):
    plain = chat("a", "b", system=None)
    thinking = json.loads(json.dumps(plain))
    thinking["messages"][1]["reasoning_content"] = "x" * 400
    lengths = count_data(
        config_for("owner/elsewhere", train_path=write_rows([plain, thinking]), task="instruction_tuning")
    ).lengths
    assert lengths[1] - lengths[0] == pytest.approx(100, abs=1)


def test_a_pair_has_two_lengths(write_rows):
    messages = chat("q" * 40, "a" * 40, system=None)["messages"]
    pair = {"chosen": messages, "rejected": [messages[0], {"role": "assistant", "content": "b" * 80}]}
    data = count_data(config_for("owner/elsewhere", train_path=write_rows([pair]), task="preference_tuning"))
    assert len(data.lengths) == data.examples == 2 and data.lengths[1] - data.lengths[0] == 10


def test_data_elsewhere_is_not_read(tmp_path, write_rows):
    here = write_rows([{"text": "a"}])
    for path in ("s3://bucket/rows.jsonl", "hf://owner/name:train", str(tmp_path / "missing.jsonl")):
        config = config_for("tiny", train_path=path)
        assert not data_is_here(config.train_path) and count_data(config) is None
    assert not data_is_here(config_for("tiny", train_path=[here, {"path": "s3://bucket/more.jsonl"}]).train_path)
    assert data_is_here(config_for("tiny", train_path=[here, {"path": here, "weight": 0.5}]).train_path)


def test_weights_scale_a_mix(write_rows):
    path = write_rows([{"text": "a" * 40}] * 4)
    data = count_data(config_for("owner/elsewhere", train_path=[{"path": path, "weight": 2}], task="causal_lm"))
    assert data.scale == 2 and data.examples == 8


def test_bad_examples_alone_are_no_data(write_rows):
    assert count_data(config_for("tiny", train_path=write_rows([{"answer": 1}]), task="instruction_tuning")) is None


def test_much_data_is_counted_in_part(write_rows, monkeypatch):
    paths = [write_rows([{"text": "a" * 40}], f"{k}.jsonl") for k in range(4)]
    monkeypatch.setattr(token_count, "COUNTING_SECONDS", -1.0)
    data = count_data(config_for("owner/elsewhere", train_path=paths, task="causal_lm"))
    assert len(data.lengths) == 1 and data.examples == 4 and data.how.endswith("from 25% of the data")
