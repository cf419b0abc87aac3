"""The judge, through the real client against a real endpoint served here."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from forgebook.errors import ConfigError, ResourceError
from forgebook.evaluation.judge import AnswerPair, Judge, judge_all


@contextlib.contextmanager
def endpoint(verdict):
    """Serve /v1/chat/completions; verdict(question) -> the judge's text, or a status code. Yields (url, requests)."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({"path": self.path, "key": self.headers["Authorization"], **body})
            reply = verdict(body["messages"][-1]["content"])
            failed = isinstance(reply, int)
            message = {"role": "assistant", "content": reply}
            answer = {"error": {"message": "refused"}} if failed else {
                "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            }  # fmt: skip
            self.send_response(reply if failed else 200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")


def answer_pairs(count=3):
    asked = [{"role": "user", "content": "2 + 2?"}]
    return [AnswerPair(asked, f"good {k}" if k == 0 else f"bad {k}", "good" if k else "bad", "4") for k in range(count)]


def better(question):
    """An honest judge: the good answer."""
    first = question.split("# Answer A\n")[1]
    return "I looked.\nVerdict: " + ("A" if first.startswith("good") else "B")


def test_an_honest_judge_is_heard():
    with endpoint(better) as (url, requests):
        assert judge_all(Judge("some-model", url), answer_pairs()) == [0.0, 1.0, 1.0]
    assert len(requests) == 6
    first = requests[0]
    assert first["path"] == "/v1/chat/completions" and first["key"] == "Bearer secret"
    assert first["model"] == "some-model" and first["temperature"] == 0
    assert "2 + 2?" in first["messages"][-1]["content"] and "right answer" in first["messages"][-1]["content"]


@pytest.mark.parametrize("reply", ["Verdict: A", "**Verdict:** B", "verdict: tie", "Verdict: A? No.\nVerdict: B"])
def test_a_judge_that_follows_the_order_decides_nothing(reply):
    with endpoint(lambda question: reply) as (url, _):
        assert judge_all(Judge("m", url), answer_pairs()) == [0.5, 0.5, 0.5]


def test_no_verdict_is_none():
    with endpoint(lambda question: "I cannot say.") as (url, _):
        assert judge_all(Judge("m", url), answer_pairs(1)) == [None]


def test_a_request_to_a_busy_endpoint_is_retried():
    statuses = iter([503, 429])
    with endpoint(lambda question: next(statuses, "Verdict: TIE")) as (url, requests):
        assert judge_all(Judge("m", url), answer_pairs(1)) == [0.5]
    assert len(requests) == 4


def test_requests_that_are_not_supported_are_errors(monkeypatch):
    with (
        endpoint(lambda question: 401) as (url, _),
        pytest.raises(ResourceError, match="Check base_url, judge and OPENAI_API_KEY"),
    ):
        judge_all(Judge("m", url), answer_pairs(1))
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        judge_all(Judge("m", "http://127.0.0.1:1/v1"), answer_pairs(1))
