"""One row as it was written -> one Row as it is trained, or every reason why it cannot be.

    row, notes = parse_row(raw, "train.jsonl:7", task="instruction_tuning")

Formats are recognised by their keys, never by a setting; the data report says how many rows came in which.

    messages         {"messages": [{"role", "content"}, ...], "tools": [...]}       OpenAI chat
    sharegpt         {"conversations": [{"from", "value"}, ...]}
    alpaca           {"instruction", "input", "output"}, also "system" and "history"
    prompt/completion {"prompt", "completion"}, texts or lists of messages
    preference       {"chosen": [...], "rejected": [...]}, conversations or answers to a "prompt"
    text             {"text": "..."}                                                task: causal_lm
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from forgebook.errors import DataError

__all__ = ["Notes", "Row", "parse_row"]

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


@dataclass(frozen=True)
class Row:
    """One checked row; `where` is its file:line.

    messages: a conversation, or the chosen one of a preference pair; text: a plain text instead.
    tools: what the assistant may call, as OpenAI's JSON schemas.
    rejected: the other conversation of a preference pair.
    """

    where: str
    messages: list[Message] | None = None
    text: str | None = None
    tools: list[dict] | None = None
    rejected: list[Message] | None = None


@dataclass(frozen=True)
class Notes:
    """What the data report says of a row: its format, and the keys that nothing reads."""

    format: str
    ignored: tuple[str, ...] = ()


def parse_row(raw: Any, where: str, task: str, labels: Iterable[str] = ()) -> tuple[Row, Notes]:
    """Recognise, convert and check one row.

    labels: of task classification, what the last answer may be.

    Raises DataError: `where: field: what it is, what to do`.
    """
    try:
        row, notes = _recognise(raw, where, task)
        for messages in (row.messages, row.rejected):
            if messages is not None:
                _check_conversation(messages, needs_answer=task != "causal_lm")
        if row.rejected is not None:
            _check_pair(row)
        if task == "classification":
            _check_label(row, list(labels))
        return row, notes
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


# Recognising ------------------------------------------------------------------------------------------


def _recognise(raw: Any, where: str, task: str) -> tuple[Row, Notes]:
    if not isinstance(raw, dict):
        raise DataError(f"got a JSON {type(raw).__name__}, need an object with the key 'messages'")
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
        row = Row(where, messages=pair[0], rejected=pair[1], tools=tools)
        return row, _notes("preference", raw, {"prompt", "chosen", "rejected", "tools"}, ignored)
    if raw.get("messages") is not None:
        messages = _messages(raw["messages"], "messages", ignored)
        return Row(where, messages=messages, tools=tools), _notes("messages", raw, {"messages", "tools"}, ignored)
    if raw.get("conversations") is not None:
        messages = _messages(raw["conversations"], "conversations", ignored)
        messages = _system(raw) + messages
        row = Row(where, messages=messages, tools=tools)
        return row, _notes("sharegpt", raw, {"conversations", "system", "tools"}, ignored)
    if raw.get("instruction") is not None and raw.get("output") is not None:
        row = Row(where, messages=_alpaca(raw))
        return row, _notes("alpaca", raw, {"instruction", "input", "output", "system", "history"}, ignored)
    if raw.get("prompt") is not None and raw.get("completion") is not None:
        messages = _as_messages(raw["prompt"], "prompt", "user", ignored)
        messages = _system(raw) + messages + _as_messages(raw["completion"], "completion", "assistant", ignored)
        row = Row(where, messages=messages, tools=tools)
        return row, _notes("prompt/completion", raw, {"prompt", "completion", "system", "tools"}, ignored)
    if task == "causal_lm" and isinstance(raw.get("text"), str) and raw["text"]:
        return Row(where, text=raw["text"]), _notes("text", raw, {"text"}, ignored)
    if has_pair:
        raise DataError("a pair of 'chosen' and 'rejected': set task: preference_tuning to train on it")
    if "messages" in raw:
        raise DataError(f"messages: need a non-empty list of {{role, content}}, got {_brief(raw['messages'])}")
    also = " or a non-empty 'text'" if task == "causal_lm" else ""
    mend = "; a 'text' is for task: causal_lm" if isinstance(raw.get("text"), str) and not also else ""
    raise DataError(f"no 'messages' (its keys: {_names(raw)}): add a list of messages{also}{mend}")


def _notes(name: str, raw: dict, used: set[str], ignored: set[str]) -> Notes:
    return Notes(name, tuple(sorted((set(raw) - used) | ignored)))


def _system(raw: dict) -> list[Message]:
    return [{"role": "system", "content": raw["system"]}] if isinstance(raw.get("system"), str) else []


def _alpaca(raw: dict) -> list[Message]:
    """Turn instruction and input into one question, as Alpaca's own prompt does: the input below."""
    for key in ("instruction", "input", "output"):
        if raw.get(key) is not None and not isinstance(raw[key], str):
            raise DataError(f"{key}: need a string, got {_brief(raw[key])}")
    messages = _system(raw)
    for turn in raw.get("history") or []:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise DataError(f"history: need [question, answer] pairs, got {_brief(turn)}")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question = "\n\n".join(text for text in (raw["instruction"], raw.get("input")) if text)
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": raw["output"]}]


