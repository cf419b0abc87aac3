"""Each kind of tool-call mistake, and what counts as the same call."""

import json

import pytest

from forgebook.data.tool_accuracy import TOOL_CALL_MISTAKES, find_tool_call_mistake
from forgebook.data.tools import ToolCall

WEATHER = ToolCall("weather", {"city": "Paris", "days": 2})


def written(*calls: ToolCall) -> str:
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
        (written(ToolCall("forecast", WEATHER.arguments)), [WEATHER], "wrong name"),
        (written(ToolCall("weather", {"city": "Rome", "days": 2})), [WEATHER], "wrong value"),
        (written(ToolCall("weather", {"city": "Paris", "days": "2"})), [WEATHER], "wrong value"),
        (written(ToolCall("weather", {"city": "Paris"})), [WEATHER], "missing argument"),
        (written(ToolCall("weather", {"city": "Rome"})), [WEATHER], "missing argument"),
        (written(WEATHER), [WEATHER], None),
        ("Sure, the weather.", [], None),
        ('A record: {"city": "Paris"}', [], None),
        ('{"name": "Paris", "country": "France"}', [], None),
        ("I look.\n" + written(WEATHER) + "\n", [WEATHER], None),
        ("<think>A <tool_call>? Yes.</think>" + written(WEATHER), [WEATHER], None),
        (written(ToolCall("weather", {"days": 2.0, "city": "Paris", "unit": "C"})), [WEATHER], None),
    ],
)  # fmt: skip
def test_each_kind_of_mistake(answer, expected, kind):
    assert find_tool_call_mistake(answer, expected) == kind
    assert kind is None or kind in TOOL_CALL_MISTAKES


def test_parallel_calls_of_one_function_match_in_any_order():
    paris, rome = (ToolCall("weather", {"city": city}) for city in ("Paris", "Rome"))
    assert find_tool_call_mistake(written(rome, paris), [paris, rome]) is None
    assert find_tool_call_mistake(written(rome, rome), [paris, rome]) == "wrong value"


@pytest.mark.parametrize(
    ("want", "text", "kind"),
    [("12345", "12345", None), ("true", "true", None), (12345, "12345", None), ([1, 2], "[1, 2]", None),
     ("12345", "12346", "wrong value"), (None, "null", None), (True, "1", "wrong value")],
)  # fmt: skip
@pytest.mark.parametrize("type_", [None, "string", "integer"])
def test_arguments_between_tags_are_equal_if_their_texts_are(want, text, kind, type_):
    """Between tags, a number and its digits are written the same."""
    answer = f"<tool_call><function=f><parameter=x>\n{text}\n</parameter></function></tool_call>"
    schema = {"type": "object", "properties": {"x": {"type": type_}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}] if type_ else None
    assert find_tool_call_mistake(answer, [ToolCall("f", {"x": want})], tools) == kind


@pytest.mark.parametrize(
    ("want", "have", "same"),
    [(1, True, False), (0, False, False), (2, 2.0, True), ([1, {"a": None}], [1, {"a": None}], True), ("2", 2, False)],
    ids="one-true zero-false int-float nested text-number".split(),
)
def test_values_are_compared_as_json(want, have, same):
    mistake = find_tool_call_mistake(written(ToolCall("f", {"x": have})), [ToolCall("f", {"x": want})])
    assert mistake == (None if same else "wrong value")
