"""The inference engine: models loaded once, one thread that generates, requests answered in small batches.

    engine = Engine({"quickstart": checkpoint_folder}).start()
    job = engine.submit(GenerationRequest("quickstart", ids, max_new_tokens=50), on_text)
    job.cancel()

Adapters over the same base share it. Requests that wait for the same model are answered together; each answer of such
a batch samples with its own temperature and random numbers, and stops, streams or is cancelled on its own.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from forgebook.config.blocks import GenerationConfig
from forgebook.inference import loading
from forgebook.inference.decode import Request, decode
from forgebook.inference.sampling import StopStrings, TokenSampling
from forgebook.models import adapters, families

if TYPE_CHECKING:
    from forgebook.data.image_batches import StoredImage
    from forgebook.inference.prompt_images import TemporaryStore

__all__ = ["Engine", "GenerationRequest", "Job", "QueueFull", "ServedModel", "TokenChance"]

# Requests that may wait; more are rejected, so that memory and waiting time are bounded.
MAX_WAITING = 256


class QueueFull(Exception):
    """Reject a request because too many are waiting."""


@dataclass(frozen=True)
class ServedModel:
    """A model that clients request by name. context: how many tokens prompt and answer may have together."""

    name: str
    folder: Path
    loaded: loading.LoadedModel
    context: int

    @property
    def stop_ids(self) -> frozenset[int]:
        """The token ids that end an answer."""
        return frozenset(self.loaded.generation_config.eos_token_id)


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt for one of the engine's models, already encoded.

    stop: texts that end the answer, in addition to the model's own. keep_special: leave special tokens in the text;
    some models mark tool calls with them. top_chances: note each token's log-probability, and those of so many of the
    most likely ones; None notes nothing. images: of the prompt; store: where those are.
    """

    model: str
    input_ids: list[int]
    max_new_tokens: int
    sampling: TokenSampling = field(default_factory=TokenSampling)
    stop: tuple[str, ...] = ()
    keep_special: bool = False
    top_chances: int | None = None
    images: tuple[StoredImage, ...] = ()
    store: TemporaryStore | None = None


