"""An OpenAI-compatible endpoint for one or more runs: POST /v1/chat/completions, GET /v1/models, GET /health; a page.

    python main.py serve quickstart        then any OpenAI client with base_url http://127.0.0.1:8000/v1

`transformers serve` renders requests with the chat template alone: special tokens in a message become special, prompt
formats are not known, a call's arguments stay text. A model answers worse when it is prompted otherwise than it was
trained, so requests are checked and encoded here, by the functions that encoded the training examples.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from forgebook.errors import ConfigError, StorageError
from forgebook.inference import chat_page, openai_api
from forgebook.inference.connections import BODY_SECONDS, http_settings
from forgebook.inference.openai_api import ApiError
from forgebook.inference.vllm_command import obstacle_for_vllm, trained_on_images, vllm_command
from forgebook.models.vllm_support import choose_engine, runs_eagerly
from forgebook.runs import run

if TYPE_CHECKING:
    from forgebook.config.blocks import GenerationConfig
    from forgebook.inference.engine import Engine, GenerationRequest, Job

__all__ = ["clean_key", "is_loopback", "make_app", "name_models", "serve", "with_bases"]

LOCAL_NAMES = ["127.0.0.1", "localhost", "::1", "[::1]"]
MAX_BODY = 16 * 2**20
# Requests that are parsed and encoded at a time: the longest prompts take seconds and hundreds of megabytes each.
ENCODE_AT_ONCE = 4
# Seconds between checks whether the client of a waiting request is still connected.
CHECK_CLIENT_EVERY = 0.2
NULL_DESCRIPTIONS = (
    "vLLM shows the model a tool without a description as one whose description is null, as training did not: describe "
    "each tool in requests"
)


def serve(
    names: Sequence[str],
    *,
    port: int = 8000,
    host: str = "127.0.0.1",
    key: str | None = None,
    engine: str = "auto",
    dtype: str | None = None,
    ui: bool = False,
) -> None:
    """Serve runs until Ctrl-C or SIGTERM.

    names: runs or checkpoint folders. port: 0 takes a free one. key: what clients send as `Authorization: Bearer`.
    engine: transformers, vllm, or auto: vLLM where it is installed and can load all of them, and none
    reads images. dtype: None is the run's.
    ui: also serve the base models, and a page at / that compares answers; not with vLLM.

    Raises ConfigError for an address that other machines can reach without a key, StorageError for a port in use.
    """
    key = clean_key(key)
    if key is None and not is_loopback(host):
        raise ConfigError(
            f"serve: host={host} can be reached from other machines: set a key with FORGEBOOK_API_KEY or "
            "key_file=FILE, or leave host out"
        )
    folders = name_models(names)
    if ui and engine == "vllm":
        raise ConfigError("serve: --ui is a page of this endpoint, not of vLLM's: leave engine=vllm out")
    # vLLM fetches images from any address, so that it serves these only where it is named.
    is_worth_it = not any(trained_on_images(folder) for folder in folders.values())
    if not ui and choose_engine(engine, lambda: obstacle_for_vllm(folders), is_worth_it) == "vllm":
        command = vllm_command(folders, host=host, port=port, dtype=dtype)
        if runs_eagerly():
            command.append("--enforce-eager")
        print("starting " + " ".join(command), flush=True)
        if "--tool-call-parser" in command:
            print(NULL_DESCRIPTIONS, flush=True)
        # In the environment, not among the arguments, which every user of the machine can read.
        os.execvpe(command[0], command, {**os.environ, **({"VLLM_API_KEY": key} if key else {})})
    with _listening(host, port) as listener:
        from forgebook.inference.engine import Engine

        defaults = None
        if ui:
            folders, defaults = with_bases(folders)
        running = Engine(folders, dtype=dtype, defaults=defaults).start()
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        listener.listen()  # so that whoever reads the next line can connect
        print(f"serving {', '.join(folders)} at {address}/v1 (Ctrl-C ends it)", flush=True)
        if ui:
            print(f"the chat page is at {address}", flush=True)
        app = make_app(running, key=key, only_local=is_loopback(host), ui=ui)
        server = uvicorn.Server(http_settings(app))
        # uvicorn shuts down on SIGTERM and then raises the signal again, for the handler that was there before.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with contextlib.suppress(KeyboardInterrupt):
                server.run(sockets=[listener])
        finally:
            signal.signal(signal.SIGTERM, before)
            running.stop()


def clean_key(key: str | None) -> str | None:
    """Return a key without the white space around it; None for one of white space alone.

    Raises ConfigError for characters that an HTTP header cannot carry.
    """
    key = (key or "").strip()
    if not (key.isascii() and (key.isprintable() or not key)):
        raise ConfigError("serve: the key must consist of printable ASCII characters: HTTP headers carry no others")
    return key or None


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def name_models(names: Sequence[str]) -> dict[str, Path]:
    """Find the checkpoint of each run, by the name under which clients request it: the run's or the folder's.

    Raises ConfigError if two have the same name, StorageError if there is no such run.
    """
    folders: dict[str, Path] = {}
    for name in names:
        folder = run.find_checkpoint(name)
        in_run = folder.parent.name == "checkpoints"
        model = folder.parent.parent.name if in_run else folder.name
        if model in folders:
            raise ConfigError(f"serve: two models are called {model}: {folders[model]} and {folder}")
        folders[model] = folder
    return folders


def with_bases(folders: dict[str, Path]) -> tuple[dict[str, Path], GenerationConfig | None]:
    """Add the models from which runs started, as `base`, or `base of NAME` where there are several.

    Returns the folders and how the first run is prompted: a base that has no chat template is prompted alike.
    """
    from forgebook.inference.loading import base_of, run_config
    from forgebook.models.tokenizer import locate

    configs = {name: run_config(folder) for name, folder in folders.items()}
    bases: dict[Path, str] = {}
    for name, folder in folders.items():
        config, base = configs[name], base_of(folder)[0]
        if base == str(folder) and config is not None:  # full fine-tuning
            base = locate(config.initial_base_model_ckpt_path or config.model_id)
        if Path(base) not in map(Path, folders.values()):
            bases.setdefault(Path(base), name)
    names = {base: "base" if len(bases) == 1 else f"base of {name}" for base, name in bases.items()}
    taken = [name for name in names.values() if name in folders]
    if taken:
        raise ConfigError(f"serve: --ui serves the base model as {taken[0]!r}, which a run is called: rename the run")
    first = next((config for config in configs.values() if config is not None), None)
    return folders | {name: base for base, name in names.items()}, first.generation_config if first else None


@contextlib.contextmanager
def _listening(host: str, port: int):
    """Bind the port before a model is loaded; yield the socket."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            raise StorageError(f"serve: cannot listen on {host}:{port} ({error}): try another port=") from None
        yield listener


