"""The taxonomy of tool-call mistakes, and every form of call that is read."""

import json

import pytest

from conftest import chat
from forgebook.data.chat_template import render
from forgebook.data.row_formats import parse_row
from forgebook.data.tool_calls import KINDS, Call, find_mistake, of_message, read_calls
from forgebook.data.tool_text import tools_as_text
from forgebook.errors import DataError

WEATHER = Call("weather", {"city": "Paris", "days": 2})


def written(*calls: Call) -> str:
    return "".join(f"<tool_call>\n{json.dumps(vars(call))}\n</tool_call>" for call in calls)


@pytest.mark.parametrize(
    ("answer", "expected", "kind"),
    [
        (written(WEATHER), [], "unwanted"),
        ("<tool_call>{oops", [], "unwanted"),
        ("It is sunny.", [WEATHER], "missing"),
        ("", [WEATHER], "missing"),
        ("<tool_call>\n{'name': 'weather'}\n</tool_call>", [WEATHER], "wrong format"),
        ("<tool_call>", [WEATHER], "wrong format"),
        (written(WEATHER, WEATHER), [WEATHER], "wrong count"),
        (written(Call("forecast", WEATHER.arguments)), [WEATHER], "wrong name"),
        (written(Call("weather", {"city": "Rome", "days": 2})), [WEATHER], "wrong value"),
        (written(Call("weather", {"city": "Paris", "days": "2"})), [WEATHER], "wrong value"),
        (written(Call("weather", {"city": "Paris"})), [WEATHER], "missing argument"),
        (written(Call("weather", {"city": "Rome"})), [WEATHER], "missing argument"),
        (written(WEATHER), [WEATHER], None),
        ("Sure, the weather.", [], None),
        ('A record: {"city": "Paris"}', [], None),
        ("I look.\n" + written(WEATHER) + "\n", [WEATHER], None),
        ("<think>A <tool_call>? Yes.</think>" + written(WEATHER), [WEATHER], None),
        (written(Call("weather", {"days": 2.0, "city": "Paris", "unit": "C"})), [WEATHER], None),
    ],
)  # fmt: skip
def test_each_kind_of_mistake(answer, expected, kind):
    assert find_mistake(answer, expected) == kind
    assert kind is None or kind in KINDS


def test_parallel_calls_of_one_function_match_in_any_order():
    paris, rome = (Call("weather", {"city": city}) for city in ("Paris", "Rome"))
    assert find_mistake(written(rome, paris), [paris, rome]) is None
    assert find_mistake(written(rome, rome), [paris, rome]) == "wrong value"


@pytest.mark.parametrize(
    ("want", "have", "same"),
    [(1, True, False), (0, False, False), (2, 2.0, True), ([1, {"a": None}], [1, {"a": None}], True), ("2", 2, False)],
    ids="one-true zero-false int-float nested text-number".split(),
)
def test_values_are_compared_as_json(want, have, same):
    found = find_mistake(written(Call("f", {"x": have})), [Call("f", {"x": want})])
    assert found == (None if same else "wrong value")


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
    assert read_calls(text) == [WEATHER]


def test_apostrophes_survive():
    """LLMForge's own parser took every single quote out of a call."""
    call = Call("book", {"what": "Doctor's appointment"})
    assert read_calls(written(call)) == [call] and find_mistake(written(call), [call]) is None


@pytest.mark.parametrize("text", ["<tool_call>{", "[TOOL_CALLS] 7", '{"name": "f", "arguments": [1]}', "<function=f>"])
def test_what_cannot_be_read_is_an_error_and_not_a_value(text):
    with pytest.raises(DataError):
        read_calls(text)


def test_what_templates_write_is_read_back(tokenizer):
    """The answer as a training row holds it: by the chat template, and as text for a prompt format."""
    row = chat("Weather?", "")
    row["messages"][-1] = {
        "role": "assistant", "content": "I look.",
        "tool_calls": [{"id": "1", "function": {"name": "weather", "arguments": '{"city": "Paris", "days": 2}'}}],
    }  # fmt: skip
    row["tools"] = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    parsed, _ = parse_row(row, "rows:1", "instruction_tuning")
    assert of_message(parsed.messages[-1]) == [WEATHER]
    rendered = render(parsed.messages, tokenizer, tools=parsed.tools).split("<|assistant|>")[1]
    as_text = tools_as_text(parsed.messages, parsed.tools)[-1]["content"]
    assert read_calls(rendered) == read_calls(as_text) == [WEATHER]
