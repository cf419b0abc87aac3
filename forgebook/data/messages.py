"""One message, or list of tools, as any tool writes it -> OpenAI's keys and types.

read_messages(raw["conversations"], "conversations", ignored)    roles, content, tool calls, marks of the loss
read_tools(raw)                                                  what the assistant may call
"""

from __future__ import annotations

import json
import re
from typing import Any

from forgebook.data.image_parts import split_images
from forgebook.data.images import IMAGES
from forgebook.data.json_values import brief, parse_json, without_nulls
from forgebook.errors import DataError

__all__ = [
    "REASONING_KEYS",
    "TOOL_KEYS",
    "Message",
    "is_turn",
    "parse_field",
    "read_messages",
    "read_text",
    "read_tools",
    "split_thought",
    "texts_of",
    "with_whole_thought",
    "without_filled_arguments",
]

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
ROLE_OF = {
    "human": "user", "gpt": "assistant", "ai": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "developer": "system", "observation": "tool",
    "function_response": "tool", "function": "tool", "function_call": "assistant", "tool_call": "assistant",
    "prompter": "user", "chatbot": "assistant", "bot": "assistant",
    "tool_response": "tool", "tool_result": "tool", "ipython": "tool", "environment": "tool",
}  # fmt: skip
CALL_ROLES = ("function_call", "tool_call")  # a call as a turn of its own: LLaMA-Factory, ms-swift
TURN_KEYS = ("content", "value", "tool_calls", "function_call")  # what a turn says, beside its role
ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")  # OpenAI, Llama 3, LangChain, Anthropic
SCHEMA_KEYS = ("parameters", "input_schema", "inputSchema")  # of a tool: OpenAI, Anthropic, MCP
CALL_KEYS = {"function", "name", "id", "type", "index"}
TEXT_TYPES = ("text", "input_text", "output_text")  # the latter two: OpenAI's responses
MESSAGE_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "weight", "reasoning_content", IMAGES}
# Whether a turn is in the loss: OpenAI's name, then those of other tools (axolotl, ms-swift, Unsloth).
MARKS = ("weight", "train", "training", "train_on_turn", "trainable", "loss", "loss_mask")
# Names under which others write what a turn says, and what to write instead. Another turn would be trained without it.
SAID_ELSEWHERE = {
    "tool_call": "write the call under tool_calls",
    "function_calls": "write the calls under tool_calls, as JSON",
    "recipient": "write a call under tool_calls",
    "channel": "write an analysis as reasoning_content of the turn that follows it, a call under tool_calls",
    "tools": "write the list beside the messages",
    "functions": "write the list beside the messages, under tools",
}
SAYS_NOTHING = {"channel": ("final",), "recipient": ("all", "user", "assistant")}
SWITCHES = {"true": 1, "false": 0, "1": 1, "0": 0}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # of data and of templates
TOOL_KEYS = ("tools", "functions", "tool_defs")  # OpenAI's name, its former name, and other data sets'
# A model's output whose prompt opened the thought (R1): "...\n</think>\n\nanswer".
UNOPENED_THOUGHT = re.compile(r"(?!\s*<think>)(.*?)\n</think>[ \t]*\n(.*)", re.DOTALL)
LEADING_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


