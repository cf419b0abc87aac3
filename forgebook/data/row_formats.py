"""A row as it was written -> an example as it is trained, or the reason why it cannot be.

    example, notes = parse_row(raw, "train.jsonl:7", task="instruction_tuning")

The format is detected from the keys, never set; the data report counts the rows of each.

    messages          {"messages": [{"role", "content"}, ...], "tools": [...]}       OpenAI chat
    sharegpt          {"conversations": [{"from", "value"}, ...]}
    alpaca            {"instruction", "input", "output"}, also "system" and "history"
    prompt/completion {"prompt", "completion"}, texts or lists of messages
    preference        {"chosen": [...], "rejected": [...]}, conversations or answers to a "prompt"
    text              {"text": "..."}                                                task: causal_lm
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from forgebook.data.readers import FileChunk, read_chunk
from forgebook.errors import DataError

__all__ = ["Example", "RowNotes", "parse_chunk", "parse_row"]

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
ROLE_OF = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "developer": "system", "observation": "tool", "function_response": "tool",
    "function_call": "assistant",
}  # fmt: skip
MESSAGE_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "weight", "reasoning_content"}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
LONGEST_SHOWN = 60
JSON_TYPES = {list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}


@dataclass(frozen=True)
class Example:
    """One checked example.

    where:    file:line of its row.
    messages: a conversation, or the chosen one of a preference pair; None for plain text.
    text:     plain text, of task causal_lm.
    tools:    what the assistant may call, as OpenAI's JSON schemas.
    rejected: the other conversation of a preference pair.
    """

    where: str
    messages: list[Message] | None = None
    text: str | None = None
    tools: list[dict] | None = None
    rejected: list[Message] | None = None

    @property
    def conversation(self) -> list[Message]:
        """The messages. Raises DataError for plain text."""
        if self.messages is None:
            raise DataError(f"{self.where}: this is a text; expected messages")
        return self.messages


@dataclass(frozen=True)
class RowNotes:
    """What the data report counts of a row: its format, and the keys that nothing reads."""

    format: str
    ignored: tuple[str, ...] = ()


def parse_chunk(
    chunk: FileChunk, task: str, labels: Iterable[str] = ()
) -> Iterator[tuple[Example, RowNotes] | DataError]:
    """Read and check the rows of a chunk; a DataError in the place of one that cannot be used."""
    labels = tuple(labels)
    for where, raw in read_chunk(chunk):
        try:
            yield raw if isinstance(raw, DataError) else parse_row(raw, where, task, labels)
        except DataError as error:
            yield error


def parse_row(raw: Any, where: str, task: str, labels: Iterable[str] = ()) -> tuple[Example, RowNotes]:
    """Detect the format of one row, convert and check it.

    labels: of task classification, what the last answer may be.

    Raises DataError: `where: field: what it is, what to do`.
    """
    try:
        example, notes = _detect(raw, where, task)
        for messages in (example.messages, example.rejected):
            if messages is not None:
                _check_conversation(messages, needs_answer=task != "causal_lm")
        if example.messages is not None and example.rejected is not None:
            _check_pair(example.messages, example.rejected)
        if task == "classification" and example.messages is not None:
            _check_label(example.messages, list(labels))
        return example, notes
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


# Detecting the format ---------------------------------------------------------------------------------


def _detect(raw: Any, where: str, task: str) -> tuple[Example, RowNotes]:
    if not isinstance(raw, dict):
        raise DataError(f"the row is a JSON {JSON_TYPES[type(raw)]}; expected an object with the key 'messages'")
    ignored: set[str] = set()
    tools = _tools(raw["tools"]) if raw.get("tools") else None
    has_pair = raw.get("chosen") is not None and raw.get("rejected") is not None
    if task == "preference_tuning":
        if not has_pair:
            raise DataError(f"no 'chosen' and 'rejected' (its keys: {_names(raw)}), which preference_tuning needs")
        prompt = _as_messages(raw.get("prompt") or [], "prompt", "user", ignored)
        pair = [prompt + _as_messages(raw[key], key, "assistant", ignored) for key in ("chosen", "rejected")]
        if raw.get("prompt") and not isinstance(raw["chosen"], str) and raw["chosen"][: len(prompt)] == raw["prompt"]:
            pair = [messages[len(prompt) :] for messages in pair]  # the prompt was written both beside and inside
        example = Example(where, messages=pair[0], rejected=pair[1], tools=tools)
        return example, _notes("preference", raw, {"prompt", "chosen", "rejected", "tools"}, ignored)
    if raw.get("messages") is not None:
        messages = _messages(raw["messages"], "messages", ignored)
        return Example(where, messages=messages, tools=tools), _notes("messages", raw, {"messages", "tools"}, ignored)
    if raw.get("conversations") is not None:
        messages = _messages(raw["conversations"], "conversations", ignored)
        messages = _system(raw) + messages
        example = Example(where, messages=messages, tools=tools)
        return example, _notes("sharegpt", raw, {"conversations", "system", "tools"}, ignored)
    if raw.get("instruction") is not None and raw.get("output") is not None:
        example = Example(where, messages=_alpaca(raw))
        return example, _notes("alpaca", raw, {"instruction", "input", "output", "system", "history"}, ignored)
    if raw.get("prompt") is not None and raw.get("completion") is not None:
        messages = _as_messages(raw["prompt"], "prompt", "user", ignored)
        messages = _system(raw) + messages + _as_messages(raw["completion"], "completion", "assistant", ignored)
        example = Example(where, messages=messages, tools=tools)
        return example, _notes("prompt/completion", raw, {"prompt", "completion", "system", "tools"}, ignored)
    if task == "causal_lm" and isinstance(raw.get("text"), str) and raw["text"]:
        return Example(where, text=raw["text"]), _notes("text", raw, {"text"}, ignored)
    if has_pair:
        raise DataError("a pair of 'chosen' and 'rejected': set task: preference_tuning to train on it")
    if "messages" in raw:
        raise DataError(f"messages is {_brief(raw['messages'])}; expected a non-empty list of {{role, content}}")
    also = " or a non-empty 'text'" if task == "causal_lm" else ""
    fix = "; a 'text' is for task: causal_lm" if isinstance(raw.get("text"), str) and not also else ""
    raise DataError(f"no 'messages' (its keys: {_names(raw)}): add a list of messages{also}{fix}")


def _notes(name: str, raw: dict, used: set[str], ignored: set[str]) -> RowNotes:
    return RowNotes(name, tuple(sorted((set(raw) - used) | ignored)))


def _system(raw: dict) -> list[Message]:
    return [{"role": "system", "content": raw["system"]}] if isinstance(raw.get("system"), str) else []


def _alpaca(raw: dict) -> list[Message]:
    """Turn instruction and input into one question, as Alpaca's own prompt does: the input below."""
    for key in ("instruction", "input", "output"):
        if raw.get(key) is not None and not isinstance(raw[key], str):
            raise DataError(f"{key} is {_brief(raw[key])}; expected a string")
    messages = _system(raw)
    for turn in raw.get("history") or []:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise DataError(f"history has {_brief(turn)}; expected [question, answer] pairs")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question = "\n\n".join(text for text in (raw["instruction"], raw.get("input")) if text)
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": raw["output"]}]


