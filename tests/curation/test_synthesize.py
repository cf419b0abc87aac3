"""Examples from a teacher over HTTP: what is accepted, what is rejected and why, and that nothing is asked twice."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from conftest import REPOSITORY, chat
from forgebook.config.parse import load_config
from forgebook.curation.synthesize import rejected_path, synthesize
from forgebook.errors import ConfigError, DataError
from support_endpoint import endpoint

SEEDS = [chat(f"What is {k} plus {k}?", f"{2 * k}", "Compute.") for k in range(2, 8)]


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGEBOOK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(write_rows, tmp_path):
    def call(url, settings=(), seeds=SEEDS, valid=None):
        quickstart = REPOSITORY / "training_configs/tiny/quickstart.yaml"
        validation = write_rows(valid, "valid.jsonl") if valid else "null"
        config = load_config(quickstart, [
            f"train_path={write_rows(seeds, 'seeds.jsonl')}", f"valid_path={validation}",
            "synthesis.teacher.model=teacher", f"synthesis.teacher.base_url={url}",
            *(f"synthesis.{one}" for one in settings),
        ])  # fmt: skip
        result = synthesize(config, tmp_path / "new.jsonl")
        return result, [json.loads(line)["messages"] for line in result.out.read_text().splitlines()]

    return call


def writer(body):
    """Write a sum by the request's seed; every fourth is wrong, every fifth a seed again, one no JSON."""
    k = body["seed"] + 10
    if body["seed"] == 3:
        return "I would rather not."
    if k % 5 == 0:
        return json.dumps(SEEDS[0])
    row = chat(f"What is {k} plus {k}?", str(2 * k + (k % 4 == 0)), None)
    return f"Here it is:\n```json\n{json.dumps(row)}\n```"


def test_examples_are_new_right_and_in_the_order_of_their_requests(run, tmp_path):
    (tmp_path / "sums.py").write_text(
        "import re\ndef right(row):\n    *_, user, answer = [m['content'] for m in row['messages']]\n"
        "    return sum(map(int, re.findall(r'\\d+', user))) == int(answer) or 'wrong sum'\n"
    )
    with endpoint(writer) as (url, requests):
        result, written = run(url, ["count=8", f"verifier={tmp_path}/sums.py:right"])
    right = [k for k in range(10, 40) if k != 13 and k % 5 and k % 4][:8]
    assert written == [chat(f"What is {k} plus {k}?", str(2 * k), "Compute.")["messages"] for k in right]
    report = result.as_json()
    assert report["accepted"] == 8 and report["yield"] == 8 / report["replies"]
    assert set(report["rejected"]) == {"unreadable", "duplicate", "verifier"}
    rejected = [json.loads(line) for line in rejected_path(result.out).read_text().splitlines()]
    assert len(rejected) == sum(report["rejected"].values())
    assert "verifier: wrong sum" in {one["reason"] for one in rejected}
    shown = requests[0]["messages"][-1]["content"]
    assert sum(json.dumps(seed) in shown for seed in SEEDS) == 3  # of six


def test_a_question_of_the_validation_examples_is_not_written(run):
    valid = [chat("what is 11 plus  11?", "22"), chat("What is 12 plus 12?", "24")]
    with endpoint(writer) as (url, _):
        result, written = run(url, ["count=2"], valid=valid)
    assert [messages[-1]["content"] for messages in written] == ["28", "33"]
    assert any(reason == "duplicate: of valid.jsonl:1" for reason, _ in result.rejected)


def test_what_the_teacher_repeats_is_taken_once(run):
    with endpoint(lambda body: json.dumps(chat(f"What is {body['seed'] // 3 + 20} plus 1?", "It is one more."))) as (
        url,
        _,
    ):
        result, written = run(url, ["count=4"])
    assert len({messages[1]["content"] for messages in written}) == 4
    assert result.as_json()["rejected"] == {"duplicate": result.replies - 4} and result.replies == 10


