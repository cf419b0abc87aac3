"""What a person sees while a run goes on."""

import io
import json
import time

import pytest
from rich.console import Console

from forgebook.reporting import console as consoles
from forgebook.runs.metrics import Progress
from forgebook.runs.run import Run

STEP = {"epoch": 1, "train_loss_batch": 1.25, "trained_tokens_throughput": 1234.5}


def follow(tmp_path, terminal: bool, steps: int) -> str:
    """Let a console follow a run of so many steps; return what it printed."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=120, soft_wrap=True)
    run = Run(tmp_path)
    with consoles.show_progress(run.logs / "progress.jsonl", console):
        progress = Progress(run)
        progress.stage("loading the model")
        progress.stage("training", steps=steps, start=0, parameters=100, trainable_parameters=25)
        for step in range(1, steps + 1):
            progress.step(step=step, **STEP)
        time.sleep(3 * consoles.POLL_SECONDS if terminal else 0)
        progress.evaluation(
            step=steps, epoch=1, eval_loss=0.5, perplexity=1.649, checkpoint_dir_name="epoch-1", is_best=True
        )
    return screen.getvalue()


def test_without_a_terminal_a_run_is_a_dozen_lines(tmp_path, monkeypatch):
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    output = follow(tmp_path, terminal=False, steps=1000)
    lines = output.splitlines()
    assert lines[0] == "loading the model"
    assert lines[1] == "training 25 of 100 parameters (25.0%), 1000 steps"
    assert 10 <= len(lines) <= 20 and "\r" not in output and "\x1b" not in output
    assert "step 83/1000  loss 1.2500  1,234 tok/s  00:00:0" in output
    assert lines[-1] == "epoch 1  step 1000  evaluation loss 0.5000  perplexity 1.649  best so far"


def test_in_a_notebook_a_run_is_its_evaluations(tmp_path, monkeypatch):
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    lines = follow(tmp_path, terminal=False, steps=1000).splitlines()
    assert lines[:2] == ["loading the model", "training 25 of 100 parameters (25.0%), 1000 steps"]
    assert lines[2:] == ["epoch 1  step 1000  evaluation loss 0.5000  perplexity 1.649  best so far"]


def test_in_a_terminal_a_bar_shows_loss_pace_and_time_left(tmp_path, monkeypatch):
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    output = follow(tmp_path, terminal=True, steps=50)
    assert "50/50" in output and "loss 1.2500" in output and "tok/s" in output and "left" in output


@pytest.mark.parametrize("terminal", [False, True], ids=["lines", "bar"])
def test_on_a_gpu_utilisation_and_money_are_shown(tmp_path, monkeypatch, terminal):
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    monkeypatch.setitem(STEP, "mfu", 0.432)
    monkeypatch.setitem(STEP, "cost_usd", 12.5)
    assert "tok/s  MFU 43%  $12.50 so far" in follow(tmp_path, terminal, steps=5)


def test_a_loss_that_rises_is_a_warning_once(tmp_path):
    screen = io.StringIO()
    with consoles.show_progress(tmp_path / "logs/progress.jsonl", Console(file=screen, width=120, soft_wrap=True)):
        progress = Progress(Run(tmp_path))
        progress.stage("training", steps=40, start=0, parameters=100, trainable_parameters=25)
        for step in range(1, 41):
            progress.step(step=step, **STEP | {"train_loss_batch": 1.0 if step <= 10 else 3.0})
    [warning] = [line for line in screen.getvalue().splitlines() if "risen" in line]
    assert warning.startswith("step 15: the training loss has risen from 1.0000 (first 5) to 2.0000 (latest 10):")
    assert warning.endswith("stop it and lower learning_rate")


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = [0.0]
    monkeypatch.setattr(consoles.time, "monotonic", lambda: now[0])
    return now


def count_answers(clock, seconds: int, terminal: bool = False) -> str:
    """Count to 100 answers of 10 tokens each, 20 of which an earlier command left; return what is printed."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=120, soft_wrap=True)
    with consoles.progress_bar(console, "evaluating") as show:
        show("base", 20, 100)
        for step in range(1, 801):
            clock[0] += seconds / 800
            show("base", 20 + step // 10, 100, step, 0.1 * (step % 10))
    return screen.getvalue()


def test_without_a_terminal_a_wait_is_a_few_lines_and_a_short_one_none(clock):
    assert count_answers(clock, 1) == ""
    assert count_answers(clock, 8) == "evaluating base  100/100  100 tok/s  00:00:00 left\n"
    lines = count_answers(clock, 1600).splitlines()
    # The first token comes after the prompts are read: its time says nothing of the others'.
    assert lines[0] == "evaluating base  20/100  0 tok/s  --:--:-- left" and lines[-1].endswith("00:00:00 left")
    assert len(lines) == 11 and len(count_answers(clock, 24 * 3600).splitlines()) < 300
    assert "  71:06:00 left\n" in count_answers(clock, 72 * 3600)


def test_in_a_terminal_answers_in_progress_move_the_bar(clock):
    shown = count_answers(clock, 1600, terminal=True)
    assert "evaluating base" in shown and "100/100" in shown and "tok/s" in shown and "00:00:00 left" in shown


@pytest.mark.parametrize("terminal", [False, True], ids=["lines", "spinner"])
def test_stages_of_a_long_wait_are_named(clock, terminal):
    screen = io.StringIO()
    with consoles.show_stages(Console(file=screen, force_terminal=terminal, width=120), "merging") as show:
        show("loading")
        clock[0] += 0 if terminal else 3
        show("writing")
        time.sleep(0.2 if terminal else 0)
    expected = "merging: writing" if terminal else "merging\nwriting, after 3 s\n"
    assert expected in screen.getvalue()


def test_half_a_line_is_waited_for(tmp_path):
    log = tmp_path / "progress.jsonl"
    screen = io.StringIO()
    whole = json.dumps({"kind": "stage", "text": "hello"}) + "\n"
    with consoles.show_progress(log, Console(file=screen)):
        log.write_text(whole[:10])
        time.sleep(2 * consoles.POLL_SECONDS)
        log.write_text(whole)
    assert screen.getvalue() == "hello\n"


def test_the_last_lines_of_every_log(tmp_path):
    (tmp_path / "worker-0.log").write_text("\n".join(f"line {k}" for k in range(20)))
    (tmp_path / "worker-1.log").write_text("")
    quoted = consoles.last_lines(tmp_path, 2)
    assert quoted == "--- worker-0.log, last lines ---\nline 18\nline 19"
