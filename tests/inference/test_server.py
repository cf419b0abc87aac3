"""The endpoint, asked by the real OpenAI client over HTTP: the same tokens as generate and as the merged model."""

import concurrent.futures
import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from conftest import LORA, REPOSITORY, TINY_MODEL, chat, uneven_rows
from forgebook.data.masking import encode_prompt
from forgebook.errors import ConfigError, StorageError
from forgebook.export.merge import merge_run
from forgebook.inference import server as endpoint
from forgebook.inference.connections import http_settings
from forgebook.inference.engine import Engine
from forgebook.inference.generate import complete
from forgebook.inference.loading import load_for_generation
from forgebook.inference.server import MAX_BODY, clean_key, is_loopback, make_app, name_models, serve
from forgebook.launch.fine_tune import fine_tune
from forgebook.runs.run import find_checkpoint

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}


def rows_with_calls() -> list[dict]:
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    question = {"role": "user", "content": "the weather of Oslo"}
    return [*uneven_rows(12), *[{"messages": [question, calling], "tools": [WEATHER]}] * 6]


@contextlib.contextmanager
def running(folders, **settings):
    """Serve in this process; yield (address, engine)."""
    import uvicorn

    key, ui = settings.pop("key", None), settings.pop("ui", False)
    engine = Engine(folders, dtype="float32", **settings).start()
    server = uvicorn.Server(http_settings(make_app(engine, key=key, ui=ui), port=0, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", engine
    finally:
        server.should_exit = True
        thread.join(20)
        engine.stop()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two LoRA runs on one base, one that learnt to call a tool; trained in this process."""
    from forgebook.config.parse import load_config

    folder = tmp_path_factory.mktemp("served")
    trained = []
    for name, rows in (("one", rows_with_calls()), ("two", [chat("what is it", f"a lamp {k}") for k in range(12)])):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = folder / f"{name}.yaml"
        config.write_text(json.dumps({
            "model_id": str(TINY_MODEL), "train_path": str(path), "valid_path": str(path), "run_name": name,
            "task": "instruction_tuning", "storage_path": str(folder / "runs"), "num_devices": 0, "num_epochs": 6,
            "train_batch_size_per_device": 6, "eval_batch_size_per_device": 8, "learning_rate": 1e-2,
            "num_warmup_steps": 1, "dtype": "float32", "deepspeed": "none", "gradient_checkpointing": False,
            "lora_config": LORA,
        }))  # fmt: skip
        trained.append(fine_tune(load_config(config)))
    return trained


@pytest.fixture(scope="module")
def served(runs):
    with running(name_models([str(run.folder) for run in runs])) as (address, engine):
        yield address, engine


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0, timeout=60) as one:
        yield one


def ask(client, messages, model="one", **settings):
    return client.chat.completions.create(model=model, messages=messages, **{"max_tokens": 24, **settings})


def streamed(client, messages, **settings):
    chunks = list(ask(client, messages, stream=True, **settings))
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), chunks


QUESTIONS = [row["messages"][:-1] for row in uneven_rows(8)]


@pytest.fixture(scope="module")
def expected(runs):
    """What generate answers, one prompt at a time."""
    model, tokenizer, _ = load_for_generation(find_checkpoint(str(runs[0].folder)), "float32")
    return complete(model, tokenizer, QUESTIONS, max_new_tokens=24, batch_size=1)


# Answers ----------------------------------------------------------------------------------------------


def test_answers_are_those_of_generate(client, expected):
    answers = [ask(client, messages).choices[0].message.content for messages in QUESTIONS]
    assert answers == expected and len(set(answers)) > 1
    assert [streamed(client, messages)[0] for messages in QUESTIONS] == expected


@pytest.mark.slow
def test_the_merged_model_gives_the_same_with_plain_transformers(runs, expected, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = merge_run(str(runs[0].folder), tmp_path / "merged").folder
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    answers = []
    for messages in QUESTIONS:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**ids, max_new_tokens=24, do_sample=False)
        answers.append(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    assert answers == expected


def test_eight_at_once_get_their_own_answers(served, client, expected):
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        whole = [pool.submit(ask, client, messages) for messages in QUESTIONS]
        pieces = [pool.submit(streamed, client, messages) for messages in QUESTIONS]
        others = [pool.submit(ask, client, messages, model="two") for messages in QUESTIONS[:2]]
        assert [one.result().choices[0].message.content for one in whole] == expected
        assert [one.result()[0] for one in pieces] == expected
        assert all(one.result().model == "two" for one in others)


def test_two_adapters_in_one_process(served, client):
    _, engine = served
    assert engine.models["one"].loaded.model is engine.models["two"].loaded.model
    assert [model.id for model in client.models.list()] == ["one", "two"] and client.models.retrieve("two").id == "two"
    question = [{"role": "user", "content": "what is it"}]
    answers = {name: ask(client, question, model=name).choices[0].message.content for name in ("one", "two")}
    assert answers["two"].startswith("a lamp") and answers["one"] != answers["two"]
    alone, tokenizer, _ = load_for_generation(engine.models["two"].folder, "float32")
    assert complete(alone, tokenizer, [question], max_new_tokens=24) == [answers["two"]]


def test_a_tool_is_called(client):
    question = [{"role": "user", "content": "the weather of Oslo"}]
    choice = ask(client, question, tools=[WEATHER]).choices[0]
    [call] = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Oslo"}
    text, chunks = streamed(client, question, tools=[WEATHER])
    [delta] = [chunk.choices[0].delta.tool_calls for chunk in chunks if chunk.choices[0].delta.tool_calls]
    assert text == "" and delta[0].function.name == "weather" and delta[0].function.arguments == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert ask(client, question, tools=[WEATHER], tool_choice="none").choices[0].message.tool_calls is None


def test_length_stop_and_usage(client, expected, tokenizer):
    question, whole = max(zip(QUESTIONS, expected, strict=True), key=lambda pair: len(pair[1]))
    short = ask(client, question, max_tokens=2)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2
    assert short.usage.prompt_tokens == len(encode_prompt(question, tokenizer))
    word = whole.split()[-1]
    before = whole[: whole.index(word)]
    assert before
    stopped = ask(client, question, stop=["never", word]).choices[0]
    assert stopped.message.content == before and stopped.finish_reason == "stop"
    text, chunks = streamed(client, question, stop=word, stream_options={"include_usage": True})
    assert text == before and chunks[-1].usage.completion_tokens >= 1 and chunks[-1].choices == []


def test_a_seed_gives_the_same_answer_whatever_shares_its_batch(client):
    def drawn(seed):
        return ask(client, QUESTIONS[0], temperature=2, top_p=0.99, seed=seed).choices[0].message.content

    first = drawn(1)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        again = list(pool.map(drawn, [1, 2, 3, 1, 4, 1]))
    assert [again[0], again[3], again[5]] == [first] * 3 and len(set(again)) > 1


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_seed_gives_the_answer_of_generate(runs, client, top_p):
    """One prompt, seed and temperature: the same text by `generate` and from the endpoint, streamed or not."""
    model, tokenizer, _ = load_for_generation(find_checkpoint(str(runs[0].folder)), "float32")
    sampling = {"temperature": 2.0, "top_p": top_p}
    for seed, messages in enumerate(QUESTIONS[:4], 5):
        [text] = complete(model, tokenizer, [messages], max_new_tokens=24, seed=seed, **sampling)
        assert ask(client, messages, seed=seed, **sampling).choices[0].message.content == text
        assert streamed(client, messages, seed=seed, **sampling)[0] == text


def test_a_client_that_goes_away_ends_its_answer(served, client):
    address, engine = served
    never = {"temperature": 2, "max_tokens": 900, "seed": 3}
    stream = ask(client, QUESTIONS[0], stream=True, **never)
    next(iter(stream))
    [job] = engine.jobs
    stream.close()
    with pytest.raises(httpx.TimeoutException):
        body = {"model": "one", "messages": QUESTIONS[1], **never}
        httpx.post(f"{address}/v1/chat/completions", json=body, timeout=0.05)
    while engine.jobs:
        time.sleep(0.02)
    assert len(job.ids) < 900 and job.finish == "cancelled"
    assert ask(client, QUESTIONS[0], max_tokens=2).choices[0].message.content


# Errors -----------------------------------------------------------------------------------------------

USER = [{"role": "user", "content": "hello"}]
GOOD = {"model": "one", "messages": USER, "max_tokens": 2}
WRONG = {
    "not JSON": b"{",
    "no UTF-8": b'{"model": "\xff"}',
    "no messages": {"model": "one"},
    "bad role": {**GOOD, "messages": [{"role": "king", "content": "hello"}]},
    "unknown": {**GOOD, "best_of": 3},
}


@pytest.mark.parametrize("body", WRONG.values(), ids=WRONG.keys())
def test_malformed_requests_are_rejected_in_openais_format(served, body):
    """All kinds of them: test_openai_api.py."""
    content = body if isinstance(body, bytes) else json.dumps(body)
    reply = httpx.post(
        f"{served[0]}/v1/chat/completions", content=content, headers={"content-type": "application/json"}
    )
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["type"] == "invalid_request_error" and error["message"], reply.text


def test_the_client_sees_its_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="'three' is not served here: one, two"):
        ask(client, USER, model="three")
    with pytest.raises(openai.BadRequestError, match="the context of one is 1024 tokens") as caught:
        ask(client, [{"role": "user", "content": "lamp " * 3000}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="max_tokens is 5000"):
        ask(client, USER, max_tokens=5000)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("three")


def post_slowly(address: str, sent: bytes) -> bytes:
    """Send the headers of a request with a longer body and only a part of it; return what the server answers."""
    host, port = address.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"{head}content-length: 1000\r\n\r\n".encode() + sent)
        return b"".join(iter(lambda: connection.recv(4096), b""))


@pytest.mark.parametrize("sent", [b"", b'{"model": "one", '], ids=["no body", "half a body"])
def test_a_slow_body_is_answered_and_disconnected(served, monkeypatch, sent):
    monkeypatch.setattr(endpoint, "BODY_SECONDS", 0.2)
    answer = post_slowly(served[0], sent)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"did not arrive within 0.2 s" in answer


def test_a_very_long_prompt_is_rejected_before_it_is_tokenized(client, monkeypatch):
    monkeypatch.setattr("forgebook.data.masking.encode_prompt", lambda *_: pytest.fail("tokenized"))
    with pytest.raises(openai.BadRequestError, match="16384 are allowed") as caught:
        ask(client, [{"role": "user", "content": "lamp " * 1_000_000}])
    assert caught.value.code == "context_length_exceeded"


def test_other_requests_are_rejected(served):
    address, _ = served
    json_type = {"content-type": "application/json"}
    assert httpx.get(f"{address}/nothing").json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{address}/v1/chat/completions").status_code == 405
    assert httpx.post(f"{address}/v1/chat/completions", data=json.dumps(GOOD)).status_code == 415
    large = httpx.post(f"{address}/v1/chat/completions", content=b" " * (MAX_BODY + 1), headers=json_type)
    assert large.status_code == 413 and "are allowed" in large.json()["error"]["message"]
    assert httpx.get(f"{address}/v1/models", headers={"host": "evil.example"}).status_code == 400
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}


def test_a_key_is_needed_where_one_is_set(runs):
    with running(name_models([str(runs[1].folder)]), key="s3cret") as (address, _):
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()
        assert httpx.get(f"{address}/v1/models", headers={"authorization": "Bearer é".encode()}).status_code == 401
        good = openai.OpenAI(base_url=f"{address}/v1", api_key="s3cret", max_retries=0)
        assert ask(good, USER, model="two").choices[0].message.content


def test_other_machines_need_a_key(runs):
    with pytest.raises(ConfigError, match="FORGEBOOK_API_KEY"):
        serve([str(runs[0].folder)], host="0.0.0.0")
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "example.com", "")] == (
        [True] * 3 + [False] * 3
    )
    with pytest.raises(ConfigError, match="two models are called one"):
        name_models([str(runs[0].folder)] * 2)
    with pytest.raises(ConfigError, match="engine must be"):
        serve([str(runs[0].folder)], engine="fast")
    with pytest.raises(StorageError, match="no run"):
        serve(["no such run"])


@pytest.mark.parametrize("key", ["", " ", "\t\n", "\u00a0"])
def test_a_blank_key_is_no_key(runs, key):
    assert clean_key(key) is None and clean_key(f"{key}s3cret{key}") == "s3cret"
    with pytest.raises(ConfigError, match="FORGEBOOK_API_KEY"):
        serve([str(runs[0].folder)], host="0.0.0.0", key=key)


@pytest.mark.parametrize("key", ["schlüssel", "a\nb", "a\x00b"])
def test_a_key_that_no_header_can_carry_is_refused(runs, key):
    with pytest.raises(ConfigError, match="printable ASCII"):
        serve([str(runs[0].folder)], key=key)


# The command ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "term"])
def test_the_command_serves_until_it_is_stopped(runs, sent):
    command = [sys.executable, "main.py", "serve", str(runs[1].folder), "port=0", "key=k3y-of-test"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line.startswith("serving"):
                break
        address = line.split(" at ")[1].split()[0]
        if sys.platform == "linux":  # every user of the machine can read the arguments of a process
            assert "k3y-of-test" not in Path(f"/proc/{process.pid}/cmdline").read_text()
        one = openai.OpenAI(base_url=address, api_key="k3y-of-test", max_retries=0)
        assert ask(one, USER, model="two", max_tokens=3).choices[0].message.content
        process.send_signal(sent)
        rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0, rest
    assert "k3y-of-test" not in "".join(printed) + rest and "Traceback" not in rest
