"""Requests to a language model behind an OpenAI-compatible URL: many at a time, repeated, saved, counted.

    endpoint = Endpoint(settings)                       an EndpointConfig of the config
    for number, reply in endpoint.ask_all(requests): ...

A reply is saved as it comes, in $FORGEBOOK_CACHE/replies, by the hash of endpoint, model and all of the request: an
interrupted command asks nothing twice. The key is read from the environment and is in no file and no message.
"""

from __future__ import annotations

import base64
import concurrent.futures
import hashlib
import http.client
import itertools
import json
import os
import random
import threading
import urllib.error
import urllib.request
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from forgebook.config.curation_blocks import EndpointConfig
from forgebook.errors import ConfigError, ResourceError, shown_value
from forgebook.runs.download import cache_folder

__all__ = ["EmbeddingRequest", "Endpoint", "Reply", "Request", "Usage"]

OPENAI = "https://api.openai.com/v1"
BUSY = {408, 409, 425, 429, 500, 502, 503, 504, 529}
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds before a repeated request, doubled each time
LARGEST_REPLY = 16 * 2**20


@dataclass(frozen=True)
class Request:
    """What a model is asked. seed: replies of several seeds differ, where the temperature is above 0.

    top_logprobs: how many of the likeliest tokens to return at each place of the reply.
    """

    messages: tuple[dict[str, str], ...]
    temperature: float = 0.0
    max_tokens: int = 512
    seed: int = 0
    top_logprobs: int = 0
    path: ClassVar[str] = "chat/completions"

    def body(self) -> dict[str, Any]:
        """Return what is sent, but for the model."""
        return {
            "messages": list(self.messages), "max_tokens": self.max_tokens, "temperature": self.temperature,
            "seed": self.seed, **({"logprobs": True, "top_logprobs": self.top_logprobs} if self.top_logprobs else {}),
        }  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """Describe the request for its hash: what is not asked for is left out, so that saved replies stay valid."""
        return {name: value for name, value in asdict(self).items() if name != "top_logprobs" or value}


@dataclass(frozen=True)
class EmbeddingRequest:
    """Texts to embed; the text of the reply is the base64 of [texts, size] 32-bit numbers."""

    texts: tuple[str, ...]
    path: ClassVar[str] = "embeddings"

    def body(self) -> dict[str, Any]:
        """Return what is sent, but for the model."""
        return {"input": list(self.texts)}

    def as_json(self) -> dict[str, Any]:
        """Describe the request for its hash."""
        return asdict(self)


@dataclass(frozen=True)
class Reply:
    """What a model answered, and the tokens that the endpoint counted. was_cut: at max_tokens.

    tokens: (text, {likely text: its log-probability}) for each token of the answer, where asked for and returned.
    """

    text: str
    input_tokens: int = 0
    output_tokens: int = 0
    was_cut: bool = False
    tokens: Sequence[tuple[str, dict[str, float]]] = ()


AnyRequest = Request | EmbeddingRequest


@dataclass
class Usage:
    """What was asked now, and what an earlier command had saved; tokens and cost are of both."""

    asked: int = 0
    saved: int = 0
    repeated: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def as_json(self, settings: EndpointConfig) -> dict[str, Any]:
        """Describe the requests, with their cost in USD where the config has prices."""
        prices = settings.usd_per_million_input_tokens, settings.usd_per_million_output_tokens
        described: dict[str, Any] = {"model": settings.model, **asdict(self)}
        if None not in prices:
            tokens = self.input_tokens, self.output_tokens
            described["cost_usd"] = round(
                sum(n * (price or 0) for n, price in zip(tokens, prices, strict=True)) / 1e6, 6
            )
        return described


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: it would take the key to another host."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


