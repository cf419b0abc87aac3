"""Every format of a row, and the errors for bad ones."""

import json

import pytest

from forgebook.data.row_formats import UnknownFormatError, parse_row
from forgebook.errors import DataError

CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"city": "Rome"}'}}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
S, B = {"role": "system", "content": "s"}, {"role": "assistant", "content": "b"}
UNSUPERVISED = B | {"weight": 0}
GPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def parse(raw, task="instruction_tuning", **more):
    return parse_row(raw, "f:1", task, **more)


def pairs(row):
    return [(message["role"], message["content"]) for message in row.messages]


@pytest.mark.parametrize(
    ("raw", "name", "expected"),
    [
        ({"messages": [Q, A]}, "messages", [("user", "q"), ("assistant", "a")]),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            "sharegpt",
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        (
            {"instruction": "i", "input": "x", "output": "o"},
            "alpaca",
            [("user", "i\n\nx"), ("assistant", "o")],
        ),
        (
            {"instruction": "i", "input": "", "output": "o", "history": [["h", "b"]]},
            "alpaca",
            [("user", "h"), ("assistant", "b"), ("user", "i"), ("assistant", "o")],
        ),
        ({"prompt": "p", "completion": "c"}, "prompt/completion", [("user", "p"), ("assistant", "c")]),
        ({"prompt": [Q], "completion": [A]}, "prompt/completion", [("user", "q"), ("assistant", "a")]),
        (
            {"messages": [{"role": "developer", "content": [{"type": "text", "text": "s"}]}, Q, A]},
            "messages",
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
    ],
)
def test_a_format_is_recognised_by_its_keys(raw, name, expected):
    row, notes = parse(raw)
    assert notes.format == name and pairs(row) == expected and notes.ignored == ()


def test_sharegpt_with_tools():
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "find", "arguments": {"city": "Rome"}}'},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "a"},
    ]
    row, _ = parse({"conversations": turns, "tools": json.dumps(TOOLS)})
    assert [role for role, _ in pairs(row)] == ["user", "assistant", "tool", "assistant"]
    assert row.messages[1]["tool_calls"][0]["function"] == {"name": "find", "arguments": {"city": "Rome"}}
    assert row.tools == TOOLS


def test_tool_calls_take_one_form():
    """Arguments as text (OpenAI) or parsed, calls with or without content: templates want them parsed."""
    for call in (CALL, {"name": "find", "arguments": {"city": "Rome"}}):
        row, _ = parse({"messages": [Q, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": TOOLS})
        assert row.messages[1]["content"] == ""
        assert row.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}


def test_keys_that_nothing_reads_are_listed():
    _, notes = parse({"messages": [Q, A | {"mood": "good"}], "source": "web", "tools": TOOLS})
    assert notes.ignored == ("messages[].mood", "source")


def test_reasoning_has_one_name():
    for key in ("reasoning_content", "reasoning", "thinking"):
        row, notes = parse({"messages": [Q, A | {key: "hm"}]})
        assert row.messages[1]["reasoning_content"] == "hm" and not notes.ignored


FORMATS = [
    {"messages": [Q, A]},
    {"messages": json.dumps([Q, A])},
    {"conversations": GPT},
    {"conversations": json.dumps(GPT)},
    {"instruction": "q", "input": "", "output": "a"},
    {"prompt": "q", "completion": "a"},
    {"prompt": [Q], "completion": [A]},
    {"prompt": json.dumps([Q]), "completion": json.dumps([A])},
    {"prompt": "q", "completion": [Q, A]},
]
PAIRS = [
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"prompt": "q", "chosen": [A], "rejected": [B]},
    {"prompt": "q", "chosen": A, "rejected": B},
    {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B]},
    {"prompt": " q\n", "chosen": [Q, A], "rejected": [Q, B]},
    {"prompt": json.dumps([Q]), "chosen": json.dumps([Q, A]), "rejected": json.dumps([Q, B])},
    {"chosen": [Q, A], "rejected": [Q, B]},
    {"messages": [Q], "chosen": A, "rejected": B},
    {"conversations": GPT[:1], "chosen": GPT[1], "rejected": {"from": "gpt", "value": "b"}},
    {"instruction": "q", "chosen": "a", "rejected": "b"},
]
BESIDE = [
    ({"system": "s"}, [S], None),
    ({"system": [{"type": "text", "text": "s"}]}, [S], None),
    ({"system": ""}, [], None),
    ({"tools": TOOLS}, [], TOOLS),
    ({"tools": json.dumps(TOOLS)}, [], TOOLS),
    ({"functions": [TOOLS[0]["function"]]}, [], TOOLS),
    ({"functions": json.dumps([TOOLS[0]["function"]]), "system": "s"}, [S], TOOLS),
]


