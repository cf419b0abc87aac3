"""OpenAI's chat completions: request bodies checked and encoded as in training, answers in OpenAI's format.

A parameter that would change the answer and is not supported (n above 1, penalties, JSON schemas)
is rejected rather than ignored; one that changes nothing (user, metadata) is accepted.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from forgebook.data.image_parts import PROMPTS, image_count
from forgebook.data.images import IMAGES
from forgebook.data.row_formats import parse_row
from forgebook.data.tools import CALL_MARKS, split_calls
from forgebook.errors import DataError, shown_value
from forgebook.inference.prompt_images import EncodedPrompt, TemporaryStore, encode_prompt
from forgebook.inference.request_images import with_bytes, without_images
from forgebook.inference.sampling import LEAST, StopStrings, TokenSampling, prompt_seed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from forgebook.inference.engine import GenerationRequest, Job, ServedModel, TokenChance

__all__ = [
    "ApiError",
    "ChatRequest",
    "ChunkWriter",
    "completion_object",
    "engine_request",
    "model_objects",
    "read_request",
]


MAX_QUOTED = 1000
# A prompt of more characters is rejected before it is tokenized, which takes seconds per megabyte. Text has about 4
# characters per token, indented code up to 10.
CHARACTERS_PER_TOKEN = 16
# After each token, an answer is compared with the beginnings of its stop strings.
MAX_STOP = 1000


class ApiError(Exception):
    """Answer a request with an error: HTTP status, message, the parameter at fault and OpenAI's code."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        # Both quote the request, which may be long, or hold half a surrogate pair.
        super().__init__(_quotable(message))
        self.status, self.param, self.code = status, param and _quotable(param), code

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def _quotable(text: str) -> str:
    return text[:MAX_QUOTED].encode(errors="backslashreplace").decode()


CALL_STARTS = StopStrings(CALL_MARKS)


def _zero_or_more(temperature: float) -> float:
    if 0 < temperature < LEAST:
        raise PydanticCustomError("temperature", f"must be 0 (greedy) or at least {LEAST:g}")
    return temperature


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StopString = Annotated[str, Field(max_length=MAX_STOP)]
Zero = Annotated[float, Field(ge=0, le=0)] | None


class ChatRequest(BaseModel):
    """A body of POST /v1/chat/completions."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    messages: list[Any]
    tools: list[Any] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    temperature: Annotated[float, Field(ge=0, le=2), AfterValidator(_zero_or_more)] | None = None
    top_p: Annotated[float, Field(ge=LEAST, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[list[StopString], Field(max_length=16), BeforeValidator(_as_list)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    # Accepted with their default values only.
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    logit_bias: Annotated[dict, Field(max_length=0)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    # These change no answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    parallel_tool_calls: Any = None
    prompt_cache_key: Any = None
    safety_identifier: Any = None

    @model_validator(mode="after")
    def _top_of_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs: true")
        return self

    @property
    def offered_tools(self) -> list[Any] | None:
        """The tools that the prompt lists."""
        return None if self.tool_choice == "none" else self.tools or None


def read_request(body: bytes) -> ChatRequest:
    """Check a request's body. Raises ApiError (400) that names the parameter at fault."""
    try:
        raw = json.loads(body)
        if not _is_text(raw):
            raise ValueError("half a surrogate pair is no text")
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON in UTF-8: {type(error).__name__}: {error}") from None
    if not isinstance(raw, dict):
        raise ApiError(400, f"the body must be a JSON object, got {type(raw).__name__}")
    try:
        return ChatRequest.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = str(first["loc"][0]) if first["loc"] else None
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"unrecognized request argument: {param}", param, "unknown_parameter") from None
        place = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
        raise ApiError(400, place + first["msg"], param, "invalid_value") from None


