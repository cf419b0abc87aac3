"""Examples read, bad rows rejected, tokens cached, one progress bar over all sources."""

import hashlib
import json

import pyarrow as pa
import pytest

from conftest import CONVERSATION, chat
from forgebook.config.blocks import PromptFormat
from forgebook.config.data_block import DataSource
from forgebook.data import readers, tokenize
from forgebook.data.data_sources import Source, find_sources
from forgebook.data.examples import read_examples
from forgebook.data.row_formats import Example
from forgebook.errors import DataError, StorageError

GOOD = json.dumps(chat("q", "a"))


# Reading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"rows\.jsonl:2: not valid JSON .*one JSON object"),
        ("[1]", r"rows\.jsonl:2: the row is a JSON array; expected an object"),
        ('{"prompt": "x"}', r"rows\.jsonl:2: no 'messages' \(its keys: prompt\)"),
        ('{"messages": []}', r"rows\.jsonl:2: messages is \[\]; expected a non-empty list"),
        ('{"messages": "hi"}', r"rows\.jsonl:2: messages is \"hi\"; expected a non-empty list"),
        ('{"messages": ["hi"]}', r"rows\.jsonl:2: messages\[0\] is \"hi\"; expected an object with role and content"),
        (
            '{"messages": [{"role": "robot", "content": "x"}]}',
            r'messages\[0\]\.role is "robot"; expected system, user, assistant or tool',
        ),
        ('{"messages": [{"role": "user", "content": 3}]}', r"messages\[0\]\.content is 3; expected a string"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\] has no content \(its keys: role\)"),
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
def test_a_bad_row_is_reported_with_its_line_and_fix(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(DataError, match=message):
        read_examples(str(path))


def test_all_bad_rows_are_reported_in_one_pass(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([GOOD, *["{"] * 25]))
    with pytest.raises(DataError) as rejected:
        read_examples(str(path))
    text = str(rejected.value)
    assert text.startswith("25 of 26 rows") and "rows.jsonl:21:" in text and "... and 5 more" in text


def test_a_file_of_bad_rows_alone_is_not_empty_after_they_are_dropped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{\n")
    with pytest.raises(DataError, match=r"1 of 1 rows .*\n  rows\.jsonl:1: not valid JSON"):
        read_examples(str(path), on_bad_rows="drop")


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        read_examples(str(tmp_path / "empty.jsonl"))
    with pytest.raises(StorageError, match="does not exist"):
        read_examples(str(tmp_path / "none.jsonl"))
    with pytest.raises(StorageError, match="is a folder without data files"):
        (tmp_path / "none").mkdir()
        read_examples(str(tmp_path / "none"))


def test_byte_order_mark_windows_lines_and_bad_bytes(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n" + GOOD.encode())
    assert [row.where for row in read_examples(str(path))] == ["rows.jsonl:1", "rows.jsonl:3"]
    path.write_bytes(GOOD.encode() + b"\n\xff\xfe")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not UTF-8"):
        read_examples(str(path))


def test_text_rows_are_for_causal_lm_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "hello"}')
    assert read_examples(str(path), "causal_lm")[0].text == "hello"
    with pytest.raises(DataError, match="no 'messages'"):
        read_examples(str(path))


# Tokenising -------------------------------------------------------------------------------------------


def test_an_empty_answer_still_has_its_end_of_turn_token_in_the_loss(tokenizer):
    [[encoded]] = tokenize.encode_examples(
        [Example("f:1", messages=chat("q", "")["messages"])], tokenizer, tokenize.EncodingOptions()
    )
    assert sum(encoded.loss_mask) == 1 and encoded.loss_mask[-1]


def test_an_example_without_a_token_in_the_loss_is_rejected(tokenizer):
    """Peers' point 1."""
    options = tokenize.EncodingOptions("classification", labels=("<|user|>",))
    rows = [Example("f:7", messages=chat("q", "neither")["messages"])]
    [error] = tokenize.encode_examples(rows, tokenizer, options)
    assert isinstance(error, DataError) and "f:7: no token of this example is in the loss" in str(error)


# The cache --------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "find", "arguments": {"city": "Rome"}}}
# A row of each format, and of everything else that changes tokens.
GOLDEN = [
    chat("Where is the lamp?", "On the table."),
    chat("What is <|end|>?", "<|end|> ends a turn.", system=None),
    {"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Here."}], "system": "Be short."},
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"prompt": "The lamp is", "completion": " on the table."},
    {"prompt": [*CONVERSATION, CONVERSATION[1]], "completion": "On the table, still."},
    {"messages": [*chat("a?", "A.")["messages"], *chat("b?", "B.", system=None)["messages"]]},
    {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So.", "thinking": "Hm."}]},
    {
        "messages": [
            {"role": "user", "content": "Rome?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "found"},
            {"role": "assistant", "content": "Found."},
        ],
        "tools": [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}],
    },
]
FORMAT = PromptFormat(system="S{instruction}", user="U{system}{instruction}", assistant="A{instruction}<|end|>")


