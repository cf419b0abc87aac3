"""Requests over HTTP: repeated where the endpoint is busy, saved as they come, with a key that nothing shows."""

import threading
import time

import pytest

from conftest import TINY_MODEL
from forgebook.config.curation_blocks import EndpointConfig
from forgebook.curation import endpoint as module
from forgebook.curation.endpoint import Endpoint, Request
from forgebook.errors import ConfigError, ResourceError
from support_endpoint import endpoint


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGEBOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("THE_KEY", "sk-the-secret")
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)


def made(url: str, **settings) -> Endpoint:
    return Endpoint(
        EndpointConfig(**{"model": "m", "base_url": url, "api_key_env": "THE_KEY", "retries": 3, **settings})
    )


def questions(count: int) -> list[Request]:
    return [Request(({"role": "user", "content": f"question {k}"},)) for k in range(count)]


def echo(body):
    return "to " + body["messages"][-1]["content"]


def answers(one: Endpoint, requests) -> dict[int, str]:
    return {number: reply.text for number, reply in one.ask_all(requests)}


def test_each_reply_is_that_of_its_request():
    with endpoint(echo) as (url, requests):
        one = made(url, usd_per_million_input_tokens=2, usd_per_million_output_tokens=10)
        assert answers(one, questions(30)) == {k: f"to question {k}" for k in range(30)}
    assert {request["path"] for request in requests} == {"/v1/chat/completions"}
    assert {request["key"] for request in requests} == {"Bearer sk-the-secret"}
    used = one.usage.as_json(one.settings)
    assert (used["asked"], used["input_tokens"], used["output_tokens"]) == (30, 3000, 300)
    assert used["cost_usd"] == pytest.approx(0.009)


def test_as_many_at_a_time_as_allowed():
    running, most, lock = set(), [0], threading.Lock()

    def slow(body):
        with lock:
            running.add(threading.get_ident())
            most[0] = max(most[0], len(running))
        time.sleep(0.02)
        with lock:
            running.discard(threading.get_ident())
        return "yes"

    with endpoint(slow) as (url, _):
        answers(made(url, concurrency=3), questions(20))
    assert most[0] == 3


def test_requests_are_made_as_they_are_needed_and_none_after_the_last_reply_that_is_wanted():
    drawn = []

    def endless():
        for request in questions(10_000):
            drawn.append(request)
            yield request

    with endpoint(echo) as (url, requests):
        replies = made(url, concurrency=2).ask_all(endless())
        for _ in range(5):
            next(replies)
        replies.close()
        assert len(drawn) <= 5 + 2 + 1 and len(requests) <= 5 + 2


def test_nothing_is_asked_twice():
    with endpoint(echo) as (url, requests):
        answers(made(url), questions(10))
        again = made(url)
        assert answers(again, questions(12)) == {k: f"to question {k}" for k in range(12)}
        assert len(requests) == 12 and (again.usage.saved, again.usage.asked) == (10, 2)
        answers(made(url, model="other"), questions(1))
        answers(made(url), [Request(questions(1)[0].messages, seed=1)])
        assert len(requests) == 14


def test_a_reply_that_a_kill_cut_off_is_asked_again_and_the_next_is_kept(tmp_path):
    with endpoint(echo) as (url, requests):
        answers(made(url), questions(2))
        [path] = (tmp_path / "cache/replies").glob("*.jsonl")
        path.write_bytes(path.read_bytes()[:-9])
        answers(made(url), questions(2))
        assert len(requests) == 3
        answers(made(url), questions(2))
        assert len(requests) == 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_endpoint_is_asked_again(status):
    seen = []

    def busy(body):
        seen.append(1)
        return (status, "busy", {"Retry-After": "0.03"}) if len(seen) < 3 else "at last"

    with endpoint(busy) as (url, _):
        one, waits = made(url), []
        one._stopped.wait = waits.append
        assert answers(one, questions(1)) == {0: "at last"} and one.usage.repeated == 2
    assert waits == [0.03, 0.03]  # as the endpoint asked


