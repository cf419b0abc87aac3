"""What single examples are found to have, and what looks like it and is none."""

import pytest

from conftest import chat
from forgebook.curation.checks import TextChecks, mask_personal_data
from forgebook.data.row_formats import parse_row


def reasons(answer: str, question: str = "Where is the lamp?", **settings) -> set[str]:
    example = parse_row(chat(question, answer), "a.jsonl:1", "instruction_tuning")[0]
    return {finding.reason for finding in TextChecks(**settings).find(0, example)}


@pytest.mark.parametrize("text", ["I'm sorry, but I can't help with that.", "As an AI language model, I have no lamp."])
def test_a_refusal(text):
    assert reasons(text) == {"refusal"}


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry about your lamp. We will send a new one.",
        "You cannot open it, but I can help.",
        "The model said that it cannot assist.",
        "I can't believe how bright it is!",
        "Sorry, the lamp is sold.",
    ],
)
def test_an_apology_is_no_refusal(text):
    assert reasons(text) == set()


def test_own_expressions_of_refusals():
    assert reasons("Not my department.") == set()
    assert reasons("Not my department.", refusals=["not my (job|department)"]) == {"refusal"}


@pytest.mark.parametrize(
    "text",
    [
        "Use this code:\n```python\nprint(1)\n",
        '{"name": "Ada", "items": [1, 2',
        "You will find the lamp on the table that is in the",
        "First open the box, then take out the lamp,",
    ],
)
def test_a_truncated_answer(text):
    assert reasons(text) == {"truncated"}


@pytest.mark.parametrize(
    "text",
    [
        "```python\nprint(1)\n```",
        '{"name": "Ada"}',
        "[Note] the lamp is on the table",
        "{user} is a placeholder",
        "On the",
        "4",
    ],
)
def test_a_short_or_unusual_answer_is_not_truncated(text):
    assert reasons(text) == set()


def test_an_answer_without_full_stop_is_truncated_where_the_others_have_one():
    checks = TextChecks()
    full, cut = "The lamp is on the table near the old door.", "The lamp is on the table near the old"
    for number, answer in enumerate([full] * 30 + [cut]):
        example = parse_row(chat("Where?", answer), "a.jsonl:1", "instruction_tuning")[0]
        assert not list(checks.find(number, example))
    assert [(one.number, one.reason) for one in checks.unfinished()] == [(30, "truncated")]
    checks = TextChecks()
    for number, answer in enumerate([full, cut] * 30):
        list(checks.find(number, parse_row(chat("Where?", answer), "a.jsonl:1", "instruction_tuning")[0]))
    assert checks.unfinished() == []


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("ada.lovelace@example.co.uk", "email address"),
        ("+49 30 1234 5678", "phone number"),
        ("(555) 123-4567", "phone number"),
        ("4539 1488 0343 6467", "card number"),
        ("AKIAIOSFODNN7EXAMPLE", "key"),
        ("-----BEGIN RSA PRIVATE KEY-----", "key"),
    ],
)
def test_personal_data_is_found_and_masked(text, kind):
    example = parse_row(chat(f"It is {text} here.", "Yes."), "a.jsonl:1", "instruction_tuning")[0]
    assert [(one.reason, one.detail) for one in TextChecks().find(0, example)] == [("personal_data", f"1 {kind}")]
    masked = mask_personal_data(f"It is {text} here.")
    assert text not in masked and f"[{kind}]" in masked


@pytest.mark.parametrize(
    "said",
    [
        {"reasoning_content": "She is ada@example.org."},
        {"tool_calls": [{"function": {"name": "mail", "arguments": {"to": "ada@example.org"}}}]},
    ],
    ids=["thought", "call"],
)
def test_personal_data_is_found_in_thoughts_and_calls(said):
    row = chat("Write to her.", "Done.")
    row["messages"][-1] |= said
    example = parse_row(row, "a.jsonl:1", "instruction_tuning")[0]
    assert [(one.reason, one.detail) for one in TextChecks().find(0, example)] == [("personal_data", "1 email address")]


@pytest.mark.parametrize(
    "text", ["order 12345678", "4539 1488 0343 6468", "2026-11-27 10:15", "3.14159265358979", "user@host", "v1.2.3"]
)
def test_other_numbers_are_not_personal(text):
    assert reasons("Yes.", f"It is {text} here.") == set()
    assert mask_personal_data(text) == text


def test_languages_that_differ():
    german = "Die Lampe ist auf dem Tisch, und der Schlüssel ist nicht mehr da."
    assert reasons(german, "Tell me where the lamp is and what you did with the key that was there.") == {
        "mixed_languages"
    }
    assert reasons(german, "Wo ist die Lampe, und was hast du mit dem Schlüssel gemacht? Ich sehe ihn nicht.") == set()
    assert reasons("Лампа стоит на столе.", "Where is the lamp?") == {"mixed_languages"}


def test_lengths():
    assert reasons("...") == {"empty_answer"} and reasons("4", min_answer_characters=2) == {"empty_answer"}
    assert reasons("Yes.", max_characters=10) == {"too_long"}


def test_labels_are_checked_for_personal_data_alone():
    assert reasons("As an AI, I ```", has_labels=True) == set()
    assert reasons("x", "Write to a@b.org", has_labels=True) == {"personal_data"}
