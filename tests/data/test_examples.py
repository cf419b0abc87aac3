"""Examples of a path, and the error that shows the mapping to write."""

import types
from pathlib import Path

import pytest
import yaml

from conftest import chat
from forgebook.config.data_block import DataSource, HeldOut
from forgebook.data.examples import display_paths, read_examples, read_notes, validation_source
from forgebook.errors import DataError, StorageError


def test_an_unknown_schema_shows_the_mapping_and_it_works(write_rows):
    path = write_rows([{"id": 1, "question": "q", "answer": "a"}] * 3)
    with pytest.raises(DataError) as refused:
        read_examples(path)
    written = str(refused.value).split("Map the columns in the config, if this guess says what they hold:\n")[1]
    source = DataSource.model_validate(yaml.safe_load(written)["train_path"])
    assert [one.conversation[-1]["content"] for one in read_examples(source)] == ["a"] * 3
    assert read_notes(path, "instruction_tuning").unknown.total() == 3


def test_other_mistakes_show_no_mapping(write_rows):
    for rows in ([{"messages": 3, "x": 1}], [{"prompt": "x"}]):
        with pytest.raises(DataError) as refused:
            read_examples(write_rows(rows))
        assert "Map the columns" not in str(refused.value)


def test_display_paths():
    mix = ["a.jsonl", DataSource(path="b.jsonl", weight=2.0), DataSource(path="c", system="s")]
    assert display_paths(mix) == "a.jsonl, b.jsonl x 2, c" and display_paths("a") == "a"
    assert display_paths(HeldOut(split=0.05)) == "0.05 of the training examples"


def test_the_validation_examples_of_a_run(tmp_path):
    run = types.SimpleNamespace(held_out=Path(tmp_path / "held_out.jsonl"), location="runs/a")
    assert validation_source(run, "v.jsonl") == "v.jsonl" and validation_source(run, None) is None
    with pytest.raises(StorageError, match="start the run first"):
        validation_source(run, HeldOut(split=0.5))
    run.held_out.touch()
    assert validation_source(run, HeldOut(split=0.5)) == str(run.held_out)


def test_openais_preferences_and_its_tools(write_rows):
    row = {
        "input": {"messages": [{"role": "user", "content": "q"}], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [{"role": "assistant", "content": "good"}],
        "non_preferred_output": [{"role": "assistant", "content": "bad"}],
    }
    [pair] = read_examples(write_rows([row]), "preference_tuning")
    assert (pair.messages[-1]["content"], pair.rejected[-1]["content"]) == ("good", "bad") and len(pair.messages) == 2
    with pytest.raises(DataError, match=r"input is 3; expected an object with messages"):
        read_examples(write_rows([row | {"input": 3}]), "preference_tuning")
    tools = [{"name": "f", "parameters": {}}]
    assert read_examples(write_rows([chat("q", "a") | {"tool_defs": tools}]))[0].tools[0]["function"]["name"] == "f"
    with pytest.raises(DataError, match="tools and tool_defs are both there: keep tools"):
        read_examples(write_rows([chat("q", "a") | {"tool_defs": tools, "tools": tools}]))
