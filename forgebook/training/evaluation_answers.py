"""`eval_generation`: answers to validation prompts at each evaluation, and metrics of them.

A loss says how likely the reference is, not what the model writes: a format that is nearly right has a good loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from forgebook.config.blocks import EvalGeneration, GenerationConfig
from forgebook.data.batching import group_size
from forgebook.data.generation_prompt import after_thought, opened_thought
from forgebook.data.token_store import Tokens
from forgebook.data.tool_accuracy import find_tool_call_mistake
from forgebook.data.tools import read_tool_calls
from forgebook.errors import DataError
from forgebook.training import distributed
from forgebook.training.greedy_answers import (
    Answered,
    ends_of,
    for_generation,
    generate,
    is_partitioned,
    last_answer,
)

if TYPE_CHECKING:
    from forgebook.training.setup import Worker

__all__ = ["EvaluationAnswers", "metric_key"]

SHOWN = 3  # answers in a line of metrics.jsonl


def metric_key(metric: str) -> str:
    """Name a metric as metrics.jsonl does."""
    return f"eval_{metric}"


class EvaluationAnswers:
    """The validation prompts of a run and how they are answered. generation_config: of the run's config."""

    def __init__(
        self,
        worker: Worker,
        valid: Tokens,
        task: str,
        settings: EvalGeneration,
        metrics: Sequence[str],
        generation_config: GenerationConfig,
        batch_size: int,
        is_compiled: bool,
    ):
        self._worker, self._settings, self._metrics = worker, settings, metrics
        self._batch_size, self._is_compiled = batch_size, is_compiled
        self._ends = ends_of(worker, generation_config)
        size = group_size(task)  # of a pair, the chosen answer
        divided = (last_answer(*valid.example(k), None) for k in range(0, len(valid), size))
        examples = [one for one in divided if one is not None]
        step = max(1, len(examples) // settings.prompts)  # spread over the file, which may be sorted
        self._examples: list[Answered] = examples[::step][: settings.prompts]

    def figures(self, number: int, is_last: bool) -> dict[str, Any]:
        """Answer the prompts, if it is their turn; return the metrics, from 0 to 1, and a few answers. Collective.

        number: of the evaluation, from 0. is_last: of the run's evaluations, which always answers.
        """
        if not self._examples or (number % self._settings.every and not is_last):
            return {}
        texts = self._answers()
        references = [self._text(one.answer) for one in self._examples]
        pairs = list(zip(texts, references, strict=True))
        closings = [opened_thought(self._worker.tokenizer.decode(one.prompt)) for one in self._examples]
        said = [_after_thoughts(*pair, closing) for pair, closing in zip(pairs, closings, strict=True)]
        figures: dict[str, Any] = {
            metric_key(metric): sum(_is_right(metric, *pair) for pair in said) / len(said) for metric in self._metrics
        }
        shown = zip(self._examples, pairs, strict=True)
        figures["generated"] = [
            {"prompt": self._worker.tokenizer.decode(one.prompt), "answer": text, "reference": reference}
            for one, (text, reference) in list(shown)[:SHOWN]
        ]
        return figures

    def _answers(self) -> list[str]:
        """Answer all prompts: each rank a share of them, or together where the weights are partitioned."""
        prompts, ranks = [one.prompt for one in self._examples], distributed.world_size()
        together = is_partitioned(self._worker)
        own = prompts if together else prompts[distributed.rank() :: ranks]
        limit, texts = self._settings.max_new_tokens, []
        with for_generation(self._worker, self._is_compiled):
            for first in range(0, len(own), self._batch_size):
                batch = own[first : first + self._batch_size]
                texts += [self._text(ids) for ids in generate(self._worker, batch, self._ends, limit)]
        if together or ranks == 1:
            return texts
        shares = distributed.gathered(texts)
        return [shares[k % ranks][k // ranks] for k in range(len(prompts))]

    def _text(self, ids: list[int]) -> str:
        # Some models mark calls with special tokens.
        return self._ends.text_before(ids, self._worker.tokenizer, "tool_calls" not in self._metrics)


def _after_thoughts(answer: str, reference: str, closing: str) -> tuple[str | None, str]:
    """Take the thoughts off an answer and its reference, which has none that does not end unless it was cut."""
    right = after_thought(reference, closing)
    return (answer, reference) if right is None else (after_thought(answer, closing), right)


def _is_right(metric: str, answer: str | None, reference: str) -> bool:
    if answer is None:  # its thought does not end
        return False
    if metric == "exact_match":
        return answer == reference
    try:
        expected = read_tool_calls(reference)
    except DataError:  # a reference that looks like a call and is none
        return answer == reference
    return find_tool_call_mistake(answer, expected) is None
