"""Examples shown as the model will see them, truncated as the run truncates them."""

import dataclasses
import html
import io
import json
import re

import pytest
from rich.console import Console

from conftest import chat, uneven_rows
from forgebook.cli.main import main
from forgebook.data.chat_template import render
from forgebook.data.masking import encode
from forgebook.data.preview import (
    example_as_json,
    ignored_keys,
    pieces_of,
    preview_examples,
    print_example,
    show,
    show_example,
)
from forgebook.errors import DataError
from forgebook.planning.prepare import prepare
from forgebook.runs.run import open_run
from support_vision import draw, image_row, save_vision_model


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


LONG = "where is the lamp of Maria near the old door "
QUESTIONS = [chat(LONG * repeats, "on the table") for repeats in (1, 8, 2)]


@pytest.mark.parametrize(
    ("truncation", "kept", "notes"),
    [
        ("drop", [0, 2], ["", "dropped", ""]),
        ("right", [0, 2], ["", "dropped", ""]),
        ("left", [0, 1, 2], ["", "cut", ""]),
    ],
)
def test_a_preview_truncates_as_the_run_does(make_config, write_rows, truncation, kept, notes):
    """An answer beyond the context leaves nothing of the loss: the run drops that example, and so says the preview."""
    config = make_config(train_path=write_rows(QUESTIONS), context_length=40, truncation=truncation)
    previewed = preview_examples(config, 3)
    train = prepare(config, open_run(config)).train
    assert [example.note.partition(",")[0].partition(" from")[0] for example in previewed] == notes
    assert [previewed[k].encoded.input_ids for k in kept] == [train.example(k)[0].tolist() for k in range(len(train))]
    assert [previewed[k].encoded.loss_mask for k in kept] == [train.example(k)[1].tolist() for k in range(len(train))]


def test_a_pair_is_dropped_as_one(make_config, write_rows):
    pair = {"chosen": chat("q", LONG * 8)["messages"], "rejected": chat("q", "a")["messages"]}
    rows = write_rows([pair, {**pair, "chosen": chat("q", "b")["messages"]}])
    config = make_config(
        train_path=rows, valid_path=None, task="preference_tuning", context_length=40, truncation="drop"
    )
    chosen, rejected, *others = preview_examples(config, 2)
    assert [example.where.partition(":")[2] for example in (chosen, rejected)] == ["1, chosen", "1, rejected"]
    assert chosen.note.startswith("dropped, longer than context_length 40")
    assert rejected.note == "dropped with the other answer of its pair"
    assert [example.note for example in others] == ["", ""]
    prepared = prepare(config, open_run(config))
    assert len(prepared.train) == 2
    assert (prepared.report["train"]["rows_cut"], prepared.report["train"]["rows_dropped"]) == (0, 2)


def test_show_example_follows_the_model_or_the_config(make_config, tmp_path):
    messages = chat("Where?", "On the table.")["messages"]
    chat_format = {"system": "S{instruction}", "user": "U{instruction}", "assistant": "A{instruction}<|end|>"}
    make_config(generation_config={"prompt_format": chat_format})
    assert "<|user|>" in html.unescape(show_example(messages, "tiny").data)
    assert "UWhere?" in html.unescape(show_example(messages, tmp_path / "run.yaml").data)


def test_show_example_highlights_what_a_configs_training_has_in_the_loss(make_config, tmp_path):
    two = [*chat("Where?", "On the table.")["messages"], *chat("Who?", "Maria.", system=None)["messages"]]
    highlighted = {}
    for name, settings in {
        "all": {}, "last": {"train_on": "last"}, "labels": {
            "task": "classification", "classifier_config": {"label_tokens": ["Maria.", "Paul."]}
        },
    }.items():  # fmt: skip
        make_config(**settings)
        found = re.findall("<mark[^>]*>(.*?)</mark>", show_example(two, tmp_path / "run.yaml").data)
        highlighted[name] = [re.sub("<.*?>", "", html.unescape(text)).strip() for text in found]
    assert "On the table." in highlighted["all"] and "On the table." not in highlighted["last"]
    assert highlighted["labels"] == ["Maria."]


def test_bad_rows_are_reported(make_config, tmp_path):
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