def solver(body):
    """Answer wrongly at first."""
    a = int(body["messages"][-1]["content"].split()[2])
    return f"I add.\n#### {2 * a if body['seed'] >= a % 3 else 2 * a + 1}"


def test_the_first_right_answer_to_each_question_is_taken(run):
    seeds = [chat(f"What is {k} plus {k}?", f"#### {2 * k}", "Compute.") for k in range(2, 8)]
    with endpoint(solver) as (url, requests):
        result, written = run(url, ["write=answers", "exact_match='#### (.+)'", "samples=2", "count=10"], seeds)
    # 2 and 5 need a third sample; 4 and 7 are right at the second one.
    assert [messages[1]["content"].split()[2] for messages in written] == ["3", "6", "4", "7"]
    assert all(messages[-1]["content"].startswith("I add.\n####") for messages in written)
    assert len(requests) == 6 + 4 and result.replies == 10
    assert result.as_json()["rejected"] == {"exact_match": 6}


def test_a_question_that_several_seeds_ask_is_answered_once(run):
    seeds = [chat("What is 3 plus 3?", f"#### {answer}", "Compute.") for answer in (6, 7)] + [chat("And you?", "Fine.")]
    with endpoint(lambda body: "Well.") as (url, requests):
        result, written = run(url, ["write=answers", "count=10"], seeds)
    assert [messages[-2]["content"] for messages in written] == ["What is 3 plus 3?", "And you?"]
    assert len(requests) == 2 and result.as_json()["seeds_in_validation"] == 0


def test_a_prompt_of_ones_own(run):
    with endpoint(lambda body: "yes") as (url, requests):
        run(url, ["write=answers", "prompt='Q: {question} Think.'", "count=1"])
    first = min(requests, key=lambda request: request["messages"][-1]["content"])  # several are asked at a time
    assert [m["content"] for m in first["messages"]] == ["Compute.", "Q: What is 2 plus 2? Think."]


def test_where_nothing_is_accepted_nothing_is_written(run, tmp_path):
    with endpoint(lambda body: "no") as (url, requests):
        with pytest.raises(DataError, match=r"none of 5 replies was accepted(.|\n)*5 x unreadable"):
            run(url, ["max_requests=5"])
        assert len(requests) == 5
    assert not (tmp_path / "new.jsonl").exists()


def test_without_a_block_nothing_is_asked(write_rows, tmp_path):
    quickstart = REPOSITORY / "training_configs/tiny/quickstart.yaml"
    with pytest.raises(ConfigError, match="needs a block `synthesis`"):
        synthesize(load_config(quickstart, [f"train_path={write_rows(SEEDS)}"]), tmp_path / "new.jsonl")


def test_a_killed_command_continues_and_ends_with_the_same_file(write_rows, tmp_path):
    def slow(body):
        time.sleep(0.02)
        return writer(body)

    with endpoint(slow) as (url, requests):
        command = [
            sys.executable, "main.py", "synthesize", "training_configs/tiny/quickstart.yaml", "teacher=t", "count=25",
            f"base_url={url}", f"train_path={write_rows(SEEDS)}", "valid_path=null", "synthesis.teacher.concurrency=2",
        ]  # fmt: skip
        process = subprocess.Popen([*command, f"out={tmp_path}/a.jsonl"], cwd=REPOSITORY, env={**os.environ})
        while len(requests) < 12:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed_after = len(requests)
        done = subprocess.run([*command, f"out={tmp_path}/a.jsonl"], cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        asked = [request["seed"] for request in requests]
        assert len(set(asked)) >= len(asked) - 2 and len(asked) > killed_after  # two were on their way
        again = subprocess.run([*command, f"out={tmp_path}/b.jsonl"], cwd=REPOSITORY, capture_output=True, text=True)
        assert again.returncode == 0 and len(requests) <= len(asked) + 2
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 25
