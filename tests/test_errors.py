"""Errors: exit codes, pickling, and the lines and suggestions that messages are made of."""

import pickle

import pytest

from forgebook import errors
from forgebook.errors import ForgebookError, first_line, last_line, near_miss, shown_value


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name.endswith("Error")])
def test_errors_survive_pickling_and_say_how_to_exit(name):
    kind = getattr(errors, name)
    copy = pickle.loads(pickle.dumps(kind("train_path: no such file")))
    assert type(copy) is kind and str(copy) == "train_path: no such file"
    assert isinstance(copy, ForgebookError)
    assert copy.exit_code == {"CheckpointError": 1, "TrainingError": 1, "StoppedError": 143}.get(name, 2)


@pytest.mark.parametrize(
    ("error", "first", "last"),
    [
        (ValueError("one"), "one", "one"),
        (ValueError("\n  one  \n\ntwo.\n"), "one", "two"),
        (ValueError(""), "ValueError", "ValueError"),
        (ValueError(" \n "), "ValueError", "ValueError"),
        (ValueError(), "ValueError", "ValueError"),
        ("Traceback (most recent call last):\nKeyError: 'x'", "Traceback (most recent call last):", "KeyError: 'x'"),
    ],
)
def test_a_line_of_an_error_is_never_empty(error, first, last):
    assert (first_line(error), last_line(error)) == (first, last)


def test_a_near_name_is_suggested():
    assert near_miss("learning_rat", ["seed", "learning_rate"]) == ": did you mean 'learning_rate'?"
    assert near_miss("zzz", ["seed"]) == near_miss(7, []) == ""


def test_values_are_shown_in_short():
    assert shown_value(None) == "nothing" and shown_value("a") == "'a'"
    assert shown_value("a" * 100) == "'" + "a" * 76 + "..." and len(shown_value([1] * 99, limit=20)) == 20