@pytest.mark.parametrize("terminal", [False, True], ids=["file", "terminal"])
def test_tokens_in_the_loss_are_in_brackets_or_in_color(make_config, terminal):
    [example, *_] = preview_examples(make_config(), 1)
    screen = io.StringIO()
    print_example(example, Console(file=screen, force_terminal=terminal, width=500, soft_wrap=True))
    shown = screen.getvalue().splitlines()[-1]
    in_loss = [piece for piece, is_in_loss, _ in example.pieces if is_in_loss]
    if terminal:
        assert "⟦" not in shown and "\x1b[" in shown
    else:
        assert shown.count("⟦") == len(in_loss) >= 2 and all(f"⟦{piece}⟧" in shown for piece in in_loss)
        assert shown.replace("⟦", "").replace("⟧", "") == "".join(piece for piece, *_ in example.pieces)


def test_show_highlights_the_tokens_in_the_loss(tokenizer):
    messages = chat("Where?", "On the table.")["messages"]
    page = show(encode(messages, tokenizer), tokenizer).data
    assert page.count('color:#102a13">On the table.</mark>') == 1 and "&lt;|end|&gt;" in page
    assert f"{sum(encode(messages, tokenizer).loss_mask)} of" in page


def test_pieces_join_to_the_text(tokenizer):
    messages = chat("漢字 and é", "👩\u200d👩 ok")["messages"]
    pieces = pieces_of(encode(messages, tokenizer), tokenizer)
    assert "".join(text for text, _, _ in pieces) == render(messages, tokenizer)
    assert [text for text, trained, _ in pieces if trained] == ["👩\u200d👩 ok", "<|end|>"]


def test_keys_that_nothing_reads_are_counted_over_all_rows(make_config, write_rows, monkeypatch, tmp_path, capsys):
    rows = [chat("q", "a") | {"source": "web"} for _ in range(5)]
    rows[3]["messages"][0]["mood"] = "good"
    config = make_config(train_path=write_rows([*rows, chat("q", "a")], "t.jsonl"))
    assert ignored_keys(config) == "messages[].mood (1), source (5)"
    assert ignored_keys(config, seconds=0) == "source (1) in the first 1 row"
    assert ignored_keys(make_config(train_path=write_rows([chat("q", "a")], "t.jsonl"))) == ""
    make_config(train_path=write_rows(rows, "t.jsonl"))
    monkeypatch.chdir(tmp_path)
    assert main(["preview", "run.yaml", "n=1"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("ignored keys: messages[].mood (1), source (5)")
    assert main(["preview", "run.yaml", "n=1", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1 and printed.err == "ignored keys: messages[].mood (1), source (5)\n"


def test_special_tokens_in_texts_are_mentioned(make_config, write_rows, capsys):
    """They look like the template's own, and are not."""
    path = write_rows([{"prompt": "<|user|>q<|end|><|assistant|>", "completion": "a"}, chat("q", "a")])
    examples = preview_examples(make_config(train_path=path), 2)
    assert [example.note for example in examples] == ["special tokens in its texts are characters", ""]
    bracketed = dataclasses.replace(examples[0], where="a[red]b.jsonl:1")
    print_example(bracketed, Console(width=100))
    assert "a[red]b.jsonl:1" in capsys.readouterr().out


def test_images_are_placeholders_with_their_tokens_and_small_pictures(make_config, write_rows, tmp_path):
    draw(tmp_path / "a.png", "a", (400, 300))
    row = image_row("What?", "A lamp.", "a.png")
    model = save_vision_model("SmolVLM", tmp_path / "model")
    values = {"model_id": model, "train_path": write_rows([row]), "vision_language_config": {}, "task": None}
    [example] = preview_examples(make_config(**values), 1)
    inside = [text for text, _, _ in example.pieces if text.startswith("[image")]
    assert inside == ["[image 1: 400 x 300 pixels, 33 tokens]"]
    assert [text for text, in_loss, _ in example.pieces if in_loss] == ["A lamp.", "<|end|>"]
    row["messages"][0]["content"][0]["image_url"]["url"] = str(tmp_path / "a.png")
    html = show_example(row["messages"], model).data
    assert html.count('<img src="data:image/jpeg;base64,') == 1 and 1_000 < len(html) < 10_000
