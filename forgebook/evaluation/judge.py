"""A language model as judge of which of two answers is better, at any OpenAI-compatible endpoint.

    judge = Judge("gpt-5-mini")                                  or base_url="http://localhost:8000/v1"
    verdicts = judge_all(judge, [AnswerPair(conversation, base_answer, tuned_answer, reference), ...])

Judges favor the answer they read first, so each pair is judged twice, once in each order; a verdict that the other
order contradicts is half a win.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from forgebook.errors import ConfigError, ResourceError

__all__ = ["AnswerPair", "Judge", "judge_all"]

INSTRUCTIONS = """\
You compare two answers to the last message of a conversation. Judge what they say: whether it is right, whether it
does what is asked, whether it is complete and to the point. A longer answer is not better for its length, and the
order of the two says nothing. Give one or two sentences of reason, then a last line of exactly one of:
Verdict: A
Verdict: B
Verdict: TIE"""
VERDICT = re.compile(r"verdict\W*(A|B|TIE)\b", re.IGNORECASE)
AT_ONCE = 8


@dataclass(frozen=True)
class Judge:
    """Which model judges, and where. base_url: None is OPENAI_BASE_URL, or OpenAI's own.

    The key is read from OPENAI_API_KEY.
    """

    model: str
    base_url: str | None = None


@dataclass(frozen=True)
class AnswerPair:
    """Two answers to one conversation; reference: a right answer, if there is one."""

    messages: list[dict[str, Any]]
    base: str
    tuned: str
    reference: str | None = None


def judge_all(
    judge: Judge, pairs: list[AnswerPair], on_progress: Callable[[int], None] = lambda done: None
) -> list[float | None]:
    """Judge each pair in both orders, several at once.

    Returns for each pair the points of the tuned answer: 1, 0, or between them for ties and verdicts that depend on
    the order; None without a verdict in either order.

    Raises ConfigError without the package or a key, ResourceError if the endpoint fails or cannot be reached.
    """
    try:
        import openai
    except ImportError:
        raise ConfigError("metric=judge needs the package openai: pip install -r requirements-dev.txt") from None
    if not os.environ.get("OPENAI_API_KEY"):
        raise ConfigError("metric=judge needs a key in OPENAI_API_KEY (any text for an endpoint that requires none)")
    client = openai.OpenAI(base_url=judge.base_url, max_retries=5)  # it waits longer before each retry
    questions = [(pair, is_swapped) for pair in pairs for is_swapped in (False, True)]
    points: list[float | None] = []
    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for one in pool.map(lambda question: _points(client, judge.model, *question), questions):
                points.append(one)
                on_progress(len(points) // 2)
    except openai.OpenAIError as error:
        raise ResourceError(
            f"the judge {judge.model} at {client.base_url} gave no answer: {error}. Check base_url, judge and "
            "OPENAI_API_KEY"
        ) from None
    verdicts = ([one for one in points[k : k + 2] if one is not None] for k in range(0, len(points), 2))
    return [sum(both) / len(both) if both else None for both in verdicts]


def _points(client, model: str, pair: AnswerPair, is_swapped: bool) -> float | None:
    """Return the points of the tuned answer in one order, None without a verdict. A is the base's unless swapped."""
    import openai

    messages = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": _question(pair, is_swapped)}]
    try:
        reply = client.chat.completions.create(model=model, messages=messages, temperature=0)
    except openai.BadRequestError as error:
        if "temperature" not in str(error):
            raise
        # Reasoning models take no temperature.
        reply = client.chat.completions.create(model=model, messages=messages)
    verdicts = VERDICT.findall((reply.choices[0].message.content or "") if reply.choices else "")
    if not verdicts:
        return None
    verdict = verdicts[-1].upper()
    return 0.5 if verdict == "TIE" else float(verdict == ("A" if is_swapped else "B"))


def _question(pair: AnswerPair, is_swapped: bool) -> str:
    first, second = (pair.tuned, pair.base) if is_swapped else (pair.base, pair.tuned)
    conversation = "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in pair.messages)
    right = f"\n\n# A right answer, for comparison\n{pair.reference}" if pair.reference else ""
    return f"# Conversation\n{conversation}{right}\n\n# Answer A\n{first}\n\n# Answer B\n{second}"
