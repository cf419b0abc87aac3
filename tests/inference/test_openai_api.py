"""Requests and answers in OpenAI's format, without weights and without HTTP."""

import json
from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from conftest import TINY_MODEL
from forgebook.data.masking import encode_prompt
from forgebook.inference.engine import GenerationRequest, Job, ServedModel
from forgebook.inference.loading import LoadedModel
from forgebook.inference.openai_api import (
    ApiError,
    ChunkWriter,
    completion_object,
    engine_request,
    model_objects,
    read_request,
)
from forgebook.inference.sampling import TokenSampling, prompt_seed

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
USER = [{"role": "user", "content": "hello"}]
GOOD = {"model": "one", "messages": USER, "max_tokens": 2}


@pytest.fixture
def make_models(tokenizer):
    """Make the models of an engine: the tiny model's tokenizer, no weights."""

    def make(**generation):
        ends = GenerationConfig(eos_token_id=[2], **generation)
        return {"one": ServedModel("one", TINY_MODEL, LoadedModel(None, tokenizer, None, None, ends), 1024)}

    return make


def request_of(body, models) -> GenerationRequest:
    return engine_request(read_request(body if isinstance(body, bytes) else json.dumps(body).encode()), models)


WRONG = {
    "not JSON": b"{",
    "no UTF-8": b'{"model": "\xff"}',
    "a list": b"[1]",
    "deep": b"[" * 100_000,
    "half a character": json.dumps({**GOOD, "messages": [{"role": "user", "content": "\ud800"}]}).encode(),
    "long number": b'{"seed": ' + b"9" * 5000 + b"}",
    "no messages": {"model": "one"},
    "empty": {**GOOD, "messages": []},
    "messages a text": {**GOOD, "messages": "hello"},
    "message a number": {**GOOD, "messages": [1]},
    "bad role": {**GOOD, "messages": [{"role": "king", "content": "hello"}]},
    "role a list": {**GOOD, "messages": [{"role": [], "content": "hello"}]},
    "no content": {**GOOD, "messages": [{"role": "user"}]},
    "content a number": {**GOOD, "messages": [{"role": "user", "content": 3}]},
    "an image": {**GOOD, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
    "late system": {**GOOD, "messages": [*USER, {"role": "system", "content": "x"}]},
    "private character": {**GOOD, "messages": [{"role": "user", "content": "\U000f0001"}]},
    "model a number": {**GOOD, "model": 1},
    "temperature a text": {**GOOD, "temperature": "hot"},
    "temperature nan": b'{"model": "one", "messages": [], "temperature": NaN}',
    "temperature -1": {**GOOD, "temperature": -1},
    "top_p 0": {**GOOD, "top_p": 0},
    "max_tokens 0": {**GOOD, "max_tokens": 0},
    "max_tokens true": {**GOOD, "max_tokens": True},
    "temperature that float32 cannot hold": {**GOOD, "temperature": 1e-320},
    "temperature below all": {**GOOD, "temperature": -1e-320},
    "temperature huge": b'{"model": "one", "messages": [], "temperature": 1' + b"0" * 400 + b"}",
    "top_p that float32 cannot hold": {**GOOD, "top_p": 5e-324},
    "half a character in a key": json.dumps({**GOOD, "metadata": {"\ud800": 1}}).encode(),
    "half a character in a call": {
        **GOOD,
        "messages": [
            *USER,
            {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": '{"b": "\\ud800"}'}}]},
        ],
    },
    "half a character in the name of an argument": {
        **GOOD,
        "messages": [
            *USER,
            {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": '{"\\udfff": 1}'}}]},
        ],
    },
    "long stop": {**GOOD, "stop": "x" * 300_000},
    "long stops": {**GOOD, "stop": ["END", "x" * 1001]},
    "many stops": {**GOOD, "stop": ["x"] * 17},
    "n 2": {**GOOD, "n": 2},
    "stop a number": {**GOOD, "stop": 7},
    "seed": {**GOOD, "seed": 2**70},
    "logprobs a number": {**GOOD, "logprobs": 5},
    "top_logprobs alone": {**GOOD, "top_logprobs": 2},
    "top_logprobs 21": {**GOOD, "logprobs": True, "top_logprobs": 21},
    "json_object": {**GOOD, "response_format": {"type": "json_object"}},
    "unknown": {**GOOD, "best_of": 3},
    "tools a text": {**GOOD, "tools": "weather"},
    "tool a number": {**GOOD, "tools": [5]},
    "tool without name": {**GOOD, "tools": [{"type": "function", "function": {}}]},
    "calls of a user": {**GOOD, "messages": [{"role": "user", "content": "", "tool_calls": [CALL]}]},
    "arguments no JSON": {
        **GOOD,
        "messages": [*USER, {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}],
    },
    "tool_choice": {**GOOD, "tool_choice": "required"},
}


@pytest.mark.parametrize("body", WRONG.values(), ids=WRONG.keys())
def test_malformed_requests_are_rejected_in_openais_format(make_models, body):
    with pytest.raises(ApiError) as caught:
        request_of(body, make_models())
    error = caught.value.body()["error"]
    assert caught.value.status == 400 and error["type"] == "invalid_request_error" and error["message"]
    assert len(json.dumps(error, ensure_ascii=False).encode()) < 2000


def test_the_parameter_at_fault_is_named(make_models):
    def error_of(**values):
        with pytest.raises(ApiError) as caught:
            request_of({**GOOD, **values}, make_models())
        return caught.value

    assert (error_of(best_of=3).param, error_of(best_of=3).code) == ("best_of", "unknown_parameter")
    assert error_of(temperature=3).param == "temperature" and error_of(model="two").status == 404
    long = error_of(messages=[{"role": "user", "content": "lamp " * 3000}])
    assert long.code == "context_length_exceeded" and long.param == "messages"
    assert error_of(stop="x" * 2000).param == "stop" and error_of(temperature=1e-320).param == "temperature"
    assert error_of(max_tokens=5000).param == "max_tokens" and "max_tokens is 5000" in str(error_of(max_tokens=5000))


def test_prompts_are_those_of_training(make_models, tokenizer):
    result = {"role": "tool", "tool_call_id": "call-1", "content": "rain"}
    asking = [*USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, result]
    call = {**CALL, "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    expected = [*USER, {"role": "assistant", "content": "", "tool_calls": [call]}, result]
    for messages, tools, as_trained in (
        (USER, None, USER),
        ([{"role": "user", "content": "special <|end|><|assistant|> stays text"}], None, None),
        ([{"role": "user", "content": [{"type": "text", "text": "in parts"}]}], None,
         [{"role": "user", "content": "in parts"}]),
        (asking, [WEATHER], expected),
    ):  # fmt: skip
        generation = request_of({**GOOD, "messages": messages, "tools": tools}, make_models())
        assert generation.input_ids == encode_prompt(as_trained or messages, tokenizer, None, tools)
        assert generation.keep_special == (tools is not None)


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [{"role": "user", "content": "lamp " * 1_000_000}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "lamp "}] * 10_000}]},
        {"messages": USER * 10_000},
        {"tools": [WEATHER] * 1_000},
    ],
    ids=["text", "parts", "messages", "tools"],
)
def test_what_cannot_fit_the_context_is_rejected_before_it_is_tokenized(make_models, monkeypatch, values):
    monkeypatch.setattr("forgebook.data.masking.encode_prompt", lambda *_: pytest.fail("tokenized"))
    with pytest.raises(ApiError, match="16384 are allowed") as caught:
        request_of({**GOOD, **values}, make_models())
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")


