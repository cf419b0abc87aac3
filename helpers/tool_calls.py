"""The calls of tools that an answer's text holds, as OpenAI writes them.

Three ways of writing a call are read: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes, Qwen, the
embedded model), `[TOOL_CALLS] [...] [/TOOL_CALLS]` (LLMForge's text, see tool_text), and an answer that is nothing
but `{"name": ..., "parameters": {...}}` (Llama 3). What cannot be read stays text.
"""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["may_begin_call", "split_calls"]

TAGS = {"<tool_call>": "</tool_call>", "[TOOL_CALLS]": "[/TOOL_CALLS]"}


def split_calls(text: str) -> tuple[str, list[dict[str, str]]]:
    """Part an answer into its words and its calls, each {"name", "arguments"}, the arguments as a JSON text.

    Where any call cannot be read, the whole answer is words.
    """
    calls, rest = [], text
    for opening, closing in TAGS.items():
        # An answer that its length limit or its end-of-turn token cut may lack the closing tag.
        pattern = re.compile(rf"{re.escape(opening)}\s*(.*?)\s*(?:{re.escape(closing)}|\Z)", re.DOTALL)
        for written in pattern.findall(rest):
            found = _read(written)
            if found is None:
                return text, []
            calls += found
        rest = pattern.sub("", rest)
    if not calls and text.lstrip().startswith("{"):
        found = _read(text.strip())
        return ("", found) if found else (text, [])
    return (rest.strip(), calls) if calls else (text, [])


def may_begin_call(text: str) -> int:
    """Tell from which character on an unfinished answer may be a call: what stands before is words for certain."""
    if text.lstrip()[:1] in ("{", ""):
        return 0
    found = [text.find(opening) for opening in TAGS if opening in text]
    if found:
        return min(found)
    for opening in TAGS:
        for length in range(min(len(opening), len(text)), 0, -1):
            if text.endswith(opening[:length]):
                found.append(len(text) - length)
                break
    return min(found, default=len(text))


def _read(written: str) -> list[dict[str, str]] | None:
    """Read one call or a list of them; None if it is not that."""
    try:
        value = json.loads(written)
    except (ValueError, RecursionError):
        return None
    calls = [_call(item) for item in (value if isinstance(value, list) else [value])]
    return None if None in calls or not calls else calls


def _call(value: Any) -> dict[str, str] | None:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    arguments = function.get("arguments", function.get("parameters"))
    if arguments is None:
        return None
    return {
        "name": function["name"],
        "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
    }
