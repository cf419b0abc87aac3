"""OpenAI's chat completions: a request's body checked and encoded as in training; an answer in OpenAI's form.

What would change the answer and is not done here (n above 1, log-probabilities, penalties, JSON schemas) is refused
rather than ignored; what changes nothing (user, metadata) is accepted.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from forgebook.data import masking
from forgebook.data.row_formats import parse_row
from forgebook.data.tools import CALL_OPENINGS, read_tool_calls
from forgebook.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from forgebook.inference.engine import Ask, Job, Served

__all__ = ["SIGNS", "ChatRequest", "Pieces", "Refusal", "as_ask", "completion", "list_models", "read_request"]


class Refusal(Exception):
    """Answer a request with an error: its status, sentence, the parameter at fault and a code."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


# What opens a call in a text: what tools.CALL_OPENINGS finds, to know it by its beginning too.
SIGNS = ("<tool_call>", "[TOOL_CALLS]", "<function=", "<functioncall>", "<|python_tag|>")

Nothing = Annotated[float, Field(ge=0, le=0)] | None


class ChatRequest(BaseModel):
    """A body of POST /v1/chat/completions."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    messages: list[Any]
    tools: list[Any] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None

    # Only as they are by default.
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    presence_penalty: Nothing = None
    frequency_penalty: Nothing = None
    logprobs: Literal[False] | None = None
    top_logprobs: Nothing = None
    logit_bias: Annotated[dict, Field(max_length=0)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    # Change no answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    parallel_tool_calls: Any = None
    prompt_cache_key: Any = None
    safety_identifier: Any = None

    @property
    def offered_tools(self) -> list[Any] | None:
        """Name the tools that the prompt lists."""
        return None if self.tool_choice == "none" else self.tools or None


def read_request(body: bytes) -> ChatRequest:
    """Check a body; raise Refusal (400) with the field that is wrong."""
    try:
        raw = json.loads(body)
        # Half a surrogate pair is valid JSON and no text.
        json.dumps(raw, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not valid JSON in UTF-8: {type(error).__name__}: {error}") from None
    if not isinstance(raw, dict):
        raise Refusal(400, f"the body must be a JSON object, got {type(raw).__name__}")
    try:
        return ChatRequest.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = str(first["loc"][0]) if first["loc"] else None
        if first["type"] == "extra_forbidden":
            raise Refusal(400, f"unrecognized request argument: {param}", param, "unknown_parameter") from None
        raise Refusal(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}", param, "invalid_value") from None


def as_ask(request: ChatRequest, models: Mapping[str, Served]) -> Ask:
    """Encode a request's conversation exactly as a training row's; raise Refusal (404, 400)."""
    from forgebook.inference.engine import Ask

    if request.model not in models:
        raise Refusal(
            404, f"the model {request.model!r} is not served here: {', '.join(models)}", "model", "model_not_found"
        )
    served = models[request.model]
    try:
        row, _ = parse_row({"messages": request.messages, "tools": request.offered_tools}, "request", "causal_lm")
        speaker = served.speaker
        ids = masking.encode_prompt(row.messages, speaker.tokenizer, speaker.prompt_format, row.tools)
    except (DataError, RecursionError) as error:
        raise Refusal(400, str(error), "messages", "invalid_value") from None
    room = served.context - len(ids)
    wanted = request.max_completion_tokens or request.max_tokens
    if room < (wanted or 1):
        asked = f" and max_tokens asks for {wanted}" if wanted else ""
        raise Refusal(
            400, f"the context of {served.name} is {served.context} tokens: the prompt has {len(ids)}{asked}",
            "messages" if room < 1 else "max_tokens", "context_length_exceeded",
        )  # fmt: skip
    defaults = speaker.generation_config
    samples = bool(defaults.do_sample)
    default_temperature = (1.0 if defaults.temperature is None else defaults.temperature) if samples else 0.0
    stop = request.stop or ()
    return Ask(
        model=served.name,
        input_ids=ids,
        max_new_tokens=wanted or min(room, defaults.max_new_tokens or room),
        temperature=default_temperature if request.temperature is None else request.temperature,
        top_p=request.top_p or (samples and defaults.top_p) or 1.0,
        top_k=(samples and defaults.top_k) or 0,
        seed=request.seed,
        stop=tuple(text for text in ((stop,) if isinstance(stop, str) else stop) if text),
        keep_special=request.offered_tools is not None,
    )


def list_models(models: Mapping[str, Served]) -> list[dict[str, Any]]:
    """List what is served, as GET /v1/models does."""
    return [
        {"id": name, "object": "model", "created": int(served.folder.stat().st_mtime), "owned_by": "forgebook"}
        for name, served in models.items()
    ]


# Answers ----------------------------------------------------------------------------------------------


def completion(request: ChatRequest, job: Job) -> dict[str, Any]:
    """Write a whole answer as a chat.completion object."""
    text, calls = _parted(request, job.text)
    message = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
    if calls:
        message["tool_calls"] = calls
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _reason(job, calls)}
    return {
        "id": _id("chatcmpl"), "object": "chat.completion", "created": int(time.time()), "model": request.model,
        "choices": [choice], "usage": _usage(job),
    }  # fmt: skip


class Pieces:
    """Writes an answer as chat.completion.chunk objects while it comes.

    With tools, words that may turn out to be a call wait until it is clear.
    """

    def __init__(self, request: ChatRequest):
        self._request = request
        self._same = {"id": _id("chatcmpl"), "object": "chat.completion.chunk", "created": int(time.time()),
                      "model": request.model}  # fmt: skip
        self._text, self._sent = "", 0

    def first(self) -> dict[str, Any]:
        """Return the chunk that opens the answer."""
        return self._chunk({"role": "assistant", "content": ""})

    def add(self, piece: str) -> list[dict[str, Any]]:
        """Return the chunks that a new piece of text makes."""
        self._text += piece
        sure = _sure_words(self._text) if self._request.offered_tools else len(self._text)
        return self._words(self._text[:sure])

    def last(self, job: Job) -> list[dict[str, Any]]:
        """Return the chunks that close the answer: what was held back, the calls, the reason, the usage."""
        text, calls = _parted(self._request, job.text)
        chunks = self._words(text)
        if calls:
            deltas = [{"index": k, **call} for k, call in enumerate(calls)]
            chunks.append(self._chunk({"tool_calls": deltas}))
        chunks.append(self._chunk({}, _reason(job, calls)))
        if (self._request.stream_options or {}).get("include_usage"):
            chunks.append({**self._same, "choices": [], "usage": _usage(job)})
        return chunks

    def _words(self, upto: str) -> list[dict[str, Any]]:
        new, self._sent = upto[self._sent :], max(self._sent, len(upto))
        return [self._chunk({"content": new})] if new else []

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {**self._same, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}


def _parted(request: ChatRequest, text: str) -> tuple[str, list[dict[str, Any]]]:
    """Part an answer into its words and its calls; where a call cannot be read, all of it is words."""
    if not request.offered_tools:
        return text, []
    try:
        calls = read_tool_calls(text)
    except DataError:
        return text, []
    if not calls:
        return text, []
    opened = CALL_OPENINGS.search(text)
    functions = [{"name": c.name, "arguments": json.dumps(c.arguments, ensure_ascii=False)} for c in calls]
    words = text[: opened.start()].rstrip() if opened else ""
    return words, [{"id": _id("call"), "type": "function", "function": function} for function in functions]


def _sure_words(text: str) -> int:
    """Count the characters of an unfinished answer that are words, whatever follows: no call may begin in them."""
    if text.lstrip()[:1] in ("", "{", "["):
        return 0
    opened = CALL_OPENINGS.search(text)
    end = opened.start() if opened else len(text)
    if not opened:
        begun = (n for n in range(1, len(max(SIGNS, key=len))) if any(sign.startswith(text[-n:]) for sign in SIGNS))
        end -= max(begun, default=0)
    return len(text[:end].rstrip())  # white space before a call is dropped


def _reason(job: Job, calls: list) -> str:
    return "tool_calls" if calls and job.finish == "stop" else job.finish


def _usage(job: Job) -> dict[str, int]:
    asked, answered = len(job.ask.input_ids), len(job.ids)
    return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}


def _id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"
