"""Which part of a message a text lacks, in the spellings of templates."""

import json

import pytest

from forgebook.data.message_parts import missing_part, missing_tool
from forgebook.data.messages import split_thought

ARGUMENTS = {"place": 'Oslo\'s "old" town', "days": 2, "dry": True, "near": ["sea", None], "at": {"hour": 9.5}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "read", "arguments": ARGUMENTS}}]}


def xml(arguments: dict) -> str:
    """Write arguments as Qwen3-Coder and GLM do: strings as they are, other values as JSON."""
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    return "".join(f"<parameter={key}>\n{value}\n</parameter>" for key, value in values.items())


WRITTEN = {
    "json": json.dumps(ARGUMENTS),
    "indented": json.dumps(ARGUMENTS, indent=2),
    "python": str(ARGUMENTS),
    "xml": xml(ARGUMENTS),
}


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN.keys())
def test_arguments_are_found_in_every_spelling(written):
    assert missing_part(CALL, f"<call>read {written}</call>") is None


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("", "tool_calls[0].function.arguments.place"),
        (json.dumps(ARGUMENTS), "tool_calls[0].function.name"),
        ("read " + json.dumps(ARGUMENTS | {"days": 3}), "tool_calls[0].function.arguments.days"),
        ("read " + json.dumps(ARGUMENTS | {"dry": False}), "tool_calls[0].function.arguments.dry"),
        ("read " + json.dumps(ARGUMENTS | {"near": ["lake", None]}), "tool_calls[0].function.arguments.near[0]"),
        ("read " + json.dumps(ARGUMENTS | {"at": {"h": 9.5}}), "tool_calls[0].function.arguments.at.hour"),
    ],
)
def test_what_is_missing_is_named(text, path):
    assert missing_part(CALL, text) == path


def test_two_equal_parts_need_two_places():
    message = {
        "role": "assistant",
        "content": "Oslo",
        "tool_calls": [{"function": {"name": "f", "arguments": {"p": "Oslo"}}}],
    }
    assert missing_part(message, "Oslo f p Oslo") is None
    assert missing_part(message, "Oslo f p") is not None
    twice = CALL | {"tool_calls": [{"function": {"name": "read", "arguments": {}}}] * 2}
    assert missing_part(twice, "read") == "tool_calls[1].function.name"


def test_reasoning_beside_and_inside_the_content():
    assert missing_part({"content": "A.", "thinking": "why"}, "A.") == "thinking"
    assert missing_part({"content": "<think>\nwhy\n</think>\n\nA."}, "A.") == "content"
    assert missing_part({"content": "<think>\nwhy\n</think>\n\nA."}, "[why] A.") is None
    assert split_thought("<think>\nwhy\n</think>\n\nA.") == ("why", "A.")
    assert split_thought("A. <think>") == ("", "A. <think>")


def test_tools_are_names_descriptions_and_parameters():
    function = {"name": "read", "description": "Read it.\n  Twice.", "parameters": {"properties": {"place": {}}}}
    tools = [{"type": "function", "function": function}]
    assert missing_tool(tools, json.dumps(tools, indent=4)) is None
    assert missing_tool(tools, "read: Read it.\n// Twice. (place)") is None
    assert missing_tool(tools, "Read it. Twice. (place)") == "tools[0].function.name"
    assert missing_tool(tools, "read (place)") == "tools[0].function.description"
    assert missing_tool(tools, "read: Read it. Twice.") == "tools[0].function.parameters.place"


@pytest.mark.parametrize("parameters", [{"place": {"type": "str"}}, {"type": {"description": "a kind", "type": "str"}}])
def test_parameters_without_a_schema_around_them_are_looked_for_too(parameters):
    """As xLAM's sets write them: a template that reads properties shows none."""
    tool = {"function": {"name": "read", "parameters": parameters}}
    [name] = parameters
    assert missing_tool([tool], "read") == f"tools[0].function.parameters.{name}"
    assert missing_tool([tool], json.dumps(tool)) is None


@pytest.mark.parametrize("schema", [{"type": "object"}, {"type": "object", "additionalProperties": {"type": "string"}}])
def test_a_schema_without_properties_has_no_parameters(schema):
    assert missing_tool([{"function": {"name": "read", "parameters": schema}}], "read") is None
