"""A row as it was written -> an example as it is trained, or the reason why it cannot be.

    example, notes = parse_row(raw, "train.jsonl:7", task="instruction_tuning")

The format is detected from the keys, never set; the data report counts the rows of each.

    messages          {"messages": [{"role", "content"}, ...], "tools": [...]}       OpenAI chat
    sharegpt          {"conversations": [{"from", "value"}, ...]}
    alpaca            {"instruction", "input", "output"}, also "system" and "history"
    prompt/completion {"prompt", "completion"}, texts or lists of messages; the prompt's answers are not in the loss
    preference        {"chosen": [...], "rejected": [...]}, conversations or answers to a prompt in any form above;
                      {"input", "preferred_output", "non_preferred_output"}, OpenAI's
    text              {"text": "..."}                                                task: causal_lm

Beside each conversation may stand "system", a text, and "tools", or OpenAI's former "functions", or "tool_defs". Lists
may be written as JSON text. Columns of other names are mapped to these before: see `columns`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from forgebook.data.columns import MappedRow
from forgebook.data.image_parts import PROMPTS, image_base, place_images
from forgebook.data.json_values import brief
from forgebook.data.messages import (
    TOOL_KEYS,
    Message,
    is_turn,
    parse_field,
    read_messages,
    read_text,
    read_tools,
    without_filled_arguments,
)
from forgebook.data.readers import FileChunk, read_chunk
from forgebook.data.row_checks import check_conversation, check_label, check_media, check_pair
from forgebook.errors import DataError

__all__ = ["NAME_KEY", "Example", "RowNotes", "UnknownFormatError", "parse_chunk", "parse_row"]

# Read as JSON where they are text, as CSV and many Parquet files have them; the others may hold an answer in JSON.
JSON_KEYS = ("messages", "conversations", *TOOL_KEYS, "history")
TEXT_OR_JSON_KEYS = ("prompt", "completion", "chosen", "rejected")
ALPACA_QUESTION = ("instruction", "input", "history")
QUESTION_KEYS = ("prompt", "question", "query")  # of a pair
SHARED_KEYS = {"system", *TOOL_KEYS}
UNMASKED = ("causal_lm", PROMPTS)  # they need no answer
NAME_KEY = "messages[].name"  # of a turn that is no tool's result
# OpenAI's fine-tuning API names the parts of a pair like this; "input" holds messages and tools.
OPENAI_PAIR = ("input", "preferred_output", "non_preferred_output")
LONGEST_NAMES = 300  # characters of a row's keys in a message
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
    def line(self) -> int:
        """The line of its file."""
        return int(self.where.rsplit(":", 1)[1])

    @property
    def conversation(self) -> list[Message]:
        """The messages. Raises DataError for plain text."""
        if self.messages is None:
            raise DataError(f"{self.where}: this is a text; expected messages")
        return self.messages


@dataclass(frozen=True)
class RowNotes:
    """What the data report counts of a row: its format, the keys that nothing reads, an empty answer in the loss."""

    format: str
    ignored: tuple[str, ...] = ()
    has_empty_answer: bool = False


class UnknownFormatError(DataError):
    """A row whose keys are those of no format. keys: its keys, where columns may be mapped."""

    def __init__(self, message: str, keys: tuple[str, ...]):
        super().__init__(message)
        self.keys = keys


def parse_chunk(
    chunk: FileChunk, task: str, labels: Iterable[str] = ()
) -> Iterator[tuple[Example, RowNotes] | DataError]:
    """Read and check the rows of a chunk; a DataError in the place of one that cannot be used."""
    labels = tuple(labels)
    base = image_base(chunk.source.uri)
    system = chunk.source.mapping.system if chunk.source.mapping else None
    for where, raw in read_chunk(chunk):
        try:
            yield raw if isinstance(raw, DataError) else parse_row(raw, where, task, labels, base, system)
        except DataError as error:
            yield error


def parse_row(
    raw: Any, where: str, task: str, labels: Iterable[str] = (), base: str | None = None, system: str | None = None
) -> tuple[Example, RowNotes]:
    """Detect the format of one row, convert and check it.

    labels: the allowed last answers. base: where relative image paths begin. system: for rows without a system message.

    Raises DataError: `where: field: what it is, what to do`.
    """
    try:
        example, notes = _detect(raw, where, task, system)
        image_keys = set[str]()
        for messages in (example.messages, example.rejected):
            if messages is not None:
                image_keys = place_images(raw, messages, task, base)
                check_media(raw, messages)
                check_conversation(messages, needs_answer=task not in UNMASKED)
        if example.messages is not None and example.rejected is not None:
            check_pair(example.messages, example.rejected)
        if task == "classification" and example.messages is not None:
            check_label(example.messages, list(labels))
        notes = dataclasses.replace(notes, ignored=tuple(key for key in notes.ignored if key not in image_keys))
        if isinstance(raw, MappedRow):
            notes = RowNotes("mapped columns", tuple(sorted({*notes.ignored, *raw.unused})))
        return example, _note_unused_marks(example, _note_messages(example, notes), task)
    except UnknownFormatError as error:
        raise UnknownFormatError(f"{where}: {error}", error.keys) from None
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


# Detecting the format ---------------------------------------------------------------------------------


def _detect(raw: Any, where: str, task: str, system: str | None) -> tuple[Example, RowNotes]:
    if not isinstance(raw, dict):
        kind = JSON_TYPES.get(type(raw), type(raw).__name__)
        raise DataError(f"the row is a JSON {kind}; expected an object with the key 'messages'")
    ignored = set[str]()
    raw = _decoded(_with_openai_pair(raw, ignored))
    has_pair = raw.get("chosen") is not None and raw.get("rejected") is not None
    if task == "preference_tuning":
        if not has_pair:
            if str(raw.get("label")).lower() in ("true", "false"):
                raise DataError(
                    "label marks one answer as good or bad, and preference_tuning compares two: put both answers to a "
                    "prompt into one row, as chosen and rejected"
                )
            if half := next((key for key in ("chosen", "rejected") if raw.get(key) is not None), None):
                other = "rejected" if half == "chosen" else "chosen"
                raise DataError(f"{half} without {other}: remove the row, or add the other answer")
            raise _unknown(f"no 'chosen' and 'rejected' (its keys: {_names(raw)}), which preference_tuning needs", raw)
        used, pair = _pair(raw, ignored)
        tools = read_tools(raw)
        chosen, rejected = (without_filled_arguments(_with_system(raw, messages, system), tools) for messages in pair)
        example = Example(where, messages=chosen, rejected=rejected, tools=tools)
        return example, _notes("preference", raw, {"chosen", "rejected", *used} | SHARED_KEYS, ignored)
    if conversation := _conversation(raw, ignored, task):
        name, used, messages = conversation
        if str(raw.get("label")).lower() == "false" and task != "classification":  # text in CSV
            raise DataError(
                "label is false, which marks an answer to avoid, and training would teach it: remove the row, or the "
                "key label if it means something else; task: preference_tuning takes pairs of chosen and rejected"
            )
        tools = read_tools(raw)
        messages = without_filled_arguments(_with_system(raw, messages, system), tools)
        example = Example(where, messages=messages, tools=tools)
        return example, _notes(name, raw, {*used} | SHARED_KEYS, ignored)
    if task in UNMASKED and isinstance(raw.get("text"), str) and raw["text"]:
        return Example(where, text=raw["text"]), _notes(
            "text", raw, {"text"}, ignored | {"system"} if system else ignored
        )
    if has_pair:
        raise DataError("a pair of 'chosen' and 'rejected': set task: preference_tuning to train on it")
    if "messages" in raw:
        raise DataError(f"messages is {brief(raw['messages'])}; expected a non-empty list of {{role, content}}")
    also = " or a non-empty 'text'" if task in UNMASKED else ""
    fix = "; a 'text' is for task: causal_lm" if isinstance(raw.get("text"), str) and not also else ""
    raise _unknown(f"no 'messages' (its keys: {_names(raw)}): add a list of messages{also}{fix}", raw)


def _unknown(message: str, raw: dict) -> DataError:
    """Make the error of a row of no known format; a mapping is suggested where several columns could be mapped."""
    talk = next((key for key, value in raw.items() if key not in TEXT_OR_JSON_KEYS and _is_conversation(value)), None)
    if talk is not None and talk not in ("messages", "conversations"):  # beside another key it would hold one
        return DataError(f"{message}; {talk!r} holds one: rename it, or map it with columns: {{messages: {talk}}}")
    keys = tuple(key for key, value in raw.items() if value not in (None, "", [], {}))
    return UnknownFormatError(message, keys) if len(keys) > 1 else DataError(message)


def _is_conversation(value: Any) -> bool:
    """Return whether a column of any name holds messages."""
    return isinstance(value, list) and bool(value) and all(map(is_turn, value))


def _with_openai_pair(raw: dict, ignored: set[str]) -> dict:
    """Give the pair of OpenAI's fine-tuning API the names of others."""
    if not all(raw.get(key) is not None for key in OPENAI_PAIR):
        return raw
    asked = raw["input"]
    if isinstance(asked, str):
        asked = parse_field(asked, "input")
    if not isinstance(asked, dict) or not asked.get("messages"):
        raise DataError(f"input is {brief(asked)}; expected an object with messages")
    rest = {key: value for key, value in raw.items() if key not in OPENAI_PAIR}
    pair = {"prompt": asked["messages"], "chosen": raw[OPENAI_PAIR[1]], "rejected": raw[OPENAI_PAIR[2]]}
    pair |= {"tools": asked["tools"]} if asked.get("tools") else {}
    if twice := [key for key in pair if rest.get(key)]:
        raise DataError(f"{twice[0]} and {OPENAI_PAIR[1]} are both there: keep one of the formats")
    ignored |= {f"input.{key}" for key, value in asked.items() if key not in ("messages", "tools") and value}
    return rest | pair


