"""Tool calls in an answer's text: read, compared with the reference's, and what is wrong with them named.

An answer is right if it calls the same functions as its reference, each with the same value for every argument of
the reference (more arguments are allowed), in any order; or calls none where the reference calls none. What a model
says beside its calls is not compared.

Read are the forms that open models write:

    <tool_call>{"name": ..., "arguments": {...}}</tool_call>        Qwen, Hermes, the tiny model
    [TOOL_CALLS] [{"name": ..., "arguments": {...}}] [/TOOL_CALLS]  Mistral; LLMForge's prompt formats
    [TOOL_CALLS]name[ARGS]{...}                                     Mistral since 2025
    <function=name>{...}</function>                                 Llama 3, and Qwen3-Coder with <parameter=...>
    <|python_tag|>{"name": ..., "parameters": {...}}                Llama 3.1 and later, also without the tag
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from forgebook.errors import DataError

__all__ = ["KINDS", "OPENINGS", "Call", "find_mistake", "of_message", "read_calls"]

# The taxonomy of LLMForge's function-calling example.
KINDS = ("unwanted", "missing", "wrong format", "wrong count", "wrong name", "wrong value", "missing argument")

THINKING = re.compile(r"^.*?</think>", re.DOTALL)
# What opens a call, up to its body; what closes it, or the next call, or the end of the text.
OPENINGS = re.compile(r"<tool_call>|\[TOOL_CALLS\]|<function=|<functioncall>|<\|python_tag\|>")
FUNCTION = re.compile(r"<function=([^>\s]+)>(.*?)</function>", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
NAMED = re.compile(r"([\w.\-]+)(?:\[CALL_ID\]\w*)?\[ARGS\](.*)", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """One call: a function's name and its arguments."""

    name: str
    arguments: dict[str, Any]


def of_message(message: dict[str, Any]) -> list[Call]:
    """List the calls of a checked assistant message (`forgebook/data/row_formats.py`)."""
    functions = [call["function"] for call in message.get("tool_calls") or []]
    return [_call({"name": function["name"], "arguments": function["arguments"]}) for function in functions]


def read_calls(text: str) -> list[Call]:
    """Read the calls that an answer makes; an answer that makes none gives an empty list.

    Raises DataError for one that tries to call, but in no form that can be read.
    """
    text = THINKING.sub("", text).strip()
    bare = text.startswith(("{", "[{")) and re.match(r'[\[{\s]*"(name|type|function)"\s*:', text)
    if not OPENINGS.search(text):
        return _parsed(text) if bare else []
    if "<function=" in text:
        return [_tagged(name, body) for name, body in _all(FUNCTION.findall(text), text)]
    calls = []
    for body in OPENINGS.split(text)[1:]:
        named = NAMED.fullmatch(body.strip())
        calls += [_call({"name": named[1], "arguments": _json(named[2])})] if named else _parsed(body)
    return _all(calls, text)


def find_mistake(answer: str, expected: list[Call]) -> str | None:
    """Name what is wrong with the calls of an answer, one of KINDS; None if nothing is."""
    try:
        made = read_calls(answer)
    except DataError:
        return "wrong format" if expected else "unwanted"
    if not expected:
        return "unwanted" if made else None
    if not made:
        return "missing"
    if len(made) != len(expected):
        return "wrong count"
    if sorted(call.name for call in made) != sorted(call.name for call in expected):
        return "wrong name"
    kinds = {kind for name in {call.name for call in expected} for kind in _argument_mistakes(name, made, expected)}
    return next((kind for kind in ("missing argument", "wrong value") if kind in kinds), None)


def _argument_mistakes(name: str, made: list[Call], expected: list[Call]) -> list[str]:
    """Name the mistakes in the arguments of a function's calls, each compared with the reference's that it fits best.

    A function may be called several times at once, in any order.
    """
    from scipy.optimize import linear_sum_assignment

    wanted = [call.arguments for call in expected if call.name == name]
    given = [call.arguments for call in made if call.name == name]
    found = [[_differences(want, have) for have in given] for want in wanted]
    rows, columns = linear_sum_assignment(np.array([[len(kinds) for kinds in row] for row in found]))
    return [kind for row, column in zip(rows, columns, strict=True) for kind in found[row][column]]


def _differences(want: dict[str, Any], have: dict[str, Any]) -> list[str]:
    missing = ["missing argument" for key in want if key not in have]
    return missing + ["wrong value" for key in want if key in have and not _same(want[key], have[key])]


def _same(one: Any, other: Any) -> bool:
    """Compare JSON values: 2 is 2.0, but true is not 1, which Python takes for the same."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


# Reading ----------------------------------------------------------------------------------------------


def _parsed(body: str) -> list[Call]:
    """Read a JSON call, or a list of them; what follows it (a closing tag, more text) is no part of it."""
    value = _json(body)
    return [_call(item) for item in (value if isinstance(value, list) else [value])]


def _json(body: str) -> Any:
    try:
        return json.JSONDecoder().raw_decode(body.lstrip())[0]
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON ({error})") from None


def _call(value: Any) -> Call:
    """Take {"name", "arguments"} in any of its spellings; arguments may be an object or its JSON text."""
    function = value.get("function", value) if isinstance(value, dict) else value
    if isinstance(function, str):  # {"type": "function", "function": name, "parameters": ...}
        function = {**value, "name": function}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError('a call needs {"name": ..., "arguments": {...}}')
    arguments = function.get("arguments", function.get("parameters", {}))
    arguments = _json(arguments) if isinstance(arguments, str) and arguments.strip() else arguments or {}
    if not isinstance(arguments, dict):
        raise DataError("the arguments of a call must be a JSON object")
    return Call(function["name"], arguments)


def _tagged(name: str, body: str) -> Call:
    """Read the body of <function=name>: a JSON object, or <parameter=key> tags whose values may be JSON."""
    if "<parameter=" not in body:
        return _call({"name": name, "arguments": body.strip() or {}})
    arguments = {}
    for key, value in PARAMETER.findall(body):
        try:
            arguments[key] = json.loads(value)
        except ValueError:
            arguments[key] = value
    return Call(name, arguments)


def _all(found: list, text: str) -> list:
    """Return what was found; raise DataError if the text opens a call and nothing was."""
    if not found:
        raise DataError(f"a call is opened that cannot be read: {text[:60]!r}")
    return found