def test_an_endpoint_that_stays_busy_is_an_error_and_replies_so_far_are_kept():
    def moody(body):
        return echo(body) if body["messages"][-1]["content"] in ("question 0", "question 1") else 503

    with endpoint(moody) as (url, requests):
        with pytest.raises(ResourceError, match="asked 4 times: 503 no"):
            answers(made(url, concurrency=1), questions(5))
        asked = len(requests)
        one = made(url, concurrency=1)
        assert answers(one, questions(2)) == {0: "to question 0", 1: "to question 1"} and len(requests) == asked


@pytest.mark.parametrize(("status", "error"), [(503, ResourceError), (404, ConfigError)])
def test_what_is_being_answered_while_another_request_fails_is_returned_before_the_error(status, error):
    has_failed = threading.Event()

    def one_fails(body):
        if body["messages"][-1]["content"] == "question 1":
            has_failed.set()
            return status
        has_failed.wait(10)
        time.sleep(0.3)  # the failure arrives first
        return echo(body)

    replies = {}
    with endpoint(one_fails) as (url, requests), pytest.raises(error, match=str(status)):
        for number, reply in made(url, concurrency=3, retries=0).ask_all(questions(9)):
            replies[number] = reply.text
    assert replies == {0: "to question 0", 2: "to question 2"} and len(requests) == 3


def test_a_rejected_request_is_an_error_at_once_without_the_key():
    with endpoint(lambda body: (401, "wrong key: sk-the-secret", {})) as (url, requests):
        with pytest.raises(ConfigError, match=r"401 wrong key: \*\*\*"):
            answers(made(url), questions(1))
        assert len(requests) == 1


def test_no_endpoint_at_all():
    with endpoint(echo) as (url, _):
        pass
    with pytest.raises(ResourceError, match="gave no answer"):
        answers(made(url, retries=1), questions(1))


def test_the_key_goes_to_no_other_host():
    def elsewhere(body):
        return 302, "", {"Location": other + "/chat/completions"}

    with endpoint(echo) as (other, reached), endpoint(elsewhere) as (url, _):
        with pytest.raises(ConfigError, match="302"):
            answers(made(url), questions(1))
        assert reached == []


def test_what_a_model_does_not_take_is_left_out():
    def picky(body):
        for name in ("max_tokens", "temperature"):
            if name in body:
                return 400, f"Unsupported parameter: '{name}'", {}
        return f"{body['max_completion_tokens']}"

    with endpoint(picky) as (url, requests):
        assert answers(made(url, concurrency=1), questions(3)) == dict.fromkeys(range(3), "512")
        assert len(requests) == 5


def test_no_key_is_sent_where_there_is_none_and_openai_needs_one(monkeypatch):
    monkeypatch.delenv("THE_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with endpoint(echo) as (url, requests):
        answers(made(url), questions(1))
    assert requests[0]["key"] is None
    with pytest.raises(ConfigError, match="set THE_KEY"):
        Endpoint(EndpointConfig(model="m", api_key_env="THE_KEY"))


def test_the_projects_own_endpoint_answers_and_counts_tokens():
    """`serve` takes every parameter of a request, and replies are those of the engine asked by another client."""
    import openai
    import uvicorn

    from forgebook.inference.connections import http_settings
    from forgebook.inference.engine import Engine
    from forgebook.inference.server import make_app

    engine = Engine({"tiny": str(TINY_MODEL)}, dtype="float32").start()
    server = uvicorn.Server(http_settings(make_app(engine, key=None), port=0))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
        one = made(url, model="tiny", max_tokens=8)
        asked = [Request(({"role": "user", "content": f"Where is the {what}?"},), 0.0, 8) for what in ("lamp", "key")]
        found = answers(one, asked)
        with openai.OpenAI(base_url=url, api_key="none") as client:
            for number, request in enumerate(asked):
                messages = list(request.messages)
                reply = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=8)
                assert found[number] == reply.choices[0].message.content != ""
        assert one.usage.asked == 2 and one.usage.input_tokens > 10 and 2 <= one.usage.output_tokens <= 16
    finally:
        server.should_exit = True
        thread.join(20)
        engine.stop()
