"""Messages of every tool take OpenAI's keys: former names of calls, marks of the loss, contents."""

import json

import pytest

from forgebook.data.json_values import brief
from forgebook.data.messages import read_messages, read_text, read_tools, with_whole_thought
from forgebook.errors import DataError

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def read(*messages):
    ignored: set[str] = set()
    return read_messages(list(messages), "messages", ignored), ignored


@pytest.mark.parametrize("key", ["weight", "train", "training", "train_on_turn", "trainable", "loss", "loss_mask"])
@pytest.mark.parametrize("value", [False, 0, 0.0, True, 1])
def test_marks_of_every_tool_are_weights(key, value):
    [_, answer], ignored = read(Q, A | {key: value})
    assert answer == A | {"weight": int(value)} and ignored == set()


@pytest.mark.parametrize(("value", "weight"), [("false", 0), ("True", 1), ("0", 0), (None, None)])
def test_marks_as_text_and_without_a_value(value, weight):
    [answer], _ = read(A | {"train": value})
    assert answer.get("weight") == weight


def test_a_user_turn_may_be_marked_as_not_in_the_loss():
    assert read(Q | {"train": False}, A)[0] == [Q, A]


@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
@pytest.mark.parametrize("as_text", [False, True])
def test_the_former_form_of_a_call(arguments, as_text):
    call = {"name": "find", "arguments": arguments}
    written = {"role": "assistant", "content": None, "function_call": json.dumps(call) if as_text else call}
    result = {"role": "function", "name": "find", "content": "sunny"}
    [_, calling, answered], ignored = read(Q, written, result)
    function = {"name": "find", "arguments": {"city": "Rome"}}
    assert calling == {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    assert answered == result | {"role": "tool"} and ignored == set()


def test_calls_as_json_text():
    call = {"type": "function", "function": {"name": "find", "arguments": {}}}
    [message], _ = read({"role": "assistant", "content": "", "tool_calls": json.dumps([call])})
    assert message["tool_calls"] == [call]


def test_tools_of_either_name():
    schema = {"name": "find", "parameters": {"type": "object"}}
    for value in ([schema], json.dumps([schema]), [{"type": "function", "function": schema}]):
        assert read_tools({"functions": value}) == read_tools({"tools": value}) != None  # noqa: E711
    assert read_tools({"tools": [], "functions": ""}) is None


def test_texts():
    assert read_text([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "system") == "ab"
    with pytest.raises(DataError, match="system is 3; expected a string"):
        read_text(3, "system")
    assert len(brief("x" * 100)) == 60


CALL = {"type": "function", "function": {"name": "find", "arguments": {"city": "Rome"}}}


@pytest.mark.parametrize("key", ["arguments", "parameters", "args", "input"])
@pytest.mark.parametrize("as_text", [False, True])
def test_arguments_of_every_name(key, as_text):
    """OpenAI's, Llama 3's, LangChain's and Anthropic's; unread, a call would be trained without any."""
    arguments = json.dumps({"city": "Rome"}) if as_text else {"city": "Rome"}
    [message], _ = read({"role": "assistant", "content": "", "tool_calls": [{"name": "find", key: arguments}]})
    assert message["tool_calls"] == [CALL]


def test_what_else_a_call_holds_is_read_or_named():
    call = {"function": {"name": "find"}, "arguments": {"city": "Rome"}, "index": 0, "result": None}
    assert read({"role": "assistant", "content": "", "tool_calls": [call]})[1] == set()
    [message], ignored = read(
        {"role": "assistant", "content": "", "tool_calls": [call | {"result": 4, "kwargs": {1: 2}}]}
    )
    assert message["tool_calls"] == [CALL]
    assert ignored == {"messages[].tool_calls[].result", "messages[].tool_calls[].kwargs"}


@pytest.mark.parametrize("arguments", [{"x": float("nan")}, '{"x": Infinity}', '{"x": [{"y": NaN}]}'])
def test_numbers_that_json_lacks_are_no_arguments(arguments):
    with pytest.raises(DataError, match=r"tool_calls\[0\]\.arguments has a number that JSON lacks"):
        read({"role": "assistant", "content": "", "tool_calls": [{"name": "find", "arguments": arguments}]})


@pytest.mark.parametrize("arguments", ["", " ", None, "{}", {}])
def test_a_call_without_arguments(arguments):
    calls = [{"function": {"name": "find", "arguments": arguments}}]
    [message], _ = read({"role": "assistant", "content": None, "tool_calls": calls})
    assert message["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    ("asking", "answering", "named"),
    [("tool_call", "tool_response", "role"), ("function_call", "observation", "from"), ("tool_call", "tool", "role")],
    ids="ms-swift llama-factory mixed".split(),
)
@pytest.mark.parametrize("as_text", [False, True])
def test_calls_as_turns_of_their_own_and_parallel_ones_as_one(asking, answering, named, as_text):
    text = "content" if named == "role" else "value"
    call = {"name": "find", "arguments": {"city": "Rome"}}
    turns = [(asking, json.dumps(call) if as_text else call)] * 2 + [(answering, "sunny"), (answering, "dry")]
    messages, ignored = read(Q, *({named: role, text: said} for role, said in turns), A)
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert ignored == set()
    with pytest.raises(DataError, match=r"messages\[0\].content is .*; expected a call"):
        read({named: asking, text: None})


@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [
        ({"loss": False}, {"loss": False}, {"weight": 0}),
        ({}, {"reasoning_content": "hm"}, {"reasoning_content": "hm"}),
        ({"reasoning": "a"}, {"reasoning": "b"}, {"reasoning_content": "a\n\nb"}),
    ],
    ids=["marks", "a thought", "two thoughts"],
)
def test_parallel_calls_keep_their_marks_and_thoughts(first, second, merged):
    call = {"role": "tool_call", "content": {"name": "find", "arguments": {"city": "Rome"}}}
    messages, ignored = read(Q, call | first, call | second)
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]} | merged and not ignored


