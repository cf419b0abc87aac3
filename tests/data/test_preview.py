"""Rows shown as they will be trained."""

import json

import pytest

from conftest import chat, uneven_rows
from forgebook.cli.main import main
from forgebook.data.chat_template import render
from forgebook.data.masking import encode
from forgebook.data.preview import example_as_json, pieces_of, preview_examples, show
from forgebook.errors import DataError
from forgebook.planning.prepare import prepare
from forgebook.runs.run import open_run


def test_a_preview_is_what_training_gets(make_config):
    config = make_config()
    train = prepare(config, open_run(config)).train
    for k, row in enumerate(preview_examples(config, 5)):
        ids, trained = train.example(k)
        assert row.encoded.input_ids == ids.tolist() and row.encoded.loss_mask == trained.tolist()
        assert row.where == f"train.jsonl:{k + 1}"


def test_json_lines(make_config, tokenizer):
    for row in preview_examples(make_config(), 3):
        line = json.loads(example_as_json(row))
        assert line["text"] == tokenizer.decode(line["input_ids"])
        trained = [label for label in line["labels"] if label != -100]
        assert len(line["labels"]) == len(line["input_ids"]) and tokenizer.decode(trained).endswith("<|end|>")


@pytest.mark.parametrize(
    ("truncation", "tokens", "note"),
    [
        ("error", None, "so the run will stop with an error"),
        ("drop", None, "dropped, longer than context_length 20"),
        ("left", 20, "cut"),
        ("right", None, "truncation leaves no token of its loss"),
    ],
)
def test_truncation_is_shown(make_config, write_rows, truncation, tokens, note):
    long = write_rows(uneven_rows(24)[-1:], "long.jsonl")
    [row] = preview_examples(make_config(train_path=long, context_length=20, truncation=truncation), 1)
    assert note in row.note and (tokens is None or len(row.encoded.input_ids) == tokens)


def test_bad_rows_are_told(make_config, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"messages": []}')
    with pytest.raises(DataError, match=r"bad\.jsonl:1: messages is \[\]; expected a non-empty list"):
        preview_examples(make_config(train_path=str(tmp_path / "bad.jsonl")))
    (tmp_path / "mixed.jsonl").write_text('{"messages": []}\n' + json.dumps(uneven_rows(1)[0]))
    [row] = preview_examples(make_config(train_path=str(tmp_path / "mixed.jsonl"), on_bad_rows="drop"))
    assert row.where == "mixed.jsonl:2"


def test_the_verb(make_config, tmp_path, capsys):
    make_config()
    config = str(tmp_path / "run.yaml")
    assert main(["preview", config, "n=2"]) == 0
    shown = capsys.readouterr().out
    assert "train.jsonl:1" in shown and "⟦" in shown and "<|assistant|>" in shown
    assert main(["preview", config, "n=2", "--json"]) == 0
    assert [set(json.loads(line)) for line in capsys.readouterr().out.splitlines()] == [
        {"input_ids", "labels", "text"}
    ] * 2
    assert main(["preview"]) == 2 and "needs a CONFIG" in capsys.readouterr().err
    assert main(["preview", config, "n=0"]) == 2 and "must be a whole number" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_show_highlights_the_tokens_in_the_loss(tokenizer):
    messages = chat("Where?", "On the table.")["messages"]
    html = show(encode(messages, tokenizer), tokenizer).data
    assert html.count('background:#2e7d3244;">On the table.</span>') == 1 and "&lt;|end|&gt;" in html
    assert f"{sum(encode(messages, tokenizer).loss_mask)} of" in html


def test_pieces_join_to_the_text(tokenizer):
    messages = chat("漢字 and é", "👩\u200d👩 ok")["messages"]
    pieces = pieces_of(encode(messages, tokenizer), tokenizer)
    assert "".join(text for text, _, _ in pieces) == render(messages, tokenizer)
    assert [text for text, trained, _ in pieces if trained] == ["👩\u200d👩 ok", "<|end|>"]
