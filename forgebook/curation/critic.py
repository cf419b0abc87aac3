"""A critic: a language model that scores each answer by a rubric, and the threshold below which answers are dropped.

    judge = make_critic(config.curation.critic, task, labels, on_progress)
    judged = judge({0: example, ...})          findings of low scores; scores, agreement, precision, recall and cost

The threshold is the config's, else the one with the highest F1 on a file that a person labeled, else the middle of the
scale.
"""

from __future__ import annotations

import collections
import itertools
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from forgebook.config.curation_blocks import CriticConfig
from forgebook.curation.checks import Finding
from forgebook.curation.curate import Judge, Judged, OnProgress
from forgebook.curation.endpoint import Endpoint, Reply, Request
from forgebook.data import data_sources, readers
from forgebook.data.row_formats import Example, parse_row
from forgebook.errors import ConfigError, DataError

__all__ = ["Labeled", "Quality", "make_critic", "qualities", "read_labeled"]

INSTRUCTIONS = """\
You check the training data of a language model. You see a conversation and the answer that the model would learn. \
Score the answer from {lowest} to {highest}:
{rubric}
Give one sentence of reason, then a last line of the form
Score: N"""
_SCORE = re.compile(r"score\W{0,8}(-?\d+)", re.IGNORECASE)
VOTING_TEMPERATURE = 0.7
TOP = 20  # likely tokens to ask for: the most that OpenAI's API returns


@dataclass(frozen=True)
class Labeled:
    """An example that a person called good or bad."""

    example: Example
    is_good: bool


@dataclass(frozen=True)
class Quality:
    """How well a threshold tells bad examples: of those below it that are bad, of the bad ones that are below it."""

    threshold: float
    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """The harmonic mean of both."""
        return 2 * self.precision * self.recall / (self.precision + self.recall) if self.precision else 0.0


@dataclass(frozen=True)
class _Score:
    """The votes on one example; reason: what the first reply said."""

    votes: tuple[float, ...]
    reason: str

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.votes) if self.votes else None


def make_critic(
    settings: CriticConfig,
    task: str,
    labels: Sequence[str] = (),
    on_progress: OnProgress = lambda name, done, total: None,
) -> Judge:
    """Make a judge that asks a critic for the score of each example.

    Raises ConfigError, before anything is asked, for a labeled file that cannot be used.
    """
    labeled = read_labeled(settings.labeled, task, labels) if settings.labeled else []
    endpoint = Endpoint(settings)

    def judge(examples: dict[int, Example]) -> Judged:
        report: dict[str, Any] = {}
        scores = _ask(endpoint, [one.example for one in labeled], "labeled examples", on_progress)
        rated = [
            (score.mean, one.is_good) for score, one in zip(scores, labeled, strict=True) if score.mean is not None
        ]
        table = qualities(rated)
        threshold, chosen_by = (settings.lowest + settings.highest) / 2, "the middle of the scale"
        if settings.threshold is not None:
            threshold, chosen_by = settings.threshold, "the config"
        elif table:
            best = max(table, key=lambda one: (one.f1, -one.threshold))
            threshold, chosen_by = best.threshold, f"the highest F1 on {len(rated)} labeled examples"
        report |= {"threshold": threshold, "threshold_chosen_by": chosen_by}
        if rated:
            at = quality_at(rated, threshold)
            report |= {"labeled_precision": at.precision, "labeled_recall": at.recall}
            report["labeled_thresholds"] = [[one.threshold, one.precision, one.recall] for one in table]

        numbers = list(examples)
        scored = dict(zip(numbers, _ask(endpoint, examples.values(), "answers", on_progress), strict=True))
        findings = [
            Finding(number, "low_score", _detail(score, settings.highest))
            for number, score in scored.items()
            if score.mean is not None and score.mean < threshold
        ]
        report |= _figures(list(scored.values())) | endpoint.usage.as_json(settings)
        return Judged(findings, report)

    return judge


def read_labeled(path: str, task: str, labels: Sequence[str] = ()) -> list[Labeled]:
    """Read examples with a key `good`. Raises ConfigError for rows without it, or if all of them have the same."""
    found = []
    for source in data_sources.find_sources(path):
        for chunk in readers.chunks_of(source):
            for where, raw in readers.read_chunk(chunk):
                if isinstance(raw, DataError):
                    raise raw
                good = raw.get("good") if isinstance(raw, dict) else None
                if str(good).lower() not in ("true", "false"):
                    raise ConfigError(f"{where}: good: got {good!r}, must be true or false, as a person labeled it")
                rest = {key: value for key, value in raw.items() if key != "good"}
                found.append(Labeled(parse_row(rest, where, task, labels)[0], str(good).lower() == "true"))
    if len({one.is_good for one in found}) < 2:
        raise ConfigError(f"curation.critic.labeled: {path} needs both good and bad examples")
    return found


def qualities(rated: Sequence[tuple[float, bool]]) -> list[Quality]:
    """List every threshold between two scores with its precision and recall. rated: (score, is good) each."""
    scores = sorted({score for score, _ in rated})
    return [quality_at(rated, (low + high) / 2) for low, high in itertools.pairwise(scores)]