def _as_messages(value: Any, field: str, role: str, ignored: set[str]) -> list[Message]:
    """Read a text as one message of a role, or a list of messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _messages(value, field, ignored) if value else []


def _messages(value: Any, field: str, ignored: set[str]) -> list[Message]:
    """Convert a list of messages to OpenAI's keys and types."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{field} is {_brief(value)}; expected a non-empty list of {{role, content}}")
    return [_message(message, f"{field}[{k}]", ignored) for k, message in enumerate(value)]


def _message(raw: Any, at: str, ignored: set[str]) -> Message:
    if not isinstance(raw, dict):
        raise DataError(f"{at} is {_brief(raw)}; expected an object with role and content")
    message = dict(raw)
    if "from" in message and "role" not in message:  # ShareGPT's names
        message |= {"role": message.pop("from"), "content": message.pop("value", None)}
    written = message.get("role")
    message["role"] = role = ROLE_OF.get(written, written) if isinstance(written, str) else written
    if role not in ROLES:
        raise DataError(f"{at}.role is {_brief(role)}; expected {', '.join(ROLES[:-1])} or {ROLES[-1]}")
    if written == "function_call":
        message["tool_calls"] = _parsed(message["content"], f"{at}.value")
        message["content"] = ""
    if message.get("function_call"):
        raise DataError(f"{at}.function_call: OpenAI's old form; write tool_calls instead")
    reasoning = {key: message.pop(key, None) for key in REASONING_KEYS}
    # Sets with one schema for all rows hold "" where there is none; only an assistant reasons.
    written_keys = [key for key, text in reasoning.items() if text is not None and text != ""]
    if written_keys and role == "assistant":
        message["reasoning_content"] = reasoning[written_keys.pop(0)]
    ignored |= {f"{at.split('[')[0]}[].{key}" for key in written_keys}
    message["content"] = _content(message, at)
    if message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(message["tool_calls"], role, at)
    for key in ("reasoning_content", "name", "tool_call_id"):
        if message.get(key) is not None and not isinstance(message[key], str):
            raise DataError(f"{at}.{key} is {_brief(message[key])}; expected a string")
    if message.get("weight") is not None and (role != "assistant" or message["weight"] not in (0, 1)):
        raise DataError(f"{at}.weight is {_brief(message['weight'])}; expected 0 or 1, on an assistant turn")
    ignored |= {f"{at.split('[')[0]}[].{key}" for key in set(message) - MESSAGE_KEYS}
    empty: tuple = (None, [])  # what Parquet puts where other rows have a value
    return {key: value for key, value in message.items() if key in MESSAGE_KEYS and value not in empty}