def _conversation(raw: dict, ignored: set[str], task: str) -> tuple[str, tuple[str, ...], list[Message]] | None:
    """Return the format of a conversation, the keys that it takes, and its messages without a system text beside."""
    if raw.get("messages") is not None:
        return "messages", ("messages",), read_messages(raw["messages"], "messages", ignored)
    if raw.get("conversations") is not None:
        return "sharegpt", ("conversations",), read_messages(raw["conversations"], "conversations", ignored)
    if raw.get("instruction") is not None and raw.get("output") is not None:
        answer = {"role": "assistant", "content": _text_of(raw, "output")}
        return "alpaca", (*ALPACA_QUESTION, "output"), [*_alpaca_question(raw), answer]
    if raw.get("prompt") is not None and raw.get("completion") is not None:
        prompt = _as_messages(raw["prompt"], "prompt", "user", ignored)
        completion = _as_messages(raw["completion"], "completion", "assistant", ignored)
        messages, count = _joined(prompt, completion, "completion")
        if task not in UNMASKED:
            messages = _with_prompt_unsupervised(messages, count)
        return "prompt/completion", ("prompt", "completion"), messages
    return None


def _pair(raw: dict, ignored: set[str]) -> tuple[tuple[str, ...], list[list[Message]]]:
    """Return the keys that hold the prompt of a pair, and both conversations."""
    answers = [_as_messages(raw[key], key, "assistant", ignored) for key in ("chosen", "rejected")]
    whole = any(messages and messages[0]["role"] != "assistant" for messages in answers)
    keys: tuple[str, ...] = ()
    prompt: list[Message] = []
    names = QUESTION_KEYS[:1] if whole else QUESTION_KEYS  # beside whole conversations the others may be anything
    if asked := next((key for key in names if raw.get(key)), None):
        keys, prompt = (asked,), _as_messages(raw[asked], asked, "user", ignored)
    elif not whole:  # else what stands beside repeats it
        named = next((key for key in ("messages", "conversations") if raw.get(key)), None)
        if named:
            keys, prompt = (named,), read_messages(raw[named], named, ignored)
        elif raw.get("instruction"):
            keys, prompt = ALPACA_QUESTION, _alpaca_question(raw)
    wholes = [messages for messages in answers if messages and messages[0]["role"] != "assistant"]
    if not prompt and len(wholes) == 1 and wholes[0][-1]["role"] == "assistant":  # the other is an answer to its prompt
        prompt = wholes[0][:-1]
    pair = zip(("chosen", "rejected"), answers, strict=True)
    if prompt and prompt[-1]["role"] == "assistant" and not whole:  # a conversation with one of the answers
        if _without_margins(prompt[-1]) not in [_without_margins(one[0]) for one in answers if one]:
            raise DataError(f"{keys[0]} ends with an answer, neither chosen nor rejected: end it with the question")
        prompt = prompt[:-1]
    return keys, [_joined(prompt, messages, name)[0] for name, messages in pair]


