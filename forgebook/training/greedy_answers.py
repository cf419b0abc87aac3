"""Greedy answers of the model in training to prompts of its tokenized examples.

example = last_answer(ids, mask, None)          an example's prompt, and the tokens of its last answer
ends = ends_of(worker, generation_config)       what ends an answer: token ids, texts
with for_generation(worker): answers = generate(worker, prompts, ends, 128)
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from forgebook.config.blocks import GenerationConfig
from forgebook.data import masking
from forgebook.training import fsdp

if TYPE_CHECKING:
    from forgebook.training.setup import Worker

__all__ = ["Answered", "Ends", "ends_of", "for_generation", "generate", "is_partitioned", "last_answer"]


@dataclass(frozen=True)
class Answered:
    """An example, divided before its last answer: token ids of both."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Ends:
    """What ends an answer: any of some tokens, or of some texts."""

    ids: frozenset[int]
    texts: tuple[str, ...]

    def is_in(self, ids: list[int], tokenizer: Any) -> bool:
        """Report whether an answer has an end."""
        return not self.ids.isdisjoint(ids) or any(text in tokenizer.decode(ids) for text in self.texts)

    def text_before(self, ids: list[int], tokenizer: Any, skip_special_tokens: bool = True) -> str:
        """Decode an answer up to its end, without white space around it."""
        count = next((k for k, token in enumerate(ids) if token in self.ids), len(ids))
        text = tokenizer.decode(ids[:count], skip_special_tokens=skip_special_tokens)
        return text[: min((at for at in map(text.find, self.texts) if at >= 0), default=None)].strip()


def ends_of(worker: Worker, generation_config: GenerationConfig) -> Ends:
    """Collect what ends answers in training and generation; generation_config: of the run's config."""
    text, ids = masking.end_of_turn(worker.tokenizer, generation_config.prompt_format)
    sequences = generation_config.stopping_sequences
    known = worker.model.generation_config.eos_token_id
    stops = {*ids, *(known if isinstance(known, list) else [known]), worker.tokenizer.eos_token_id, *sequences}
    texts = tuple(stop for stop in (text, *sequences) if isinstance(stop, str) and stop)
    return Ends(frozenset(stop for stop in stops if isinstance(stop, int)), texts)


def last_answer(ids: np.ndarray, mask: np.ndarray, stops: frozenset[int] | None) -> Answered | None:
    """Divide an example before its last answer; None if it has none, or one that ends with none of `stops`."""
    supervised = np.flatnonzero(mask)
    if not len(supervised) or (stops is not None and int(ids[supervised[-1]]) not in stops):
        return None
    others = np.flatnonzero(~mask[: supervised[-1]])
    first = int(others[-1]) + 1 if len(others) else 0
    return Answered(ids[:first].tolist(), ids[first : supervised[-1] + 1].tolist()) if first else None


def is_partitioned(worker: Worker) -> bool:
    """Report whether the weights are (ZeRO-3, FSDP2), so that all ranks generate together."""
    engine = worker.deepspeed_engine
    return worker.is_fsdp or (engine is not None and engine.zero_optimization_stage() == 3)


@contextlib.contextmanager
def for_generation(worker: Worker, is_compiled: bool):
    """Switch the model to evaluation for a block; a compiled decoder would be recompiled for every length."""
    worker.wrapped.eval()
    eager = torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext()
    try:
        with torch.no_grad(), fsdp.with_whole_root(worker.wrapped), eager:
            yield
    finally:
        worker.wrapped.train()


def generate(
    worker: Worker, prompts: list[list[int]], ends: Ends, max_new_tokens: int, max_seconds: float | None = None
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
        eos_token_id=sorted(ends.ids),
        pad_token_id=pad,
        # Partitioned weights are gathered by all ranks together, so none may end before the others.
        synced_gpus=is_partitioned(worker) and worker.accelerator.num_processes > 1,
        **({"stop_strings": list(ends.texts), "tokenizer": worker.tokenizer} if ends.texts else {}),
    )
    return output[:, width:].tolist()
