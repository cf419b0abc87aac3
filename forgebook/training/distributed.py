"""Which worker this process is; errors that reach every worker; SIGTERM as a request to stop.

A spot machine sends SIGTERM before it is taken away. The process that started the run receives it and writes a file
into the run folder; rank 0 looks for that file after each step, so that the run saves its state and ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from forgebook.errors import ForgebookError, TrainingError, first_line

__all__ = [
    "STOP_FILE",
    "all_end",
    "describe",
    "gathered",
    "handle_sigterm",
    "is_first_here",
    "is_main",
    "is_stop_requested",
    "raised_everywhere",
    "rank",
    "world_size",
]

STOP_FILE = ".stop"
# In the process group's store: how many ranks end with an error; and for how long one waits for the others to.
ENDING, END_SECONDS = "forgebook/ending", 10
T = TypeVar("T")


def rank() -> int:
    """Return this process's number among the workers, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of workers, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this is rank 0, the one that writes the files of all."""
    return rank() == 0


def is_first_here() -> bool:
    """Return whether this is the first worker of its machine, the one that writes the files of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def gathered(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """List a value of every rank, by rank. Collective. group: of all ranks, for a thread beside the one that trains."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value, group)
    return values


@contextlib.contextmanager
def raised_everywhere(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Raise on every rank what any rank raises within the block; otherwise the others would wait for it forever.

    A ForgebookError is raised as it is: what went wrong is the same on all ranks. Any other error of one rank, a GPU
    out of memory or a file that cannot be read, becomes a TrainingError that names the rank, its cause the original;
    a single process raises the original. An interrupted rank stays interrupted and the others raise a TrainingError.

    Collective. All ranks must leave the block before any error is raised, so no rank may wait for another inside it
    in a collective that the other can miss. group: as in `gathered`.
    """
    error: BaseException | None = None
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit) as raised:
        error = raised
    if world_size() > 1:
        error = _shared(error, group)
    if error is not None:
        raise error


def _shared(error: BaseException | None, group: dist.ProcessGroup | None) -> BaseException | None:
    """Exchange the ranks' errors; return what this rank raises: its own interrupt, or the error of the first rank."""
    # Other errors travel as text: not all of them can be pickled, and their tracebacks hold on to GPU memory.
    own = error if error is None or isinstance(error, ForgebookError) else describe(error)
    errors: list[ForgebookError | str | None] = [None] * world_size()
    try:
        dist.all_gather_object(errors, own, group)
    except Exception as lost:  # another worker has died: whoever started the workers restarts all of them
        return error or lost
    first = next((each for each in errors if each is not None), None)
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return error
    if first is None or isinstance(first, ForgebookError):
        return first
    shared = TrainingError(first)
    shared.__cause__ = error
    return shared


def all_end(seconds: float = END_SECONDS) -> bool:
    """Return whether every rank calls this within so many seconds, as each does that ends with an error.

    Where not, the others wait for this one in a collective, and whoever started the workers has to end them.
    """
    if world_size() == 1:
        return True
    store = dist.distributed_c10d._get_default_store()
    deadline = time.monotonic() + seconds
    try:
        count = store.add(ENDING, 1)
        while count < world_size() and time.monotonic() < deadline:
            time.sleep(0.05)
            count = store.add(ENDING, 0)
    except Exception:  # the rank that holds the store has died
        return False
    return count >= world_size()


def describe(error: BaseException) -> str:
    """Write an error as one line that names its rank; many errors of libraries have no message of their own."""
    name, line = type(error).__name__, first_line(error)
    return f"worker {rank()}: {name}: {line}" if line != name else f"worker {rank()}: {name}"


@contextlib.contextmanager
def handle_sigterm(folder: Path) -> Iterator[None]:
    """Turn SIGTERM into a stop request in a run's folder for the length of a block; a second one ends the process.

    Outside the main thread, where Python delivers no signals (the trials of a sweep), the handler stays as it was.
    """
    (folder / STOP_FILE).unlink(missing_ok=True)
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def request_stop(number, frame) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        (folder / STOP_FILE).touch()

    previous = signal.signal(signal.SIGTERM, request_stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)
        (folder / STOP_FILE).unlink(missing_ok=True)


def is_stop_requested(folder: Path) -> bool:
    """Return whether SIGTERM has requested the run in `folder` to stop."""
    return (folder / STOP_FILE).exists()