def _with_prompt_unsupervised(messages: list[Message], count: int) -> list[Message]:
    """Take the assistant turns of a prompt, the first `count` messages, out of the loss, unless they are marked."""
    if not any(message["role"] == "assistant" for message in messages[count:]):
        raise DataError("completion holds no assistant turn, so nothing to train on")
    prompt = [{"weight": 0, **message} if message["role"] == "assistant" else message for message in messages[:count]]
    return prompt + messages[count:]


def _joined(prompt: list[Message], answer: list[Message], key: str) -> tuple[list[Message], int]:
    """Put a prompt before what continues it, unless that repeats it, in whole or in part.

    Returns the messages, and how many of them are the prompt and what precedes it.
    """
    if not prompt or not answer or answer[0]["role"] == "assistant":
        return prompt + answer, len(prompt)
    before, after = ([_without_margins(message) for message in messages] for messages in (prompt, answer))
    for start in range(len(after)):
        if after[start : start + len(before)] == before:
            return answer, start + len(before)
    for count in range(min(len(before), len(after)), 0, -1):
        if before[-count:] == after[:count]:
            return prompt + answer[count:], len(prompt)
    if prompt[-1]["role"] == "assistant":
        return prompt + answer, len(prompt)
    raise DataError(f"prompt and {key} both hold a question, and not the same one: remove prompt, or its part of {key}")


