"""The results of an evaluation: figures of both models, the tuned model's mistakes, and the files with both.

<run>/evaluation.json              all figures under flat names
<run>/evaluation/mistakes.jsonl    {"kind", "base_was_right", "prompt", "reference", "base", "tuned"}
"""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from forgebook.data.images import shown_content
from forgebook.evaluation import statistics
from forgebook.evaluation.statistics import Column, Difference, Figure
from forgebook.runs import atomic
from forgebook.runs import run as storage
from forgebook.runs.run import Run

__all__ = [
    "Comparison",
    "Evaluation",
    "Score",
    "conversation_text",
    "figure_lines",
    "limit_text",
    "make_evaluation",
    "message_text",
    "save",
    "score_lines",
    "share_score",
    "statistic_score",
]


@dataclass(frozen=True)
class Comparison:
    """Held-out prompts with three answers each, in the order of the file."""

    prompts: list[str]
    references: list[str]
    base: list[str]
    tuned: list[str]


@dataclass(frozen=True)
class Score:
    """One figure of both models and their difference; before is None where only the two together have one."""

    name: str
    before: Figure | None
    after: Figure
    difference: Difference


def share_score(name: str, before: Sequence[bool] | np.ndarray, after: Sequence[bool] | np.ndarray) -> Score:
    """Compare the shares of right answers of both models."""
    difference = statistics.compare_shares(before, after)
    return Score(name, statistics.share(before), statistics.share(after), difference)


def statistic_score(
    name: str, statistic: Callable[..., float], before: Sequence[Column], after: Sequence[Column], resamples: int
) -> Score:
    """Compare a statistic of both models; before, after: each model's columns, see `compare_statistics`."""
    return Score(name, *statistics.compare_statistics(statistic, before, after, resamples))


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    rows: how many examples were scored. mistakes: the tuned model's, first those that the base did not make.
    kinds: for each kind of mistake, how many examples the base got wrong that way, and how many the tuned model.
    left_out: examples that are not measured: the truncation of the run drops them, or they have nothing to answer.
    limits: max_new_tokens of the answers, and longest_reference_tokens, from which it is derived by default.
    """

    metric: str
    rows: int
    scores: list[Score]
    comparison: Comparison
    mistakes: list[dict[str, Any]] = field(default_factory=list)
    kinds: dict[str, tuple[int, int]] = field(default_factory=dict)
    left_out: int = 0
    limits: dict[str, int] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return all figures under flat names, for evaluation.json."""
        summary: dict[str, Any] = {"rows": self.rows} | ({"rows_left_out": self.left_out} if self.left_out else {})
        for score in self.scores:
            for when, figure in (("before", score.before), ("after", score.after)):
                if figure is not None:
                    summary[f"{score.name}_{when}"] = figure.value
                    summary[f"{score.name}_{when}_95"] = [round(figure.low, 4), round(figure.high, 4)]
            summary[f"{score.name}_p"] = float(f"{score.difference.p:.3g}")
            summary[f"{score.name}_test"] = score.difference.test
        kinds = {kind: {"before": before, "after": after} for kind, (before, after) in self.kinds.items()}
        return summary | {"metric": self.metric} | self.limits | ({"mistakes": kinds} if kinds else {})


def make_evaluation(
    metric: str,
    scores: list[Score],
    compared: Comparison,
    kinds: Sequence[Sequence[str | None]],
    *,
    rows: int | None = None,
    kinds_by_example: Sequence[Sequence[str | None]] | None = None,
    left_out: int = 0,
) -> Evaluation:
    """Make an evaluation from scores and answers; list the mistakes and count their kinds.

    kinds: for the base and for the tuned model, what is wrong with each answer, None if nothing is.
    rows: how many examples were scored, if not all; kinds_by_example: where an example has several answers.
    left_out: examples that truncation drops.
    """
    wrong = [
        {
            "kind": after,
            "base_was_right": before is None,
            "prompt": compared.prompts[k],
            "reference": compared.references[k],
            "base": compared.base[k],
            "tuned": compared.tuned[k],
        }
        for k, (before, after) in enumerate(zip(*kinds, strict=True))
        if after is not None
    ]
    wrong.sort(key=lambda mistake: not mistake["base_was_right"])
    before, after = (collections.Counter(filter(None, one)) for one in kinds_by_example or kinds)
    table = {kind: (before[kind], after[kind]) for kind, _ in (before + after).most_common()}
    rows = len(compared.prompts) if rows is None else rows
    return Evaluation(metric, rows, scores, compared, wrong, table, left_out)


def conversation_text(messages: list[dict[str, Any]]) -> str:
    """Return a conversation as readable text: a single question alone, else each turn after its role."""
    turns = [message for message in messages if message["role"] != "system"]
    if len(turns) == 1:
        return shown_content(turns[0])
    return "\n".join(f"[{message['role']}] {message_text(message)}" for message in turns)


def message_text(message: dict[str, Any]) -> str:
    """Return a message's content followed by its tool calls."""
    calls = [call["function"] for call in message.get("tool_calls") or []]
    written = [json.dumps({"name": c["name"], "arguments": c["arguments"]}, ensure_ascii=False) for c in calls]
    return "\n".join(part for part in (shown_content(message), *written) if part)


def figure_lines(evaluation: Evaluation) -> list[str]:
    """Return an evaluation's figures as lines for the console."""
    examples = f"{evaluation.rows} held-out examples"
    if evaluation.left_out:
        why = "nothing to answer" if evaluation.limits else "dropped by truncation"  # answers alone have limits
        examples += f" ({evaluation.left_out} left out: {why})"
    return [line for score in evaluation.scores for line in score_lines(score, examples)]


def limit_text(limits: dict[str, int]) -> str:
    """Report how long answers may be."""
    longest, limit = limits["longest_reference_tokens"], limits["max_new_tokens"]
    return f"answers of at most {limit} tokens; the longest reference has {longest} (change it with max_new_tokens=)"


def score_lines(score: Score, examples: str) -> list[str]:
    """Return one figure of both models as two lines: the values, then how certain they are."""
    figures = [
        (name, figure) for name, figure in (("base", score.before), ("tuned", score.after)) if figure is not None
    ]
    form = ".1%" if all(0 <= figure.value <= 1 for _, figure in figures) and score.name != "perplexity" else ".3f"
    values = ", ".join(f"{name} {figure.value:{form}}" for name, figure in figures)
    ranges = ", ".join(f"{figure.low:{form}} to {figure.high:{form}}" for _, figure in figures)
    p = f"p = {score.difference.p:.2g}" if score.difference.p >= 0.001 else "p < 0.001"
    return [
        f"{score.name.replace('_', ' ')} on {examples}: {values}",
        f"  95% intervals {ranges}; difference: {p} ({score.difference.test})",
    ]


def save(evaluation: Evaluation, run: Run) -> None:
    """Write evaluation.json and evaluation/mistakes.jsonl into the run folder."""
    with atomic.atomic_file(run.folder / "evaluation" / "mistakes.jsonl") as temporary:
        lines = (json.dumps(mistake, ensure_ascii=False) + "\n" for mistake in evaluation.mistakes)
        temporary.write_text("".join(lines))
    storage.save_json(run, "evaluation.json", evaluation.summary())
