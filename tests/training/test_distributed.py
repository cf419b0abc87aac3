"""SIGTERM: the state is saved, the process ends with a clear line, and the same command ends at the same losses."""

import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from conftest import LORA, REPOSITORY, losses_of, uneven_rows
from forgebook.launch.ray_train import fine_tune
from forgebook.runs.metrics import read_metrics
from forgebook.runs.run import Run
from forgebook.training import distributed

ONE_PROCESS = {"num_devices": 0, "train_batch_size_per_device": 4, "deepspeed": None}


def stopped_at(config, step: int) -> tuple[subprocess.Popen, str]:
    """Start a run by its command, send SIGTERM to it at a step, and return the process with what it printed."""
    run = Run(Path(config.storage_path) / config.run_name)
    command = [sys.executable, str(REPOSITORY / "main.py"), str(config.source)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and not (run.metrics.exists() and read_metrics(run.metrics)[step - 1 :]):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    return process, process.communicate()[0]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [0, 2], ids=["here", "two workers"])
def test_sigterm_saves_and_ends(request, make_config, write_rows, devices):
    settings = {
        "train_path": write_rows(uneven_rows(160), "many.jsonl"), "num_devices": devices, "lora_config": LORA,
        "train_batch_size_per_device": 2 if devices else 4, "deepspeed": "zero_2" if devices else None,
    }  # fmt: skip
    config = make_config(run_name="stopped", **settings)
    process, told = stopped_at(config, 5)
    assert process.returncode == 143, told
    step = int(re.search(r"StoppedError: stopped by SIGTERM; step (\d+) is saved, and the same command", told)[1])
    run = Run(Path(config.storage_path) / "stopped")
    assert 5 <= step < 40 and [path.name for path in run.resume.iterdir()] == [f"step-{step}"]
    if devices:
        request.getfixturevalue("ray_session")
    fine_tune(config)
    assert f'"start": {step}, "workers": {devices or 1}' in (run.logs / "progress.jsonl").read_text()
    alone = fine_tune(make_config(run_name="alone", **settings | ONE_PROCESS))
    assert len(losses_of(run)) == 40 and losses_of(run) == pytest.approx(losses_of(alone), abs=1e-3)


def test_outside_the_main_thread_nothing_is_done(tmp_path):
    """A sweep's trials run there; a wish that an earlier process left is forgotten."""
    (tmp_path / distributed.STOP_FILE).touch()
    heard = []

    def trial():
        before = signal.getsignal(signal.SIGTERM)
        with distributed.handle_sigterm(tmp_path):
            heard.append((signal.getsignal(signal.SIGTERM) == before, distributed.is_stop_requested(tmp_path)))

    thread = threading.Thread(target=trial)
    thread.start()
    thread.join()
    assert heard == [(True, False)]
