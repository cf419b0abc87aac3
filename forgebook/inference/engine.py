"""Answers for many askers at once: models loaded once, one thread that generates, small batches.

    engine = Engine({"quickstart": checkpoint_folder}).start()
    job = engine.submit(Ask("quickstart", ids, max_new_tokens=50), on_text)
    job.cancel()

Adapters over the same base share it. Requests that wait for the same model are answered together; each row of such
a batch samples with its own temperature and random numbers, and stops, streams or is dropped on its own.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from forgebook.inference import generate
from forgebook.models import families

__all__ = ["Ask", "Busy", "Engine", "Job", "Served"]

# Requests that may wait; more are refused, so that memory and patience have a bound.
WAITING = 256


class Busy(Exception):
    """Refuse a request because too many wait."""


@dataclass(frozen=True)
class Served:
    """A model that is asked by its name. context: how many tokens prompt and answer may have together."""

    name: str
    folder: Path
    speaker: generate.Speaker
    context: int

    @property
    def stops(self) -> frozenset[int]:
        """The ids that end an answer."""
        return frozenset(self.speaker.generation_config.eos_token_id)


@dataclass(frozen=True)
class Ask:
    """One request. temperature 0 is greedy; seed None draws other random numbers each time.

    stop: texts that end the answer, beside the model's own. keep_special: show special tokens in the answer, with
    which some models mark calls of tools.
    """

    model: str
    input_ids: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    keep_special: bool = False


class Job:
    """An answer that comes into being.

    on_text is called from the engine's thread with each new piece of text, and with None once the answer has ended:
    then `finish` is "stop", "length", "cancelled" or "error", and `text` and `ids` are complete.
    """

    def __init__(self, ask: Ask, served: Served, on_text: Callable[[str | None], None]):
        self.ask, self._on_text = ask, on_text
        self._tokenizer, self._stop_ids = served.speaker.tokenizer, served.stops
        self._stops = (*ask.stop, *(served.speaker.generation_config.stop_strings or []))
        self.ids: list[int] = []
        self.text, self.finish = "", None
        self._cancelled = False
        self._sent = 0  # characters of the text that were told
        self._start = self._read = 0  # tokens: of the window that is decoded, and of its part that is text already

    def cancel(self) -> None:
        """Let the answer end with its next token."""
        self._cancelled = True

    def take(self, token: int) -> bool:
        """Add a token; tell whether the answer has ended."""
        if self.finish is None:
            if self._cancelled:
                self.end("cancelled")
            elif token in self._stop_ids:
                self.end("stop")
            else:
                self.ids.append(token)
                self.text += self._new_text()
                found = [at for at in (self.text.find(stop, self._sent) for stop in self._stops) if at >= 0]
                if found:
                    self.text = self.text[: min(found)]
                    self.end("stop", whole=False)
                elif len(self.ids) >= self.ask.max_new_tokens:
                    self.end("length")
                else:
                    self._tell(len(self.text) - self._held())
        return self.finish is not None

    def end(self, finish: str, whole: bool = True) -> None:
        """Close the answer. whole: its text is that of all its tokens."""
        if whole:
            decoded = self._decode(self.ids)
            self.text = decoded if decoded.startswith(self.text[: self._sent]) else self.text
        self.finish = finish
        self._tell(len(self.text))
        self._on_text(None)

    def _new_text(self) -> str:
        """Decode what the last token adds; nothing while a character is incomplete."""
        before, now = self._decode(self.ids[self._start : self._read]), self._decode(self.ids[self._start :])
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""
        self._start, self._read = self._read, len(self.ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=not self.ask.keep_special)

    def _held(self) -> int:
        """Count the characters at the end that may become a stop text."""
        ends = [n for stop in self._stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])]
        return max(ends, default=0)

    def _tell(self, upto: int) -> None:
        if upto > self._sent:
            piece, self._sent = self.text[self._sent : upto], upto
            self._on_text(piece)


class Engine:
    """Models in memory and the thread that answers for them."""

    def __init__(self, folders: dict[str, Path], *, dtype: str | None = None, batch_size: int = 8):
        self.models = _load_all(folders, dtype)
        self._batch_size = batch_size
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._running: list[Job] = []
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> Engine:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Drop all answers and end the thread."""
        with self._changed:
            self._stopped = True
            for job in [*self._waiting, *self._running]:
                job.cancel()
            self._changed.notify()
        self._thread.join(timeout=30)

    def submit(self, ask: Ask, on_text: Callable[[str | None], None]) -> Job:
        """Queue a request; raise Busy if too many wait."""
        job = Job(ask, self.models[ask.model], on_text)
        with self._changed:
            if self._stopped or len(self._waiting) >= WAITING:
                raise Busy
            self._waiting.append(job)
            self._changed.notify()
        return job

    @property
    def is_idle(self) -> bool:
        """Tell whether nothing waits and nothing is being answered."""
        with self._changed:
            return not self._waiting and not self._running

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = []
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                if not self._waiting:
                    return
                # The oldest request, and with it those that wait for the same model.
                name = self._waiting[0].ask.model
                mine = [job for job in self._waiting if job.ask.model == name][: self._batch_size]
                self._waiting = deque(job for job in self._waiting if job not in mine)
                self._running = mine
            for job in [job for job in mine if job._cancelled]:
                job.end("cancelled")
            mine = [job for job in mine if job.finish is None]
            try:
                if mine:
                    _answer(self.models[name], mine)
            except Exception as error:  # whatever goes wrong (memory, say) ends these answers, not the server
                print(f"an answer of {name} failed: {type(error).__name__}: {error}", flush=True)
            for job in mine:
                if job.finish is None:
                    job.end("error")