def _as_messages(value: Any, field: str, role: str, ignored: set[str]) -> list[Message]:
    """Take a text as one message of a role, or a list of messages as it is."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _messages(value, field, ignored) if value else []


def _messages(value: Any, field: str, ignored: set[str]) -> list[Message]:
    """Bring a list of messages to OpenAI's keys and types."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{field}: need a non-empty list of {{role, content}}, got {_brief(value)}")
    return [_message(message, f"{field}[{k}]", ignored) for k, message in enumerate(value)]


def _message(raw: Any, at: str, ignored: set[str]) -> Message:
    if not isinstance(raw, dict):
        raise DataError(f"{at}: need an object with role and content, got {_brief(raw)}")
    message = dict(raw)
    if "from" in message and "role" not in message:  # ShareGPT's names
        message |= {"role": message.pop("from"), "content": message.pop("value", None)}
    written = message.get("role")
    message["role"] = role = ROLE_OF.get(written, written) if isinstance(written, str) else written
    if role not in ROLES:
        raise DataError(f"{at}.role: got {_brief(role)}, need one of {', '.join(ROLES)}")
    if written == "function_call":
        message["tool_calls"] = _parsed(message["content"], f"{at}.value")
        message["content"] = ""
    if message.get("function_call"):
        raise DataError(f"{at}.function_call: OpenAI's former form: write tool_calls instead")
    for key in REASONING_KEYS:
        if message.get(key) is not None:
            message["reasoning_content"] = message.pop(key) if key != "reasoning_content" else message[key]
            break
    message["content"] = _content(message, at)
    if message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(message["tool_calls"], role, at)
    for key in ("reasoning_content", "name", "tool_call_id"):
        if message.get(key) is not None and not isinstance(message[key], str):
            raise DataError(f"{at}.{key}: need a string, got {_brief(message[key])}")
    if message.get("weight") is not None and (role != "assistant" or message["weight"] not in (0, 1)):
        raise DataError(f"{at}.weight: got {_brief(message['weight'])}, need 0 or 1, on an assistant's turn")
    ignored |= {f"{at.split('[')[0]}[].{key}" for key in set(message) - MESSAGE_KEYS}
    empty = (None, [])  # what Parquet puts where other rows have a value
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
                raise DataError(f"{at}.content[{k}]: only text can be trained so far, got {_brief(part)}")
        return "".join(part["text"] for part in content)
    raise DataError(f"{at}.content: need a string, got {_brief(content)}")


def _tool_calls(value: Any, role: str, at: str) -> list[dict]:
    """Bring tool calls to OpenAI's form, their arguments parsed: that is what chat templates expect."""
    if role != "assistant":
        raise DataError(f"{at}.tool_calls: only an assistant calls tools, this is a turn of {role}")
    calls = []
    for k, raw in enumerate(value if isinstance(value, list) else [value]):
        here = f"{at}.tool_calls[{k}]"
        function = raw.get("function", raw) if isinstance(raw, dict) else raw
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f'{here}: need {{"function": {{"name": ..., "arguments": ...}}}}, got {_brief(raw)}')
        arguments = function.get("arguments")
        arguments = _parsed(arguments, f"{here}.arguments") if isinstance(arguments, str) else (arguments or {})
        if not isinstance(arguments, dict):
            raise DataError(f"{here}.arguments: need a JSON object, got {_brief(arguments)}")
        call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        calls.append(call | ({"id": raw["id"]} if isinstance(raw.get("id"), str) else {}))
    return calls


def _tools(value: Any) -> list[dict]:
    value = _parsed(value, "tools") if isinstance(value, str) else value
    if not isinstance(value, list):
        raise DataError(f"tools: need a list of JSON schemas, got {_brief(value)}")
    tools = []
    for k, raw in enumerate(value):
        function = raw.get("function", raw) if isinstance(raw, dict) else raw
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f'tools[{k}]: need {{"type": "function", "function": {{"name": ...}}}}, got {_brief(raw)}')
        tools.append({"type": "function", "function": function})
    return tools


def _parsed(text: Any, field: str) -> Any:
    """Parse JSON that was written as a text."""
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
        raise DataError("messages: every assistant turn has weight 0, so nothing is trained: leave the row out")


def _check_pair(row: Row) -> None:
    """Raise DataError unless both conversations share all but their last, different, answer."""
    for name, messages in (("chosen", row.messages), ("rejected", row.rejected)):
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise DataError(f"{name}: must end with an answer to a prompt, got {_brief(messages[-1])}")
    if row.messages[:-1] != row.rejected[:-1]:
        raise DataError("chosen and rejected: their prompts differ; all but the last message must be the same")
    if row.messages[-1] == row.rejected[-1]:
        raise DataError("chosen and rejected: the same answer, so there is nothing to prefer")


def _check_label(row: Row, labels: list[str]) -> None:
    answer = row.messages[-1]
    if answer["role"] != "assistant" or answer["content"] not in labels:
        raise DataError(
            f"messages[{len(row.messages) - 1}]: the last answer must be one of classifier_config.label_tokens "
            f"({', '.join(labels)}), got {_brief(answer['content'])}"
        )


def _names(raw: dict) -> str:
    return ", ".join(map(str, raw)) or "none"


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."