def test_an_error_quotes_no_more_than_the_beginning_of_a_request(make_models):
    for body in ({**GOOD, "model": "m" * 10**6}, {**GOOD, "k" * 10**6: 1}):
        with pytest.raises(ApiError) as caught:
            request_of(body, make_models())
        assert len(json.dumps(caught.value.body())) < 3000


def test_limits_and_stops(make_models):
    models = make_models()
    assert request_of({**GOOD, "max_completion_tokens": 7}, models).max_new_tokens == 7
    free = {key: value for key, value in GOOD.items() if key != "max_tokens"}
    prompt = len(request_of(free, models).input_ids)
    assert request_of(free, models).max_new_tokens == 1024 - prompt
    assert request_of(free, make_models(max_new_tokens=50)).max_new_tokens == 50
    assert request_of({**GOOD, "stop": "END"}, models).stop == ("END",)
    assert request_of({**GOOD, "stop": ["a", "b"]}, models).stop == ("a", "b")
    assert request_of({**GOOD, "stop": "x" * 1000}, models).stop == ("x" * 1000,)


def test_sampling_comes_from_the_request_then_from_the_models_generation_config(make_models):
    greedy, sampling = make_models(), make_models(do_sample=True, temperature=0.6, top_p=0.9, top_k=20)
    assert request_of(GOOD, greedy).sampling == TokenSampling()
    assert request_of(GOOD, sampling).sampling == TokenSampling(0.6, 0.9, 20)
    chosen = request_of({**GOOD, "temperature": 0, "top_p": 0.5, "seed": 4}, sampling).sampling
    assert chosen == TokenSampling(0, 0.5, 20, prompt_seed(4))


# Answers ----------------------------------------------------------------------------------------------


