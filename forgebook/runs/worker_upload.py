"""A run in a bucket whose workers are on machines that do not see its folder: the bucket is what they share.

In the process that started the run:

    send_inputs(folder, uri, warn)          before: the run's files and its tokens, for the workers
    passing_stop(stop_file, uri)            while it trains: a request to stop
    fetch_logs(uri, folder); remove_inputs(uri)     after

In the workers, by the first one of each machine:

    fetch_inputs(uri, folder)               into a folder of the machine's own
    uploading_logs(folder, uri, stop_file)  while it trains
    send_folder(folder, uri), and rank 0's start_folder and finish_folder around it: checkpoints, training states

A folder in the bucket is complete or absent, though several machines write it: rank 0 writes its manifest last. What
the workers save counts only when it is in the bucket, so a busy one holds training up for some minutes, then ends it.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from forgebook.errors import StorageError
from forgebook.runs import object_store, upload
from forgebook.runs.atomic import atomic_file
from forgebook.runs.object_store import Manifest

__all__ = [
    "fetch_inputs",
    "fetch_logs",
    "finish_folder",
    "passing_stop",
    "remove_inputs",
    "send_folder",
    "send_inputs",
    "send_run_files",
    "start_folder",
    "uploading_logs",
]

INPUTS = ".workers"  # below the run's URI while it trains; a name with a dot is no file of the run
TOKENS, STOP = f"{INPUTS}/tokens", f"{INPUTS}/stop"
LOGS = "logs/*.log"
LOOK_SECONDS = 2  # between looks for a request to stop
LOGS_SECONDS = 20  # between uploads of logs


# Where the run was started ----------------------------------------------------------------------------


def send_inputs(folder: Path, uri: str, warn: upload.Warn) -> None:
    """Upload what workers start from: the run's own files, and `tokens/` with its shards."""

    def send() -> None:
        object_store.remove_folder(f"{uri}/{INPUTS}")
        upload.send_files(folder, uri, {})
        object_store.upload_folder(folder / "tokens", f"{uri}/{TOKENS}")

    upload.persist(send, warn)


@contextlib.contextmanager
def passing_stop(stop_file: Path, uri: str) -> Iterator[None]:
    """Pass a request to stop on to the workers while a block runs: a file that appears here appears in the bucket."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(LOOK_SECONDS / 4):
            if stop_file.exists():
                upload.persist(lambda: object_store.write_file(f"{uri}/{STOP}", b"stop"), lambda text: None)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def fetch_logs(uri: str, folder: Path) -> None:
    """Download the workers' logs; what the bucket does not give is left out."""
    with contextlib.suppress(StorageError):
        names = [name for name in object_store.list_files(uri) if name.startswith("logs/worker-")]
        object_store.download_files(uri, folder, names)


def remove_inputs(uri: str) -> None:
    """Delete what only the workers needed; what cannot be deleted is replaced by the next run of that name."""
    with contextlib.suppress(StorageError):
        object_store.remove_folder(f"{uri}/{INPUTS}")


# In a worker ------------------------------------------------------------------------------------------


def fetch_inputs(uri: str, folder: Path) -> None:
    """Make `folder` what a worker starts from: the run's files, its tokens, its newest training state.

    Shards that are there from an earlier start are not downloaded again. `folder/.tokens` holds the tokens as they
    are in the bucket, `folder/tokens` copies of the views alone, which the caller points at the shards.
    """
    there = object_store.list_files(uri)
    for name in ("resume", "checkpoints", "tokens"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
    for log in ("metrics.jsonl", "logs/progress.jsonl"):
        (folder / log).unlink(missing_ok=True)
    state = upload.newest_state(upload.complete_folders(uri, there))
    if state:
        object_store.download_folder(f"{uri}/{state}", folder / state)
    is_there = f"{TOKENS}/{object_store.MANIFEST}" in there
    if not is_there or not object_store.download_folder(f"{uri}/{TOKENS}", folder / ".tokens"):
        raise StorageError(f"{uri}/{TOKENS} is not complete: start the run again")
    for view in (folder / ".tokens").glob("*.np[yz]"):
        shutil.copy2(view, folder / "tokens" / view.name)
    for name in there:
        if ("/" not in name and not name.startswith(".")) or name.startswith("tokens/reference-"):
            with atomic_file(folder / name) as temporary:
                temporary.write_bytes(object_store.read_file(f"{uri}/{name}"))
    _sent[folder] = {name: state for name, state in _states(folder).items() if name in there}


# Per folder of this process: name -> [bytes, time of change] of the run's files that the bucket has.
_sent: dict[Path, dict[str, list[int]]] = {}
_sending = threading.Lock()


def _states(folder: Path) -> dict[str, list[int]]:
    paths = [path for pattern in upload.FILES for path in folder.glob(pattern) if path.is_file()]
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def send_run_files(folder: Path, uri: str) -> None:
    """Upload the run's own files that have changed, such as its metrics. Rank 0 alone calls it."""
    with _sending:
        upload.persist(lambda: upload.send_files(folder, uri, _sent.setdefault(folder, {})), print)


@contextlib.contextmanager
def uploading_logs(folder: Path, uri: str, stop_file: Path | None) -> Iterator[None]:
    """Upload the logs of this machine's workers while a block runs, and at its end.

    stop_file: rank 0's, created when the bucket has a request to stop; None on the other machines.
    """
    ended, sizes = threading.Event(), dict[Path, int]()

    def send_logs() -> None:
        for log in folder.glob(LOGS):
            if sizes.get(log) != log.stat().st_size:
                sizes[log] = log.stat().st_size
                object_store.write_file(f"{uri}/logs/{log.name}", log.read_bytes())

    def watch() -> None:
        due = time.monotonic()
        while not ended.wait(LOOK_SECONDS):
            with contextlib.suppress(StorageError):  # tried again
                if stop_file and not stop_file.exists() and object_store.has_file(f"{uri}/{STOP}"):
                    stop_file.touch()
                if time.monotonic() > due:
                    send_logs()
                    due = time.monotonic() + LOGS_SECONDS

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(StorageError):
            send_logs()


def start_folder(uri: str) -> None:
    """Mark a folder of the bucket as incomplete, whatever it held."""
    upload.persist(lambda: object_store.write_manifest(uri, {}, is_complete=False), print)


def send_folder(folder: Path, uri: str) -> Manifest:
    """Upload the files that this machine has of a folder; return what `finish_folder` needs of it."""
    return upload.persist(lambda: object_store.upload_files(folder, uri), print)


def finish_folder(uri: str, files: Manifest) -> None:
    """Mark a folder of the bucket as complete; files: those of all machines."""
    upload.persist(lambda: object_store.write_manifest(uri, files, is_complete=True), print)
