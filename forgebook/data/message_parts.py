"""Which part of a message a rendered text lacks: content, reasoning, a tool call's name or arguments, a tool.

Templates write these as JSON, as XML tags or as Python, so that names and values are looked for one by one, in every
spelling that templates use. What is found is taken out of the text: two equal arguments need two places.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from typing import Any

from forgebook.data.images import IMAGE
from forgebook.data.messages import REASONING_KEYS, Message, split_thought

__all__ = ["follows_call", "missing_part", "missing_tool"]


def missing_part(message: Message, text: str) -> str | None:
    """Name the part of a message that is not in its rendered text, as `tool_calls[0].function.name`; None if all is."""
    parts = list(_parts(message))
    if len(parts) == 1 and isinstance(parts[0][1], str) and parts[0][1].strip() in text:  # nearly all messages
        return None
    # Longest first: what is in a long part does not count as a short one.
    for path, part in sorted(parts, key=lambda entry: -len(str(entry[1]))):
        spelling = next((spelled for spelled in _spellings(part) if spelled in text), None)
        if spelling is None:
            return path
        text = text.replace(spelling, "\0", 1) if spelling else text
    return None


def follows_call(thought: str, message: Message, text: str) -> bool:
    """Return whether a message's thought comes after its first call in a rendered text."""
    calls = message.get("tool_calls") or []
    return bool(thought and calls) and _place(calls[0]["function"]["name"], text) < _place(thought, text)


def _place(part: str, text: str) -> int:
    return min((at for spelled in _spellings(part) if (at := text.find(spelled)) >= 0), default=len(text))


def missing_tool(tools: list[dict], text: str) -> str | None:
    """Name the part of a list of tools that is not in a rendered text: a name, a description, a parameter's name."""
    for k, tool in enumerate(tools):
        function = tool.get("function", tool)
        parts = [("name", function["name"]), *(_lines("description", function.get("description")))]
        parts += [(f"parameters.{name}", name) for name in _parameters(function.get("parameters") or {})]
        for path, part in parts:
            if not any(spelled in text for spelled in _spellings(part)):
                return f"tools[{k}].function.{path}"
    return None


def _parameters(schema: dict[str, Any]) -> list[str]:
    """List the names of a tool's parameters; some sets (xLAM) write them without a schema around them."""
    if "properties" in schema or ("type" in schema and not isinstance(schema["type"], dict)):
        return list(schema.get("properties") or {})
    return [name for name, about in schema.items() if isinstance(about, dict) and name[0] != "$"]


def _parts(message: Message) -> Iterator[tuple[str, Any]]:
    """Yield (path, text or value) of everything in a message."""
    # A template that parses thinking out of the content may put other white space around it.
    for piece in split_thought(message.get("content") or ""):
        yield from (("content", text) for text in piece.split(IMAGE) if text.strip())
    for key in REASONING_KEYS:
        if thought := message.get(key):
            yield key, thought
    for k, call in enumerate(message.get("tool_calls") or []):
        path = f"tool_calls[{k}].function"
        yield f"{path}.name", call["function"]["name"]
        yield from _leaves(call["function"].get("arguments"), f"{path}.arguments")


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the keys and the single values of nested arguments."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{path}.{key}", str(key)
            yield from _leaves(item, f"{path}.{key}")
    elif isinstance(value, list):
        for k, item in enumerate(value):
            yield from _leaves(item, f"{path}[{k}]")
    else:
        yield path, value


def _lines(path: str, text: Any) -> Iterator[tuple[str, str]]:
    # Templates indent the lines of a description.
    for line in str(text or "").splitlines():
        yield path, line


def _spellings(value: Any) -> Iterator[str]:
    """Yield the ways in which templates write a value."""
    if isinstance(value, str):
        value = value.strip()
        yield value
        yield json.dumps(value, ensure_ascii=False)[1:-1]
        yield json.dumps(value)[1:-1]
        yield repr(value)[1:-1]
        yield html.escape(value)
    else:
        yield json.dumps(value)
        yield str(value)
