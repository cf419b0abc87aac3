"""Which worker this process is; errors that reach every worker; SIGTERM as a request to stop.

A spot machine sends SIGTERM before it is taken away. The process that started the run receives it and writes a file
into the run folder; rank 0 looks for that file after each step, so that the run saves its state and ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from forgebook.errors import CheckpointError, ForgebookError

__all__ = [
    "handle_sigterm",
    "is_first_here",
    "is_main",
    "is_stop_requested",
    "raised_everywhere",
    "rank",
    "world_size",
]

STOP_FILE = ".stop"


def rank() -> int:
    """Return this process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of workers, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Tell whether this is rank 0, the one that writes files."""
    return rank() == 0


def is_first_here() -> bool:
    """Tell whether this is the first worker of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextlib.contextmanager
def raised_everywhere() -> Iterator[None]:
    """Raise on every rank what is raised on any within the block; otherwise the others would wait forever.

    Collective. An error of the operating system (no space, no permission) becomes a CheckpointError.
    """
    error: ForgebookError | None = None
    try:
        yield
    except ForgebookError as raised:
        error = raised
    except OSError as raised:
        error = CheckpointError(f"a file could not be written: {raised}")
    if world_size() > 1:
        errors: list[ForgebookError | None] = [None] * world_size()
        dist.all_gather_object(errors, error)
        error = next((one for one in errors if one is not None), None)
    if error is not None:
        raise error


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