def read_messages(value: Any, field: str, ignored: set[str]) -> list[Message]:
    """Convert a list of messages to OpenAI's keys and types."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{field} is {brief(value)}; expected a non-empty list of {{role, content}}")
    messages: list[Message] = []
    for k, raw in enumerate(value):
        message = _message(raw, f"{field}[{k}]", ignored)
        if k and all(isinstance(one, dict) and _written_role(one) in CALL_ROLES for one in value[k - 1 : k + 1]):
            messages[-1] = _parallel(messages[-1], message, f"{field}[{k}]")
        else:
            messages.append(message)
    return messages


def is_turn(value: Any) -> bool:
    """Return whether a JSON value is a turn, of any spelling, and not a record that has a key `from` or `role`."""
    if not isinstance(value, dict) or value.keys().isdisjoint(TURN_KEYS):
        return False
    role = _written_role(value)
    return isinstance(role, str) and (role.lower() in ROLES or role.lower() in ROLE_OF)


def _parallel(message: Message, call: Message, at: str) -> Message:
    """Make one turn of two that call tools one after the other."""
    if message.get("weight") != call.get("weight"):
        raise DataError(f"{at} and the call before it are one turn, and marked differently: give both the same mark")
    thoughts = [turn["reasoning_content"] for turn in (message, call) if turn.get("reasoning_content")]
    reasoning = {"reasoning_content": "\n\n".join(thoughts)} if thoughts else {}
    return message | {"tool_calls": message["tool_calls"] + call["tool_calls"]} | reasoning


def _written_role(raw: dict) -> Any:
    return raw["role"] if raw.get("role") is not None else raw.get("from")


def _message(raw: Any, at: str, ignored: set[str]) -> Message:
    if not isinstance(raw, dict):
        raise DataError(f"{at} is {brief(raw)}; expected an object with role and content")
    message = dict(raw)
    for openai, sharegpt in (("role", "from"), ("content", "value")):
        if message.get(openai) is None and sharegpt in message:
            message[openai] = message.pop(sharegpt)
    written = message.get("role")
    if isinstance(written, str):
        known = written.lower()
        written = ROLE_OF.get(known, known if known in ROLES else written)
    message["role"] = role = written
    if role not in ROLES:
        raise DataError(f"{at}.role is {brief(role)}; expected {', '.join(ROLES[:-1])} or {ROLES[-1]}")
    if _written_role(raw) in CALL_ROLES:
        call = message.get("content")
        message |= {"tool_calls": parse_field(call, f"{at}.content") if isinstance(call, str) else call, "content": ""}
        if not message["tool_calls"]:
            raise DataError(f"{at}.content is {brief(call)}; expected a call")
    if call := message.pop("function_call", None):  # OpenAI's former name
        if message.get("tool_calls"):
            raise DataError(f"{at} has tool_calls and function_call, its former name: keep tool_calls")
        message["tool_calls"] = parse_field(call, f"{at}.function_call") if isinstance(call, str) else call
    if role == "assistant" and isinstance(message.get("content"), list):
        message |= _divided(message["content"])
    message |= split_images(message, at)
    reasoning = {key: message.pop(key, None) for key in REASONING_KEYS}
    # Sets with one schema for all rows hold "" where there is none; only an assistant reasons.
    written_keys = [key for key, text in reasoning.items() if text is not None and text != ""]
    if written_keys and role == "assistant":
        message["reasoning_content"] = reasoning[written_keys.pop(0)]
    ignored |= {f"{at.split('[')[0]}[].{key}" for key in written_keys}
    message["content"] = _content(message, at)
    if "<think>" in message["content"] and message.get("reasoning_content"):
        _check_thoughts(message["reasoning_content"], message, at)
    if message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(message["tool_calls"], role, at, ignored)
    if message.get("train_detail"):  # axolotl's mark of parts of a turn
        raise DataError(
            f"{at}.train_detail: a turn is in the loss as a whole or not at all: remove train_detail, and mark turns "
            "that must not be in the loss with train: false"
        )
    for key in ("reasoning_content", "name", "tool_call_id"):
        if message.get(key) is not None and not isinstance(message[key], str):
            raise DataError(f"{at}.{key} is {brief(message[key])}; expected a string")
    if (weight := _weight(message, role, at)) is not None:
        message["weight"] = weight
    for key in SAID_ELSEWHERE.keys() & message.keys():
        if (value := message[key]) and value not in SAYS_NOTHING.get(key, ()):
            raise DataError(f"{at}.{key} is {brief(value)}, which is not read there: {SAID_ELSEWHERE[key]}")
    empty: tuple = (None, [])  # what Parquet puts where other rows have a value
    unread = (key for key in message if key not in MESSAGE_KEYS and message[key] not in empty)
    ignored |= {f"{at.split('[')[0]}[].{key}" for key in unread}
    return {key: value for key, value in message.items() if key in MESSAGE_KEYS and value not in empty}


def _divided(parts: list) -> Message:
    """Divide the parts of a content into thoughts, as Mistral and Anthropic write them, and the rest."""
    thoughts = [part for part in parts if isinstance(part, dict) and part.get("type") == "thinking"]
    if not thoughts:
        return {}
    texts = [read_text(part.get("thinking"), "thinking") for part in thoughts]
    return {"thinking": "\n".join(texts), "content": [part for part in parts if part not in thoughts]}


def texts_of(message: Message) -> list[str]:
    """List what a checked message says: its reasoning, its content, and its calls as JSON."""
    calls = json.dumps(message["tool_calls"], ensure_ascii=False) if message.get("tool_calls") else None
    return [text for text in (message.get("reasoning_content"), message.get("content"), calls) if text]


def split_thought(content: str) -> tuple[str, str]:
    """Divide a content into the thought it begins with (empty without one) and the rest."""
    match = LEADING_THOUGHT.fullmatch(content)
    return (match[1].strip(), match[2].strip()) if match else ("", content)


def with_whole_thought(content: str, field: str) -> str:
    """Open the thought of a content whose prompt did. Raises DataError for one that does not end."""
    if "think>" not in content:
        return content
    if content.lstrip().startswith("<think>") and "</think>" not in content:
        raise DataError(f"{field} opens a thought with <think> that does not end: add </think>, or remove the row")
    match = UNOPENED_THOUGHT.fullmatch(content)
    # After an opening tag, or in a block of code, the closing one is what the text speaks of.
    if match is None or "<think>" in match[1] or match[1].count("```") % 2:
        return content
    return f"<think>\n{match[1].strip()}\n</think>\n\n{match[2].lstrip()}"


def _check_thoughts(reasoning: Any, message: Message, at: str) -> None:
    """Remove a thought from the content that is also under its own key; raise DataError for two different ones."""
    match = LEADING_THOUGHT.fullmatch(message["content"])
    if match is None:
        return
    if (thought := match[1].strip()) and isinstance(reasoning, str) and thought != reasoning.strip():
        raise DataError(f"{at} has reasoning and another thought in its content: keep one of them")
    message["content"] = match[2].strip()


def _weight(message: Message, role: str, at: str) -> int | None:
    """Take the marks out of a message; return 1 for a turn that is in the loss, 0 for another, None if unmarked."""
    marks = {key: value for key in MARKS if (value := message.pop(key, None)) is not None}
    weights = set()
    for key, value in marks.items():
        weight = SWITCHES.get(value.lower(), value) if isinstance(value, str) else value
        if weight not in (0, 1) or (weight == 1 and role != "assistant") or (key == "weight" and role != "assistant"):
            expected = "0 or 1" if key == "weight" else "true or false"
            raise DataError(f"{at}.{key} is {brief(value)}; expected {expected}, on an assistant turn")
        weights.add(int(weight))
    if len(weights) > 1:
        raise DataError(f"{at}: {' and '.join(marks)} contradict each other: keep one")
    return weights.pop() if weights and role == "assistant" else None


def _content(message: Message, at: str) -> str:
    if message.get("content") is None and message["role"] == "assistant" and message.get("tool_calls"):
        return ""
    if "content" not in message:
        raise DataError(f"{at} has no content (its keys: {', '.join(map(str, message))}); expected a string")
    return read_text(message["content"], f"{at}.content")


def read_text(content: Any, field: str) -> str:
    """Read a text, or OpenAI's list of text parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        for k, part in enumerate(content):
            is_text = isinstance(part, dict) and part.get("type") in TEXT_TYPES and isinstance(part.get("text"), str)
            if not is_text:
                raise DataError(f"{field}[{k}] is {brief(part)}; only text parts are supported")
        return "".join(part["text"] for part in content)
    raise DataError(f"{field} is {brief(content)}; expected a string")


