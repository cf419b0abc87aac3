"""The decoding loop: prompts -> tokens, many answers at once; for generate, evaluate, chat and serve.

    for k in decode(model, requests, batch_size=32): ...      the answer to requests[k] has ended

An answer leaves the batch with its last token and the next prompt takes its place: no step computes a token that
nobody reads. (`generate` of transformers computes every row until the last one has ended, and copies the whole cache
at every step.) Rows are padded on the left, so that the newest token of each is in the last column.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from forgebook.errors import ModelError
from forgebook.inference.cache import add_rows, keep_rows, rows_cache
from forgebook.inference.sampling import Sampler, TokenSampling, generator_of

if TYPE_CHECKING:
    from forgebook.data.image_batches import StoredImage
    from forgebook.inference.prompt_images import PromptImages

__all__ = ["Request", "decode"]

# Prompt tokens computed at once, padding included: more takes memory and is no faster.
PREFILL_TOKENS = 8192
# Prompts join once this share of the batch is free: computing them holds up all other answers.
FREE_SHARE = 1 / 8


@dataclass(frozen=True)
class Request:
    """A prompt to continue. add_token is called with each new token; it returns whether the answer has ended.

    add_chances: called before it, if not None, with the token's log-probability and those of the `top` most likely
    tokens, by their ids; of the model's own distribution, before temperature and limits. images: of the prompt.
    """

    input_ids: list[int]
    sampling: TokenSampling
    add_token: Callable[[int], bool]
    add_chances: Callable[[float, dict[int, float]], None] | None = None
    top: int = 0
    images: tuple[StoredImage, ...] = ()


@dataclass
class _Row:
    """One answer in progress.

    index: of its request; ids: prompt and answer; processors: of its model's settings. shift: of the positions of its
    answer's tokens, where an image takes fewer positions than it has tokens (Qwen's and GLM's models).
    """

    index: int
    request: Request
    ids: list[int]
    generator: torch.Generator | None
    processors: Any
    shift: int = 0


@torch.inference_mode()
def decode(
    model,
    requests: Sequence[Request],
    batch_size: int,
    on_step: Callable[[int], None] = lambda tokens: None,
    images: PromptImages | None = None,
) -> Iterator[int]:
    """Yield the index of each request when its answer has ended; the longest prompts are answered first.

    batch_size: answers at a time. on_step: called with the number of tokens that a step added. images: of the model,
    where prompts have some.

    Raises torch.OutOfMemoryError, and ModelError for an architecture with a cache of its own kind.
    """
    # The longest first: memory runs out at the start or never, and no prompt that joins is longer than the batch.
    waiting = deque(sorted(range(len(requests)), key=lambda k: -len(requests[k].input_ids)))
    batch = _Batch(model, min(batch_size, len(requests)), images)
    while waiting or batch.rows:
        free = batch.size - len(batch.rows)
        if waiting and (not batch.rows or (batch.takes_more and free >= FREE_SHARE * batch.size)):
            longest = len(requests[waiting[0]].input_ids)
            count = min(free, len(waiting), max(1, PREFILL_TOKENS // longest)) if batch.takes_more else free
            joining = [waiting.popleft() for _ in range(min(count, len(waiting)))]
            rows = batch.join({k: requests[k] for k in joining})
        else:
            rows = batch.step()
        on_step(len(rows))
        ended = {row.index for row in rows if row.request.add_token(row.ids[-1])}
        yield from ended
        if ended:
            batch.keep([k for k, row in enumerate(batch.rows) if row.index not in ended])


class _Batch:
    """Answers in progress, at most `size`. takes_more: whether prompts can join before all of them have ended."""

    def __init__(self, model, size: int, images: PromptImages | None):
        self.size, self.rows = size, list[_Row]()
        self._model, self._images = model, images
        self._inner = model.get_base_model() if hasattr(model, "peft_config") else model
        if not self._inner._supports_default_dynamic_cache():
            raise ModelError(
                f"{type(self._inner).__name__} has a cache of its own kind, with which answers are not computed here"
            )
        accepted = inspect.signature(self._inner.forward).parameters
        self._cache_name = "past_key_values" if "past_key_values" in accepted else "cache_params"
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        rows = rows_cache(self._inner.config, size)
        self.takes_more = rows is not None
        self._cache = rows or DynamicCache(config=self._inner.config)
        self._mask = torch.zeros((0, 0), dtype=torch.long, device=model.device)  # [rows, columns], 0 where padded

    def join(self, requests: dict[int, Request]) -> list[_Row]:
        """Compute prompts and add them, each with its first token; return their rows."""
        rows = [self._start(index, request) for index, request in requests.items()]
        columns = max(len(row.ids) for row in rows)
        ids = torch.tensor([[0] * (columns - len(row.ids)) + row.ids for row in rows])
        mask = torch.tensor([[0] * (columns - len(row.ids)) + [1] * len(row.ids) for row in rows])
        of_images = self._image_inputs(rows, ids)
        ids, mask = ids.to(self._mask.device), mask.to(self._mask.device)
        computed = DynamicCache(config=self._inner.config)
        logits = self._forward(ids, mask, self._positions(rows, ids, mask, of_images), computed, of_images)
        if self.takes_more:
            add_rows(self._cache, computed)
        else:
            self._cache = computed
        if self.rows:
            mask = torch.cat([self._mask, torch.nn.functional.pad(mask, (self._mask.shape[1] - columns, 0))])
        self._mask = mask
        _add_tokens(rows, logits)
        self.rows += rows
        return rows

    def step(self) -> list[_Row]:
        """Add a token to each answer; return all rows."""
        self._mask = torch.cat([self._mask, self._mask.new_ones((len(self.rows), 1))], dim=1)
        newest = torch.tensor([row.ids[-1:] for row in self.rows], device=self._mask.device)
        positions = self._mask.sum(1, keepdim=True) - 1
        if any(row.shift for row in self.rows):
            positions = positions + torch.tensor([[row.shift] for row in self.rows], device=self._mask.device)
        with getattr(self._inner, "_optimize_model_for_decode", contextlib.nullcontext)():
            logits = self._forward(newest, self._mask, positions, self._cache, {})
        _add_tokens(self.rows, logits)
        return self.rows

    def keep(self, kept: list[int]) -> None:
        """Drop all rows except these; their order may change."""
        # The last ones move to where others ended: nothing else is copied.
        low, moved = [k for k in kept if k < len(kept)], [k for k in kept if k >= len(kept)]
        free = sorted(set(range(len(kept))) - set(low))
        sources = list(range(len(kept)))
        for to, of in zip(free, moved, strict=True):
            sources[to] = of
        self.rows = [self.rows[k] for k in sources]
        self._mask = self._mask[torch.tensor(sources, dtype=torch.long, device=self._mask.device)]
        longest = max((len(row.ids) for row in self.rows), default=1) - 1  # the newest token is not computed yet
        unused = self._mask.shape[1] - longest if self.takes_more else 0
        self._mask = self._mask[:, unused:]
        keep_rows(self._cache, sources, unused)

    def _image_inputs(self, rows: list[_Row], ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what the forward pass takes of the images of prompts; nothing if there are none."""
        if self._images is None or not any(row.request.images for row in rows):
            return {}
        inputs = self._images.inputs([row.request.images for row in rows], ids)
        return {name: value.to(self._mask.device) for name, value in inputs.items()}

    def _positions(
        self, rows: list[_Row], ids: torch.Tensor, mask: torch.Tensor, of_images: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the positions of prompts' tokens, in time, height and width where images have these; note the shifts.

        Such a model would compute them itself, and remember those of the last batch alone.
        """
        indexed = getattr(getattr(self._inner, "model", None), "get_rope_index", None)
        if not of_images or indexed is None:
            return (mask.cumsum(1) - 1).clamp(min=0)
        positions, shifts = indexed(input_ids=ids, attention_mask=mask, **of_images)
        for row, shift in zip(rows, shifts.flatten().tolist(), strict=True):
            row.shift = int(shift)
        return positions

    def _forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        cache: DynamicCache,
        of_images: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Return [rows, vocabulary] the logits of the next tokens."""
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, self._cache_name: cache}
        return self._model(**inputs, **of_images, use_cache=True, return_dict=True, **self._last_only).logits[:, -1]

    def _start(self, index: int, request: Request) -> _Row:
        generator = generator_of(request.sampling, self._model.device)
        return _Row(index, request, list(request.input_ids), generator, self._processors(len(request.input_ids)))

    def _processors(self, length: int):
        """Make what a model's generation_config.json does to its logits, such as a repetition penalty; usually none.

        length: of the prompt, in tokens.
        """
        settings = copy.deepcopy(self._inner.generation_config)
        settings.do_sample = False
        self._inner._prepare_special_tokens(settings, kwargs_has_attention_mask=True, device=self._model.device)
        return self._inner._get_logits_processor(settings, length, device=self._model.device)


def _add_tokens(rows: list[_Row], logits: torch.Tensor) -> None:
    """Choose the next token of each row. logits: [rows, vocabulary]."""
    if any(row.processors for row in rows):  # row by row: they look at the whole prompt, and padding is none of it
        each = zip(rows, logits.float(), strict=True)
        logits = torch.cat(
            [row.processors(torch.tensor([row.ids], device=scores.device), scores[None]) for row, scores in each]
        )
    sampler = Sampler([row.request.sampling for row in rows], [row.generator for row in rows], logits.device)
    for row, token, scores in zip(rows, sampler(None, logits).argmax(-1).tolist(), logits, strict=True):
        row.ids.append(token)
        if row.request.add_chances is not None:
            chances = scores.float().log_softmax(-1)
            values, ids = chances.topk(min(row.request.top, len(chances)))
            row.request.add_chances(float(chances[token]), dict(zip(ids.tolist(), values.tolist(), strict=True)))
