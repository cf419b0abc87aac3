"""Columns of any name become the keys of a format, or an error that names the column."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from conftest import chat
from forgebook.config.data_block import DataSource
from forgebook.data.columns import ColumnMapping, map_row, mapping_text
from forgebook.data.examples import read_examples
from forgebook.errors import DataError

GSM = {"question": "2 + 2?", "answer": "4 {so}", "id": 7}


def mapped(raw, columns, labels=None):
    return map_row(raw, ColumnMapping.of(columns, None, labels))


def texts(row):
    return [(message["role"], message["content"]) for message in row["messages"]]


def test_user_and_assistant():
    row = mapped(GSM, {"user": "question", "assistant": "answer"})
    assert texts(row) == [("user", "2 + 2?"), ("assistant", "4 {so}")]
    assert row.unused == ("id",)


def test_templates_keep_braces_of_cells_and_escaped_ones():
    row = mapped(GSM, {"user": "{answer} {{x}}: {id}\n\n{question}", "assistant": "answer", "system": "none"})
    assert texts(row)[0] == ("user", "4 {so} {x}: 7\n\n2 + 2?") and "system" not in row


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_an_empty_cell_is_an_empty_part_of_a_template(tmp_path, kind):
    path, rows = tmp_path / f"a.{kind}", [{"q": "?", "more": None, "a": "!"}, {"q": None, "more": None, "a": "!"}]
    if kind == "csv":
        path.write_text("q,more,a\n?,,!\n,,!\n")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows, pa.schema(dict.fromkeys(("q", "more", "a"), pa.string()))), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    source = DataSource(path=str(path), columns={"user": "{q}|{more}", "assistant": "a", "system": "About {more}"})
    [example] = read_examples(source, on_bad_rows="drop")
    assert [one["content"] for one in example.conversation] == ["?|", "!"]
    with pytest.raises(DataError, match=r"the column 'q', which columns\.user reads, is empty"):
        read_examples(source)


def test_an_optional_column_that_is_not_there_is_reported():
    row = mapped(GSM, {"user": "question", "assistant": "answer", "system": "sytem"})
    assert "system" not in row and row.unused == ("id", "columns.system: no column 'sytem'")


def test_a_dot_leads_into_a_column():
    raw = {"context": "c", "answers": {"text": ["a", "b"]}, "a.b": "d"}
    row = mapped(raw, {"user": "{context} {a.b}", "assistant": "answers.text.1"})
    assert texts(row) == [("user", "c d"), ("assistant", "b")] and row.unused == ()


@pytest.mark.parametrize(
    ("value", "labels", "expected"),
    [
        (1, ["ham", "spam"], "spam"),
        ("spam", ["ham", "spam"], "spam"),
        ("spam", {"spam": "[[1]]"}, "[[1]]"),
        (True, {True: "yes"}, "yes"),
        (0, {0: "no"}, "no"),
        (1.0, ["ham", "spam"], "spam"),
        (3, None, "3"),
    ],
)
def test_labels(value, labels, expected):
    row = mapped({"sms": "hi", "kind": value}, {"text": "sms", "label": "kind"}, labels=labels)
    assert texts(row) == [("user", "hi"), ("assistant", expected)]


def test_preferences_texts_and_messages():
    pair = mapped({"q": "?", "good": "a", "bad": "b"}, {"user": "q", "chosen": "good", "rejected": "bad"})
    assert dict(pair) == {"prompt": "?", "chosen": "a", "rejected": "b"}
    turns = chat("q", "a")["messages"]
    assert dict(mapped({"dialog": turns}, {"messages": "dialog"})) == {"messages": turns}
    assert dict(mapped({"body": "x"}, {"text": "body"})) == {"text": "x"}


def read_with_system(write_rows, raw, columns=None, task="instruction_tuning"):
    source = DataSource(path=write_rows([raw]), columns=columns, system="Be brief.")
    return read_examples(source, task)[0]


ANSWER = {"role": "assistant", "content": "a"}
OWN = {
    "messages": chat("q", "a", "Own."),
    "JSON text": {"messages": json.dumps(chat("q", "a", "Own.")["messages"])},
    "capitals": {"messages": [{"role": "System", "content": "Own."}, *chat("q", "a", None)["messages"]]},
    "beside the messages": {**chat("q", "a", None), "system": "Own."},
    "pair of OpenAI": {
        "input": {"messages": chat("q", "a", "Own.")["messages"][:2]}, "preferred_output": [ANSWER],
        "non_preferred_output": [ANSWER | {"content": "b"}],
    },
}  # fmt: skip


@pytest.mark.parametrize("raw", OWN.values(), ids=OWN)
def test_a_conversation_keeps_its_own_system_message_however_it_is_written(write_rows, raw):
    task = "preference_tuning" if "input" in raw else "instruction_tuning"
    example = read_with_system(write_rows, raw, task=task)
    assert [(m["role"], m["content"]) for m in example.messages] == [
        ("system", "Own."),
        ("user", "q"),
        ("assistant", "a"),
    ]


@pytest.mark.parametrize(
    ("raw", "columns"),
    [
        (chat("q", "a", None), None),
        ({"prompt": "q", "completion": "a"}, None),
        ({"ask": "q", "say": "a"}, {"user": "ask", "assistant": "say"}),
        ({"talk": chat("q", "a", None)["messages"]}, {"messages": "talk"}),
    ],
    ids=["messages", "prompt", "columns", "a column of messages"],
)
def test_a_conversation_without_a_system_message_gets_that_of_the_config(write_rows, raw, columns):
    example = read_with_system(write_rows, raw, columns)
    assert example.messages[0] == {"role": "system", "content": "Be brief."} and len(example.messages) == 3


def test_nan_is_an_empty_cell():
    """As pandas writes one: {"system": NaN}."""
    columns = {"user": "question", "assistant": "answer", "system": "system"}
    nan = float("nan")
    row = mapped({"question": "x", "answer": "y", "system": nan}, columns)
    assert texts(row) == [("user", "x"), ("assistant", "y")] and "system" not in row
    with pytest.raises(DataError, match=r"the column 'answer', which columns\.assistant reads, is empty"):
        mapped({"question": "x", "answer": nan}, columns)
    row = mapped({"question": "x", "more": nan, "answer": "y"}, {"user": "{question}{more}", "assistant": "answer"})
    assert texts(row)[0] == ("user", "x")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"qestion": "x", "answer": "y"}, r"no column 'question', which columns\.user reads .*did you mean 'qestion'"),
        ({"question": "", "answer": "y"}, r"the column 'question', which columns\.user reads, is empty"),
        ({"question": "x", "answer": ["y"]}, r"'assistant' is \[\"y\"\]; expected text"),
        ({"question": {"a": 1}, "answer": "y"}, r"expected text \(a dot leads into it"),
    ],
)
def test_a_column_that_cannot_be_read(raw, message):
    columns = {"user": "question", "assistant": "{answer}" if isinstance(raw["answer"], str) else "answer"}
    with pytest.raises(DataError, match=message.replace("'assistant'", "'answer'")):
        mapped(raw, columns)


def test_an_unknown_label_names_the_known_ones():
    with pytest.raises(DataError, match=r"the label is 2, which `labels` does not have \(0: ham, 1: spam\)"):
        mapped({"sms": "x", "kind": 2}, {"text": "sms", "label": "kind"}, labels=["ham", "spam"])


def test_a_class_label_of_the_hub_gives_its_names(tmp_path):
    """The schema's metadata is what `datasets` writes into every Parquet file of the hub."""
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"sms": Value("string"), "label": ClassLabel(names=["ham", "spam"])})
    data = Dataset.from_dict({"sms": ["hi", "win", "?"], "label": [0, 1, -1]}, features=features)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    pq.write_table(pa.table({"sms": ["hi"], "label": [0]}), tmp_path / "plain.parquet")
    columns = {"text": "sms", "label": "label"}
    for path in ("a.parquet", "saved"):
        source = DataSource(path=str(tmp_path / path), columns=columns)
        read = read_examples(source, "classification", 2, ("ham", "spam"), "drop")
        assert [one.messages[-1]["content"] for one in read] == ["ham", "spam"]
        with pytest.raises(DataError, match=r"1 of 3 rows[\s\S]*:3: the column 'label', .* is empty"):
            read_examples(source, "classification", None, ("ham", "spam"))
    by_number = DataSource(path=str(tmp_path / "a.parquet"), columns=columns, labels=["[[0]]", "[[1]]"])
    read = read_examples(by_number, "classification", 2, ("[[0]]", "[[1]]"), "drop")
    assert [one.messages[-1]["content"] for one in read] == ["[[0]]", "[[1]]"]
    source = DataSource(path=str(tmp_path / "plain.parquet"), columns=columns, labels=["ham", "spam"])
    assert read_examples(source, "classification", None, ("ham", "spam"))[0].messages[-1]["content"] == "ham"