def test_cached_tokens_are_those_of_this_code(tmp_path, write_rows, tokenizer):
    """Cached tokens are named by CACHE_VERSION: with it older tokens would pass for those of changed code."""
    sources = find_sources(write_rows([*GOLDEN, {"text": "The lamp."}]))
    digest = hashlib.sha256()
    for options in (
        tokenize.EncodingOptions(),
        tokenize.EncodingOptions(train_on="last"),
        tokenize.EncodingOptions("causal_lm"),
        tokenize.EncodingOptions(prompt_format=FORMAT),
    ):
        tokens, notes = tokenize.tokenize(sources, tokenizer, options, tmp_path)
        [shard] = {file for file, _ in tokens.files}
        digest.update(repr(pa.ipc.open_file(shard).read_all().to_pydict()).encode())
        digest.update(repr((notes.rows, notes.turns, notes.formats, notes.ignored)).encode())
    golden = (18, "cee4c5dc742515ff")
    assert (tokenize.CACHE_VERSION, digest.hexdigest()[:16]) == golden, (
        "the tokens of the same rows, or their shards, changed: bump CACHE_VERSION and re-pin"
    )


def test_names_are_in_the_table_where_the_template_shows_none(tmp_path, write_rows, tokenizer, with_template):
    path = write_rows([{"messages": [{"role": "user", "name": "Ann", "content": "q"}, chat("q", "a")["messages"][-1]]}])
    sources, options = find_sources(path), tokenize.EncodingOptions()
    assert tokenize.tokenize(sources, tokenizer, options, tmp_path)[1].ignored == {"messages[].name": 1}
    kimi = with_template(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.name }}:{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>:{% endif %}"
    )
    assert tokenize.tokenize(sources, kimi, options, tmp_path)[1].ignored == {}


def test_special_tokens_in_texts_are_counted(tmp_path, write_rows, tokenizer):
    """Texts that another program has already put into a template, whose tokens are characters here."""
    call = {"type": "function", "function": {"name": "read", "arguments": {"place": "<|user|>"}}}
    rows = [
        chat("q", "a"),
        {"prompt": "<|user|>q<|end|><|assistant|>", "completion": "a<|end|>"},
        {"messages": [*chat("q", "a")["messages"][:-1], {"role": "assistant", "content": "", "tool_calls": [call]}]},
    ]
    sources, options = find_sources(write_rows(rows)), tokenize.EncodingOptions()
    expected = {"<|user|>": 2, "<|end|>": 1, "<|assistant|>": 1}
    for _ in range(2):  # the second time from the cache
        assert tokenize.tokenize(sources, tokenizer, options, tmp_path)[1].special == expected


