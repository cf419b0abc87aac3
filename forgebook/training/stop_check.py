"""After the last step: does the model end its answers? A few training prompts are answered with the model in memory.

A model that was never taught to stop has as good a loss as one that was: only an answer shows it. The check is bounded
in tokens and in time, and a run that cannot afford it, or fails in it, is a finished run with a note.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from forgebook.config.blocks import GenerationConfig
from forgebook.data.batching import group_size
from forgebook.data.token_store import Tokens
from forgebook.errors import first_line
from forgebook.training import distributed
from forgebook.training.greedy_answers import (
    Answered,
    Ends,
    ends_of,
    for_generation,
    generate,
    is_partitioned,
    last_answer,
)

if TYPE_CHECKING:
    from forgebook.training.setup import Worker

__all__ = ["check_stops"]

# A classifier's label is compared, not generated, and a text of continued pretraining has no answer.
TASKS = ("instruction_tuning", "preference_tuning")
PROMPTS = 3
# Examples among which they are chosen, and the longest answer and whole example that is chosen.
SAMPLED, ANSWER_TOKENS, EXAMPLE_TOKENS = 256, 128, 2048
# Generation may take a hundredth of the time of training, within these bounds (seconds). The upper one is below the ten
# minutes for which the other ranks wait.
TIME_SHARE, LEAST_SECONDS, MOST_SECONDS = 0.01, 20.0, 300.0


def check_stops(
    worker: Worker,
    train: Tokens,
    task: str,
    generation_config: GenerationConfig,
    training_seconds: float,
    is_compiled: bool = False,
) -> dict[str, Any] | None:
    """Answer three training prompts greedily and count the answers that end with what ends answers in training.

    generation_config: of the run's config. is_compiled: whether the decoder runs through torch.compile.

    Returns, on every rank, what summary.json reports: `prompts`, `stopped`, `max_new_tokens` (twice the longest trained
    answer and a few), `trained_answer_tokens`, and a `note` on why nothing was checked. None for a task without
    answers. Raises nothing. Collective.
    """
    if task not in TASKS:
        return None
    result: dict[str, Any] = {"prompts": 0, "stopped": 0, "max_new_tokens": 0, "trained_answer_tokens": 0, "note": None}
    if worker.accelerator.is_main_process or is_partitioned(worker):
        limit = min(MOST_SECONDS, max(LEAST_SECONDS, TIME_SHARE * training_seconds))
        try:
            result |= _check(worker, train, group_size(task), generation_config, limit, is_compiled)
        except Exception as error:  # whatever it is, the run is complete
            result["note"] = f"generation failed ({type(error).__name__}: {first_line(error)})"
    return distributed.gathered(result)[0]


def _check(
    worker: Worker,
    train: Tokens,
    group: int,
    generation_config: GenerationConfig,
    seconds: float,
    is_compiled: bool,
) -> dict[str, Any]:
    ends = ends_of(worker, generation_config)
    examples, note = _choose(train, group, ends)
    if note is not None:
        return {"note": note}
    longest = max(len(one.answer) for one in examples)
    limit = 2 * longest + 8
    started = time.perf_counter()
    with for_generation(worker, is_compiled):
        answers = generate(worker, [one.prompt for one in examples], ends, limit, seconds)
    stopped = sum(ends.is_in(ids, worker.tokenizer) for ids in answers)
    tokens = max(map(len, answers))
    if stopped < len(answers) and tokens < limit:
        plural = "s" if tokens > 1 else ""
        return {"note": f"{tokens} token{plural} of each answer took {time.perf_counter() - started:.0f} s"}
    return {
        "prompts": len(answers), "stopped": stopped, "max_new_tokens": limit, "trained_answer_tokens": longest,
    }  # fmt: skip


def _choose(train: Tokens, group: int, ends: Ends) -> tuple[list[Answered], str | None]:
    """Choose examples whose last answer is short and complete, the shortest first, or return why there is none.

    group: of a pair, only the chosen answer counts.
    """
    stops = None if ends.texts else ends.ids  # an answer may end with a text instead
    sampled = np.unique(np.linspace(0, len(train) // group - 1, SAMPLED).astype(int)) * group
    whole = [example for k in sampled if (example := last_answer(*train.example(k), stops))]
    if not whole:
        return [], "no training answer ends with a token that stops: context_length cuts them off, so raise it"
    short = [
        one for one in whole if len(one.answer) <= ANSWER_TOKENS and len(one.prompt) + len(one.answer) <= EXAMPLE_TOKENS
    ]
    if not short:
        return [], f"no training answer has at most {ANSWER_TOKENS} tokens in an example of at most {EXAMPLE_TOKENS:,}"
    short.sort(key=lambda one: len(one.answer))
    chosen = sorted({len(short) * (1 + k) // (PROMPTS + 1) for k in range(PROMPTS)})
    return [short[k] for k in chosen], None
