"""Answers beside their references, without a model: every kind of mistake in a text."""

import pytest

from forgebook.evaluation.results import Comparison
from forgebook.evaluation.scoring import Turn, said_by, scored


def turn(**reference) -> Turn:
    return Turn(0, "rows:1", [{"role": "user", "content": "q"}], None, {"role": "assistant", **reference})


@pytest.mark.parametrize(
    ("metric", "said", "kind"),
    [
        ("exact_match", " The lamp 4\n", None),
        ("exact_match", None, "thought does not end"),
        ("exact_match", "", "empty"),
        ("exact_match", "The lamp 4, 5", "does not stop"),
        ("exact_match", "The", "stops early"),
        ("exact_match", "the  lamp 4", "case or spaces"),
        ("exact_match", "A key", "different"),
        ("anls", "The lamp 5", "close"),
        ("gsm8k", "#### 4", "wrong number"),
        ("gsm8k", "4", "no number after ####"),
        ("gsm8k", None, "thought does not end"),
        ("tool_calls", "A key", None),
        ("tool_calls", None, "thought does not end"),
    ],
)
@pytest.mark.parametrize("thought", ["", "<think>\nIt stands there.\n</think>\n\n"], ids=["plain", "thought"])
def test_each_kind_of_mistake(metric, said, kind, thought):
    compared = Comparison(["q"], ["The lamp 4"], ["b"], ["t"])
    found = scored(metric, [turn(content=f"{thought}The lamp 4")], compared, [[said], [said]])
    assert found.kinds == ({kind: (1, 1)} if kind else {})
    assert [mistake["tuned"] for mistake in found.mistakes] == ["t"] * bool(kind)


def test_a_reference_says_what_follows_its_thought():
    assert said_by({"content": "<think>\nhm\n</think>\n\n4"}) == said_by({"content": "4"}) == "4"
