"""Answers beside their references: each is right, or wrong in a way that has a name.

Compared is what an answer says after its thought, if it has one; one whose thought does not end is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from forgebook.data import tool_accuracy
from forgebook.data.messages import split_thought
from forgebook.data.tools import calls_of_message
from forgebook.errors import ConfigError
from forgebook.evaluation import statistics
from forgebook.evaluation.judge import AnswerPair, Judge, judge_all
from forgebook.evaluation.results import (
    Comparison,
    Evaluation,
    Score,
    make_evaluation,
    message_text,
    share_score,
    statistic_score,
)

if TYPE_CHECKING:
    from forgebook.evaluation.logprobs import OnProgress

__all__ = ["Said", "Turn", "judged", "said_by", "scored"]

# What a model says after its thoughts, answer by answer; None where a thought does not end.
Said = list[str | None]


@dataclass(frozen=True)
class Turn:
    """One turn to answer. example: the number of its conversation, which may have several; where: file:line of it."""

    example: int
    where: str
    messages: list[dict[str, Any]]
    tools: list[dict] | None
    reference: dict[str, Any]


def said_by(message: dict[str, Any]) -> str:
    """Return what a reference's content says after its thought."""
    return split_thought(message["content"])[1]


def scored(metric: str, turns: list[Turn], compared: Comparison, said: list[Said]) -> Evaluation:
    """Compare the answers with their references; said: by the base and the tuned model."""
    kinds = [[_mistake(metric, turn, answer) for turn, answer in zip(turns, answers, strict=True)] for answers in said]
    # A conversation is right if every turn of it is; it counts once, under the kind of its first mistake.
    by_example = [_first_of_each(turns, one) for one in kinds]
    before, after = ([kind is None for kind in one] for one in by_example)
    scores = [share_score("exact_match" if metric == "anls" else metric, before, after)]
    if metric == "anls":
        points = [
            [
                statistics.anls(answer or "", said_by(turn.reference))
                for answer, turn in zip(answers, turns, strict=True)
            ]
            for answers in said
        ]
        scores.insert(0, statistic_score("anls", np.mean, points[:1], points[1:], statistics.RESAMPLES))
    return make_evaluation(metric, scores, compared, kinds, rows=len(after), kinds_by_example=by_example)


def _mistake(metric: str, turn: Turn, answer: str | None) -> str | None:
    """Name what is wrong with an answer, None where its thought does not end; return None if it is right."""
    if answer is None:
        return "thought does not end"
    if metric == "tool_calls":
        return tool_accuracy.find_tool_call_mistake(answer, calls_of_message(turn.reference), turn.tools)
    reference = said_by(turn.reference)
    if metric == "gsm8k":
        if statistics.is_gsm8k_right(answer, reference):
            return None
        return "no number after ####" if statistics.gsm8k_number(answer) is None else "wrong number"
    if statistics.is_exact(answer, reference):
        return None
    if metric == "anls" and (similarity := statistics.anls(answer, reference)):
        return "close" if similarity < 1 else "case or spaces"
    answer, reference = answer.strip(), reference.strip()
    if not answer:
        return "empty"
    if answer.startswith(reference):
        return "does not stop"
    if reference.startswith(answer):
        return "stops early"
    return "case or spaces" if "".join(answer.split()).lower() == "".join(reference.split()).lower() else "different"


def _first_of_each(turns: list[Turn], kinds: list[str | None]) -> list[str | None]:
    """Return the first mistake of each example that has a turn to answer."""
    first: dict[int, str | None] = {turn.example: None for turn in turns}
    for turn, kind in zip(turns, kinds, strict=True):
        first[turn.example] = first[turn.example] or kind
    return list(first.values())


def judged(
    turns: list[Turn], compared: Comparison, said: list[Said], judge: Judge, on_progress: OnProgress
) -> Evaluation:
    """Let a judge compare what the base and the tuned model said. Raises ConfigError if it gives no verdict at all."""
    texts = [[text or "" for text in answers] for answers in said]
    right = [message_text(turn.reference | {"content": said_by(turn.reference)}) for turn in turns]
    pairs = [AnswerPair(turn.messages, *one) for turn, *one in zip(turns, *texts, right, strict=True)]
    points = judge_all(judge, pairs, lambda done: on_progress("judge", done, len(pairs)))
    counted = [one for one in points if one is not None]
    if not counted:
        raise ConfigError(f"the judge {judge.model} gave no verdict on any of {len(pairs)} pairs: use another model")
    wins, losses = ([one > 0.5 for one in counted], [one < 0.5 for one in counted])
    rate = statistics.share(counted)
    # McNemar's test on wins and losses is the sign test; ties do not count.
    chance = statistics.Difference(rate.value - 0.5, statistics.compare_shares(losses, wins).p, "sign test, exact")
    lost = ["no verdict" if one is None else "lost" if one < 0.5 else None for one in points]
    beaten = ["no verdict" if one is None else "lost" if one > 0.5 else None for one in points]
    score = Score("win_rate", None, rate, chance)
    return make_evaluation("judge", [score], compared, [beaten, lost], rows=len(counted))
