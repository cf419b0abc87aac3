"""After the last step: does the model end its answers? A few training prompts are answered with the model in memory.

A model that was never taught to stop has as good a loss as one that was: only an answer shows it. The check is bounded
in tokens and in time, and a run that cannot afford it, or fails in it, is a finished run with a note.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from forgebook.config.blocks import GenerationConfig
from forgebook.data import masking
from forgebook.data.batching import group_size
from forgebook.data.token_store import Tokens
from forgebook.errors import first_line
from forgebook.training import distributed

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


@dataclass(frozen=True)
class _Example:
    """A training example. answer: how many tokens its last answer has."""

    prompt: list[int]
    answer: int


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
    deepspeed_engine = worker.deepspeed_engine
    is_partitioned = deepspeed_engine is not None and deepspeed_engine.zero_optimization_stage() == 3
    result: dict[str, Any] = {"prompts": 0, "stopped": 0, "max_new_tokens": 0, "trained_answer_tokens": 0, "note": None}
    if worker.accelerator.is_main_process or is_partitioned:
        limit = min(MOST_SECONDS, max(LEAST_SECONDS, TIME_SHARE * training_seconds))
        try:
            result |= _check(worker, train, group_size(task), generation_config, limit, is_partitioned, is_compiled)
        except Exception as error:  # whatever it is, the run is complete
            result["note"] = f"generation failed ({type(error).__name__}: {first_line(error)})"
    return distributed.gathered(result)[0]


def _check(
    worker: Worker,
    train: Tokens,
    group: int,
    generation_config: GenerationConfig,
    seconds: float,
    is_partitioned: bool,
    is_compiled: bool,
) -> dict[str, Any]:
    text, ids = masking.end_of_turn(worker.tokenizer, generation_config.prompt_format)
    sequences = generation_config.stopping_sequences
    known = worker.model.generation_config.eos_token_id
    stops = {*ids, *(known if isinstance(known, list) else [known]), worker.tokenizer.eos_token_id}
    stops = {stop for stop in (*stops, *sequences) if isinstance(stop, int)}
    texts = [stop for stop in (text, *sequences) if isinstance(stop, str) and stop]
    examples, note = _choose(train, group, stops, bool(texts))
    if note is not None:
        return {"note": note}
    longest = max(one.answer for one in examples)
    limit = 2 * longest + 8
    started = time.perf_counter()
    with _for_generation(worker, is_compiled):
        answers = _generate(worker, [one.prompt for one in examples], stops, texts, limit, seconds, is_partitioned)
    stopped = sum(_is_stopped(ids, stops, texts, worker.tokenizer) for ids in answers)
    tokens = max(map(len, answers))
    if stopped < len(answers) and tokens < limit:
        plural = "s" if tokens > 1 else ""
        return {"note": f"{tokens} token{plural} of each answer took {time.perf_counter() - started:.0f} s"}
    return {
        "prompts": len(answers), "stopped": stopped, "max_new_tokens": limit, "trained_answer_tokens": longest,
    }  # fmt: skip


def _choose(train: Tokens, group: int, stops: set[int], has_text: bool) -> tuple[list[_Example], str | None]:
    """Choose examples whose last answer is short and complete, the shortest first, or return why there is none.

    group: of a pair, only the chosen answer counts. has_text: answers may end with a text instead of one of `stops`.
    """
    sampled = np.unique(np.linspace(0, len(train) // group - 1, SAMPLED).astype(int)) * group
    whole = [example for k in sampled if (example := _last_answer(*train.example(k), None if has_text else stops))]
    if not whole:
        return [], "no training answer ends with a token that stops: context_length cuts them off, so raise it"
    short = [one for one in whole if one.answer <= ANSWER_TOKENS and len(one.prompt) + one.answer <= EXAMPLE_TOKENS]
    if not short:
        return [], f"no training answer has at most {ANSWER_TOKENS} tokens in an example of at most {EXAMPLE_TOKENS:,}"
    short.sort(key=lambda one: one.answer)
    chosen = sorted({len(short) * (1 + k) // (PROMPTS + 1) for k in range(PROMPTS)})
    return [short[k] for k in chosen], None


def _last_answer(ids: np.ndarray, mask: np.ndarray, stops: set[int] | None) -> _Example | None:
    """Split an example before its last answer; None if it has none, or one that ends with none of `stops`."""
    supervised = np.flatnonzero(mask)
    if not len(supervised) or (stops is not None and int(ids[supervised[-1]]) not in stops):
        return None
    others = np.flatnonzero(~mask[: supervised[-1]])
    first = int(others[-1]) + 1 if len(others) else 0
    return _Example(ids[:first].tolist(), int(supervised[-1]) + 1 - first) if first else None


@contextlib.contextmanager
def _for_generation(worker: Worker, is_compiled: bool):
    """Switch the model to evaluation for a block; a compiled decoder would be recompiled for every length."""
    worker.wrapped.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext():
            yield
    finally:
        worker.wrapped.train()


def _generate(
    worker: Worker,
    prompts: list[list[int]],
    stops: set[int],
    texts: list[str],
    max_new_tokens: int,
    max_seconds: float,
    is_partitioned: bool,
) -> list[list[int]]:
    """Generate greedily: [prompts][tokens] ids of the answers, each up to the batch's longest."""
    width, pad, device = max(map(len, prompts)), worker.tokenizer.pad_token_id, worker.accelerator.device
    output = worker.model.generate(
        input_ids=torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=device),
        attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device),
        max_new_tokens=max_new_tokens,
        max_time=max_seconds,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=sorted(stops),
        pad_token_id=pad,
        # Partitioned weights are gathered by all ranks together, so none may end before the others.
        synced_gpus=is_partitioned and worker.accelerator.num_processes > 1,
        **({"stop_strings": texts, "tokenizer": worker.tokenizer} if texts else {}),
    )
    return output[:, width:].tolist()


def _is_stopped(ids: list[int], stops: set[int], texts: list[str], tokenizer: Any) -> bool:
    return not stops.isdisjoint(ids) or any(text in tokenizer.decode(ids) for text in texts)
