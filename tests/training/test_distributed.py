"""Errors that reach every rank, in a group of two processes; SIGTERM saves the state and the same command resumes."""

import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from conftest import LORA, REPOSITORY, losses_of, uneven_rows
from forgebook.errors import ConfigError, TrainingError
from forgebook.training import distributed
from support_ranks import run_two_ranks

# Errors of one rank -------------------------------------------------------------------------------------


class Unpicklable(Exception):
    """An error that cannot travel between processes as it is, as those of some libraries."""

    def __init__(self):
        super().__init__("no handle\nfor this device")
        self.handle = lambda: None


# What each rank raises within a block; `None` is nothing.
BLOCKS = {
    "nothing": (None, None),
    "a user's mistake": (None, ConfigError("learning_rate: 5 is too large")),
    "out of memory": (None, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
    "no message": (RuntimeError(""), None),
    "a file that is not there": (None, FileNotFoundError(2, "No such file or directory", "weights.bin")),
    "interrupted": (KeyboardInterrupt(), None),
    "both": (ValueError("of rank 0"), ConfigError("of rank 1")),
    "not to be pickled": (None, Unpicklable()),
}


def raise_each(rank: int) -> dict:
    """Raise what BLOCKS says of a rank; return what the block raised: its type, text and cause."""
    outcomes = {
        "rank": [distributed.rank(), distributed.world_size()],
        "writes": [distributed.is_main(), distributed.is_first_here()],
        "gathered": distributed.gathered(f"of rank {rank}"),
    }
    for name, raised in BLOCKS.items():
        outcomes[name] = outcome(raised[rank])
    total = torch.tensor([rank + 1])
    torch.distributed.all_reduce(total)  # no rank is a collective ahead of the other
    outcomes["total"] = int(total)
    outcomes["one ends"] = None if rank == 0 else distributed.all_end(0.2)
    torch.distributed.barrier()
    outcomes["both end"] = distributed.all_end(5) if rank == 0 else None
    return outcomes


def outcome(raised: BaseException | None) -> list[str]:
    try:
        with distributed.raised_everywhere():
            if raised is not None:
                raise raised
    except BaseException as error:
        return [type(error).__name__, str(error), type(error.__cause__).__name__]
    return []


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_two_ranks(raise_each, tmp_path_factory.mktemp("ranks"))


def test_each_process_knows_its_rank(outcomes):
    assert [each["rank"] for each in outcomes] == [[0, 2], [1, 2]]
    assert [each["writes"] for each in outcomes] == [[True, True], [False, False]]
    assert [each["gathered"] for each in outcomes] == [["of rank 0", "of rank 1"]] * 2


def test_a_block_without_errors_raises_nothing(outcomes):
    assert [each["nothing"] for each in outcomes] == [[], []] and [each["total"] for each in outcomes] == [3, 3]


@pytest.mark.parametrize(
    ("name", "kind", "text", "causes"),
    [
        ("a user's mistake", "ConfigError", "learning_rate: 5 is too large", ["NoneType", "NoneType"]),
        (
            "out of memory", "TrainingError",
            "worker 1: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
            ["NoneType", "OutOfMemoryError"],
        ),
        ("no message", "TrainingError", "worker 0: RuntimeError", ["RuntimeError", "NoneType"]),
        (
            "a file that is not there", "TrainingError",
            "worker 1: FileNotFoundError: [Errno 2] No such file or directory: 'weights.bin'",
            ["NoneType", "FileNotFoundError"],
        ),
        ("both", "TrainingError", "worker 0: ValueError: of rank 0", ["ValueError", "ConfigError"]),
        ("not to be pickled", "TrainingError", "worker 1: Unpicklable: no handle", ["NoneType", "Unpicklable"]),
    ],
)  # fmt: skip
def test_an_error_of_one_rank_is_raised_on_both(outcomes, name, kind, text, causes):
    assert [each[name] for each in outcomes] == [[kind, text, cause] for cause in causes]


def test_an_interrupted_rank_stays_interrupted_and_ends_the_other(outcomes):
    assert outcomes[0]["interrupted"][0] == "KeyboardInterrupt"
    assert outcomes[1]["interrupted"][:2] == ["TrainingError", "worker 0: KeyboardInterrupt"]


def test_a_rank_learns_whether_the_others_end_too(outcomes):
    """One alone waits in vain, and is raised to Ray; the last one to end does not wait."""
    assert outcomes[1]["one ends"] is False and outcomes[0]["both end"] is True
    assert distributed.all_end()


def leave_one(rank: int) -> list[list[str]]:
    """Rank 1 dies, as a killed worker, while rank 0 waits for it at the end of a block, with and without an error."""
    if rank == 1:
        return []
    return [outcome(None), outcome(torch.OutOfMemoryError("CUDA out of memory"))]


def test_a_rank_that_dies_does_not_keep_the_other_waiting(tmp_path):
    """What is raised then is no ForgebookError, so that Ray takes it for a failed worker and restarts all."""
    (waiting, failing), _ = run_two_ranks(leave_one, tmp_path)
    assert waiting[0] not in ("ConfigError", "TrainingError") and waiting
    assert failing[:2] == ["OutOfMemoryError", "CUDA out of memory"]


def test_one_process_raises_the_error_itself():
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError) as raised, distributed.raised_everywhere():
        raise error
    assert raised.value is error and not isinstance(error, TrainingError)
    with pytest.raises(KeyboardInterrupt), distributed.raised_everywhere():
        raise KeyboardInterrupt


# SIGTERM ------------------------------------------------------------------------------------------------

ONE_PROCESS = {"num_devices": 0, "train_batch_size_per_device": 4, "deepspeed": None}


def stopped_at(config, step: int) -> tuple[subprocess.Popen, str]:
    """Start a run by its command, send SIGTERM to it at a step, and return the process with what it printed."""
    from forgebook.runs.metrics import read_metrics
    from forgebook.runs.run import Run

    run = Run(Path(config.storage_path) / config.run_name)
    command = [sys.executable, str(REPOSITORY / "main.py"), str(config.source)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and not (run.metrics.exists() and read_metrics(run.metrics)[step - 1 :]):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    return process, process.communicate()[0]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "zero_2"], ids=["here", "two workers"])
def test_sigterm_saves_and_ends(without_ray, make_config, write_rows, sharding):
    """The command is stopped with its workers on Ray; what continues it needs no Ray. FSDP2: tests/cli/test_main.py."""
    from forgebook.launch.fine_tune import fine_tune
    from forgebook.runs.run import Run

    devices = 0 if sharding == "none" else 2
    settings = {
        "train_path": write_rows(uneven_rows(160), "many.jsonl"), "num_devices": devices, "lora_config": LORA,
        "train_batch_size_per_device": 2 if devices else 4, "sharding": sharding,
        "deepspeed": None if sharding == "none" else sharding,
    }  # fmt: skip
    config = make_config(run_name="stopped", **settings)
    process, printed = stopped_at(config, 5)
    assert process.returncode == 143, printed
    step = int(re.search(r"StoppedError: stopped by SIGTERM; step (\d+) is saved, and the same command", printed)[1])
    run = Run(Path(config.storage_path) / "stopped")
    assert 5 <= step < 40 and [path.name for path in run.resume.iterdir()] == [f"step-{step}"]
    fine_tune(config)
    assert f'"start": {step}, "workers": {devices or 1}' in (run.logs / "progress.jsonl").read_text()
    alone = fine_tune(make_config(run_name="alone", **settings | ONE_PROCESS | {"sharding": "none"}))
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
