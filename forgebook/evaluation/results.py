"""What an evaluation found: figures of both models, the tuned model's mistakes, and how both are written down.

<run>/evaluation.json              all figures under flat names
<run>/evaluation/mistakes.jsonl    {"kind", "base_was_right", "prompt", "reference", "base", "tuned"}
"""

from __future__ import annotations

import collections
import json
from dataclasses import dataclass, field
from typing import Any

from forgebook.evaluation import statistics as scores
from forgebook.evaluation.statistics import Difference, Figure
from forgebook.runs import atomic
from forgebook.runs import run as storage
from forgebook.runs.run import Run

__all__ = [
    "Comparison",
    "Evaluation",
    "Score",
    "as_read",
    "exact_match",
    "figure_lines",
    "make_evaluation",
    "said",
    "save",
]


@dataclass(frozen=True)
class Comparison:
    """Held-out prompts with three answers each, in the order of the file."""

    prompts: list[str]
    references: list[str]
    base: list[str]
    tuned: list[str]

    def accuracy(self) -> tuple[float, float]:
        """Return the share of exact matches (base, tuned)."""
        return exact_match(self.base, self.references), exact_match(self.tuned, self.references)

    def summary(self) -> dict[str, Any]:
        """Return the shares under the names of evaluation.json."""
        before, after = self.accuracy()
        return {"rows": len(self.references), "exact_match_before": before, "exact_match_after": after}


@dataclass(frozen=True)
class Score:
    """One figure of both models, and how sure the difference is; before is None where only the two together count."""

    name: str
    before: Figure | None
    after: Figure
    difference: Difference


@dataclass(frozen=True)
class Evaluation:
    """What came of an evaluation.

    mistakes: of the tuned model, those first that the base did not make.
    kinds: for each kind of mistake, how many rows the base got wrong so, and how many the tuned model.
    left_out: examples that the truncation of the run drops, which are not measured.
    """

    metric: str
    rows: int
    scores: list[Score]
    comparison: Comparison
    mistakes: list[dict[str, Any]] = field(default_factory=list)
    kinds: dict[str, tuple[int, int]] = field(default_factory=dict)
    left_out: int = 0

    def summary(self) -> dict[str, Any]:
        """Return all figures under flat names, for evaluation.json."""
        told: dict[str, Any] = {"rows": self.rows} | ({"rows_left_out": self.left_out} if self.left_out else {})
        for score in self.scores:
            for when, figure in (("before", score.before), ("after", score.after)):
                if figure is not None:
                    told[f"{score.name}_{when}"] = figure.value
                    told[f"{score.name}_{when}_95"] = [round(figure.low, 4), round(figure.high, 4)]
            told |= {f"{score.name}_p": float(f"{score.difference.p:.3g}"), f"{score.name}_test": score.difference.test}
        kinds = {kind: {"before": before, "after": after} for kind, (before, after) in self.kinds.items()}
        return told | {"metric": self.metric} | ({"mistakes": kinds} if kinds else {})


def exact_match(answers: list[str], references: list[str]) -> float:
    """Return the share of answers equal to their reference, outer white space aside."""
    pairs = list(zip(answers, references, strict=True))
    return sum(scores.is_exact(answer, reference) for answer, reference in pairs) / len(pairs)


def make_evaluation(
    metric: str,
    made: list[Score],
    compared: Comparison,
    kinds: list[list[str | None]],
    rows: int | None = None,
    counted: list[list[str | None]] | None = None,
    left_out: int = 0,
) -> Evaluation:
    """Gather what was found.

    kinds: for the base and for the tuned model, what is wrong with each answer, None if nothing is.
    rows: how many were scored; counted: kinds by row, where a row has several answers. left_out: examples that
    truncation drops.
    """
    wrong = [
        {
            "kind": after, "base_was_right": before is None, "prompt": compared.prompts[k],
            "reference": compared.references[k], "base": compared.base[k], "tuned": compared.tuned[k],
        }
        for k, (before, after) in enumerate(zip(*kinds, strict=True))
        if after is not None
    ]  # fmt: skip
    wrong.sort(key=lambda mistake: not mistake["base_was_right"])
    before, after = (collections.Counter(filter(None, one)) for one in counted or kinds)
    table = {kind: (before[kind], after[kind]) for kind, _ in (before + after).most_common()}
    return Evaluation(metric, len(compared.prompts) if rows is None else rows, made, compared, wrong, table, left_out)


def as_read(messages: list[dict[str, Any]]) -> str:
    """Write a conversation as a person reads it: a single question alone, else each turn after its role."""
    spoken = [message for message in messages if message["role"] != "system"]
    if len(spoken) == 1:
        return spoken[0]["content"]
    return "\n".join(f"[{message['role']}] {said(message)}" for message in spoken)


def said(message: dict[str, Any]) -> str:
    """Write what a message says, its tool calls included."""
    calls = [call["function"] for call in message.get("tool_calls") or []]
    written = [json.dumps({"name": c["name"], "arguments": c["arguments"]}, ensure_ascii=False) for c in calls]
    return "\n".join(part for part in (message["content"], *written) if part)


def figure_lines(evaluation: Evaluation) -> list[str]:
    """Write an evaluation's figures as lines for the console."""
    rows = f"{evaluation.rows} held-out rows"
    if evaluation.left_out:
        rows += f" ({evaluation.left_out} left out: dropped by truncation)"
    return [line for score in evaluation.scores for line in score_lines(score, rows)]


def score_lines(score: Score, rows: str) -> list[str]:
    """Write one figure of both models as two lines: the values, then how sure they are."""
    figures = [(who, figure) for who, figure in (("base", score.before), ("tuned", score.after)) if figure is not None]
    form = ".1%" if all(0 <= figure.value <= 1 for _, figure in figures) and score.name != "perplexity" else ".3f"
    told = ", ".join(f"{who} {figure.value:{form}}" for who, figure in figures)
    ranges = ", ".join(f"{figure.low:{form}} to {figure.high:{form}}" for _, figure in figures)
    p = f"p {score.difference.p:.2g}" if score.difference.p >= 0.001 else "p below 0.001"
    return [
        f"{score.name.replace('_', ' ')} on {rows}: {told}",
        f"  95 % intervals {ranges}; the difference by chance: {p} ({score.difference.test})",
    ]


def save(evaluation: Evaluation, run: Run) -> None:
    """Write evaluation.json and evaluation/mistakes.jsonl into the run folder."""
    with atomic.atomic_file(run.folder / "evaluation" / "mistakes.jsonl") as temporary:
        lines = (json.dumps(mistake, ensure_ascii=False) + "\n" for mistake in evaluation.mistakes)
        temporary.write_text("".join(lines))
    storage.save_json(run, "evaluation.json", evaluation.summary())