def engine_request(request: ChatRequest, models: Mapping[str, ServedModel]) -> GenerationRequest:
    """Encode a request's conversation exactly as a training example's. Raises ApiError (404, 400)."""
    from forgebook.inference.engine import GenerationRequest

    if request.model not in models:
        raise ApiError(
            404,
            f"the model {shown_value(request.model)} is not served here: {', '.join(models)}",
            "model",
            "model_not_found",
        )
    served = models[request.model]
    loaded = served.loaded
    _check_length(request, served)
    prompt, store = _encode(request, served)
    ids = prompt.input_ids
    room = served.context - len(ids)
    requested = request.max_completion_tokens or request.max_tokens
    if room < (requested or 1):
        limit = f" and max_tokens is {requested}" if requested else ""
        raise ApiError(
            400,
            f"the context of {served.name} is {served.context} tokens: the prompt has {len(ids)}{limit}",
            "messages" if room < 1 else "max_tokens",
            "context_length_exceeded",
        )
    return GenerationRequest(
        model=served.name,
        input_ids=ids,
        images=prompt.images,
        store=store,
        max_new_tokens=requested or min(room, loaded.generation_config.max_new_tokens or room),
        sampling=_token_sampling(request, loaded.generation_config),
        stop=tuple(request.stop or ()),
        keep_special=request.offered_tools is not None,
        top_chances=(request.top_logprobs or 0) if request.logprobs else None,
    )


def _encode(request: ChatRequest, served: ServedModel) -> tuple[EncodedPrompt, TemporaryStore | None]:
    """Encode a request's conversation, with the images of its messages in a store. Raises ApiError (400)."""
    loaded = served.loaded
    try:
        raw = {"messages": with_bytes(request.messages), "tools": request.offered_tools}
        example, _ = parse_row(raw, "request", PROMPTS)
        messages = example.conversation
        texts = [{key: value for key, value in message.items() if key != IMAGES} for message in messages]
        if not _is_text([texts, example.tools]):  # in a call's arguments, JSON within JSON
            raise DataError("arguments hold half a surrogate pair, which is no text")
        # Also where a message has other names than OpenAI's for its parts.
        if not all(image.data for message in messages for image in message.get(IMAGES) or ()):
            raise DataError("an image must be a part of content: image_url with a data URI or an http(s) address")
        store = TemporaryStore() if image_count(messages) else None
        path = None if store is None else store.path
        return encode_prompt(
            messages, loaded.tokenizer, loaded.images, path, loaded.prompt_format, example.tools
        ), store
    except (DataError, RecursionError) as error:
        raise ApiError(400, str(error), "messages", "invalid_value") from None


def _check_length(request: ChatRequest, served: ServedModel) -> None:
    """Raise ApiError for a prompt that is too long to be tokenized, let alone for the context."""
    length, limit = (
        _json_length([without_images(request.messages), request.offered_tools]),
        served.context * CHARACTERS_PER_TOKEN,
    )
    if length > limit:
        raise ApiError(
            400,
            f"the context of {served.name} is {served.context} tokens: messages and tools have {length} characters of "
            f"JSON, {limit} are allowed",
            "messages",
            "context_length_exceeded",
        )


def _json_length(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False))


