"""Messages of every tool take OpenAI's keys: former names of calls, marks of the loss, contents."""

import json

import pytest

from forgebook.data.messages import brief, read_messages, read_text, read_tools
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