@pytest.mark.parametrize("raw", FORMATS, ids=str)
@pytest.mark.parametrize(("beside", "system", "tools"), BESIDE, ids=str)
def test_every_format_honors_the_keys_beside_the_conversation(raw, beside, system, tools):
    row, notes = parse(raw | beside)
    assert row.messages == [*system, Q, A] and row.tools == tools and notes.ignored == ()


@pytest.mark.parametrize("raw", PAIRS, ids=str)
@pytest.mark.parametrize(("beside", "system", "tools"), BESIDE, ids=str)
def test_every_form_of_a_pair_has_its_question_once(raw, beside, system, tools):
    row, notes = parse(raw | beside, "preference_tuning")
    assert row.messages == [*system, Q, A] and row.rejected == [*system, Q, B]
    assert row.tools == tools and notes.ignored == ()


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ([S, Q], [Q, A], [S, Q, A]),
        ([Q], [S, Q, A], [S, Q, A]),
        ("q", [Q, B, Q, A], [Q, B, Q, A]),
        ([Q, B], [{"role": "user", "content": "z"}, A], [Q, UNSUPERVISED, {"role": "user", "content": "z"}, A]),
        ([Q, B, Q], [A], [Q, UNSUPERVISED, Q, A]),
        ([Q, B, Q], [Q, B, Q, A], [Q, UNSUPERVISED, Q, A]),
        ([Q, B | {"weight": 1}, Q], [A], [Q, B | {"weight": 1}, Q, A]),
    ],
)
def test_a_prompt_that_the_answer_repeats_in_part(prompt, answer, expected):
    row, _ = parse({"prompt": prompt, "completion": answer})
    assert row.messages == expected


def test_a_prompts_answers_are_in_the_loss_of_every_token():
    row, notes = parse({"prompt": [Q, B, Q], "completion": [A]}, "causal_lm")
    assert row.messages == [Q, B, Q, A] and notes.ignored == ()


@pytest.mark.parametrize("row", [{"messages": [Q, A]}, {"prompt": "q", "completion": "a"}])
def test_an_answer_labeled_as_one_to_avoid_is_not_trained(row):
    with pytest.raises(DataError, match="f:1: label is false, which marks an answer to avoid"):
        parse(row | {"label": False})
    with pytest.raises(DataError, match="label is false"):
        parse(row | {"label": "False"})  # as CSV holds it
    assert parse(row | {"label": True})[1].ignored == ("label",)
    assert parse(row | {"label": 0})[1].ignored == ("label",)


def test_a_null_argument_that_the_tool_does_not_take_is_left_out():
    """A set written by datasets has one schema for the arguments of all calls."""
    arguments = {"x": 0, "unit": None, "message": None}
    calls = A | {"content": "", "tool_calls": [{"function": {"name": "move", "arguments": arguments}}]}
    tool = {"name": "move", "parameters": {"type": "object", "properties": {"x": {}, "unit": {}}}}
    for tools, expected in (([tool], {"x": 0, "unit": None}), ([tool | {"name": "turn"}], arguments)):
        [_, answer] = parse({"messages": [Q, calls], "tools": tools})[0].messages
        assert answer["tool_calls"][0]["function"]["arguments"] == expected


def test_a_system_text_inside_and_beside_the_messages_occurs_once():
    assert parse({"messages": [S, Q, A], "system": "s "})[0].messages == [S, Q, A]


def test_answers_in_json_stay_text():
    for text in (
        '{"city": "Rome"}', '["Rome"]', "[not json", '[{"name": "Rome"}]', '{"from": "Rome", "to": "Paris"}',
        '[{"name": "Bo", "role": "lead"}]', '{"from": "Rome", "value": 7}',
    ):  # fmt: skip
        assert parse({"prompt": "q", "completion": text})[0].messages[1]["content"] == text
        pair = parse({"prompt": "q", "chosen": text, "rejected": "no"}, "preference_tuning")[0]
        assert pair.messages[1]["content"] == text


def test_marks_that_the_task_cannot_honor_are_named():
    _, notes = parse({"messages": [Q, A | {"train": False}]}, "causal_lm")
    assert notes.ignored == ("messages[].weight (causal_lm trains every token)",)
    assert parse({"messages": [Q, A | {"train": True}]}, "causal_lm")[1].ignored == ()


def test_keys_without_a_value_are_not_named_as_ignored():
    _, notes = parse({"messages": [Q, A | {"refusal": None}], "source": None, "note": ""})
    assert notes.ignored == ()