def test_empty_answers_in_the_loss_are_counted(tmp_path, write_rows, tokenizer):
    rows = [chat("q", "a"), chat("q", " "), {"instruction": "q", "output": ""}]
    unsupervised = {"role": "assistant", "content": "", "weight": 0}
    rows.append({"messages": [{"role": "user", "content": "q"}, unsupervised, *chat("q", "a", None)["messages"]]})
    sources = find_sources(write_rows(rows))
    assert tokenize.tokenize(sources, tokenizer, tokenize.EncodingOptions(), tmp_path)[1].empty_answers == 2


def test_the_cache_version_names_cached_tokens(tmp_path, write_rows, tokenizer, monkeypatch):
    sources = find_sources(write_rows(GOLDEN))
    tokenize.tokenize(sources, tokenizer, tokenize.EncodingOptions(), tmp_path)
    monkeypatch.setattr(tokenize, "CACHE_VERSION", tokenize.CACHE_VERSION + 1)
    tokenize.tokenize(sources, tokenizer, tokenize.EncodingOptions(), tmp_path)
    assert len(list(tmp_path.glob("*/notes.json"))) == 2


def test_progress_counts_the_chunks_of_all_sources(tmp_path, write_rows, tokenizer, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 400)
    paths = [write_rows([chat(f"{name} {k}", "a") for k in range(9)], f"{name}.jsonl") for name in ("x", "y")]
    sources = find_sources(paths)
    expected = sum(len(readers.split_source(source)) for source in sources)
    calls = []
    for _ in range(2):
        tokens, _ = tokenize.tokenize(
            sources, tokenizer, tokenize.EncodingOptions(), tmp_path, on_progress=lambda *call: calls.append(call)
        )
    assert expected >= 6 and calls == [(k, expected) for k in range(1, expected + 1)]  # nothing for cached tokens
    assert [tokens.where(k) for k in (0, 8, 9, 17)] == ["x.jsonl:1", "x.jsonl:9", "y.jsonl:1", "y.jsonl:9"]


def test_weights_repeat_and_sample_the_examples_of_a_source(tmp_path, write_rows, tokenizer):
    paths = [write_rows([chat(f"{name}{k}", "a") for k in range(10)], f"{name}.jsonl") for name in ("x", "y")]
    sources = [Source(paths[0], 2.0), Source(paths[1], 0.5, entry=1)]
    tokens, notes = tokenize.tokenize(sources, tokenizer, tokenize.EncodingOptions(), tmp_path)
    names = [tokens.where(k)[0] for k in range(len(tokens))]
    assert names.count("x") == 20 and names.count("y") == 5 and notes.rows == 20


@pytest.mark.parametrize(("weight", "expected"), [(0.25, 20), (0.75, 60), (1.5, 120)])
def test_a_weight_is_of_all_files_of_an_entry(tmp_path, write_rows, tokenizer, weight, expected):
    """Each file had been rounded by itself: a quarter of 40 files of two rows was nothing."""
    (tmp_path / "many").mkdir()
    for k in range(40):
        write_rows([chat(f"q{k}", "a"), chat(f"r{k}", "a")], f"many/{k:02}.jsonl")
    big = write_rows([chat(f"big {k}", "a") for k in range(10)], "big.jsonl")
    sources = find_sources([big, DataSource(path=str(tmp_path / "many/*.jsonl"), weight=weight)])
    tokens, _ = tokenize.tokenize(sources, tokenizer, tokenize.EncodingOptions(), tmp_path / "cache")
    names = [tokens.where(k).split(":")[0] for k in range(len(tokens))]
    assert names.count("big.jsonl") == 10 and len(names) == 10 + expected
    assert len(set(names)) > 10


def test_a_classification_example_has_its_label_alone_in_the_loss(tokenizer):
    options = tokenize.EncodingOptions("classification", labels=("<|user|>",))
    examples = [Example("f:1", messages=chat("q", "x")["messages"])]
    [error] = tokenize.encode_examples(examples, tokenizer, options)
    assert "no token of this example is in the loss" in str(error)
