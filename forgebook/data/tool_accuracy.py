"""Tool calls of an answer compared with the reference's, and the mistake named.

An answer is right if it calls the same functions as its reference, each with the same value for every argument of
the reference (more arguments are allowed), in any order; or calls none where the reference calls none. Text beside the
calls is not compared.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from forgebook.data.tools import ToolCall, as_text, read_tool_calls
from forgebook.errors import DataError

__all__ = ["TOOL_CALL_MISTAKES", "find_tool_call_mistake"]

# The taxonomy of LLMForge's function-calling example.
TOOL_CALL_MISTAKES = (
    "unwanted",
    "missing",
    "wrong format",
    "wrong count",
    "wrong name",
    "wrong value",
    "missing argument",
)


def find_tool_call_mistake(answer: str, expected: list[ToolCall], tools: list[dict] | None = None) -> str | None:
    """Name what is wrong with the calls of an answer, one of TOOL_CALL_MISTAKES; None if nothing is.

    tools: those that the prompt offers, as of `read_tool_calls`.
    """
    try:
        calls = read_tool_calls(answer, tools)
    except DataError:
        return "wrong format" if expected else "unwanted"
    if not expected:
        return "unwanted" if calls else None
    if not calls:
        return "missing"
    if len(calls) != len(expected):
        return "wrong count"
    if sorted(call.name for call in calls) != sorted(call.name for call in expected):
        return "wrong name"
    kinds = {kind for name in {call.name for call in expected} for kind in _argument_mistakes(name, calls, expected)}
    return next((kind for kind in ("missing argument", "wrong value") if kind in kinds), None)


def _argument_mistakes(name: str, calls: list[ToolCall], expected: list[ToolCall]) -> list[str]:
    """Name the mistakes in the arguments of a function's calls, each compared with the reference's that it fits best.

    A function may be called several times at once, in any order.
    """
    from scipy.optimize import linear_sum_assignment

    references = [call.arguments for call in expected if call.name == name]
    candidates = [call for call in calls if call.name == name]
    mistakes = [[_differences(reference, candidate) for candidate in candidates] for reference in references]
    pairs = linear_sum_assignment(np.array([[len(kinds) for kinds in line] for line in mistakes]))
    return [kind for line, column in zip(*pairs, strict=True) for kind in mistakes[line][column]]


def _differences(reference: dict[str, Any], candidate: ToolCall) -> list[str]:
    missing = ["missing argument" for key in reference if key not in candidate.arguments]
    common = [key for key in reference if key in candidate.arguments]
    return missing + ["wrong value" for key in common if not _has_value(candidate, key, reference[key])]


def _has_value(call: ToolCall, key: str, value: Any) -> bool:
    """Return whether an argument has a value; one between tags has it, too, if it is written there as a text."""
    return _is_same(value, call.arguments[key]) or call.texts.get(key) == as_text(value)


def _is_same(one: Any, other: Any) -> bool:
    """Compare JSON values: 2 equals 2.0, but true does not equal 1, as it does in Python."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return one == other