def _tool_calls(value: Any, role: str, at: str, ignored: set[str]) -> list[dict]:
    """Convert tool calls to OpenAI's form, their arguments parsed: that is what chat templates expect."""
    if role != "assistant":
        raise DataError(f"{at}.tool_calls: only an assistant calls tools; this is a turn of the {role}")
    value = parse_field(value, f"{at}.tool_calls") if isinstance(value, str) else value
    calls = []
    for k, raw in enumerate(value if isinstance(value, list) else [value]):
        here = f"{at}.tool_calls[{k}]"
        function = raw.get("function", raw) if isinstance(raw, dict) else raw
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f'{here} is {brief(raw)}; expected {{"function": {{"name": ..., "arguments": ...}}}}')
        # Some write the arguments beside the function, and not inside it.
        unread = raw | function
        name = next((key for key in ARGUMENT_KEYS if unread.get(key) is not None), None)
        arguments = unread.pop(name) if name else None
        if isinstance(arguments, str):
            arguments = parse_field(arguments, f"{here}.arguments") if arguments.strip() else {}
        arguments = arguments or {}
        if not isinstance(arguments, dict):
            raise DataError(f"{here}.arguments is {brief(arguments)}; expected a JSON object")
        _check_numbers(arguments, f"{here}.arguments")
        places = (key for key, item in unread.items() if key not in CALL_KEYS and item not in (None, "", [], {}))
        ignored |= {f"{at.split('[')[0]}[].tool_calls[].{key}" for key in places}
        call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        calls.append(call | ({"id": raw["id"]} if isinstance(raw.get("id"), str) else {}))
    return calls


