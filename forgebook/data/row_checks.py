"""Checks of one row's conversation, preference pair or label, once its messages are in OpenAI's form."""

from __future__ import annotations

from forgebook.data.json_values import brief
from forgebook.data.messages import Message, with_whole_thought
from forgebook.errors import DataError

__all__ = ["check_conversation", "check_label", "check_media", "check_pair"]

# What stands for a recording in a text, and the keys of a row that hold it (LLaMA-Factory, ms-swift, TRL).
MEDIA = {f"<{kind}>": (kind, f"{kind}s", f"{kind}_path", f"{kind}_paths") for kind in ("video", "audio")}


def check_conversation(messages: list[Message], needs_answer: bool) -> None:
    """Raise DataError for a conversation out of order or, where one is needed, without an answer in the loss.

    An answer whose prompt opened its thought gets the whole thought, in place.
    """
    for k, message in enumerate(messages):
        if message["role"] == "system" and k > 0:
            raise DataError(f"messages[{k}].role: a system message can only come first")
        if message["role"] == "assistant":
            message["content"] = with_whole_thought(message["content"], f"messages[{k}].content")
    answers = [message for message in messages if message["role"] == "assistant"]
    if needs_answer and not answers:
        raise DataError(
            "messages: no assistant turn, so nothing to train on: "
            "add the answer, or set task: causal_lm to train on every token"
        )
    if needs_answer and all(message.get("weight") == 0 for message in answers):
        raise DataError(
            "messages: every assistant turn has weight 0, or train: false, so nothing is in the loss: remove the row"
        )


def check_pair(chosen: list[Message], rejected: list[Message]) -> None:
    """Raise DataError unless both conversations share all but their last, different, answer."""
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        _check_last_is_in_loss(name, messages)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise DataError(f"{name} ends with {brief(messages[-1])}; expected an answer to a prompt")
    if all(message["role"] == "system" for message in chosen[:-1]):
        raise DataError("chosen and rejected answer no question: add prompt, or the question to both")
    if chosen[:-1] != rejected[:-1]:
        raise DataError("chosen and rejected: their prompts differ; all but the last message must be the same")
    if chosen[-1] == rejected[-1]:
        raise DataError("chosen and rejected: the same answer, so there is nothing to prefer")


def _check_last_is_in_loss(name: str, messages: list[Message]) -> None:
    if messages and messages[-1].get("weight") == 0:
        raise DataError(f"{name}: the last answer has weight 0, or train: false, but this task trains it alone")


def check_label(messages: list[Message], labels: list[str]) -> None:
    """Raise DataError unless the last answer is one of the labels."""
    _check_last_is_in_loss("messages", messages)
    answer = messages[-1]
    if answer["role"] != "assistant" or answer["content"] not in labels:
        raise DataError(
            f"messages[{len(messages) - 1}] is {brief(answer['content'])}; the last answer must be one of "
            f"classifier_config.label_tokens ({', '.join(labels)})"
        )


def check_media(row: dict, messages: list[Message]) -> None:
    """Raise DataError for a row with videos or sound that its messages mention."""
    for mark, keys in MEDIA.items():
        if (key := next((key for key in keys if row.get(key)), None)) and any(mark in m["content"] for m in messages):
            raise DataError(f"{key}: the messages mention {mark}, and nothing trains on it: remove the row")
