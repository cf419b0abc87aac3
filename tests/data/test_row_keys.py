"""Every key that any format knows x every format: honored, refused, or named as ignored."""

import itertools
import json

import pytest

from forgebook.data.messages import MARKS, MESSAGE_KEYS, REASONING_KEYS
from forgebook.data.row_formats import JSON_KEYS, QUESTION_KEYS, SHARED_KEYS, TEXT_OR_JSON_KEYS, parse_row
from forgebook.errors import DataError

SEEN = "Zq7"
Q = {"role": "user", "content": "Qq7"}
A, B = ({"role": "assistant", "content": text} for text in ("Aq7", "Bq7"))
GPT = [{"from": "user", "value": "Qq7"}, {"from": "gpt", "value": "Aq7"}]
TOOL = {"name": SEEN, "parameters": {"type": "object", "properties": {}}}

FORMATS = [
    ("instruction_tuning", {"messages": [Q, A]}),
    ("instruction_tuning", {"conversations": GPT}),
    ("instruction_tuning", {"instruction": "Qq7", "output": "Aq7"}),
    ("instruction_tuning", {"prompt": "Qq7", "completion": "Aq7"}),
    ("instruction_tuning", {"prompt": [Q], "completion": [A]}),
    ("causal_lm", {"text": "Qq7"}),
    ("causal_lm", {"messages": [Q, A]}),
    ("classification", {"messages": [Q, A]}),
    ("classification", {"prompt": "Qq7", "completion": "Aq7"}),
    ("preference_tuning", {"prompt": "Qq7", "chosen": "Aq7", "rejected": "Bq7"}),
    ("preference_tuning", {"prompt": "Qq7", "chosen": [Q, A], "rejected": [Q, B]}),
    ("preference_tuning", {"chosen": [Q, A], "rejected": [Q, B]}),
    ("preference_tuning", {"messages": [Q], "chosen": A, "rejected": B}),
    ("preference_tuning", {"conversations": GPT[:1], "chosen": "Aq7", "rejected": "Bq7"}),
    ("preference_tuning", {"instruction": "Qq7", "chosen": "Aq7", "rejected": "Bq7"}),
    ("preference_tuning", {"question": "Qq7", "chosen": "Aq7", "rejected": "Bq7"}),
    ("preference_tuning", {"input": {"messages": [Q]}, "preferred_output": [A], "non_preferred_output": [B]}),
]
TURNS = [{"role": "user", "content": SEEN}, {"role": "assistant", "content": SEEN}]
BESIDE = {
    **dict.fromkeys((*TEXT_OR_JSON_KEYS, *QUESTION_KEYS, *REASONING_KEYS), SEEN),
    **dict.fromkeys(("system", "text", "instruction", "input", "output", "system_prompt", "context"), SEEN),
    **dict.fromkeys(("messages", "conversations"), TURNS),
    **{key: [TOOL] for key in ("tools", "functions", "tool_defs")},
    **dict.fromkeys(MARKS, 0),
    "history": [[SEEN, SEEN]],
    "label": False,
    "chat_template_kwargs": {SEEN: True},
}
# In a turn. A mark is honored where its turn leaves the loss.
INSIDE = {
    **dict.fromkeys((*REASONING_KEYS, "name", "tool_call_id", "mood", "images"), SEEN),
    **dict.fromkeys(MARKS, 0),
    "tool_calls": [{"function": TOOL | {"arguments": {}}}],
    "function_call": TOOL | {"arguments": {}},
    "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}],
}


def dropped(raw, task, keys):
    """List the keys of a row that leave no trace: no error, nothing in the example, no name in the table."""
    try:
        example, notes = parse_row(raw, "f:1", task, ("Aq7", SEEN))
    except DataError as error:
        assert str(error).startswith("f:1: ")
        return []
    turns = [*(example.messages or ()), *(example.rejected or ())]
    # A name that is no tool's result is shown by few templates: it has to be in the table.
    shown = [{key: value for key, value in turn.items() if key != "name"} for turn in turns]
    shown_text = json.dumps([shown, example.text, example.tools])
    named = {name.split(" ")[0].rsplit(".", 1)[-1] for name in notes.ignored}
    return [key for key, sign in keys.items() if key not in named and sign not in shown_text]


def signs(raw):
    """Choose for each key of a row a text that shows that it is in the example."""
    texts = {key: json.dumps(value) for key, value in raw.items()}
    return {key: next(text for text in ("Qq7", "Aq7", "Bq7")[::-1] if text in texts[key]) for key in raw}


def test_every_key_that_is_read_anywhere_is_tried():
    assert {*JSON_KEYS, *TEXT_OR_JSON_KEYS, *QUESTION_KEYS, *SHARED_KEYS} <= {*BESIDE}
    assert {*MESSAGE_KEYS, *MARKS, *REASONING_KEYS} <= {*INSIDE, "role", "content"}


@pytest.mark.parametrize(("task", "raw"), FORMATS, ids=str)
def test_no_key_beside_a_conversation_is_dropped_in_silence(task, raw):
    for key in BESIDE.keys() - raw.keys():
        assert dropped(raw | {key: BESIDE[key]}, task, signs(raw) | {key: SEEN}) == []


@pytest.mark.parametrize(("task", "raw"), FORMATS, ids=str)
def test_no_key_of_a_turn_is_dropped_in_silence(task, raw):
    for field, value in raw.items():
        turns = [value] if isinstance(value, dict) else value
        for (k, turn), key in itertools.product(enumerate(turns) if isinstance(turns, list) else (), INSIDE):
            if key in MARKS and "user" in turn.values():  # never in the loss
                continue
            changed = [*turns[:k], turn | {key: INSIDE[key]}, *turns[k + 1 :]]
            sign = {"weight": '"weight": 0'} if key in MARKS else {key: SEEN}
            assert dropped(raw | {field: changed}, task, sign) == [], (field, k)