# HTTP -------------------------------------------------------------------------------------------------


def make_app(engine: Engine, *, key: str | None = None, only_local: bool = True, ui: bool = False) -> Starlette:
    """Make the web application for a running engine. ui: with the chat page at /.

    only_local: answer only requests addressed to this machine by a local name, so that no web page reaches the
    endpoint through a host name that resolves to this machine (DNS rebinding).
    """
    key = clean_key(key)
    encoding = asyncio.Semaphore(ENCODE_AT_ONCE)

    async def chat(request: Request) -> Response:
        _check_key(request, key)
        content = await _body(request)
        async with encoding:
            body = await asyncio.to_thread(openai_api.read_request, content)
            generation = await asyncio.to_thread(openai_api.engine_request, body, engine.models)
        answer = _Answer(engine, generation, request)
        if body.stream:
            return StreamingResponse(_events(body, answer), media_type="text/event-stream")
        async for _ in answer.pieces():
            pass
        if answer.job.finish == "error":
            raise _generation_failed()
        return JSONResponse(openai_api.completion_object(body, answer.job))

    async def list_models(request: Request) -> Response:
        _check_key(request, key)
        return JSONResponse({"object": "list", "data": openai_api.model_objects(engine.models)})

    async def one_model(request: Request) -> Response:
        _check_key(request, key)
        name = request.path_params["name"]
        model = next((one for one in openai_api.model_objects(engine.models) if one["id"] == name), None)
        if model is None:
            raise ApiError(404, f"the model {name!r} is not served here", "model", "model_not_found")
        return JSONResponse(model)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", list_models),
            Route("/v1/models/{name:path}", one_model),
            Route("/health", health),
            *([Route("/", chat_page.respond)] if ui else []),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_NAMES)] * only_local,
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _unexpected_error},
    )


class _Answer:
    """One answer, from the engine's thread to this request; a client that disconnects cancels it."""

    def __init__(self, engine: Engine, generation: GenerationRequest, request: Request):
        from forgebook.inference.engine import QueueFull

        self._request = request
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(piece: str | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server is shutting down
                loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        try:
            self.job: Job = engine.submit(generation, deliver)
        except QueueFull:
            raise ApiError(503, "too many requests are waiting: try again later", code="overloaded") from None

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the answer's text as it is generated."""
        try:
            while True:
                try:
                    piece = await asyncio.wait_for(self._pieces.get(), CHECK_CLIENT_EVERY)
                except TimeoutError:
                    if await self._request.is_disconnected():
                        return
                    continue
                if piece is None:
                    return
                yield piece
        finally:
            if self.job.finish is None:
                self.job.cancel()


async def _events(body: openai_api.ChatRequest, answer: _Answer) -> AsyncIterator[str]:
    """Write an answer as server-sent events."""
    writer = openai_api.ChunkWriter(body)
    yield _event(writer.first())
    async for piece in answer.pieces():
        for chunk in writer.add(piece, answer.job.chances):
            yield _event(chunk)
    if answer.job.finish in ("stop", "length"):
        for chunk in writer.last(answer.job):
            yield _event(chunk)
        yield "data: [DONE]\n\n"
    else:
        yield _event(_generation_failed().body())


def _generation_failed() -> ApiError:
    return ApiError(500, "generating the answer failed: the server's output has the reason")


def _event(value: dict) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _check_key(request: Request, key: str | None) -> None:
    if key is None:
        return
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    # Compared in constant time, so that the duration reveals nothing about the key.
    if scheme.lower() != "bearer" or not hmac.compare_digest(sent.strip().encode(), key.encode()):
        raise ApiError(401, "the key in 'Authorization: Bearer KEY' is missing or wrong", code="invalid_api_key")


async def _body(request: Request) -> bytes:
    """Read a request's body. Raises ApiError: 415 if it is not JSON, 413 if it is too large, 408 if it is too slow."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the content type must be application/json")
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > 8 * MAX_BODY:
                    break  # most clients read no answer while they still send, so the rest is read up to here
                if size <= MAX_BODY:
                    parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS} s") from None
    if size > MAX_BODY:
        raise ApiError(413, f"the body has {size} bytes or more, {MAX_BODY} are allowed")
    return b"".join(parts)


# Starlette declares handlers with Exception and calls each with the class that it is registered for.


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {401: {"www-authenticate": "Bearer"}, 408: {"connection": "close"}}.get(error.status)
    return JSONResponse(error.body(), error.status, headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, headers=error.headers)


async def _unexpected_error(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, "the server failed on this request").body(), 500)
