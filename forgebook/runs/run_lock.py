"""Which process writes a run: one that holds a lock on a file in its folder.

with locked(folder):        while a run is written; the system frees the lock however the process ends
check_free(folder)          StorageError with the process id if another process writes the run
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from forgebook.errors import StorageError
from forgebook.runs.run_files import LOCK

__all__ = ["check_free", "locked", "writer_of"]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, which is created if it does not exist, for the length of a block.

    Raises StorageError, which names the process, if another one holds it; and if the folder cannot be written.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(path)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
    except BlockingIOError:
        raise _in_use(folder, writer_of(folder)) from None
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error}: set storage_path to another location") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def check_free(folder: Path) -> None:
    """Raise StorageError if another process writes the run in a folder."""
    writer = writer_of(folder)
    if writer is not None and writer != (str(os.getpid()), socket.gethostname()):
        raise _in_use(folder, writer)


def writer_of(folder: Path) -> tuple[str, str] | None:
    """Return (process id, host) of the process that writes the run in a folder; None if there is none."""
    try:
        with open(folder / LOCK, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                pid, _, host = file.read(300).decode(errors="replace").strip().partition(" ")
                return pid or "unknown", host or "unknown"
    except OSError:  # no such file, or a file system without locks
        pass
    return None


def _lock(path: Path) -> int:
    """Open and lock a file that is still at its path then: the process before deletes it when it is done."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError:  # a file system without locks: the run is written as before there were any
                return descriptor
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _in_use(folder: Path, writer: tuple[str, str] | None) -> StorageError:
    pid, host = writer or ("unknown", "unknown")
    # SIGTERM, which saves the state: a process that a script started in the background ignores SIGINT.
    return StorageError(
        f"the run {folder} is being written by process {pid} on {host}: wait until it ends, stop it "
        f"(kill {pid}), or choose another run_name"
    )
