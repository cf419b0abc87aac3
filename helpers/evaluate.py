"""Is the tuned model better than its base? Both answer held-out prompts; the answers are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from helpers import data, generate, models, storage
from helpers.config import load_config
from helpers.errors import ConfigError, StorageError
from helpers.storage import Run

__all__ = ["Comparison", "compare_with_base", "exact_match"]


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
        before, after = self.accuracy()
        return {"rows": len(self.references), "exact_match_before": before, "exact_match_after": after}


def exact_match(answers: list[str], references: list[str]) -> float:
    """Return the share of answers equal to their reference, outer white space aside."""
    pairs = list(zip(answers, references, strict=True))
    return sum(answer.strip() == reference.strip() for answer, reference in pairs) / len(pairs)


def compare_with_base(run: Run, path: str | None = None, rows: int | None = None) -> Comparison:
    """Let a run's best checkpoint and the model it began from answer the last turn of held-out rows.

    path: JSONL of messages that end with an assistant's turn; default: the run's validation file.
    rows: the first so many.

    Raises ConfigError without rows to ask, StorageError if the run is not complete.
    """
    config = load_config(run.config)
    if path is None and config.valid_path is None:
        raise ConfigError(f"the run {run.name} has no valid_path: name held-out rows with data=FILE")
    if not run.is_complete:
        raise StorageError(f"the run {run.name} has not ended well yet: its command continues it")
    best = run.folder / storage.read_json(run.summary)["best_checkpoint"]
    held_out = data.read_rows(path or config.valid_path, limit=rows)
    asked = [row.messages[:-1] for row in held_out]
    longest = 1 if config.task == "classification" else 128  # a label is one token
    answers = []
    for source in (models.locate(config.initial_base_model_ckpt_path or config.model_id), best):
        model, tokenizer, prompt_format = generate.load_for_generation(source)
        prompt_format = prompt_format or config.generation_config.prompt_format
        answers.append(
            generate.complete(
                model, tokenizer, asked, prompt_format=prompt_format, tools=[row.tools for row in held_out],
                max_new_tokens=longest,
            )
        )  # fmt: skip
    return Comparison(
        prompts=[messages[-1]["content"] for messages in asked],
        references=[row.messages[-1]["content"] for row in held_out],
        base=answers[0],
        tuned=answers[1],
    )