def _without_margins(message: Message) -> Message:
    return message | {"content": message["content"].strip()}


def _with_system(raw: dict, messages: list[Message], default: str | None) -> list[Message]:
    """Put the system text that stands beside the messages before them, or the default if there is none at all."""
    has_own = bool(messages) and messages[0]["role"] == "system"
    text = read_text(raw["system"], "system") if raw.get("system") else None if has_own else default
    if text is None:
        return messages
    system = {"role": "system", "content": text}
    if has_own:
        if _without_margins(messages[0]) == _without_margins(system):
            return messages
        raise DataError("system: the messages begin with another system message: keep one of them")
    return [system, *messages]


def _notes(name: str, raw: dict, used: set[str], ignored: set[str]) -> RowNotes:
    empty: tuple = (None, "", [], {})
    unused = {key for key, value in raw.items() if key not in used and value not in empty}
    return RowNotes(name, tuple(sorted(unused | ignored)))


def _note_messages(example: Example, notes: RowNotes) -> RowNotes:
    """Add names of speakers, which few templates show, to the ignored keys; note an answer that says nothing."""
    messages, rejected = example.messages or [], example.rejected or []
    named = any("name" in message and message["role"] != "tool" for message in messages + rejected)
    return RowNotes(
        notes.format,
        (*notes.ignored, NAME_KEY) if named else notes.ignored,
        any(message["role"] == "assistant" and _says_nothing(message) for message in messages),
    )


def _says_nothing(message: Message) -> bool:
    says = message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content")
    return not says and message.get("weight") != 0


def _note_unused_marks(example: Example, notes: RowNotes, task: str) -> RowNotes:
    """Add the marks of turns that are not in the loss to the ignored keys, where the task trains every token."""
    if task != "causal_lm" or not any(message.get("weight") == 0 for message in example.messages or ()):
        return notes
    mark = "messages[].weight (causal_lm trains every token)"
    return dataclasses.replace(notes, ignored=(*notes.ignored, mark))


def _decoded(raw: dict) -> dict:
    """Parse what is written as JSON text."""
    decoded = dict(raw)
    for key in (*JSON_KEYS, *TEXT_OR_JSON_KEYS):
        text = raw.get(key)
        if not isinstance(text, str) or not text.lstrip().startswith(("[", "{")):
            continue
        if key in JSON_KEYS:
            decoded[key] = parse_field(text, key)
            continue
        with contextlib.suppress(DataError):  # a text that looks like JSON
            value = parse_field(text, key)
            if _is_conversation(turns := value if isinstance(value, list) else [value]):
                decoded[key] = turns
    return decoded


def _alpaca_question(raw: dict) -> list[Message]:
    """Turn instruction and input into one question, as Alpaca's own prompt does: the input below."""
    messages = []
    history = raw.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"history is {brief(history)}; expected a list of [question, answer] pairs")
    for turn in history:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise DataError(f"history has {brief(turn)}; expected [question, answer] pairs")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question = "\n\n".join(text for text in (_text_of(raw, "instruction"), _text_of(raw, "input")) if text.strip())
    return [*messages, {"role": "user", "content": question}]


def _text_of(raw: dict, key: str) -> str:
    if raw.get(key) is not None and not isinstance(raw[key], str):
        raise DataError(f"{key} is {brief(raw[key])}; expected a string")
    return raw.get(key) or ""


def _as_messages(value: Any, field: str, role: str, ignored: set[str]) -> list[Message]:
    """Read a text as one message of a role; or one message, or a list of them."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return read_messages([value] if isinstance(value, dict) else value, field, ignored) if value else []


def _names(raw: dict) -> str:
    names = ", ".join(map(str, raw)) or "none"
    return names if len(names) <= LONGEST_NAMES else f"{names[:LONGEST_NAMES]}..."