@dataclass(frozen=True)
class TokenChance:
    """A token of an answer: its text, its log-probability, and the most likely tokens there with theirs."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


class Job:
    """One request and its answer so far.

    on_text is called from the engine's thread with each new piece of text, and with None once the answer has ended:
    then `finish` is "stop", "length", "cancelled" or "error", and `text` and `ids` are complete.
    """

    def __init__(self, request: GenerationRequest, served: ServedModel, on_text: Callable[[str | None], None]):
        self.request, self._on_text = request, on_text
        self._tokenizer, self._stop_ids = served.loaded.tokenizer, served.stop_ids
        self._stops = StopStrings((*request.stop, *(served.loaded.generation_config.stop_strings or ())))
        self.ids: list[int] = []
        self.text = ""
        self.finish: str | None = None
        self.chances: list[TokenChance] = []  # of `ids`, if the request asks for them
        self.is_cancelled = False
        self._sent = 0  # characters of the text that on_text was called with
        # Tokens: where the window that is decoded begins, and the part of it that is in the text already.
        self._window = self._read = 0
        self._next_chances: tuple[float, dict[int, float]] | None = None

    def cancel(self) -> None:
        """End the answer at its next token."""
        self.is_cancelled = True

    def add_chances(self, logprob: float, top: dict[int, float]) -> None:
        """Take the log-probabilities of the next token."""
        self._next_chances = logprob, top

    def _note_chances(self, token: int) -> None:
        if self._next_chances is not None:
            logprob, top = self._next_chances
            named = tuple((self._token_text(one), value) for one, value in top.items())
            self.chances.append(TokenChance(self._token_text(token), logprob, named))

    def _token_text(self, token: int) -> str:
        """Decode a token after the last one: alone it may lose the space before it."""
        before = self.ids[-1:]
        return self._tokenizer.decode([*before, token])[len(self._tokenizer.decode(before)) :]

    def add_token(self, token: int) -> bool:
        """Add a token to the answer; return whether the answer has ended."""
        if self.finish is not None:
            return True
        if self.is_cancelled:
            self.end("cancelled")
        elif token in self._stop_ids:
            self.end("stop")
        else:
            self._note_chances(token)
            self.ids.append(token)
            self.text += self._new_text()
            stop = self._stops.find(self.text)
            if stop is not None:
                self._close(self.text[:stop], "stop")
            elif len(self.ids) >= self.request.max_new_tokens:
                self.end("length")
            else:
                self._send(self._stops.settled(self.text))
        return self.finish is not None

    def end(self, finish: str) -> None:
        """Close the answer with the text of all its tokens."""
        decoded = self._decode(self.ids)
        # Text that was sent cannot be taken back, should decoding all tokens at once give another beginning.
        self._close(decoded if decoded.startswith(self.text[: self._sent]) else self.text, finish)

    def _close(self, text: str, finish: str) -> None:
        self.text, self.finish = text, finish
        self._send(len(text))
        self._on_text(None)

    def _new_text(self) -> str:
        """Decode what the last token adds; nothing while a character is incomplete."""
        before, now = self._decode(self.ids[self._window : self._read]), self._decode(self.ids[self._window :])
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""
        self._window, self._read = self._read, len(self.ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=not self.request.keep_special)

    def _send(self, end: int) -> None:
        if end > self._sent:
            piece, self._sent = self.text[self._sent : end], end
            self._on_text(piece)


class Engine:
    """Loaded models and the thread that generates with them."""

    def __init__(
        self,
        folders: dict[str, Path],
        *,
        dtype: str | None = None,
        batch_size: int = 8,
        defaults: GenerationConfig | None = None,
    ):
        """Load the models. defaults: how models are prompted that belong to no run."""
        self.models = _load_all(folders, dtype, defaults)
        self._batch_size = batch_size
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._running: list[Job] = []
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> Engine:
        """Start the thread that generates."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Cancel all answers and end the thread."""
        with self._changed:
            self._stopped = True
            for job in [*self._waiting, *self._running]:
                job.cancel()
            self._changed.notify()
        self._thread.join(timeout=30)

    def submit(self, request: GenerationRequest, on_text: Callable[[str | None], None]) -> Job:
        """Queue a request. Raises QueueFull if too many wait, or the engine was stopped."""
        job = Job(request, self.models[request.model], on_text)
        with self._changed:
            if self._stopped or len(self._waiting) >= MAX_WAITING:
                raise QueueFull
            self._waiting.append(job)
            self._changed.notify()
        return job

    @property
    def jobs(self) -> list[Job]:
        """The jobs that have not ended: those being answered, then those that wait."""
        with self._changed:
            return [job for job in (*self._running, *self._waiting) if job.finish is None]

    def _work(self) -> None:
        while self._answer_next():
            pass

    def _answer_next(self) -> bool:
        """Answer the next batch; return whether there was one. While waiting, none is referred to any more."""
        batch = self._next_batch()
        if not batch:
            return False
        try:
            _generate(self.models[batch[0].request.model], batch)
        except Exception as error:  # whatever goes wrong (memory, say) ends these answers, not the server
            name = batch[0].request.model
            print(f"generating with {name} failed: {type(error).__name__}: {error}", flush=True)
        for job in batch:
            if job.finish is None:
                job.end("error")
        return True

    def _next_batch(self) -> list[Job]:
        """Wait for requests; return the oldest and those that wait for the same model; empty once stopped."""
        while True:
            with self._changed:
                self._running = []
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                if not self._waiting:
                    return []
                name = self._waiting[0].request.model
                batch = [job for job in self._waiting if job.request.model == name][: self._batch_size]
                self._waiting = deque(job for job in self._waiting if job not in batch)
                self._running = batch
            for job in batch:
                if job.is_cancelled:
                    job.end("cancelled")
            if batch := [job for job in batch if job.finish is None]:
                return batch


# Generating -------------------------------------------------------------------------------------------


def _generate(served: ServedModel, jobs: list[Job]) -> None:
    """Answer a batch of requests for one model."""
    requests = [
        Request(
            job.request.input_ids,
            job.request.sampling,
            job.add_token,
            job.add_chances if job.request.top_chances is not None else None,
            job.request.top_chances or 0,
            job.request.images,
        )
        for job in jobs
    ]
    with served.loaded.active() as model:
        for _ in decode(model, requests, len(requests), images=served.loaded.images):
            pass


# Loading ----------------------------------------------------------------------------------------------


def _load_all(folders: dict[str, Path], dtype: str | None, defaults: GenerationConfig | None) -> dict[str, ServedModel]:
    """Load every checkpoint; plain adapters over one base with equal settings share it, also with the base itself."""
    together: dict[tuple, list[str]] = {}
    for name, folder in folders.items():
        settings = adapters.read_lora_config(folder) or {}
        # An adapter that holds full layers, rows of the vocabulary or biases shares no weights.
        full = settings.get("modules_to_save") or settings.get("trainable_token_indices")
        own = full or adapters.trains_biases(folder)
        key = (json.dumps(loading.base_of(folder), sort_keys=True), name if own else None)
        together.setdefault(key, []).append(name)
    served = {}
    for names in together.values():
        models = loading.load_together([folders[name] for name in names], dtype, defaults)
        for name, loaded in zip(names, models, strict=True):
            base, overrides = loading.base_of(folders[name])
            context = families.context_limit(base, overrides.get("rope_scaling")) or loaded.tokenizer.model_max_length
            served[name] = ServedModel(name, folders[name], loaded, context)
    return {name: served[name] for name in folders}