def _check_numbers(value: Any, field: str) -> None:
    """Raise DataError for what Python and pandas write as JSON and nothing else reads: NaN and Infinity."""
    try:
        json.dumps(value, allow_nan=False, default=str)
    except ValueError:
        raise DataError(f"{field} has a number that JSON lacks, NaN or Infinity: write null or a number") from None


def without_filled_arguments(messages: list[Message], tools: list[dict] | None) -> list[Message]:
    """Leave null arguments out of calls that no tool of their name takes: one schema for all calls filled them in."""
    if not tools or not any("tool_calls" in message for message in messages):
        return messages
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    return [
        message | {"tool_calls": [_without_filled(call, functions) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _without_filled(call: dict, functions: dict[str, dict]) -> dict:
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    taken = (functions.get(name, {}).get("parameters") or {}).get("properties")
    if not isinstance(taken, dict):
        return call
    arguments = {key: value for key, value in arguments.items() if value is not None or key in taken}
    return call | {"function": {"name": name, "arguments": arguments}}


def read_tools(raw: dict) -> list[dict] | None:
    """Read what the assistant may call."""
    written = [key for key in TOOL_KEYS if raw.get(key)]
    if len(written) > 1:
        raise DataError(f"{' and '.join(written)} are both there: keep {written[0]}")
    return _tools(raw[written[0]], written[0]) if written else None


def _tools(value: Any, key: str) -> list[dict]:
    value = parse_field(value, key) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise DataError(f"{key} is {brief(value)}; expected a list of JSON schemas")
    tools = []
    for k, raw in enumerate(value):
        function = raw.get("function", raw) if isinstance(raw, dict) else raw
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            expected = '{"type": "function", "function": {"name": ...}}'
            raise DataError(f"{key}[{k}] is {brief(raw)}; expected {expected}")
        function = _with_parameters(function, f"{key}[{k}]")
        # As sets hold them that went through Arrow: a template would print the keys of other tools.
        tools.append({"type": "function", "function": without_nulls(function, kept=("default", "const"))})
    return tools


def _with_parameters(function: dict, at: str) -> dict:
    """Give a tool's schema OpenAI's name, which templates read, and parse it where it is JSON text."""
    name = next((key for key in SCHEMA_KEYS if function.get(key)), None)
    if name is None:
        return function
    schema = function[name]
    schema = parse_field(schema, f"{at}.{name}") if isinstance(schema, str) else schema
    properties = schema.get("properties") if isinstance(schema, dict) else schema
    if not isinstance(properties, dict | None):
        raise DataError(f"{at}.{name} is {brief(function[name])}; expected a JSON schema with properties")
    return {"parameters" if key == name else key: schema if key == name else value for key, value in function.items()}


def parse_field(text: Any, field: str) -> Any:
    """Parse JSON that was written as text."""
    try:
        return parse_json(text)
    except DataError as error:
        raise DataError(f"{field}: {error}: {brief(text)}") from None