def test_preference_pairs():
    chosen, rejected = [Q, A], [Q, A | {"content": "b"}]
    for raw in (
        {"chosen": chosen, "rejected": rejected, "num_words_chosen": 1},
        {"prompt": "q", "chosen": "a", "rejected": "b", "score": 2},
        {"prompt": [Q], "chosen": [A], "rejected": rejected[1:], "x": 0},
        {"prompt": [Q], "chosen": chosen, "rejected": rejected, "x": 0},
        {"messages": [Q, A], "chosen": "a", "rejected": "b", "x": 0},
        {"conversations": [Q, A], "chosen": A, "rejected": rejected[1], "x": 0},
        {"messages": rejected, "chosen": "a", "rejected": "b", "x": 0},
    ):
        row, notes = parse(raw, "preference_tuning")
        assert row.messages == chosen and row.rejected == rejected and len(notes.ignored) == 1


def test_a_conversation_beside_two_other_answers_is_an_error():
    with pytest.raises(DataError, match="messages ends with an answer, neither chosen nor rejected"):
        parse({"messages": [Q, A], "chosen": "x", "rejected": "y"}, "preference_tuning")


@pytest.mark.parametrize(
    ("raw", "task", "message"),
    [
        ({"messages": None}, "instruction_tuning", "f:1: messages is null; expected a non-empty list"),
        ({"text": "x"}, "instruction_tuning", "a 'text' is for task: causal_lm"),
        ({"instruction": "i", "output": 3}, "instruction_tuning", "output is 3; expected a string"),
        ({"prompt": "q", "completion": [Q]}, "instruction_tuning", "completion holds no assistant turn"),
        (
            {"messages": [Q, A | {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}]},
            "instruction_tuning",
            r"messages\[1\].train_detail: a turn is in the loss as a whole or not at all",
        ),
        ({"messages": [Q, A | {"weight": 2}]}, "instruction_tuning", r"messages\[1\].weight is 2; expected 0 or 1"),
        ({"messages": [Q | {"weight": 1}, A]}, "instruction_tuning", "on an assistant turn"),
        ({"messages": [Q, A | {"weight": 0}]}, "instruction_tuning", "every assistant turn has weight 0"),
        ({"messages": [Q, A | {"name": 3}]}, "instruction_tuning", r"messages\[1\].name is 3; expected a string"),
        ({"messages": [Q | {"tool_calls": [CALL]}, A]}, "instruction_tuning", "only an assistant calls tools"),
        (
            {"messages": [Q, A | {"tool_calls": [{"function": {"name": "f", "arguments": "{oops"}}]}]},
            "instruction_tuning",
            r"messages\[1\].tool_calls\[0\].arguments: not valid JSON",
        ),
        (
            {"messages": [Q, A | {"tool_calls": [{"id": "1"}]}]},
            "instruction_tuning",
            r"tool_calls\[0\] is .*; expected .*\"function\"",
        ),
        (
            {"messages": [Q, A | {"function_call": {"name": "f"}, "tool_calls": [CALL]}]},
            "instruction_tuning",
            r"messages\[1\] has tool_calls and function_call",
        ),
        ({"messages": [Q, A | {"function_call": "{oops"}]}, "instruction_tuning", r"function_call: not valid JSON"),
        ({"messages": [Q, A], "tools": TOOLS, "functions": TOOLS}, "instruction_tuning", "are both there: keep tools"),
        ({"messages": [Q, A], "functions": [{}]}, "instruction_tuning", r"functions\[0\] is {}; expected"),
        (
            {"messages": [Q, A | {"train": "maybe"}]},
            "instruction_tuning",
            r"train is \"maybe\"; expected true or false",
        ),
        (
            {"messages": [Q | {"train": True}, A]},
            "instruction_tuning",
            r"messages\[0\].train is true; .*assistant turn",
        ),
        (
            {"messages": [Q, A | {"train": True, "loss": False}]},
            "instruction_tuning",
            "train and loss contradict each other",
        ),
        (
            {"messages": [Q, A | {"train": False}]},
            "instruction_tuning",
            "every assistant turn has weight 0, or train: false",
        ),
        ({"messages": "[oops"}, "instruction_tuning", r"f:1: messages: not valid JSON"),
        ({"instruction": "i", "output": "o", "history": 3}, "instruction_tuning", "history is 3; expected a list"),
        ({"messages": [S, Q, A], "system": "t"}, "instruction_tuning", "begin with another system message"),
        ({"messages": [Q, A], "system": {"a": 1}}, "instruction_tuning", r"system is {\"a\": 1}; expected a string"),
        (
            {"prompt": "z", "chosen": [Q, A], "rejected": [Q, B]},
            "preference_tuning",
            "prompt and chosen both hold a question",
        ),
        ({"prompt": "z", "completion": [Q, A]}, "instruction_tuning", "prompt and completion both hold a question"),
        ({"chosen": [Q, A | {"loss": 0}], "rejected": [Q, B]}, "preference_tuning", "weight 0"),
        ({"messages": [Q, A, Q, A | {"loss": 0}]}, "classification", "this task trains it alone"),
        ({"messages": [Q, A], "tools": "[oops"}, "instruction_tuning", "tools: not valid JSON"),
        ({"messages": [Q, A], "tools": [{"type": "function"}]}, "instruction_tuning", r"tools\[0\] is .*; expected"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, A]},
            "instruction_tuning",
            r"messages\[0\].content\[0\]: an image, and task: instruction_tuning reads text alone",
        ),
        ({"chosen": [Q, A], "rejected": [Q, A]}, "instruction_tuning", "set task: preference_tuning"),
        ({"messages": [Q, A]}, "preference_tuning", "no 'chosen' and 'rejected'"),
        ({"chosen": [Q, A], "rejected": [Q, A]}, "preference_tuning", "the same answer"),
        (
            {"chosen": [Q, A], "rejected": [{"role": "user", "content": "z"}, A]},
            "preference_tuning",
            "their prompts differ",
        ),
        (
            {"chosen": [Q, A, Q], "rejected": [Q, A]},
            "preference_tuning",
            "chosen ends with .*; expected an answer to a prompt",
        ),
    ],
)
def test_a_bad_row_is_reported_with_its_field_and_fix(raw, task, message):
    with pytest.raises(DataError, match=message):
        parse(raw, task)


