"""Tools as plain text: written for templates and prompt formats without tools, and calls read from answers.

Written in LLMForge's convention: the list of tools in the system message, calls in the assistant's content, results
in a user turn, each between its tags.

    system     You are helpful.[TOOL_LIST] [{"type": "function", ...}] [/TOOL_LIST]
    assistant  [TOOL_CALLS] [{"function": {"name": "...", "arguments": "{...}"}, "type": "function"}] [/TOOL_CALLS]
    user       [TOOL_RESULT] {"name": "...", "content": "...", "tool_call_id": "..."} [/TOOL_RESULT]

Read in every form that open models write:

    <tool_call>{"name": ..., "arguments": {...}}</tool_call>        Qwen, Hermes, the tiny model
    [TOOL_CALLS] [{"name": ..., "arguments": {...}}] [/TOOL_CALLS]  Mistral; LLMForge's prompt formats
    [TOOL_CALLS]name[ARGS]{...}                                     Mistral since 2025
    <function=name>{...}</function>                                 Llama 3, and Qwen3-Coder with <parameter=...>
    <|python_tag|>{"name": ..., "parameters": {...}}                Llama 3.1 and later; also without the tag, if the
                                                                    name is that of a tool which the prompt offers
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from forgebook.data.messages import Message
from forgebook.errors import DataError

__all__ = [
    "CALL_MARKS",
    "ToolCall",
    "as_text",
    "calls_of_message",
    "name_results",
    "read_tool_calls",
    "split_calls",
    "tools_as_text",
    "uses_tools",
]


THINKING = re.compile(r"^.*?</think>", re.DOTALL)
# What opens a call, up to its body. A call ends with its closing tag, the next call, or the end of the text.
CALL_MARKS = ("<tool_call>", "[TOOL_CALLS]", "<function=", "<functioncall>", "<|python_tag|>")
CALL_MARK = re.compile("|".join(map(re.escape, CALL_MARKS)))
BARE_CALL = re.compile(r'[\[{\s]*"(name|type|function)"\s*:')
BARE_ARGUMENTS = re.compile(r'"(arguments|parameters)"\s*:')
FUNCTION = re.compile(r"<function=([^>\s]+)>(.*?)</function>", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
PYTHON_VALUES = {"True": True, "False": False, "None": None}  # as Qwen3-Coder's template writes them between tags
NAME_AND_ARGS = re.compile(r"([\w.\-]+)(?:\[CALL_ID\]\w*)?\[ARGS\](.*)", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """One call: a function's name and its arguments.

    texts: of arguments between tags, what is written there: it has no type, so that 1 may be a number or a text.
    """

    name: str
    arguments: dict[str, Any]
    texts: dict[str, str] = field(default_factory=dict, compare=False)


# Writing ----------------------------------------------------------------------------------------------


def uses_tools(messages: list[Message], tools: list[dict] | None) -> bool:
    """Return whether a conversation lists tools, calls one, or contains a result."""
    return bool(tools) or any(message["role"] == "tool" or message.get("tool_calls") for message in messages)


def tools_as_text(messages: list[Message], tools: list[dict] | None) -> list[Message]:
    """Write the tools, calls and results of a conversation into the contents of its messages."""
    written: list[Message] = []
    if tools:
        has_system = bool(messages) and messages[0]["role"] == "system"
        system = messages[0]["content"] if has_system else ""
        written.append({"role": "system", "content": f"{system}[TOOL_LIST] {_to_json(tools)} [/TOOL_LIST]"})
        messages = messages[has_system:]
    for message in name_results(messages):
        if message["role"] == "tool":
            text = _result_as_text(message)
            # Results of parallel calls are one turn: many formats want user and assistant to alternate.
            if written and written[-1].get("holds_results"):
                written[-1]["content"] += text
            else:
                written.append({"role": "user", "content": text, "holds_results": True})
        elif message.get("tool_calls"):
            calls = [
                {
                    "function": {"name": call["function"]["name"], "arguments": as_text(call["function"]["arguments"])},
                    "type": "function",
                }
                for call in message["tool_calls"]
            ]
            others = {key: value for key, value in message.items() if key != "tool_calls"}
            written.append({**others, "content": f"{message['content']}[TOOL_CALLS] {_to_json(calls)} [/TOOL_CALLS]"})
        else:
            written.append(message)
    return [{key: value for key, value in message.items() if key != "holds_results"} for message in written]


def name_results(messages: list[Message]) -> list[Message]:
    """Give each result without a name that of its call: the one of its id, else the first without a result."""
    named = []
    unanswered: list[dict[str, Any]] = []
    for message in messages:
        if message.get("tool_calls"):
            unanswered = list(message["tool_calls"])
        elif message["role"] == "tool":
            id_, name = message.get("tool_call_id"), message.get("name")
            fitting = [call for call in unanswered if id_ and call.get("id") == id_]
            fitting = fitting or [call for call in unanswered if not (id_ and call.get("id"))]
            call = next((call for call in fitting if name in (None, call["function"]["name"])), None)
            if call is not None:
                unanswered = [other for other in unanswered if other is not call]
                message = message | {"name": call["function"]["name"]}
        named.append(message)
    return named


def _result_as_text(message: Message) -> str:
    result = {key: message[key] for key in ("name", "content", "tool_call_id") if message.get(key) is not None}
    return f"[TOOL_RESULT] {_to_json(result)} [/TOOL_RESULT]"


def as_text(value: Any) -> str:
    """Write a value as templates do between tags: a text as it is, others as JSON."""
    return value if isinstance(value, str) else _to_json(value)


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# Reading ----------------------------------------------------------------------------------------------


def calls_of_message(message: Message) -> list[ToolCall]:
    """List the calls of a checked assistant message (`row_formats.py`)."""
    functions = [call["function"] for call in message.get("tool_calls") or []]
    return [_call({"name": function["name"], "arguments": function["arguments"]}) for function in functions]


def read_tool_calls(text: str, tools: list[dict] | None = None) -> list[ToolCall]:
    """Read the calls that an answer makes; an empty list if it makes none.

    tools: those that the prompt offers; None: not known. Their schemas say which arguments between tags are texts, and
    JSON without a mark is a call if it names one of them.

    Raises DataError for an answer that opens a call in a form that cannot be read.
    """
    text = THINKING.sub("", text).strip()
    if not CALL_MARK.search(text):
        return _bare_calls(text, tools)
    if "<function=" in text:
        return [_tagged_call(name, body, tools) for name, body in _not_empty(FUNCTION.findall(text), text)]
    calls: list[ToolCall] = []
    for body in CALL_MARK.split(text)[1:]:
        named = NAME_AND_ARGS.fullmatch(body.strip())
        calls += [_call({"name": named[1], "arguments": _from_json(named[2])})] if named else _json_calls(body)
    return _not_empty(calls, text)


def split_calls(text: str, tools: list[dict] | None) -> tuple[str, list[ToolCall]]:
    """Split an answer into its text and its calls; where none is offered or one cannot be read, all of it is text."""
    try:
        calls = read_tool_calls(text, tools) if tools else []
        _to_json([[call.name, call.arguments] for call in calls]).encode()
    except (DataError, UnicodeEncodeError):  # half a surrogate pair, which no text in UTF-8 can hold
        calls = []
    thought = THINKING.match(text)
    said = thought.end() if thought else 0  # a thought may speak of calls
    mark = CALL_MARK.search(text, said)
    return (text[: mark.start() if mark else said].rstrip() if calls else text), calls


def _bare_calls(text: str, tools: list[dict] | None) -> list[ToolCall]:
    """Read calls without a mark; an empty list for JSON that is an answer itself, such as a record with a name."""
    names = None if tools is None else [tool.get("function", tool).get("name") for tool in tools]
    if not (text.startswith(("{", "[{")) and BARE_CALL.match(text)):
        return []
    try:
        value = _from_json(text)
    except DataError:
        if BARE_ARGUMENTS.search(text) and (names is None or any(_to_json(name) in text for name in names)):
            raise
        return []
    items = value if isinstance(value, list) else [value]
    return [_call(item) for item in items] if all(_is_bare_call(item, names) for item in items) else []


def _is_bare_call(item: Any, names: list[str] | None) -> bool:
    """Return whether a JSON value has arguments, or nothing but a name, and the name of an offered tool."""
    function = item.get("function", item) if isinstance(item, dict) else None
    if isinstance(function, str):
        function = {**item, "name": function}
    if not isinstance(function, dict):
        return False
    name, has_arguments = function.get("name"), not function.keys().isdisjoint(("arguments", "parameters"))
    if names is None:
        return has_arguments
    return name in names and (has_arguments or function.keys() <= {"name", "type", "function"})


def _json_calls(body: str) -> list[ToolCall]:
    """Read a JSON call, or a list of them; what follows it (a closing tag, more text) is not part of it."""
    value = _from_json(body)
    return [_call(item) for item in (value if isinstance(value, list) else [value])]


def _from_json(body: str) -> Any:
    try:
        return json.JSONDecoder().raw_decode(body.lstrip())[0]
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON ({error})") from None


def _call(value: Any) -> ToolCall:
    """Read {"name", "arguments"} in any of its spellings; arguments may be an object or its JSON text."""
    function = value.get("function", value) if isinstance(value, dict) else value
    if isinstance(function, str):  # {"type": "function", "function": name, "parameters": ...}
        function = {**value, "name": function}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError('a call needs {"name": ..., "arguments": {...}}')
    arguments = function.get("arguments", function.get("parameters", {}))
    arguments = _from_json(arguments) if isinstance(arguments, str) and arguments.strip() else arguments or {}
    if not isinstance(arguments, dict):
        raise DataError("the arguments of a call must be a JSON object")
    return ToolCall(function["name"], arguments)


def _tagged_call(name: str, body: str, tools: list[dict] | None) -> ToolCall:
    """Read the body of <function=name>: a JSON object, or <parameter=key> tags."""
    if "<parameter=" not in body:
        return _call({"name": name, "arguments": body.strip() or {}})
    texts = dict(PARAMETER.findall(body))
    schemas = _argument_schemas(name, tools or [])
    return ToolCall(name, {key: _typed(text, _types(schemas.get(key))) for key, text in texts.items()}, texts)


def _typed(text: str, types: set[str]) -> Any:
    """Read an argument between tags: as JSON, unless its schema allows a text."""
    if "string" in types and not ("null" in types and text == "null"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return PYTHON_VALUES.get(text, text)


def _argument_schemas(name: str, tools: list[dict]) -> dict[str, Any]:
    """Return the JSON schemas of a function's arguments, by their names; empty for a function that is not offered."""
    for tool in tools:
        function = tool.get("function", tool)
        if function.get("name") == name:
            schema = function.get("parameters")
            properties = schema.get("properties") if isinstance(schema, dict) else None
            return properties if isinstance(properties, dict) else {}
    return {}


def _types(schema: Any) -> set[str]:
    """List the types that a JSON schema allows, in an anyOf or oneOf, too; empty if it names none."""
    types: set[str] = set()
    choices = [one for key in ("anyOf", "oneOf") for one in _listed(schema, key)] if isinstance(schema, dict) else []
    for one in (schema, *choices):
        if isinstance(one, dict):
            named = [one["type"]] if isinstance(one.get("type"), str) else _listed(one, "type")
            are_texts = any(isinstance(value, str) for value in _listed(one, "enum"))
            types.update(kind for kind in named or ["string"] * are_texts if isinstance(kind, str))
    return types


def _listed(schema: dict[str, Any], key: str) -> list:
    return schema[key] if isinstance(schema.get(key), list) else []


def _not_empty(calls: list, text: str) -> list:
    """Return calls; raise DataError if there are none although the text opens one."""
    if not calls:
        raise DataError(f"a call is opened that cannot be read: {text[:60]!r}")
    return calls