@pytest.mark.parametrize(
    ("keys", "task", "expected"),
    [
        (["question", "answer"], "instruction_tuning", {"user": "question", "assistant": "answer"}),
        (["id", "Prompt", "model_response"], "instruction_tuning", {"user": "Prompt", "assistant": "model_response"}),
        (["system_prompt", "x", "y"], "", {"system": "system_prompt", "user": "x", "assistant": "y"}),
        (["sms", "label"], "classification", {"text": "sms", "label": "label"}),
        (["a", "b"], "classification", {"text": "a", "label": "b"}),
        (["q", "better", "worse"], "preference_tuning", {"user": "q", "chosen": "better", "rejected": "worse"}),
        (["id", "q", "better", "worse"], "preference_tuning", {"chosen": "better", "rejected": "worse"}),
        (["url", "content"], "causal_lm", {"text": "content"}),
    ],
)
def test_the_mapping_to_write_is_valid_yaml_with_the_files_columns(keys, task, expected):
    written = yaml.safe_load(mapping_text(keys, "a: b.jsonl", "train_path", task))
    assert written == {"train_path": {"path": "a: b.jsonl", "columns": expected}}
    DataSource.model_validate(written["train_path"])


@pytest.mark.parametrize("other", ["rejected_response", "rejected_messages"])
def test_pairs_of_ms_swift_get_the_mapping_that_reads_them(write_rows, other):
    """Their chosen answer is the last one of `messages`."""
    whole = chat("q", "b")["messages"]
    rows = [chat("q", "a") | {other: "b" if other == "rejected_response" else whole}]
    path = write_rows(rows)
    with pytest.raises(DataError, match=rf"columns:\n +chosen: messages\n +rejected: {other}"):
        read_examples(path, "preference_tuning")
    source = DataSource(path=str(path), columns={"chosen": "messages", "rejected": other})
    [pair] = read_examples(source, "preference_tuning")
    assert pair.rejected == whole and pair.messages == chat("q", "a")["messages"]