def _content(message: Message, at: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message["role"] == "assistant" and message.get("tool_calls"):
        return ""
    if isinstance(content, list):  # OpenAI's parts
        for k, part in enumerate(content):
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise DataError(f"{at}.content[{k}] is {_brief(part)}; only text parts are supported")
        return "".join(part["text"] for part in content)
    raise DataError(f"{at}.content is {_brief(content)}; expected a string")


def _tool_calls(value: Any, role: str, at: str) -> list[dict]:
    """Convert tool calls to OpenAI's form, their arguments parsed: that is what chat templates expect."""
    if role != "assistant":
        raise DataError(f"{at}.tool_calls: only an assistant calls tools; this is a turn of the {role}")
    calls = []
    for k, raw in enumerate(value if isinstance(value, list) else [value]):
        here = f"{at}.tool_calls[{k}]"
        function = raw.get("function", raw) if isinstance(raw, dict) else raw
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f'{here} is {_brief(raw)}; expected {{"function": {{"name": ..., "arguments": ...}}}}')
        arguments = function.get("arguments")
        arguments = _parsed(arguments, f"{here}.arguments") if isinstance(arguments, str) else (arguments or {})
        if not isinstance(arguments, dict):
            raise DataError(f"{here}.arguments is {_brief(arguments)}; expected a JSON object")
        call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        calls.append(call | ({"id": raw["id"]} if isinstance(raw.get("id"), str) else {}))
    return calls


def _tools(value: Any) -> list[dict]:
    value = _parsed(value, "tools") if isinstance(value, str) else value
    if not isinstance(value, list):
        raise DataError(f"tools is {_brief(value)}; expected a list of JSON schemas")
    tools = []
    for k, raw in enumerate(value):
        function = raw.get("function", raw) if isinstance(raw, dict) else raw
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f'tools[{k}] is {_brief(raw)}; expected {{"type": "function", "function": {{"name": ...}}}}'
            )
        tools.append({"type": "function", "function": function})
    return tools


def _parsed(text: Any, field: str) -> Any:
    """Parse JSON that was written as text."""
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise DataError(f"{field}: not valid JSON ({error}): {_brief(text)}") from None


# Checking ---------------------------------------------------------------------------------------------


def _check_conversation(messages: list[Message], needs_answer: bool) -> None:
    for k, message in enumerate(messages):
        if message["role"] == "system" and k > 0:
            raise DataError(f"messages[{k}].role: a system message can only come first")
    answers = [message for message in messages if message["role"] == "assistant"]
    if needs_answer and not answers:
        raise DataError(
            "messages: no assistant turn, so nothing to train on: "
            "add the answer, or set task: causal_lm to train on every token"
        )
    if needs_answer and all(message.get("weight") == 0 for message in answers):
        raise DataError("messages: every assistant turn has weight 0, so nothing is in the loss: remove the row")


def _check_pair(chosen: list[Message], rejected: list[Message]) -> None:
    """Raise DataError unless both conversations share all but their last, different, answer."""
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise DataError(f"{name} ends with {_brief(messages[-1])}; expected an answer to a prompt")
    if chosen[:-1] != rejected[:-1]:
        raise DataError("chosen and rejected: their prompts differ; all but the last message must be the same")
    if chosen[-1] == rejected[-1]:
        raise DataError("chosen and rejected: the same answer, so there is nothing to prefer")


def _check_label(messages: list[Message], labels: list[str]) -> None:
    answer = messages[-1]
    if answer["role"] != "assistant" or answer["content"] not in labels:
        raise DataError(
            f"messages[{len(messages) - 1}] is {_brief(answer['content'])}; the last answer must be one of "
            f"classifier_config.label_tokens ({', '.join(labels)})"
        )


def _names(raw: dict) -> str:
    return ", ".join(map(str, raw)) or "none"


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."
