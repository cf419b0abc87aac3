"""What can be checked of a record without knowing the right one: the message must say what is in it."""

import json

WORDS = {
    "cancel": ("cancel", "stop the order"),
    "refund": ("refund", "money"),
    "repair": ("repair", "fix"),
    "replacement": ("replace", "new one"),
}


def agrees_with_the_message(row: dict) -> bool | str:
    """Return True, or what of the record the message does not say."""
    *_, question, answer = [message["content"] for message in row["messages"]]
    record = json.loads(answer)
    for field in ("name", "item", "order"):
        if str(record[field]) not in question:
            return f"the message does not say {field} {record[field]!r}"
    words = WORDS.get(record["request"], ())
    return (
        any(word in question.lower() for word in words)
        or f"the message does not ask for {record['request']!r}"
    )