def quality_at(rated: Sequence[tuple[float, bool]], threshold: float) -> Quality:
    """Measure one threshold."""
    below = [is_good for score, is_good in rated if score < threshold]
    bad = sum(not is_good for _, is_good in rated)
    right = below.count(False)
    return Quality(threshold, right / len(below) if below else 0.0, right / bad if bad else 0.0)


def _ask(endpoint: Endpoint, examples: Iterable[Example], name: str, on_progress: OnProgress) -> list[_Score]:
    """Ask for all votes on each example."""
    settings = endpoint.settings
    assert isinstance(settings, CriticConfig)
    examples = list(examples)
    temperature = settings.temperature
    if temperature is None:
        temperature = 0.0 if settings.votes == 1 else VOTING_TEMPERATURE
    requests = (
        Request(_messages(example, settings), temperature, settings.max_tokens, vote, TOP * settings.probabilities)
        for example in examples
        for vote in range(settings.votes)
    )
    replies: dict[int, Reply] = {}
    total = len(examples) * settings.votes
    for number, reply in endpoint.ask_all(requests):
        replies[number] = reply
        on_progress(name, len(replies), total)
    scores = []
    for k in range(len(examples)):
        given = [replies[k * settings.votes + vote] for vote in range(settings.votes)]
        votes = [vote for reply in given if (vote := _vote(reply, settings)) is not None]
        scores.append(_Score(tuple(votes), given[0].text))
    return scores


def _vote(reply: Reply, settings: CriticConfig) -> float | None:
    """Read the last score of a reply; None if there is none on the scale."""
    if settings.probabilities:
        return _expected_score(reply, settings)
    found = [int(one) for one in _SCORE.findall(reply.text)]
    return found[-1] if found and settings.lowest <= found[-1] <= settings.highest else None


def _expected_score(reply: Reply, settings: CriticConfig) -> float | None:
    """Return the mean of all scores by their probabilities at the place of the last score."""
    if reply.text and not any(likely for _, likely in reply.tokens):
        raise ConfigError(
            f"curation.critic.probabilities: {settings.model} returns no logprobs: set probabilities: false, and votes"
        )
    matches = list(_SCORE.finditer("".join(text for text, _ in reply.tokens)))
    if not matches:
        return None
    ends = itertools.accumulate(len(text) for text, _ in reply.tokens)
    likely = next(one for (_, one), end in zip(reply.tokens, ends, strict=True) if end > matches[-1].start(1))
    scale = {str(score): score for score in range(settings.lowest, settings.highest + 1)}
    chances = {scale[text.strip()]: math.exp(log) for text, log in likely.items() if text.strip() in scale}
    total = sum(chances.values())
    return sum(score * chance for score, chance in chances.items()) / total if total else None


def _messages(example: Example, settings: CriticConfig) -> tuple[dict[str, str], ...]:
    instructions = INSTRUCTIONS.format(lowest=settings.lowest, highest=settings.highest, rubric=settings.rubric)
    messages = [{"role": "system", "content": instructions}]
    for shot in settings.shots:
        question = _question([{"role": "user", "content": shot.question}], shot.answer)
        reply = f"{shot.reason}\nScore: {shot.score}".lstrip()
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    if example.messages is None:
        question = _question([], example.text or "")
    else:
        *before, last = example.messages
        question = _question(before, _content(last), example.tools)
    return (*messages, {"role": "user", "content": question})


def _question(before: Sequence[Any], answer: str, tools: list[dict] | None = None) -> str:
    conversation = "\n\n".join(f"[{message['role']}]\n{_content(message)}" for message in before)
    known = f"# Tools\n{json.dumps(tools, ensure_ascii=False)}\n\n" if tools else ""
    asked = f"# Conversation\n{conversation}\n\n" if conversation else ""
    return f"{known}{asked}# Answer to score\n{answer}"


def _content(message: Any) -> str:
    calls = message.get("tool_calls")
    return str(message.get("content") or "") + (json.dumps(calls, ensure_ascii=False) if calls else "")


def _detail(score: _Score, highest: int) -> str:
    votes = f" (votes {', '.join(f'{vote:.3g}' for vote in score.votes)})" if len(score.votes) > 1 else ""
    reason = _SCORE.split(score.reason)[0].strip()
    return f"{score.mean:.3g} of {highest}{votes}" + (f": {reason[:300]}" if reason else "")


def _figures(scores: list[_Score]) -> dict[str, Any]:
    """Summarize scores; agreement: of pairs of votes on the same example, the share that round to the same score."""
    means = [score.mean for score in scores if score.mean is not None]
    pairs = [pair for score in scores for pair in itertools.combinations(score.votes, 2)]
    counts = collections.Counter(round(mean) for mean in means)
    figures: dict[str, Any] = {
        "scored": len(means),
        "without_score": len(scores) - len(means),
        "mean_score": statistics.fmean(means) if means else None,
        "scores": {str(score): counts[score] for score in sorted(counts)},
    }
    return figures | ({"agreement": sum(round(a) == round(b) for a, b in pairs) / len(pairs)} if pairs else {})
