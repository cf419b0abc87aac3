"""JSON that is parsed but could not be written again, or would lose a value, is an error."""

import pytest

from forgebook.data.json_values import check_unique, parse_json, without_nulls
from forgebook.errors import DataError


def test_values():
    assert parse_json('{"a": [1, "\\ud83d\\ude00"]}') == {"a": [1, "\U0001f600"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"^not valid JSON \("),
        ('{"a": 1, "a": 2}', "the key 'a' is repeated in one object"),
        ('["\\ud83d"]', "half of a surrogate pair"),
        ("[" * 101 + "]" * 101, "nested more than 100 levels"),
        ("9" * 5000, "not valid JSON .*Exceeds the limit"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(DataError, match=message):
        parse_json(text)


def test_a_name_that_occurs_twice():
    check_unique(["a", "b"], "column")
    with pytest.raises(DataError, match=r"^the column 'b' is repeated$"):
        check_unique(["a", "b", "b"], "column")


def test_without_nulls():
    assert without_nulls({"a": None, "b": [{"c": None, "default": None}]}, ("default",)) == {"b": [{"default": None}]}