@dataclass
class Endpoint:
    """A model to ask. usage: what was asked so far. saves: whether replies are saved for a later command."""

    settings: EndpointConfig
    saves: bool = True
    usage: Usage = field(default_factory=Usage, init=False)

    def __post_init__(self) -> None:
        self.url = (self.settings.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI).rstrip("/")
        self._key = os.environ.get(self.settings.api_key_env, "")
        if not self._key and self.url.startswith("https://api.openai.com"):
            raise ConfigError(f"{self.url} needs a key: set {self.settings.api_key_env}")
        if not self._key.isascii() or any(sign.isspace() for sign in self._key):
            raise ConfigError(f"{self.settings.api_key_env} holds no API key: it has spaces or letters beyond ASCII")
        self._replies = _SavedReplies(self.url, self.settings.model) if self.saves else None
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._refused: set[str] = set()  # parameters that the model does not take

    def ask_all(self, requests: Iterable[AnyRequest]) -> Iterator[tuple[int, Reply]]:
        """Yield (number of the request, its reply) as replies come; saved ones are not asked again.

        Raises ConfigError if the endpoint rejects a request, ResourceError if it does not answer after all repetitions.
        """
        running: dict[concurrent.futures.Future[Reply], int] = {}
        self._stopped.clear()
        with concurrent.futures.ThreadPoolExecutor(self.settings.concurrency) as pool:
            try:
                for number, request in enumerate(requests):
                    if (reply := self.saved(request)) is not None:
                        yield number, reply
                        continue
                    if len(running) >= self.settings.concurrency:
                        yield from self._finished(running)
                    running[pool.submit(self._ask, request)] = number
                while running:
                    yield from self._finished(running)
            finally:
                self._stopped.set()  # no further repetition, where this ends early
                for future in running:
                    future.cancel()

    def _finished(self, running: dict[concurrent.futures.Future[Reply], int]) -> Iterator[tuple[int, Reply]]:
        """Wait for at least one reply; yield those that are there, and remove them.

        Where a request fails, what is being answered to the others is waited for and yielded first: it is paid for.
        """
        done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
        problem = next((error for future in done if (error := future.exception()) is not None), None)
        if problem is not None:
            self._stopped.set()  # no further repetition
            done, _ = concurrent.futures.wait(running)
        for future in done:
            number = running.pop(future)
            if future.exception() is None:
                yield number, future.result()
        if problem is not None:
            raise problem

    def saved(self, request: AnyRequest) -> Reply | None:
        """Return the saved reply to a request, and count it; None if there is none."""
        reply = self._replies.get(self._identity(request)) if self._replies is not None else None
        if reply is not None:
            self._count(reply, is_saved=True)
        return reply

    def save(self, request: AnyRequest, reply: Reply) -> None:
        """Save a reply as it comes, and count it."""
        if self._replies is not None:
            self._replies.add(self._identity(request), reply)
        self._count(reply, is_saved=False)

    def _identity(self, request: AnyRequest) -> str:
        return hashlib.sha256(json.dumps([self.url, self.settings.model, request.as_json()]).encode()).hexdigest()[:32]

    def _count(self, reply: Reply, is_saved: bool) -> None:
        with self._lock:
            self.usage.saved += is_saved
            self.usage.asked += not is_saved
            self.usage.input_tokens += reply.input_tokens
            self.usage.output_tokens += reply.output_tokens

    def _ask(self, request: AnyRequest) -> Reply:
        """Ask until there is a reply, and save it."""
        for attempt in range(self.settings.retries + 1):
            try:
                reply = self._post(request)
                break
            except _BusyError as error:
                if attempt == self.settings.retries or self._stopped.is_set():
                    raise ResourceError(
                        f"{self.settings.model} at {self.url} gave no answer, asked {attempt + 1} times: {error}. The "
                        "same command continues with the replies so far"
                    ) from None
                with self._lock:
                    self.usage.repeated += 1
                longest = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt)
                self._stopped.wait(error.wait or longest * random.uniform(0.5, 1))
        self.save(request, reply)
        return reply

    def _post(self, request: AnyRequest) -> Reply:
        body: dict[str, Any] = {"model": self.settings.model, **request.body()}
        for name in self._refused & set(body):
            value = body.pop(name)
            if name == "max_tokens":  # its name for reasoning models
                body["max_completion_tokens"] = value
        headers = {
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {self._key}"} if self._key else {}),
        }
        sent = urllib.request.Request(f"{self.url}/{request.path}", json.dumps(body).encode(), headers)
        try:
            with self._opener.open(sent, timeout=self.settings.timeout) as response:
                content = response.read(LARGEST_REPLY)
                return (
                    _read_vectors(content, request) if isinstance(request, EmbeddingRequest) else _read_reply(content)
                )
        except urllib.error.HTTPError as error:
            message = self._without_key(_error_message(error))
            if error.code in BUSY:
                raise _BusyError(f"{error.code} {message}", _seconds(error.headers.get("Retry-After"))) from None
            refused = [name for name in ("temperature", "seed", "max_tokens") if name in body and name in message]
            if error.code == 400 and refused:
                self._refused.update(refused)
                return self._post(request)
            raise ConfigError(
                f"{self.url} rejects the request for {self.settings.model}: {error.code} {message}"
            ) from None
        except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut off
            reason = getattr(error, "reason", None) or error
            raise _BusyError(self._without_key(f"{reason}" or type(error).__name__)) from None

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


