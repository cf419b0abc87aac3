"""main.py as a user runs it: exit codes, one readable sentence, no traceback, nothing half-written."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest

from conftest import REPOSITORY, TINY_MODEL
from forgebook.cli.main import main
from forgebook.runs.metrics import read_metrics

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
    ("arguments", "message"),
    [
        (["none.yaml"], "none.yaml"),
        (["c.yaml", "learning_rat=1"], "did you mean 'learning_rate'?"),
        (["c.yaml", "num_epochs=many"], "num_epochs"),
        (["c.yaml", "train_path=none.jsonl"], "none.jsonl does not exist"),
        (["c.yaml", "deepspeed=zero_9"], "zero_9.json"),
        (["c.yaml", "num_devices=4096"], "num_devices is 4096"),
        (["c.yaml", "storage_path=https://host/runs"], "storage_path"),
        (["c.yaml", "nonsense"], "nonsense"),
        (["evalute", "quickstart"], "did you mean 'evaluate'?"),
        (["evaluate"], "evaluate needs a RUN"),
        (["evaluate", "none"], "no run 'none'"),
        (["evaluate", "none", "row=3"], "unknown option row"),
        (["models", "show"], "models show needs a RUN"),
        (["models", "delete", "none"], "no model 'none'"),
        (["push", "none"], "push needs a repository"),
        (["push", "none", "a/b", "public=true"], "unknown option public"),
        (["export", "none"], "export needs a file"),
        (["generate", "tiny"], "generate needs prompts"),
        (["generate", "tiny", "-p", "a", "temperature=hot"], "temperature must be a number, got 'hot'"),
        (["generate", "tiny", "data=none.jsonl"], "none.jsonl does not exist"),
        (["generate", "none", "-p", "a"], "no run 'none'"),
        (["generate", "tiny", "-p", "a", "engine=fast"], "engine must be auto, transformers or vllm"),
        (["chat", "none"], "no run 'none'"),
    ],
)
def test_mistakes_end_with_two_and_a_sentence(here, capsys, arguments, message):
    before = sorted(path.name for path in here.iterdir())
    assert main(arguments) == 2
    output = capsys.readouterr().err
    assert message in output and "Traceback" not in output
    assert sorted(path.name for path in here.iterdir()) == before


def tokens_kept(folder) -> set[str]:
    return {path.name for path in folder.glob("runs/.tokens/*")}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "is empty"),
        (ROW + "{oops\n", "train.jsonl:2: not valid JSON"),
        ('{"messages": [{"role": "user", "content": "q"}]}\n', "train.jsonl:1: messages: no assistant turn"),
    ],
)
def test_bad_rows_end_with_two_and_their_place(here, capsys, rows, message):
    (here / "train.jsonl").write_text(rows)
    assert main(["c.yaml"]) == 2
    assert message in capsys.readouterr().err
    # Nothing of a run: the report on all bad rows, and what can be used of the tokens.
    assert {path.name for path in (here / "runs").glob("*/*")} <= {"data_report.json"} | tokens_kept(here)


def test_retired_names_are_noted_once(here, capsys):
    (here / "c.yaml").write_text(GOOD + "no_gradient_checkpoint: true\ndeepspeed: none\n")
    assert main(["c.yaml"]) == 0
    output = capsys.readouterr().err
    assert output.count("no_gradient_checkpoint is retired") == 1 and "gradient_checkpointing" in output


def test_the_command_as_a_process(here):
    """Real process, real streams: a mistake, then a run, then its evaluation."""

    def run(*arguments):
        return subprocess.run(
            [sys.executable, str(REPOSITORY / "main.py"), *arguments], capture_output=True, text=True, cwd=here
        )

    mistake = run("c.yaml", "seeed=1")
    assert mistake.returncode == 2 and mistake.stdout == "" and "Traceback" not in mistake.stderr
    (here / "valid.jsonl").write_text(ROW.replace('"q"', '"another q"') * 4)
    done = run("c.yaml", "deepspeed=none", "valid_path=valid.jsonl", "train_batch_size_per_device=2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any("evaluation loss" in line for line in lines) and any("best checkpoint" in line for line in lines)
    assert len(lines) < 30 and done.stderr == ""
    evaluated = run("evaluate", "c", "rows=2")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "exact match on 2 held-out examples" in evaluated.stdout and "95% intervals" in evaluated.stdout
    assert (here / "runs/c/evaluation/mistakes.jsonl").exists()
    message = run("generate", "c", "-p", "q", "max_new_tokens=4")
    assert message.returncode == 0 and message.stderr == "" and len(message.stdout.splitlines()) == 1, message.stderr
    written = run("generate", "c", "data=train.jsonl", "out=answers.jsonl", "max_new_tokens=4")
    # A slow machine shows progress before it.
    assert written.stdout.endswith("4 of 4 prompts answered, 0 already in the file: answers.jsonl\n"), written.stderr
    assert len((here / "answers.jsonl").read_text().splitlines()) == 4
    again = run("c.yaml", "deepspeed=none", "valid_path=valid.jsonl", "train_batch_size_per_device=2")
    assert again.returncode == 0 and "is complete already" in again.stdout


def test_a_reader_that_leaves_early_gets_no_traceback():
    """As `head` does."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(REPOSITORY / "main.py"), "schema"]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_a_terminal_sees_a_bar(here):
    """The same command on a pseudo-terminal: a live bar with loss, pace and time left."""
    controller, terminal = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "JPY_PARENT_PID"} | {"TERM": "xterm"}
    command = [sys.executable, str(REPOSITORY / "main.py"), "c.yaml", "deepspeed=none"]
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, cwd=here, env=environment)
    os.close(terminal)
    seen = b""
    with contextlib.suppress(OSError):  # Linux ends a terminal that nobody holds with an error
        while chunk := os.read(controller, 65536):
            seen += chunk
    assert process.wait() == 0
    output = seen.decode()
    assert (
        "\x1b[" in output
        and "epoch 1" in output
        and "tok/s" in output
        and "left" in output
        and "Loading weights" not in output
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharding", "lora", "devices"),
    [
        ("none", "null", ["train_batch_size_per_device=2"]),
        ("zero_2", "{r: 4, lora_dropout: 0.1}", ["train_batch_size_per_device=2"]),
        ("zero_3", "{r: 4}", ["train_batch_size_per_device=2"]),
        ("fsdp", "{r: 4, lora_dropout: 0.1}", ["train_batch_size_per_device=1", "num_devices=2"]),
    ],
)
def test_a_killed_command_continues_to_the_same_losses(here, without_ray, capsys, sharding, lora, devices):
    """SIGKILL of the process, on Ray of the driver, between two saved states, then the same command again.

    With FSDP2 on Ray, SIGTERM stops the second command, which saves its state, and a third one finishes the run.
    """
    (here / "train.jsonl").write_text("".join(ROW.replace('"q"', f'"{"q " * (1 + k % 7)}"') for k in range(48)))
    command = [
        sys.executable, str(REPOSITORY / "main.py"), "c.yaml", f"sharding={sharding}", f"lora_config={lora}",
        *devices, "num_epochs=2", "learning_rate=1e-3", "checkpoint_and_evaluation_frequency="
        "{unit: steps, frequency: 10}",
    ]  # fmt: skip
    on_ray = "num_devices=2" in devices
    if on_ray:
        assert main([*command[2:], "run_name=undisturbed"]) == 0  # its workers are started by this process, without Ray
    else:  # DeepSpeed in this process would stay in it
        undisturbed = subprocess.run([*command, "run_name=undisturbed"], capture_output=True, text=True, cwd=here)
        assert undisturbed.returncode == 0, undisturbed.stderr
    metrics = here / "runs/disturbed/metrics.jsonl"

    def ended_at(lines: int, by: signal.Signals) -> tuple[int, str]:
        """Run the command until it has written so many lines of metrics; return its exit status and what it printed."""
        with open(here / "printed.txt", "w+") as file:
            process = subprocess.Popen([*command, "run_name=disturbed"], stdout=file, stderr=file, cwd=here)
            while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) > lines):
                time.sleep(0.02)
            process.send_signal(by)
            status = process.wait()
            file.seek(0)
            return status, file.read()

    assert ended_at(15, signal.SIGKILL)[0] == -signal.SIGKILL, "the run had ended before it could be killed"
    if on_ray:
        status, printed = ended_at(30, signal.SIGTERM)
        assert status == 143 and "resumed after step 10" in printed, printed
        step = int(re.search(r"StoppedError: stopped by SIGTERM; step (\d+) is saved, and the same", printed)[1])
        assert [path.name for path in (here / "runs/disturbed/resume").iterdir()] == [f"step-{step}"]
        capsys.readouterr()
        assert main([*command[2:], "run_name=disturbed"]) == 0
        assert f"resumed after step {step}" in capsys.readouterr().out
    else:
        again = subprocess.run([*command, "run_name=disturbed"], capture_output=True, text=True, cwd=here)
        assert again.returncode == 0, again.stderr
        assert "resumed after step" in again.stdout
    losses = [
        [row["train_loss_batch"] for row in read_metrics(here / f"runs/{name}/metrics.jsonl") if "grad_norm" in row]
        for name in ("undisturbed", "disturbed")
    ]
    assert len(losses[0]) == 48 and losses[0] == losses[1]
