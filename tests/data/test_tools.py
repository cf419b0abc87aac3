"""Tools written as text, and every form of call that is read."""

import json
import re

import pytest

from conftest import chat
from forgebook.data.chat_template import render
from forgebook.data.row_formats import parse_row
from forgebook.data.tools import ToolCall, calls_of_message, name_results, read_tool_calls, split_calls, tools_as_text
from forgebook.errors import DataError

WEATHER = ToolCall("weather", {"city": "Paris", "days": 2})


def written(*calls: ToolCall) -> str:
    return "".join(f"<tool_call>\n{json.dumps(vars(call))}\n</tool_call>" for call in calls)


CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"city": "Paris", "days": 2}}',
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris", "days": 2}}]',
        '[TOOL_CALLS]weather[ARGS]{"city": "Paris", "days": 2}',
        '[TOOL_CALLS]weather[CALL_ID]a1b2c3d4e[ARGS]{"city": "Paris", "days": 2}',
        '<function=weather>{"city": "Paris", "days": 2}</function>',
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
        "</function>\n</tool_call>",
        '{"name": "weather", "parameters": {"city": "Paris", "days": 2}}',
        '<|python_tag|>{"type": "function", "function": "weather", "parameters": {"city": "Paris", "days": 2}}',
        '[{"name": "weather", "arguments": "{\\"city\\": \\"Paris\\", \\"days\\": 2}"}]',
    ],
    ids="qwen unclosed mistral mistral-args mistral-id llama-tag qwen-coder llama-bare llama-tagged text".split(),
)
def test_every_form_is_read(text):
    assert read_tool_calls(text) == [WEATHER]


def test_apostrophes_survive():
    """LLMForge's own parser took every single quote out of a call."""
    call = ToolCall("book", {"what": "Doctor's appointment"})
    assert read_tool_calls(written(call)) == [call]


TAGS = "<tool_call>\n<function=look_up>\n<parameter=key>\n{}\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "12345", "12345"),
        ({"type": "string"}, "true", "true"),
        ({"type": "string"}, "null", "null"),
        ({"type": ["string", "null"]}, "null", None),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "12", "12"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"type": "integer"}, "12345", 12345),
        ({"type": "array", "items": {"type": "string"}}, '["1"]', ["1"]),
        ({"type": "boolean"}, "True", True),
        ({}, "12345", 12345),
        (None, "12345", 12345),
        (True, "a b", "a b"),
        ({"type": 5, "enum": 5, "anyOf": [5]}, "5", 5),
    ],
)
def test_an_argument_between_tags_has_the_type_of_its_schema(schema, text, value):
    """Qwen3-Coder's form, in which nothing but the schema says what is a text."""
    function = {"name": "look_up", "parameters": {"type": "object", "properties": {"key": schema}}}
    for tools in ([{"type": "function", "function": function}], [function]):
        [call] = read_tool_calls(TAGS.format(text), tools)
        assert call.arguments == {"key": value} and type(call.arguments["key"]) is type(value)


LOOK_UP = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(
    ("text", "offered", "calls"),
    [
        ('{"name": "Alice Smith", "email": "a@b.c", "age": 30}', LOOK_UP, []),
        ('{"name": "Alice Smith", "email": "a@b.c", "age": 30}', None, []),
        ('[{"name": "Alice"}, {"name": "Bob"}]', LOOK_UP, []),
        ('{"name": "Alice", "parameters": {}}', LOOK_UP, []),
        ('{"name": "look_up", "email": "a@b.c"}', LOOK_UP, []),
        ('{"name": "Alice", "ema', LOOK_UP, []),
        ('{"name": "Alice", "ema', None, []),
        ('{"name": ["look_up"], "arguments": {}}', LOOK_UP, []),
        ('{"type": "circle", "function": null}', LOOK_UP, []),
        ('{"name": "look_up", "parameters": {}}', LOOK_UP, ["look_up"]),
        ('{"name": "look_up", "parameters": {}}', [LOOK_UP[0]["function"]], ["look_up"]),
        ('{"name": "look_up"}', LOOK_UP, ["look_up"]),
        ('{"type": "function", "function": "look_up", "parameters": {}}', LOOK_UP, ["look_up"]),
        ('[{"name": "look_up", "arguments": {}}, {"name": "look_up"}]', LOOK_UP, ["look_up", "look_up"]),
    ],
)
def test_json_without_a_mark_is_a_call_of_an_offered_tool_alone(text, offered, calls):
    assert [call.name for call in read_tool_calls(text, offered)] == calls


