"""plan, preview, submit, status, stop: what they print, write and hand to the engine."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from conftest import REPOSITORY, TINY_MODEL, chat
from forgebook.cli.main import main
from forgebook.launch import fine_tune, ray_jobs


@pytest.fixture
def config(make_config, tmp_path, monkeypatch):
    """A small config's file, in the working directory."""
    make_config()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORGEBOOK_CACHE", str(tmp_path / "cache"))
    return "run.yaml"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "run.yaml", "mfu=0"], "plan: mfu must be a share"),
        (["plan", "run.yaml", "fit=true"], "plan: fit=true needs the hardware to fit, such as hardware=8xA100-80G"),
        (["plan", "run.yaml", "hardware=8xB9000"], "hardware: got '8xB9000'"),
        (["preview", "run.yaml", "n=none"], "preview: n must be a whole number"),
        (["submit", "run.yaml", "image=a"], "submit: image has no effect on a job on a running cluster"),
        (
            ["submit", "run.yaml", "--format", "anyscale", "secret=a"],
            "secret has no effect on --format anyscale",
        ),
        (["submit", "run.yaml", "--format", "kuberay"], "--format kuberay needs image="),
        (["status"], "status needs a JOB: the id that submit printed"),
        (["plna", "run.yaml"], "'plna' is neither a command nor a config file: did you mean 'plan'?"),
    ],
)
def test_mistakes_are_one_sentence(config, capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_file_named_almost_like_a_command_is_a_config(config, tmp_path):
    (tmp_path / "plans").write_text((tmp_path / config).read_text().replace('"num_epochs": 1', '"num_epochs": -1'))
    assert main(["plans"]) == 2


def test_fit_writes_the_settings_that_fit(config, capsys, tmp_path):
    assert main(["plan", config, "hardware=1xA100-80G", "fit=true", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["fits"] and printed.err == "wrote run-fit.yaml\n"
    fitting = (tmp_path / "run-fit.yaml").read_text()
    assert "hardware: 1xA100-80G" in fitting
    # The same again; then over two files of the user's own.
    assert main(["plan", config, "hardware=1xA100-80G", "fit=true", "--json"]) == 0
    assert capsys.readouterr().err == "wrote run-fit.yaml\n"
    for k in (1, 2):
        (tmp_path / "run-fit.yaml").write_text(f"# mine {k}")
        assert main(["plan", config, "hardware=1xA100-80G", "fit=true", "--json"]) == 0
        renamed = f"run-fit.yaml was there with other content, which is now run-fit.yaml.{k}"
        assert capsys.readouterr().err == f"{renamed}\nwrote run-fit.yaml\n"
        assert (tmp_path / f"run-fit.yaml.{k}").read_text() == f"# mine {k}"
        assert (tmp_path / "run-fit.yaml").read_text() == fitting


def test_preview_prints_examples_or_json(config, capsys):
    assert main(["preview", config, "n=2", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(isinstance(json.loads(line), dict) for line in lines)
    assert main(["preview", config]) == 0 and capsys.readouterr().out.count("train.jsonl:") == 3


def test_a_jobs_state_is_printed_and_a_job_is_stopped_once(config, capsys, monkeypatch):
    details = {"state": "RUNNING", "started": 1e9, "message": None}
    monkeypatch.setattr(ray_jobs, "job_status", lambda job, address: details | {"at": address})
    monkeypatch.setattr(ray_jobs, "stop_job", lambda job, address: {"old": "SUCCEEDED"}.get(job, "RUNNING"))
    assert main(["status", "job", "address=http://head:8265"]) == 0
    state, started, where = capsys.readouterr().out.splitlines()
    assert (state, where) == ("state      RUNNING", "at         http://head:8265")
    assert re.fullmatch(r"started    2001-09-0[89] \d\d:\d\d:40[+-]\d\d:\d\d", started)
    assert main(["stop", "job"]) == main(["stop", "old"]) == 0
    assert capsys.readouterr().out == "job job is stopping\njob old had already succeeded\n"


def test_fine_tuning_is_what_a_config_alone_does(config, monkeypatch):
    started = []
    monkeypatch.setattr("forgebook.launch.fine_tune.fine_tune", started.append)
    assert main([config, "num_epochs=2"]) == 0
    assert started[0].num_epochs == 2 and started[0].model_id == str(TINY_MODEL)


MISTAKES = """
import sys
from forgebook.cli.main import main
from forgebook.runs import object_store

def version(uri):  # as a bucket would answer
    if "absent" in uri:
        raise object_store.StorageError(f"{uri} could not be read: no such file")
    return "1"

object_store.file_version = version
object_store.download_file = lambda uri, target: target.write_bytes(open(uri.rpartition("/")[2], "rb").read())
everywhere, everything = ("", "s3://bucket/", "gs://bucket/"), ("json", "answer", "key", "absent")
commands = {
    "c.yaml train_path={} run_name={}": (everywhere, everything),
    "preview c.yaml train_path={}": (everywhere, everything),
    "tune c.yaml train_path={} run_name={} learning_rate=[0.1,0.2] valid_path=good.jsonl": (everywhere, everything),
    "submit c.yaml train_path={} run_name={} --format anyscale": (("",), everything[:3]),  # elsewhere may be there only
    "generate tiny data={}": (everywhere, ("json", "key", "absent")),  # a prompt has no answer
    "evaluate runs/done data={}": (everywhere, everything),
}
for command, (places, names) in commands.items():
    for path in [f"{place}{name}.jsonl" for place in places for name in names]:
        assert main(command.format(path, path.replace("/", "-")).split()) == 2
        print("answered", command, path, sorted({"torch", "ray", "transformers"} & set(sys.modules)))
"""


def test_a_mistake_in_the_data_is_answered_before_torch_is_imported(tmp_path, make_run):
    """In a process of its own: the tests beside import torch."""
    config = "model_id: tiny\ntrain_path: rows.jsonl\ntask: instruction_tuning\nnum_devices: 0\ndeepspeed: none\n"
    (tmp_path / "c.yaml").write_text(config)
    (tmp_path / "json.jsonl").write_text("{oops\n")
    (tmp_path / "answer.jsonl").write_text('{"messages": [{"role": "user", "content": "q"}]}\n')
    (tmp_path / "key.jsonl").write_text('{"mesages": []}\n')
    (tmp_path / "good.jsonl").write_text(json.dumps(chat("q", "a")) + "\n")
    checkpoint = make_run("done", context_length=64).checkpoints / "epoch-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "FORGEBOOK_CACHE": str(tmp_path / "cache")}
    ended = subprocess.run(
        [sys.executable, "-c", MISTAKES], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    answered = [line for line in ended.stdout.splitlines() if line.startswith("answered ")]
    assert len(answered) == 4 * 12 + 3 + 9 and all(line.endswith(" []") for line in answered), ended
    problems = {"not valid JSON": 16, "no assistant turn": 13, "its keys: mesages": 16}
    assert {text: ended.stderr.count(text) for text in problems} == problems, ended.stderr
    assert ended.stderr.count("StorageError: ") == 15 and "Traceback" not in ended.stderr, ended.stderr


def interrupt():
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def as_started():
    """Interrupts as a process has them that a person started; those that share the tests ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_is_one_sentence_and_exit_code_130(config, monkeypatch, capsys, as_started):
    monkeypatch.setattr(fine_tune, "fine_tune", lambda config: interrupt())
    assert main([config]) == 130
    assert "the same command resumes" in capsys.readouterr().err


def test_a_second_interrupt_ends_at_once_also_during_cleanup(config, monkeypatch, as_started):
    class Ended(BaseException):
        pass

    def end(code):
        assert code == 130
        raise Ended

    def train(config):
        try:
            interrupt()
        finally:
            interrupt()

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(fine_tune, "fine_tune", train)
    with pytest.raises(Ended):
        main([config])


def test_after_a_run_an_interrupt_is_what_it_was(config, monkeypatch, as_started):
    monkeypatch.setattr(fine_tune, "fine_tune", lambda config: None)
    assert main([config]) == 0 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
