"""Reading rows, refusing bad ones, and making tokens of them."""

import json

import pytest

from conftest import chat
from forgebook.data import tokenize
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
            '{"messages": [{"role": "bot", "content": "x"}]}',
            r'messages\[0\]\.role is "bot"; expected system, user, assistant or tool',
        ),
        ('{"messages": [{"role": "user", "content": 3}]}', r"messages\[0\]\.content is 3; expected a string"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\]\.content is null; expected a string"),
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
        tokenize.read_examples(str(path))


def test_all_bad_rows_are_found_in_one_pass(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([GOOD, *["{"] * 25]))
    with pytest.raises(DataError) as rejected:
        tokenize.read_examples(str(path))
    text = str(rejected.value)
    assert text.startswith("25 of 26 rows") and "rows.jsonl:21:" in text and "... and 5 more" in text


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        tokenize.read_examples(str(tmp_path / "empty.jsonl"))
    with pytest.raises(StorageError, match="does not exist"):
        tokenize.read_examples(str(tmp_path / "none.jsonl"))
    with pytest.raises(StorageError, match="is a folder"):
        tokenize.read_examples(str(tmp_path))


def test_byte_order_mark_windows_lines_and_bad_bytes(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n" + GOOD.encode())
    assert [row.where for row in tokenize.read_examples(str(path))] == ["rows.jsonl:1", "rows.jsonl:3"]
    path.write_bytes(GOOD.encode() + b"\n\xff\xfe")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not UTF-8"):
        tokenize.read_examples(str(path))


def test_text_rows_are_for_causal_lm_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "hello"}')
    assert tokenize.read_examples(str(path), "causal_lm")[0].text == "hello"
    with pytest.raises(DataError, match="no 'messages'"):
        tokenize.read_examples(str(path))


# Tokenising -------------------------------------------------------------------------------------------


def test_an_empty_answer_still_has_its_end_of_turn_token_in_the_loss(tokenizer):
    [[encoded]] = tokenize.encode_examples(
        [Example("f:1", messages=chat("q", "")["messages"])], tokenizer, tokenize.EncodingOptions()
    )
    assert sum(encoded.loss_mask) == 1 and encoded.loss_mask[-1]


def test_an_example_without_a_token_in_the_loss_is_rejected(tokenizer):
    """Peers' point 1."""
    from forgebook.config.parse import PromptFormat

    silent = PromptFormat(system="{instruction}", user="{instruction}", assistant="{instruction}")
    rows = [Example("f:7", messages=chat("q", "")["messages"])]
    [error] = tokenize.encode_examples(rows, tokenizer, tokenize.EncodingOptions(prompt_format=silent))
    assert isinstance(error, DataError) and "f:7: no token of this example is in the loss" in str(error)