@pytest.mark.parametrize("tools", [None, LOOK_UP])
def test_a_call_without_a_mark_that_was_cut_cannot_be_read(tools):
    with pytest.raises(DataError):
        read_tool_calls('{"name": "look_up", "parameters": {"ke', tools)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<think>\n<tool_call>?\n</think>\n\nI look. " + CALL, "<think>\n<tool_call>?\n</think>\n\nI look."),
        ("Maybe <tool_call>?\n</think>\n\n" + CALL, "Maybe <tool_call>?\n</think>"),  # the prompt opened the thought
        ('<think>\nHm.\n</think>\n\n{"name": "f", "arguments": {}}', "<think>\nHm.\n</think>"),
        ("I look. " + CALL, "I look."),
    ],
    ids=["thought", "thought opened before", "thought before bare JSON", "no thought"],
)
def test_text_before_a_call_is_kept_with_its_thought(text, said):
    assert split_calls(text, [{"function": {"name": "f"}}]) == (said, [ToolCall("f", {})])


@pytest.mark.parametrize("text", ["<tool_call>{", "[TOOL_CALLS] 7", '{"name": "f", "arguments": [1]}', "<function=f>"])
def test_what_cannot_be_read_is_an_error_and_not_a_value(text):
    with pytest.raises(DataError):
        read_tool_calls(text)


def test_what_templates_write_is_read_back(tokenizer):
    """The answer as a training row holds it: by the chat template, and as text for a prompt format."""
    row = chat("Weather?", "")
    row["messages"][-1] = {
        "role": "assistant", "content": "I look.",
        "tool_calls": [{"id": "1", "function": {"name": "weather", "arguments": '{"city": "Paris", "days": 2}'}}],
    }  # fmt: skip
    row["tools"] = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    parsed, _ = parse_row(row, "rows:1", "instruction_tuning")
    assert calls_of_message(parsed.messages[-1]) == [WEATHER]
    rendered = render(parsed.messages, tokenizer, tools=parsed.tools).split("<|assistant|>")[1]
    as_text = tools_as_text(parsed.messages, parsed.tools)[-1]["content"]
    assert read_tool_calls(rendered) == read_tool_calls(as_text) == [WEATHER]


def calling(*named: str | tuple[str, str]) -> dict:
    calls = [{"function": {"name": one, "arguments": {}}} for one in named if isinstance(one, str)]
    calls += [
        {"id": one[1], "function": {"name": one[0], "arguments": {}}} for one in named if not isinstance(one, str)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def result(**keys: str) -> dict:
    return {"role": "tool", "content": "it is 4", **keys}


@pytest.mark.parametrize(
    ("messages", "names"),
    [
        ([calling("a"), result(), calling("b", "c"), result(), result()], ["a", "b", "c"]),
        ([calling(("a", "1"), ("b", "2")), result(tool_call_id="2"), result(tool_call_id="1")], ["b", "a"]),
        ([calling(("a", "1"), ("b", "2")), result(), result(tool_call_id="9")], ["a", None]),
        ([calling("a", "b"), result(name="b"), result()], ["b", "a"]),
        ([calling("a", "b"), result(tool_call_id="1"), result(tool_call_id="2")], ["a", "b"]),
        ([calling("a"), result(), result(), result(name="own")], ["a", None, "own"]),
    ],
    ids=["in order", "by id", "other ids", "one named", "ids of results alone", "more than calls"],
)
def test_a_result_is_named_after_its_own_call(messages, names):
    messages = [{"role": "user", "content": "q"}, *messages]
    assert [one.get("name") for one in name_results(messages) if one["role"] == "tool"] == names
    text = json.dumps(tools_as_text(messages, None))
    assert re.findall(r'\[TOOL_RESULT\] \{(?:\\"name\\": \\"(\w+))?', text) == [name or "" for name in names]
