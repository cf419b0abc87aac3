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
    told = follow(tmp_path, terminal=False, steps=1000)
    lines = told.splitlines()
    assert lines[0] == "loading the model"
    assert lines[1] == "training 25 of 100 parameters (25.0%), 1000 steps"
    assert 10 <= len(lines) <= 20 and "\r" not in told and "\x1b" not in told
    assert "step 83/1000  loss 1.2500  1,234 tok/s  00:00:0" in told
    assert lines[-1] == "epoch 1  step 1000  evaluation loss 0.5000  perplexity 1.649  best so far"


def test_in_a_terminal_a_bar_shows_loss_pace_and_time_left(tmp_path, monkeypatch):
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    told = follow(tmp_path, terminal=True, steps=50)
    assert "50/50" in told and "loss 1.2500" in told and "tok/s" in told and "left" in told


@pytest.mark.parametrize("terminal", [False, True], ids=["lines", "bar"])
def test_on_a_gpu_utilisation_and_money_are_shown(tmp_path, monkeypatch, terminal):
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    monkeypatch.setitem(STEP, "mfu", 0.432)
    monkeypatch.setitem(STEP, "cost_usd", 12.5)
    assert "tok/s  MFU 43%  $12.50 so far" in follow(tmp_path, terminal, steps=5)


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
