"""Where a generation prompt ends inside a thought or after one, and how an answer continues it.

Some templates open a thought in the generation prompt (`<think>`), or close an empty one (`<think></think>`), and begin
no finished answer with it. The answer that a prompt leads to is then the prompt and what the message adds.
"""

from __future__ import annotations

import itertools
import re

__all__ = [
    "added_to_prompt",
    "after_thought",
    "begins_with_empty_thought",
    "closes_thought",
    "fill_thought",
    "opened_thought",
]

# <think>, <thought>, <seed:think>, <|inner_thoughts_begin|>; [THINK]; Cohere's <|START_THINKING|>; Gemma 4's channel.
NAME = r"[\w:]*(?:think|thought|reason)[\w:]*"
OPENED = re.compile(
    rf"(?:<(?P<tag>{NAME})>|\[(?P<bracket>THINK)\]|<\|START_(?P<start>THINKING)\|>|(?P<channel><\|channel>thought))\s*$",
    re.IGNORECASE,
)
CLOSED = re.compile(rf"(?:</{NAME}>|\[/THINK\]|<\|END_THINKING\|>|<channel\|>)\s*$", re.IGNORECASE)
EMPTY = re.compile(rf"(\s*<{NAME}>)(\s*)(</{NAME}>)", re.IGNORECASE)
OPEN_TAG = re.compile(r"(?:<[^<>\s]*|\[[^\[\]\s]*)$")


def closes_thought(prompt: str) -> bool:
    """Return whether a generation prompt ends after a thought, so that none can follow."""
    return CLOSED.search(prompt) is not None


def opened_thought(prompt: str) -> str:
    """Return what closes the thought in which a generation prompt ends; empty if it ends in none."""
    match = OPENED.search(prompt)
    if match is None:
        return ""
    if match["tag"]:
        return f"</{match['tag']}>"
    if match["bracket"]:
        return "[/THINK]"
    return "<|END_THINKING|>" if match["start"] else "<channel|>"


def after_thought(answer: str, closing: str = "") -> str | None:
    """Return what an answer says after its thought; None if the thought does not end.

    closing: what closes the thought that the prompt opened, see `opened_thought`; empty if it opened none.
    """
    closing = "</think>" if answer.lstrip().startswith("<think>") else closing
    if not closing:
        return answer
    _, end, rest = answer.partition(closing)
    return rest.strip() if end else None


def begins_with_empty_thought(turn: str) -> bool:
    """Return whether a turn begins with a thought that holds nothing."""
    return EMPTY.match(turn) is not None


def fill_thought(turn: str, reasoning: str) -> str:
    """Write reasoning into the empty thought with which a turn begins."""
    match = EMPTY.match(turn)
    if match is None:
        return turn
    half = len(match[2]) // 2
    return f"{match[1]}{match[2][:half]}{reasoning}{match[2][half:]}{match[3]}{turn[match.end() :]}"


def added_to_prompt(prompt: str, header: str, turn: str, reasoning: str) -> str:
    """Return what follows a generation prompt, where a finished turn begins in another way than the prompt.

    prompt, turn: the generation prompt and the finished turn, from the end of the message before them on.
    header: the turn up to its content. reasoning: the message's, which the turn leaves out.
    """
    pairs = zip(prompt, header, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    if shared < len(prompt) and (torn := OPEN_TAG.search(prompt[:shared])):
        shared = torn.start()
    added = turn[shared:]
    closing = opened_thought(prompt)
    if not closing:
        return added
    if added.lstrip().startswith(closing):
        return reasoning + added
    return f"{reasoning}\n{closing}\n\n{added}"