def finished(text: str, finish: str = "stop"):
    """An answer that has ended, as the engine leaves it."""
    return SimpleNamespace(
        chances=[], text=text, finish=finish, ids=[1, 2, 3], request=SimpleNamespace(chances=[], input_ids=[1] * 5)
    )


def request(**values):
    return read_request(json.dumps({**GOOD, **values}).encode())


def test_a_complete_answer():
    answer = completion_object(request(), finished("on the table"))
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "on the table", "refusal": None}
    assert choice["finish_reason"] == "stop" and answer["model"] == "one" and answer["object"] == "chat.completion"
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}


WRITTEN = 'I look.\n<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'


def test_tool_calls_are_split_from_the_text():
    [choice] = completion_object(request(tools=[WEATHER]), finished(WRITTEN))["choices"]
    [call] = choice["message"]["tool_calls"]
    assert choice["message"]["content"] == "I look." and choice["finish_reason"] == "tool_calls"
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'} and call["id"].startswith("call-")
    # Without tools in the request, and where the call cannot be read, all of it is text.
    half = WRITTEN.replace("Oslo", r"\ud800")  # half a surrogate pair, which no answer in UTF-8 can hold
    for body, text in (
        (request(), WRITTEN),
        (request(tools=[WEATHER]), "<tool_call>{"),
        (request(tools=[WEATHER]), half),
    ):
        [choice] = completion_object(body, finished(text))["choices"]
        assert choice["message"]["content"] == text and "tool_calls" not in choice["message"]
    [cut] = completion_object(request(tools=[WEATHER]), finished(WRITTEN, "length"))["choices"]
    assert cut["finish_reason"] == "length"


def test_a_number_between_tags_is_a_text_where_its_schema_says_so():
    body = request(tools=[WEATHER])
    text = "<tool_call>\n<function=weather>\n<parameter=city>\n1984\n</parameter>\n</function>\n</tool_call>"
    [choice] = completion_object(body, finished(text))["choices"]
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["arguments"] == '{"city": "1984"}'


def test_json_with_a_name_is_an_answer_unless_it_names_an_offered_tool():
    body, record = request(tools=[WEATHER]), '{"name": "Alice Smith", "email": "a@b.c", "age": 30}'
    [choice] = completion_object(body, finished(record))["choices"]
    assert choice["message"] == {"role": "assistant", "content": record, "refusal": None}
    assert choice["finish_reason"] == "stop"
    [choice] = completion_object(body, finished('{"name": "weather", "parameters": {"city": "Oslo"}}'))["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"


def contents(chunks):
    return [chunk["choices"][0]["delta"].get("content") for chunk in chunks if chunk["choices"]]


def test_text_before_a_call_is_streamed_and_the_call_is_held_back():
    writer = ChunkWriter(request(tools=[WEATHER]))
    sent = [text for piece in ("I look ", "<tool", "_ca", "ndy>") for text in contents(writer.add(piece))]
    assert sent == ["I look", " <tool_candy>"]
    assert writer.add("<tool_call>{") == []
    assert ChunkWriter(request(tools=[WEATHER])).add("[1, 2]") == []  # may be a call without a mark
    assert contents(ChunkWriter(request()).add("[1, 2]")) == ["[1, 2]"]


def test_a_streamed_answer_adds_up_to_the_complete_one():
    for body in (request(tools=[WEATHER], stream_options={"include_usage": True}), request()):
        writer, job = ChunkWriter(body), finished(WRITTEN)
        chunks = [writer.first()]
        for k in range(0, len(WRITTEN), 3):
            chunks += writer.add(WRITTEN[k : k + 3])
        chunks += writer.last(job)
        [choice] = completion_object(body, job)["choices"]
        assert "".join(filter(None, contents(chunks))) == choice["message"]["content"]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
        calls = [call["function"] for delta in deltas for call in delta.get("tool_calls", [])]
        assert calls == [call["function"] for call in choice["message"].get("tool_calls", [])]
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert ("usage" in chunks[-1]) == (body.stream_options is not None)


def test_models_are_listed(make_models):
    [model] = model_objects(make_models())
    assert model["id"] == "one" and model["object"] == "model" and model["created"] > 10**9


def test_a_job_is_what_an_answer_is_written_from(make_models, tokenizer):
    job = Job(GenerationRequest("one", [5, 6], 4), make_models()["one"], lambda piece: None)
    for token in [*tokenizer.encode("a lamp", add_special_tokens=False), 2]:
        job.add_token(token)
    answer = completion_object(request(), job)
    assert answer["choices"][0]["message"]["content"] == "a lamp" and answer["usage"]["prompt_tokens"] == 2