def test_a_label_outside_the_list_is_rejected():
    labels = ("[[1]]", "[[2]]")
    parse({"messages": [Q, A | {"content": "[[1]]"}]}, "classification", labels=labels)
    with pytest.raises(DataError, match=r"must be one of classifier_config.label_tokens \(\[\[1\]\], \[\[2\]\]\)"):
        parse({"messages": [Q, A]}, "classification", labels=labels)


def test_only_the_first_keys_of_a_very_wide_row_are_named():
    with pytest.raises(DataError, match=r"its keys: k0, k1, .*\.\.\.\): add a list of messages") as error:
        parse({f"k{n}": n for n in range(1000)})
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("key", ["prompt", "question", "query"])
def test_the_question_of_a_pair_has_several_names(key):
    """Orca's pairs hold system, question, chosen and rejected."""
    row = {"system": "Be short.", key: "How warm?", "chosen": "Four.", "rejected": "Cold."}
    example, notes = parse_row(row, "rows:1", "preference_tuning")
    assert [message["content"] for message in example.messages] == ["Be short.", "How warm?", "Four."]
    assert example.rejected[:-1] == example.messages[:-1] and notes.ignored == ()


def test_a_pair_that_answers_no_question_is_an_error():
    row = {"system": "Be short.", "problem": "How warm?", "chosen": "Four.", "rejected": "Cold."}
    with pytest.raises(DataError, match=r"rows:1: chosen and rejected answer no question: add prompt"):
        parse_row(row, "rows:1", "preference_tuning")


def test_a_conversation_of_another_name_is_pointed_out():
    talk = [{"role": "user", "content": "q"}, {"from": "gpt", "value": "a"}]
    with pytest.raises(DataError, match=r"'talk' holds one: .* columns: \{messages: talk\}") as error:
        parse_row({"language": "English", "talk": talk}, "a.jsonl:1", "instruction_tuning")
    assert not isinstance(error.value, UnknownFormatError)  # no guess among the columns
    for other in ([], ["a"], [{"text": "a"}], "a"):
        with pytest.raises(UnknownFormatError):
            parse_row({"language": "English", "talk": other, "more": "b"}, "a.jsonl:1", "instruction_tuning")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": None}, "chosen without rejected"),
        ({"prompt": "q", "rejected": "a"}, "rejected without chosen"),
        ({"prompt": "q", "completion": "a", "label": True}, "label marks one answer"),
        ({"prompt": "q", "completion": "a", "label": "false"}, "label marks one answer"),
    ],
)
def test_single_answers_are_no_pairs(row, message):
    with pytest.raises(DataError, match=message) as error:
        parse_row(row, "a.jsonl:1", "preference_tuning")
    assert not isinstance(error.value, UnknownFormatError)
