"""main.py as a user runs it: exit codes, one readable sentence, no traceback, nothing half-written."""

import subprocess
import sys

import pytest

from conftest import REPOSITORY, TINY_MODEL
from helpers.cli import main

GOOD = f"model_id: {TINY_MODEL}\ntrain_path: train.jsonl\ntask: instruction_tuning\nnum_devices: 0\nnum_epochs: 1\n"
ROW = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with a good config and good rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(GOOD)
    (tmp_path / "train.jsonl").write_text(ROW * 4)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.yaml"], "none.yaml"),
        (["c.yaml", "learning_rat=1"], "did you mean 'learning_rate'?"),
        (["c.yaml", "num_epochs=many"], "num_epochs"),
        (["c.yaml", "train_path=none.jsonl"], "none.jsonl does not exist"),
        (["c.yaml", "deepspeed=zero_9"], "zero_9.json"),
        (["c.yaml", "num_devices=4096"], "num_devices is 4096"),
        (["c.yaml", "storage_path=s3://bucket"], "storage_path"),
        (["c.yaml", "nonsense"], "nonsense"),
        (["evaluate"], "evaluate needs a RUN"),
        (["evaluate", "none"], "no run 'none'"),
        (["evaluate", "none", "row=3"], "unknown option row"),
    ],
)
def test_mistakes_end_with_two_and_a_sentence(here, capsys, arguments, said):
    before = sorted(path.name for path in here.iterdir())
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told
    assert sorted(path.name for path in here.iterdir()) == before


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("", "is empty"),
        (ROW + "{oops\n", "train.jsonl:2: not valid JSON"),
        ('{"messages": [{"role": "user", "content": "q"}]}\n', "train.jsonl:1: messages: no assistant turn"),
    ],
)
def test_bad_rows_end_with_two_and_their_place(here, capsys, rows, said):
    (here / "train.jsonl").write_text(rows)
    assert main(["c.yaml"]) == 2
    assert said in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_retired_names_are_noted_once(here, capsys):
    (here / "c.yaml").write_text(GOOD + "no_gradient_checkpoint: true\ndeepspeed: none\n")
    assert main(["c.yaml"]) == 0
    told = capsys.readouterr().err
    assert told.count("no_gradient_checkpoint is retired") == 1 and "gradient_checkpointing" in told


def test_the_command_as_a_process(here):
    """Real process, real streams: a mistake, then a run, then its evaluation."""

    def run(*arguments):
        return subprocess.run(
            [sys.executable, str(REPOSITORY / "main.py"), *arguments], capture_output=True, text=True, cwd=here
        )

    mistake = run("c.yaml", "seeed=1")
    assert mistake.returncode == 2 and mistake.stdout == "" and "Traceback" not in mistake.stderr
    done = run("c.yaml", "deepspeed=none", "valid_path=train.jsonl", "train_batch_size_per_device=2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any("evaluation loss" in line for line in lines) and any("best checkpoint" in line for line in lines)
    assert len(lines) < 30 and done.stderr == ""
    evaluated = run("evaluate", "c", "rows=2")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "exact match on 2 held-out rows" in evaluated.stdout
    again = run("c.yaml", "deepspeed=none", "valid_path=train.jsonl", "train_batch_size_per_device=2")
    assert again.returncode == 0 and "is complete already" in again.stdout


@pytest.mark.slow
def test_deepspeed_in_this_process(here):
    """num_devices: 0 with ZeRO-2 and ZeRO-3, interrupted and continued, without Ray."""
    for sharding in ("zero_2", "zero_3"):
        command = [
            sys.executable,
            str(REPOSITORY / "main.py"),
            "c.yaml",
            f"deepspeed={sharding}",
            f"run_name={sharding}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=here)
        assert done.returncode == 0, done.stderr
        assert "done" in done.stdout or "steps" in done.stdout
