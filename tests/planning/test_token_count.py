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


def write_csv(path, rows, characters):
    path.write_text("prompt,completion\n" + f"{'q' * characters},{'a' * characters}\n" * rows)
    return {"path": str(path)}


@pytest.mark.parametrize(("weight", "examples"), [(1, 410), (20, 600), (0.5, 405)])
def test_files_of_different_sizes_count_by_their_rows(tmp_path, weight, examples):
    """A file of CSV is one chunk of any size: each had counted as half of two."""
    large = write_csv(tmp_path / "large.csv", 400, 40)
    small = write_csv(tmp_path / "small.csv", 10, 200) | {"weight": weight}
    data = count_data(config_for("owner/elsewhere", train_path=[large, small], task="instruction_tuning"))
    overhead = 2 * token_count.TOKENS_PER_MESSAGE
    tokens = 400 * (20 + overhead) + weight * 10 * (100 + overhead)
    assert data.examples == examples and data.tokens == pytest.approx(tokens, rel=0.01)
    assert data.longest == 100 + overhead


def test_what_is_not_read_counts_by_its_bytes(tmp_path, monkeypatch):
    """Nothing but the smallest file is read: a quarter of its entry, and nothing of the other."""
    monkeypatch.setattr(token_count, "COUNTING_SECONDS", -1.0)
    for name, rows in (("a1", 100), ("a2", 300), ("b", 1000)):
        write_csv(tmp_path / f"{name}.csv", rows, 40)
    paths = [{"path": str(tmp_path / "a*.csv"), "weight": 2}, {"path": str(tmp_path / "b.csv")}]
    data = count_data(config_for("owner/elsewhere", train_path=paths, task="instruction_tuning"))
    assert data.examples == pytest.approx(2 * 400 + 1000, rel=0.01) and data.how.endswith("from 7% of the data")


def test_bad_examples_alone_are_no_data(write_rows):
    assert count_data(config_for("tiny", train_path=write_rows([{"answer": 1}]), task="instruction_tuning")) is None


def test_much_data_is_counted_in_part(write_rows, monkeypatch):
    paths = [write_rows([{"text": "a" * 40}], f"{k}.jsonl") for k in range(4)]
    monkeypatch.setattr(token_count, "COUNTING_SECONDS", -1.0)
    data = count_data(config_for("owner/elsewhere", train_path=paths, task="causal_lm"))
    assert len(data.lengths) == 1 and data.examples == 4 and data.how.endswith("from 25% of the data")