def _is_text(value: Any) -> bool:
    """Return whether all strings of a JSON value can be encoded: half a surrogate pair is valid JSON and no text."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _token_sampling(request: ChatRequest, defaults: Any) -> TokenSampling:
    """Take a request's sampling, and what it leaves out from the model's generation config."""
    samples = bool(defaults.do_sample)
    temperature = (1.0 if defaults.temperature is None else defaults.temperature) if samples else 0.0
    return TokenSampling(
        temperature=temperature if request.temperature is None else request.temperature,
        top_p=request.top_p or (samples and defaults.top_p) or 1.0,
        top_k=(samples and defaults.top_k) or 0,
        seed=None if request.seed is None else prompt_seed(request.seed),
    )


def model_objects(models: Mapping[str, ServedModel]) -> list[dict[str, Any]]:
    """List what is served, as GET /v1/models does."""
    return [
        {"id": name, "object": "model", "created": int(served.folder.stat().st_mtime), "owned_by": "forgebook"}
        for name, served in models.items()
    ]


# Answers ----------------------------------------------------------------------------------------------


def completion_object(request: ChatRequest, job: Job) -> dict[str, Any]:
    """Write a complete answer as a chat.completion object."""
    text, calls = _split_calls(request, job.text)
    message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
    if calls:
        message["tool_calls"] = calls
    logprobs = _logprobs(job.chances) if request.logprobs else None
    choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": _reason(job, calls)}
    return {
        "id": _new_id("chatcmpl"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": [choice],
        "usage": _usage(job),
    }


class ChunkWriter:
    """Write an answer as chat.completion.chunk objects while it is generated.

    With tools, text that may turn out to be a call is held back until that is clear.
    """

    def __init__(self, request: ChatRequest):
        self._request = request
        self._common = {
            "id": _new_id("chatcmpl"),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": request.model,
        }
        self._text, self._sent, self._sent_chances = "", 0, 0

    def first(self) -> dict[str, Any]:
        """Return the chunk that opens the answer."""
        return self._chunk({"role": "assistant", "content": ""})

    def add(self, piece: str, chances: Sequence[TokenChance] = ()) -> list[dict[str, Any]]:
        """Return the chunks for a new piece of text. chances: of all tokens so far."""
        self._text += piece
        end = _settled_without_calls(self._text) if self._request.offered_tools else len(self._text)
        return self._content(self._text[:end], chances)

    def last(self, job: Job) -> list[dict[str, Any]]:
        """Return the chunks that close the answer: text held back, calls, finish reason, usage."""
        text, calls = _split_calls(self._request, job.text)
        chunks = self._content(text, job.chances)
        if len(job.chances) > self._sent_chances:  # tokens that added no text
            chunks.append(self._chunk({}, logprobs=self._new_logprobs(job.chances)))
        if calls:
            deltas = [{"index": k, **call} for k, call in enumerate(calls)]
            chunks.append(self._chunk({"tool_calls": deltas}))
        chunks.append(self._chunk({}, _reason(job, calls)))
        if (self._request.stream_options or {}).get("include_usage"):
            chunks.append({**self._common, "choices": [], "usage": _usage(job)})
        return chunks

    def _content(self, text: str, chances: Sequence[TokenChance]) -> list[dict[str, Any]]:
        """Return a chunk with what is new in the answer's text, if anything."""
        new, self._sent = text[self._sent :], max(self._sent, len(text))
        return [self._chunk({"content": new}, logprobs=self._new_logprobs(chances))] if new else []

    def _new_logprobs(self, chances: Sequence[TokenChance]) -> dict[str, Any] | None:
        if not self._request.logprobs:
            return None
        new, self._sent_chances = list(chances[self._sent_chances :]), len(chances)
        return _logprobs(new)

    def _chunk(
        self, delta: dict[str, Any], reason: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._common, "choices": [choice]}


def _logprobs(chances: Sequence[TokenChance]) -> dict[str, Any]:
    """Write log-probabilities as OpenAI does; those of a token with part of a character have no bytes."""

    def entry(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    tokens = [entry(one.text, one.logprob) | {"top_logprobs": [entry(*top) for top in one.top]} for one in chances]
    return {"content": tokens, "refusal": None}


def _split_calls(request: ChatRequest, text: str) -> tuple[str, list[dict[str, Any]]]:
    """Split an answer into its text and its tool calls; where a call cannot be read, all of it is text."""
    content, calls = split_calls(text, request.offered_tools)
    functions = [{"name": c.name, "arguments": json.dumps(c.arguments, ensure_ascii=False)} for c in calls]
    return content, [{"id": _new_id("call"), "type": "function", "function": function} for function in functions]


def _settled_without_calls(text: str) -> int:
    """Count the characters of an unfinished answer that are plain text whatever follows."""
    if text.lstrip()[:1] in ("", "{", "["):  # may become a call without a mark
        return 0
    return len(text[: CALL_STARTS.settled(text)].rstrip())  # white space before a call is dropped


def _reason(job: Job, calls: list) -> str | None:
    return "tool_calls" if calls and job.finish == "stop" else job.finish


def _usage(job: Job) -> dict[str, int]:
    prompt, answer = len(job.request.input_ids), len(job.ids)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"
