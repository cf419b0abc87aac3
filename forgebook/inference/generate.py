"""Prompts -> completions with a loaded model, many at a time; greedily or sampled.

    loaded = load_together([find_model("quickstart")])[0]          see `loading`
    answers = complete(loaded.model, loaded.tokenizer, conversations, prompt_format=loaded.prompt_format)

Prompts are those of training (`data/masking.py`). What ends an answer is in the model's `generation_config`, where
`loading` has collected it.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from forgebook.config.blocks import PromptFormat
from forgebook.data import chat_template
from forgebook.errors import ResourceError
from forgebook.inference.prompt_images import EncodedPrompt, PromptImages, encode_prompt
from forgebook.inference.sampling import Sampling, StopStrings, TokenSampling, prompt_seed

__all__ = ["OnAnswers", "answer_in_batches", "complete"]

# Called with the answers that are complete, the tokens of all so far, and those in progress as a number of answers: of
# each the share of its longest possible length.
OnAnswers = Callable[[int, int, float], None]


def complete(
    model,
    tokenizer,
    conversations: list[list[chat_template.Message]],
    *,
    prompt_format: PromptFormat | None = None,
    tools: list[list[dict] | None] | None = None,
    on_progress: OnAnswers = lambda done, tokens, begun: None,
    on_answer: Callable[[int, str], None] = lambda index, text: None,
    keep_special: bool = False,
    images: PromptImages | None = None,
    image_store: Path | None = None,
    **sampling: Any,
) -> list[str]:
    """Answer each conversation, which ends with a user's turn; greedily unless a temperature is set.

    tools: for each conversation the tools that it lists, as in its training example.
    on_progress: called at each step. on_answer: called with a conversation's index and its complete answer.
    keep_special: leave special tokens in the answers, except those that end them; some models mark tool calls so.
    images, image_store: as in `answer_in_batches`.
    sampling: the fields of `Sampling`.

    Returns the answers' texts.
    """
    answers = [""] * len(conversations)
    finished = answer_in_batches(
        model,
        tokenizer,
        conversations,
        Sampling(**sampling),
        prompt_format=prompt_format,
        tools=tools,
        keep_special=keep_special,
        on_progress=on_progress,
        images=images,
        image_store=image_store,
    )
    for k, text in finished:
        answers[k] = text
        on_answer(k, text)
    return answers


def answer_in_batches(
    model,
    tokenizer,
    conversations: list[list[chat_template.Message]],
    sampling: Sampling,
    *,
    prompt_format: PromptFormat | None = None,
    tools: list[list[dict] | None] | None = None,
    keep_special: bool | None = False,
    numbers: Sequence[int] | None = None,
    streamer: Any = None,
    on_progress: OnAnswers = lambda done, tokens, begun: None,
    images: PromptImages | None = None,
    image_store: Path | None = None,
) -> Iterator[tuple[int, str]]:
    """Yield (index of a conversation, its answer) in the order in which answers end; the longest prompts come first.

    numbers: each conversation's number in the set of which these are a part; its seed is derived from it.
    keep_special: as in `complete`; None: where tools are offered. on_progress: called at each step.
    streamer: a transformers streamer, which gets each token; for a single conversation only.
    images: of the model, for conversations with some. image_store: where those that were checked are; None keeps their
    bytes until the last answer.

    Raises ResourceError if the GPU runs out of memory.
    """
    if not conversations:
        return
    tools = tools or [None] * len(conversations)
    numbers = range(len(conversations)) if numbers is None else numbers
    keeps = [bool(offered) if keep_special is None else keep_special for offered in tools]
    with tempfile.TemporaryDirectory() if image_store is None else contextlib.nullcontext(image_store) as store:
        prompts = [
            encode_prompt(messages, tokenizer, images, Path(store), prompt_format, offered)
            for messages, offered in zip(conversations, tools, strict=True)
        ]
        yield from _decode(model, tokenizer, prompts, sampling, keeps, numbers, streamer, on_progress, images)


def _decode(
    model,
    tokenizer,
    prompts: list[EncodedPrompt],
    sampling: Sampling,
    keeps: list[bool],
    numbers: Sequence[int],
    streamer: Any,
    on_progress: OnAnswers,
    images: PromptImages | None,
) -> Iterator[tuple[int, str]]:
    """Yield (index of a prompt, its answer); see `answer_in_batches`."""
    import torch

    from forgebook.inference.cache import rows_that_fit
    from forgebook.inference.decode import Request, decode

    ends = model.generation_config
    answers = [_Answer(ends, tokenizer, sampling.max_new_tokens, streamer) for _ in prompts]
    requests = [
        Request(
            prompt.input_ids,
            TokenSampling(sampling.temperature, sampling.top_p, seed=prompt_seed(sampling.seed, number)),
            answer.add_token,
            images=prompt.images,
        )
        for prompt, answer, number in zip(prompts, answers, numbers, strict=True)
    ]
    longest = max(len(prompt.input_ids) for prompt in prompts)
    batch_size = min(sampling.batch_size or rows_that_fit(model, longest + sampling.max_new_tokens), len(prompts))
    tokens = done = tokens_of_done = 0

    def report(added: int = 0) -> None:
        nonlocal tokens
        tokens += added
        on_progress(done, tokens, (tokens - tokens_of_done) / sampling.max_new_tokens)

    if streamer is not None:
        streamer.put(torch.tensor(prompts[0].input_ids))
    try:
        for k in decode(model, requests, batch_size, report, images):
            done, tokens_of_done = done + 1, tokens_of_done + len(answers[k].ids)
            yield k, _text(answers[k].ids, ends, tokenizer, keeps[k])
            report()
    except torch.OutOfMemoryError:
        raise ResourceError(
            f"the GPU has too little memory for {batch_size} prompts of up to {longest} tokens and their answers; "
            f"set batch_size lower than {batch_size}"
        ) from None


class _Answer:
    """The tokens of an answer in progress: it ends with a token or text that ends answers, or at a limit."""

    def __init__(self, ends, tokenizer, limit: int, streamer: Any = None):
        self.ids: list[int] = []
        self._tokenizer, self._limit, self._streamer = tokenizer, limit, streamer
        self._stop_ids = _stop_ids(ends)
        self._stops = StopStrings(ends.stop_strings or ())
        # No token is shorter than a byte, and a letter may begin or end inside one.
        self._tail = 2 + max((len(stop.encode()) for stop in self._stops.stops), default=0)

    def add_token(self, token: int) -> bool:
        """Add a token; return whether the answer has ended."""
        self.ids.append(token)
        has_ended = token in self._stop_ids or len(self.ids) >= self._limit or self._has_stop_text()
        if self._streamer is not None:
            import torch

            self._streamer.put(torch.tensor([token]))
            if has_ended:
                self._streamer.end()
        return has_ended

    def _has_stop_text(self) -> bool:
        return bool(self._stops.stops) and self._stops.find(self._tokenizer.decode(self.ids[-self._tail :])) is not None


def _text(ids: list[int], ends, tokenizer, keep_special: bool) -> str:
    """Decode an answer up to what ends it."""
    closing = _stop_ids(ends)
    stop = next((k for k, token in enumerate(ids) if token in closing), len(ids))
    return StopStrings(ends.stop_strings or ()).cut(tokenizer.decode(ids[:stop], skip_special_tokens=not keep_special))


def _stop_ids(ends) -> frozenset[int]:
    """Return the tokens that end an answer, padding among them; a generation config has none, one or a list."""
    ids = ends.eos_token_id if isinstance(ends.eos_token_id, list) else [ends.eos_token_id]
    return frozenset(token for token in (*ids, ends.pad_token_id) if token is not None)
