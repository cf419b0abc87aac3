"""What a conversation, a pair and a label must be; tests/data/test_row_formats.py has the rows."""

import pytest

from conftest import chat
from forgebook.data.row_checks import check_conversation, check_label, check_media, check_pair
from forgebook.errors import DataError

GOOD, OTHER = chat("q", "a")["messages"], chat("q", "b")["messages"]


def test_good_ones_pass():
    check_conversation(GOOD, needs_answer=True)
    check_conversation(GOOD[:2], needs_answer=False)
    check_pair(GOOD, OTHER)
    check_label(GOOD, ["a", "b"])


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_conversation(GOOD[:2], True), "no assistant turn"),
        (
            lambda: check_conversation([*GOOD, GOOD[0]], True),
            r"messages\[3\]\.role: a system message can only come first",
        ),
        (lambda: check_pair(GOOD, GOOD), "the same answer"),
        (lambda: check_pair(GOOD, chat("other", "b")["messages"]), "their prompts differ"),
        (lambda: check_label(GOOD, ["x", "y"]), r"messages\[2\] is \"a\"; the last answer must be one of"),
    ],
)
def test_others_are_named(check, message):
    with pytest.raises(DataError, match=message):
        check()


@pytest.mark.parametrize(
    ("key", "text"), [("videos", "<video>What is it?"), ("video", "Look: <video>"), ("audio_path", "<audio>\nSay it.")]
)
def test_recordings_that_the_messages_mention_are_not_left_out(key, text):
    with pytest.raises(DataError, match=rf"{key}: the messages mention <\w+>, and nothing trains on it"):
        check_media({key: ["a.png"]}, chat(text, "a")["messages"])
    check_media({key: []}, chat(text, "a")["messages"])
    check_media({key: ["a.png"]}, GOOD)
