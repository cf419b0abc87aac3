"""Tools as plain text, for templates and prompt formats that know nothing of them.

The convention is LLMForge's: the list of tools in the system message, calls in the assistant's content, results
in a user's turn, each between its tags.

    system     You are helpful.[TOOL_LIST] [{"type": "function", ...}] [/TOOL_LIST]
    assistant  [TOOL_CALLS] [{"function": {"name": "...", "arguments": "{...}"}, "type": "function"}] [/TOOL_CALLS]
    user       [TOOL_RESULT] {"name": "...", "content": "...", "tool_call_id": "..."} [/TOOL_RESULT]
"""

from __future__ import annotations

import json
from typing import Any

__all__ = ["speaks_of_tools", "tools_as_text"]

Message = dict[str, Any]


def speaks_of_tools(messages: list[Message], tools: list[dict] | None) -> bool:
    """Tell whether a conversation lists, calls or answers as a tool."""
    return bool(tools) or any(message["role"] == "tool" or message.get("tool_calls") for message in messages)


def tools_as_text(messages: list[Message], tools: list[dict] | None) -> list[Message]:
    """Write the tools, the calls and the results of a conversation into its contents."""
    written: list[Message] = []
    if tools:
        is_first = bool(messages) and messages[0]["role"] == "system"
        system = messages[0]["content"] if is_first else ""
        written.append({"role": "system", "content": f"{system}[TOOL_LIST] {_json(tools)} [/TOOL_LIST]"})
        messages = messages[is_first:]
    names = {call.get("id"): call["function"]["name"] for m in messages for call in m.get("tool_calls", [])}
    for message in messages:
        if message["role"] == "tool":
            text = _result(message, names)
            # Results of parallel calls are one turn: many formats want user and assistant to take turns.
            if written and written[-1].get("holds_results"):
                written[-1]["content"] += text
            else:
                written.append({"role": "user", "content": text, "holds_results": True})
        elif message.get("tool_calls"):
            calls = [
                {"function": {"name": c["function"]["name"], "arguments": _text(c["function"])}, "type": "function"}
                for c in message["tool_calls"]
            ]
            kept = {key: value for key, value in message.items() if key != "tool_calls"}
            written.append({**kept, "content": f"{message['content']}[TOOL_CALLS] {_json(calls)} [/TOOL_CALLS]"})
        else:
            written.append(message)
    return [{key: value for key, value in message.items() if key != "holds_results"} for message in written]


def _result(message: Message, names: dict[str | None, str]) -> str:
    name = message.get("name") or names.get(message.get("tool_call_id"))
    result = {"name": name, "content": message["content"], "tool_call_id": message.get("tool_call_id")}
    return f"[TOOL_RESULT] {_json({key: value for key, value in result.items() if value is not None})} [/TOOL_RESULT]"


def _text(function: dict) -> str:
    return function["arguments"] if isinstance(function["arguments"], str) else _json(function["arguments"])


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