@pytest.mark.parametrize(("first", "second"), [({}, {"loss": False}), ({"train": False}, {"train": True})])
def test_parallel_calls_of_different_marks_are_an_error(first, second):
    call = {"role": "tool_call", "content": {"name": "find", "arguments": {"city": "Rome"}}}
    with pytest.raises(DataError, match=r"messages\[2\] and the call before it are one turn, and marked differently"):
        read(Q, call | first, call | second)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "User", "content": "q"},
        {"from": "human", "content": "q"},
        {"role": "user", "value": "q"},
        {"from": "user", "role": None, "value": "q", "content": None},
        {"role": "user", "content": [{"type": "input_text", "text": "q"}]},
    ],
    ids="capital from-content role-value both-empty responses-api".split(),
)
def test_mixed_spellings_of_a_message(message):
    assert read(message) == ([Q], set())


THOUGHT = "<think>\nhm\n</think>\n\na"


@pytest.mark.parametrize(
    "answer",
    [
        {"content": THOUGHT, "reasoning_content": "hm"},
        {"content": THOUGHT, "reasoning": " hm\n"},
        {"content": "<think>\n\n</think>\n\na", "reasoning_content": "hm"},
        {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                {"type": "text", "text": "a"},
            ]
        },
    ],
    ids="in-content-and-beside with-margins empty-in-content anthropic mistral".split(),
)
def test_a_thought_written_twice_or_in_parts_is_one(answer):
    [message], ignored = read({"role": "assistant", **answer})
    assert message["content"] == "a" and message["reasoning_content"].strip() == "hm" and ignored == set()


def test_two_different_thoughts_are_an_error():
    with pytest.raises(DataError, match=r"messages\[0\] has reasoning and another thought in its content: keep one"):
        read({"role": "assistant", "content": THOUGHT, "reasoning_content": "well"})