class _BusyError(Exception):
    """An endpoint that may answer later. wait: seconds, if it says so."""

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


def _read_reply(content: bytes) -> Reply:
    try:
        answer = json.loads(content)
        choices, usage = answer["choices"], answer.get("usage") or {}
        text = (choices[0]["message"].get("content") or "") if choices else ""
        read, written = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
        was_cut = bool(choices) and choices[0].get("finish_reason") == "length"
        places = ((choices[0].get("logprobs") or {}).get("content") or ()) if choices else ()
        tokens = [(place["token"], {one["token"]: one["logprob"] for one in place["top_logprobs"]}) for place in places]
        return Reply(str(text), read, written, was_cut, tokens)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise _BusyError(f"no chat completion but {shown_value(content[:200].decode(errors='replace'))}") from None


def _read_vectors(content: bytes, request: EmbeddingRequest) -> Reply:
    try:
        answer = json.loads(content)
        by_text = sorted(answer["data"], key=lambda one: int(one["index"]))
        vectors = array("f", itertools.chain.from_iterable(one["embedding"] for one in by_text))
        sizes = {len(one["embedding"]) for one in by_text}
        if len(by_text) != len(request.texts) or len(sizes) != 1:
            raise ValueError
        read = int((answer.get("usage") or {}).get("prompt_tokens") or 0)
        return Reply(base64.b64encode(vectors.tobytes()).decode(), read)
    except (ValueError, KeyError, TypeError, AttributeError):
        shown = shown_value(content[:200].decode(errors="replace"))
        raise _BusyError(f"no embedding for each of {len(request.texts)} texts but {shown}") from None


def _error_message(error: urllib.error.HTTPError) -> str:
    try:
        text = error.read(LARGEST_REPLY).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""
    try:
        return str(json.loads(text)["error"]["message"])[:500]
    except (ValueError, KeyError, TypeError):
        return text[:500]


def _seconds(text: str | None) -> float | None:
    try:
        return min(LONGEST_WAIT, max(0.0, float(text))) if text else None
    except ValueError:
        return None  # a date


class _SavedReplies:
    """Replies of one model by the hash of their request, in a file that every reply is added to."""

    def __init__(self, url: str, model: str):
        name = hashlib.sha256(f"{url}\0{model}".encode()).hexdigest()[:16]
        self._path, self._lock = cache_folder() / "replies" / f"{name}.jsonl", threading.Lock()
        self._replies = _read_replies(self._path)

    def get(self, key: str) -> Reply | None:
        return self._replies.get(key)

    def add(self, key: str, reply: Reply) -> None:
        line = json.dumps({"request": key, **asdict(reply)}, ensure_ascii=False)
        with self._lock:
            self._replies[key] = reply
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")


def _read_replies(path: Path) -> dict[str, Reply]:
    """Read what is whole of a file of replies; end a line that a kill cut off, so that the next one has its own."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        with open(path, "ab") as file:
            file.write(b"\n")
    replies = {}
    for line in content.decode(errors="replace").split("\n"):
        try:
            saved = json.loads(line)
            key = saved.pop("request")
            replies[key] = Reply(**saved)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return replies