# Generating -------------------------------------------------------------------------------------------


@torch.inference_mode()
def _answer(served: Served, jobs: list[Job]) -> None:
    """Answer a batch of requests for one model."""
    tokenizer = served.speaker.tokenizer
    rows = [job.ask.input_ids for job in jobs]
    with served.speaker.active() as model:
        batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(model.device)
        model.generate(
            **batch,
            max_new_tokens=max(job.ask.max_new_tokens for job in jobs),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            logits_processor=LogitsProcessorList([_Sample(jobs)]),
            stopping_criteria=StoppingCriteriaList([_Deliver(jobs)]),
            tokenizer=tokenizer,
        )


class _Sample(LogitsProcessor):
    """Draw the next token of each row that samples, by the row's own settings and random numbers."""

    def __init__(self, jobs: list[Job]):
        self.rows = {}
        for row, job in enumerate(jobs):
            ask = job.ask
            if ask.temperature > 0:
                warpers = LogitsProcessorList([TemperatureLogitsWarper(ask.temperature)])
                if ask.top_k > 0:
                    warpers.append(TopKLogitsWarper(ask.top_k))
                if ask.top_p < 1:
                    warpers.append(TopPLogitsWarper(ask.top_p))
                numbers = torch.Generator()
                numbers.manual_seed(ask.seed) if ask.seed is not None else numbers.seed()
                self.rows[row] = warpers, numbers

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        for row, (warpers, numbers) in self.rows.items():
            warped = warpers(input_ids[row : row + 1], scores[row : row + 1].float())
            drawn = torch.multinomial(torch.softmax(warped, -1).cpu(), 1, generator=numbers).item()
            scores[row] = -torch.inf
            scores[row, drawn] = 0.0
        return scores


class _Deliver(StoppingCriteria):
    """Give each row's newest token to its request; a row is done when its request is."""

    def __init__(self, jobs: list[Job]):
        self.jobs = jobs

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        newest = input_ids[:, -1].tolist()
        done = [job.take(token) for job, token in zip(self.jobs, newest, strict=True)]
        return torch.tensor(done, device=input_ids.device)


# Loading ----------------------------------------------------------------------------------------------


def _load_all(folders: dict[str, Path], dtype: str | None) -> dict[str, Served]:
    """Load every checkpoint; plain adapters over one base, made alike, share it."""
    together: dict[tuple, list[str]] = {}
    for name, folder in folders.items():
        path = folder / "adapter_config.json"
        settings = json.loads(path.read_text()) if path.exists() else {}
        # A whole model, and an adapter that holds whole layers or rows of the vocabulary, has its weights for itself.
        own = not settings or settings.get("modules_to_save") or settings.get("trainable_token_indices")
        key = (json.dumps(generate.base_of(folder), sort_keys=True), name if own else None)
        together.setdefault(key, []).append(name)
    served = {}
    for names in together.values():
        speakers = generate.load_together([folders[name] for name in names], dtype)
        for name, speaker in zip(names, speakers, strict=True):
            base, overrides = generate.base_of(folders[name])
            context = families.context_limit(base, overrides.get("rope_scaling")) or speaker.tokenizer.model_max_length
            served[name] = Served(name, folders[name], speaker, context)
    return {name: served[name] for name in folders}