def test_a_thought_beside_a_content_that_only_names_the_tag():
    message = {"role": "assistant", "content": "Write <think> first.", "reasoning_content": "hm"}
    assert read(message)[0] == [message]


@pytest.mark.parametrize(
    ("content", "whole"),
    [
        ("hm\n</think>\n\na", THOUGHT),
        ("```\n1 + 1\n```\n</think>\na", "<think>\n```\n1 + 1\n```\n</think>\n\na"),
        ("Write:\n<think>\nhm\n</think>\nThen answer.", None),
        ("```xml\n<a>\n</think>\n</a>\n```", None),
        ("Close it with </think> then.", None),
    ],
    ids="opened-by-the-prompt with-code shown in-code within-a-line".split(),
)
def test_a_thought_that_the_prompt_opened_is_told_from_a_text_about_thoughts(content, whole):
    assert with_whole_thought(content, "content") == (whole or content)


def test_keys_without_a_value_are_no_part_of_a_schema():
    """Arrow puts them where other tools have one; a template would print them."""
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": None}, "days": None},
        "required": None,
    }
    [tool] = read_tools({"tools": [{"name": "find", "strict": None, "parameters": schema}]})
    assert tool["function"] == {
        "name": "find",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
    kept = {"properties": {"city": {"type": ["string", "null"], "default": None, "enum": ["Rome", None]}}}
    assert read_tools({"tools": [{"name": "find", "parameters": kept}]})[0]["function"]["parameters"] == kept


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("key", ["parameters", "input_schema", "inputSchema"])
def test_the_schema_of_a_tool_has_the_name_that_templates_read(key, as_text):
    schema = {"type": "object", "properties": {"place": {"type": "string"}}}
    tool = {"name": "read", key: json.dumps(schema) if as_text else schema, "strict": True}
    [read_tool] = read_tools({"tools": [tool]}) or []
    assert list(read_tool["function"].items()) == [("name", "read"), ("parameters", schema), ("strict", True)]


@pytest.mark.parametrize("schema", ["{", ["place"], {"properties": ["place"]}, 3])
def test_a_schema_of_another_form_is_named(schema):
    with pytest.raises(DataError, match=r"tools\[0\]\.parameters"):
        read_tools({"tools": [{"name": "read", "parameters": schema}]})


@pytest.mark.parametrize(
    ("message", "fix"),
    [
        (A | {"function_calls": "read(place='Oslo')"}, "tool_calls"),
        (A | {"tool_call": {"name": "read"}}, "tool_calls"),
        (A | {"channel": "analysis"}, "reasoning_content"),
        (A | {"channel": "commentary"}, "tool_calls"),
        (A | {"recipient": "functions.read"}, "tool_calls"),
        ({"role": "system", "content": "s", "functions": "[]"}, "beside the messages"),
        ({"role": "system", "content": "s", "tools": [{"name": "read"}]}, "beside the messages"),
    ],
)
def test_what_a_turn_says_elsewhere_is_not_left_out(message, fix):
    """As OLMo's sets, harmony's channels and DeepSeek's messages have it: the turn without it is another one."""
    with pytest.raises(DataError, match=rf"messages\[0\]\.\w+ is .*, which is not read there: .*{fix}"):
        read(message)


def test_keys_of_the_same_names_that_say_nothing():
    final = {"channel": "final", "recipient": "all", "functions": None, "function_calls": "", "tools": []}
    [answer], ignored = read(A | final)
    assert answer == A and ignored == {"messages[].channel", "messages[].recipient", "messages[].function_calls"}


@pytest.mark.parametrize("asks", ["user", "human", "prompter", "Human"])
@pytest.mark.parametrize("answers", ["assistant", "gpt", "bot", "chatbot", "model", "ai", "GPT"])
def test_a_conversation_names_its_roles_as_the_tool_that_wrote_it(asks, answers):
    messages, _ = read({"from": asks, "value": "q"}, {"from": answers, "value": "a"})
    assert messages == [Q, A]
