"""A critic over HTTP: scores, votes, thresholds on labeled examples, and an interrupted command that continues."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from conftest import REPOSITORY, chat
from forgebook.config.curation_blocks import CriticConfig
from forgebook.curation.critic import make_critic, qualities, read_labeled
from forgebook.data.row_formats import parse_row
from forgebook.errors import ConfigError
from support_endpoint import endpoint
from support_planted import plant, score


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGEBOOK_CACHE", str(tmp_path / "cache"))


def examples_of(rows):
    return {k: parse_row(row, f"a.jsonl:{k + 1}", "instruction_tuning")[0] for k, row in enumerate(rows)}


def careful(body):
    """Score by whether the answer has a name or a number of the question; a vote in four is one off."""
    question, answer = (
        re.findall(r"\w+", text) for text in body["messages"][-1]["content"].split("# Answer to score\n")
    )
    named = {word for word in question if (word[0].isupper() or word.isdigit()) and len(word) > 3}
    right = any(word in named for word in answer)
    off = body["seed"] % 4 == 3
    return f"I looked for {sorted(named)}.\nScore: {(4 if off else 5) if right else (2 if off else 1)}"


def judged_by(url, rows, **settings):
    critic = CriticConfig(model="critic", base_url=url, **settings)
    return make_critic(critic, "instruction_tuning")(examples_of(rows))


def test_wrong_answers_score_low():
    rows, faults = plant(120, 10)
    with endpoint(careful) as (url, requests):
        judged = judged_by(url, rows, votes=4)
    distinct = len({json.dumps(row) for row in rows})  # the same question is not asked twice
    assert 4 * distinct <= len(requests) < 4 * len(rows) and {request["temperature"] for request in requests} == {0.7}
    found = {finding.number for finding in judged.findings}
    assert faults["wrong"] <= found  # all ten name somebody else
    assert judged.report["agreement"] == pytest.approx(0.5)  # 3 of 6 pairs of votes
    assert judged.report["scored"] == len(rows) and judged.report["threshold"] == 3
    assert "I looked for" in judged.findings[0].detail and "votes 1, 1, 1, 2" in judged.findings[0].detail


def test_the_rubric_and_the_shots_are_what_the_critic_reads():
    shot = {"question": "2 + 2?", "answer": "5", "score": 1, "reason": "It is 4."}
    with endpoint(lambda body: "Score: 3") as (url, requests):
        judged_by(url, [chat("Where?", "Here.", "Be short.")], rubric="3: fine", highest=3, shots=[shot])
    system, *shown, asked = requests[0]["messages"]
    assert "from 1 to 3:\n3: fine" in system["content"]
    assert [message["role"] for message in shown] == ["user", "assistant"]
    assert shown[1]["content"] == "It is 4.\nScore: 1" and "2 + 2?" in shown[0]["content"]
    assert "[system]\nBe short." in asked["content"] and asked["content"].endswith("# Answer to score\nHere.")


def test_a_score_by_probabilities_is_the_mean_of_all_scores_at_its_place():
    likely = {"1": 0.3, " 2": 0.1, "5": 0.2, "9": 0.2, "x": 0.2}  # 9 is beyond the scale
    reply = [("Score", {"Score": 1.0}), (": ", {": ": 1.0}), ("1", likely)]
    with endpoint(lambda body: reply) as (url, requests):
        judged = judged_by(url, [chat("Where?", "Here.")], probabilities=True)
    assert requests[0]["logprobs"] is True and requests[0]["top_logprobs"] == 20 and requests[0]["temperature"] == 0
    assert judged.report["mean_score"] == pytest.approx((0.3 * 1 + 0.1 * 2 + 0.2 * 5) / 0.6)


def test_an_endpoint_without_probabilities_is_an_error_with_the_fix():
    with (
        endpoint(lambda body: "Score: 3") as (url, requests),
        pytest.raises(ConfigError, match="critic returns no logprobs: set probabilities: false"),
    ):
        judged_by(url, [chat("Where?", "Here.")], probabilities=True)
    assert len(requests) == 1
    with pytest.raises(ValueError, match="scores must be one digit each"):
        CriticConfig(model="critic", probabilities=True, highest=10)


@pytest.mark.parametrize("reply", ["no idea", "Score: 9", ""])
def test_a_reply_without_a_score_drops_nothing(reply):
    with endpoint(lambda body: reply) as (url, _):
        judged = judged_by(url, [chat("Where?", "Here.")])
    assert judged.findings == [] and judged.report["without_score"] == 1


def test_the_threshold_is_the_one_with_the_highest_f1_on_labeled_examples(write_rows):
    grades = {"good a": 4, "good b": 5, "good c": 3, "bad a": 3, "bad b": 2, "bad c": 1}
    labeled = write_rows([chat("Is it?", answer) | {"good": answer[0] == "g"} for answer in grades])
    with endpoint(lambda body: f"Score: {grades.get(body['messages'][-1]['content'][-6:].strip(), 2)}") as (url, _):
        judged = judged_by(url, [chat("Where?", "xx 2 x")], labeled=labeled)
    report = judged.report
    # Below 3.5: all three bad ones and one good; below 2.5: two bad ones.
    assert report["threshold"] == 3.5 and (report["labeled_precision"], report["labeled_recall"]) == (0.75, 1.0)
    assert [one[0] for one in report["labeled_thresholds"]] == [1.5, 2.5, 3.5, 4.5]
    assert len(judged.findings) == 1


def test_qualities_by_hand():
    [one] = qualities([(1.0, False), (1.0, True), (4.0, False), (4.0, True)])
    assert (one.threshold, one.precision, one.recall, one.f1) == (2.5, 0.5, 0.5, 0.5)


def test_labels_that_are_missing_or_all_the_same(write_rows):
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: good: got None"):
        read_labeled(write_rows([chat("Is it?", "Yes.")]), "instruction_tuning")
    with pytest.raises(ConfigError, match="both good and bad"):
        read_labeled(write_rows([chat("Is it?", "Yes.") | {"good": True}]), "instruction_tuning")


def test_a_killed_command_continues_without_asking_twice(write_rows, tmp_path):
    rows = [chat(f"Which order is {10_000 + k}?", f"It is {10_000 + k + (k == 7)}.") for k in range(60)]

    def slow(body):
        time.sleep(0.02)
        return careful(body)

    with endpoint(slow) as (url, requests):
        command = [
            sys.executable, "main.py", "curate", "training_configs/tiny/quickstart.yaml", f"base_url={url}", "judge=c",
            f"train_path={write_rows(rows)}", "valid_path=null", "curation.critic.concurrency=2",
            f"out={tmp_path / 'out.jsonl'}",
        ]  # fmt: skip
        environment = {**os.environ, "OPENAI_API_KEY": "sk-not-in-any-report"}
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, env=environment)
        while len(requests) < 15:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "out.jsonl").exists()
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert 60 <= len(requests) <= 62  # two were on their way when it was killed
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 59
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["critic"]["asked"] + report["critic"]["saved"] == 60 and report["critic"]["saved"] >= 12
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 5 and not any(b"sk-not-in-any-report" in path.read_bytes() for path in written)


def test_wrong_answers_are_dropped_and_right_ones_stay(write_rows, tmp_path):
    """Curate a set with planted faults: what is left, with precision and recall."""
    from forgebook.config.parse import load_config
    from forgebook.curation.curate import curate

    rows, faults = plant(120, 10)
    with endpoint(careful) as (url, _):
        quickstart = REPOSITORY / "training_configs/tiny/quickstart.yaml"
        config = load_config(quickstart, [f"train_path={write_rows(rows)}", "valid_path=null"])
        critic = make_critic(CriticConfig(model="critic", base_url=url), "instruction_tuning")
        curation = curate(config, tmp_path / "out.jsonl", {"critic": critic})
    found = {finding.number for finding in curation.findings if finding.reason == "low_score"}
    # Answers in another language name nobody either; one right answer names only the request.
    precision, recall = score(found, faults["wrong"] | faults["mixed_languages"])
    assert precision > 0.95 and recall == 1
