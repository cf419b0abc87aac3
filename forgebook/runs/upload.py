"""A run folder and its copy in a bucket.

download_run(uri, folder)            before a run, or to look at one: fetch what the bucket has
uploading(folder, uri, warn)         while a run trains: upload what it writes, in a thread of its own
upload_run(folder, uri, warn)        bring the bucket up to date, or fail

Workers on machines that do not see the run folder upload it themselves: `forgebook.runs.worker_upload`.

The bucket's folder looks like the local one. Checkpoints and training states are complete or absent there, too
(a manifest, written last); an old one is deleted when what replaces it is complete. A slow or failing bucket never
stops training: uploads are tried again until the run's end, and for some minutes after it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from forgebook.errors import BucketBusyError, StorageError
from forgebook.runs import object_store
from forgebook.runs.atomic import atomic_file, delete_folder

__all__ = [
    "complete_folders",
    "download_run",
    "newest_state",
    "persist",
    "read_known",
    "send_files",
    "upload_run",
    "uploading",
]

CONFIG = "config.yaml"  # makes a folder a run's
STATES, CHECKPOINTS = "resume", "checkpoints"
# In addition to these folders; tokens can be computed again.
FILES = ("*", "tokens/reference-*.npy", "tokens/reference/*.npy")
LOGS = ("logs/*.log",)
RAY_LIST = "checkpoint_manager_snapshot.json"  # Ray Train's own, of what it was reported; deleted after the run
SNAPSHOTS = ".uploading"

LOOK_SECONDS, FILES_SECONDS = 1, 30  # between looks for new folders; between uploads of files that grow
PAUSES = (5, 10, 20, 40, 60)  # seconds between the last attempts to complete an upload, once training is over

T = TypeVar("T")
Warn = Callable[[str], None]
Known = dict[str, Any]  # what the bucket holds: folder -> its manifest, None if not complete; file -> [bytes, time]


# From the bucket --------------------------------------------------------------------------------------


def download_run(uri: str, folder: Path, with_state: bool = True) -> None:
    """Make a local run folder what the bucket holds, or leave it if it is the same run and as far or further on.

    A run that the bucket does not have is removed here: it was deleted there. with_state: also fetch the training
    state to resume from.
    """
    there = object_store.list_files(uri)
    if CONFIG not in there:
        shutil.rmtree(folder, ignore_errors=True)
        return
    complete = complete_folders(uri, there)
    state = newest_state(complete)
    if _is_same(uri, folder, there) and _reached_here(folder) >= _reached_there(there, state):
        return
    (folder / CONFIG).unlink(missing_ok=True)  # written last: a pull that was interrupted is begun again
    wanted = {part for part in complete if part.startswith(CHECKPOINTS)} | ({state} if state and with_state else set())
    for part in _local_parts(folder) - wanted:
        delete_folder(folder / part)
    for part in sorted(wanted):
        object_store.download_folder(f"{uri}/{part}", folder / part)
    files = [name for name in there if _part_of(name) is None and not name.startswith(("logs/", "."))]
    for name in sorted(files, key=lambda name: name == CONFIG):
        with atomic_file(folder / name) as temporary:
            temporary.write_bytes(object_store.read_file(f"{uri}/{name}"))


def complete_folders(uri: str, there: dict[str, int]) -> list[str]:
    """List the complete checkpoints and training states of a bucket's run; there: its files."""
    return [part for part, manifest in read_known(uri, there).items() if manifest is not None]


def newest_state(folders: Iterable[str]) -> str | None:
    """Name the training state of the latest step among folders such as `resume/step-20`."""
    return max((folder for folder in folders if folder.startswith(STATES)), key=_step, default=None)


def read_known(uri: str, there: dict[str, int]) -> Known:
    """Read the manifests of the folders that a bucket's run holds, complete or not."""
    parts = {part for name in there if (part := _part_of(name))}
    return {
        part: object_store.read_manifest(f"{uri}/{part}") if f"{part}/{object_store.MANIFEST}" in there else None
        for part in parts
    }


def _part_of(name: str) -> str | None:
    """Return the folder (`checkpoints/epoch-1`) that a file of a run belongs to; None if it is in no such folder."""
    parts = name.split("/")
    return "/".join(parts[:2]) if len(parts) > 2 and parts[0] in (STATES, CHECKPOINTS) else None


def _local_parts(folder: Path) -> set[str]:
    """List the complete folders of a local run: what is being written or removed starts with a dot."""
    paths = [path for kind in (STATES, CHECKPOINTS) for path in (folder / kind).glob("[!.]*")]
    return {path.relative_to(folder).as_posix() for path in paths if path.is_dir()}


def _step(part: str) -> int:
    return int(part.rpartition("-")[2])


def _is_same(uri: str, folder: Path, there: dict[str, int]) -> bool:
    """Return whether a local folder is of the bucket's run: the same config, the same data."""
    for name in (CONFIG, "data_report.json"):
        local = folder / name
        if not local.exists() or name not in there or local.read_bytes() != object_store.read_file(f"{uri}/{name}"):
            return False
    return True


def _reached_here(folder: Path) -> tuple[bool, int, int]:
    """Measure how far a local run is: whether it is complete, its newest training state, the length of its metrics."""
    metrics = folder / "metrics.jsonl"
    steps = [_step(part) for part in _local_parts(folder) if part.startswith(STATES)]
    length = metrics.stat().st_size if metrics.exists() else 0
    return (folder / "summary.json").exists(), max(steps, default=0), length


def _reached_there(there: dict[str, int], state: str | None) -> tuple[bool, int, int]:
    return "summary.json" in there, _step(state) if state else 0, there.get("metrics.jsonl", 0)


# To the bucket ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def uploading(folder: Path, uri: str | None, warn: Warn) -> Iterator[None]:
    """Upload what a block writes into a run folder while it runs; the block's end waits until all is there.

    uri: None for a run on this machine alone: nothing is done. warn: called with what the user should know.

    Raises StorageError at once if the bucket cannot be written, or at the end if the upload could not be completed.
    """
    if uri is None:
        yield
        return
    known = read_known(uri, object_store.list_files(uri))
    send_files(folder, uri, known)
    ended = threading.Event()
    thread = threading.Thread(target=_upload_until, args=(ended, folder, uri, known, warn), daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        ended.set()
        thread.join()
        try:
            _send_all(folder, uri, known, with_logs=True)
        except StorageError as error:  # what went wrong in the block matters more
            warn(f"{error}; what the run wrote last is in {folder} alone")
        raise
    ended.set()
    thread.join()
    upload_run(folder, uri, warn, known)


def upload_run(folder: Path, uri: str, warn: Warn, known: Known | None = None) -> None:
    """Bring the bucket up to date with a run folder; try for some minutes.

    Raises StorageError, which names the local folder, if that fails.
    """

    def send() -> None:
        _send_all(
            folder, uri, read_known(uri, object_store.list_files(uri)) if known is None else known, with_logs=True
        )

    try:
        persist(send, warn)
    except StorageError as error:
        raise StorageError(
            f"{error}. The run is not complete in the bucket; all of it is in {folder}, and the same command uploads "
            "it again"
        ) from None


def persist(attempt: Callable[[], T], warn: Warn) -> T:
    """Call a function that writes to a bucket until it succeeds, for some minutes; return its result.

    Raises BucketBusyError if the bucket stays busy, at once any other StorageError.
    """
    for pause in PAUSES:
        try:
            return attempt()
        except BucketBusyError as error:
            warn(f"{error}; retrying in {pause} s")
            time.sleep(pause)
    return attempt()


def _upload_until(ended: threading.Event, folder: Path, uri: str, known: Known, warn: Warn) -> None:
    """Upload new folders as they appear, and files that grow now and then, until `ended` is set."""
    is_failing, due = False, time.monotonic() + FILES_SECONDS
    while not ended.wait(PAUSES[0] if is_failing else LOOK_SECONDS):
        if _local_parts(folder) <= known.keys() and time.monotonic() < due:
            continue
        try:
            _send_all(folder, uri, known)
        except StorageError as error:
            if not is_failing:
                warn(f"{error}; training continues, the upload is tried again")
            is_failing = True
        else:
            if is_failing:
                warn(f"{uri} can be written again")
            is_failing, due = False, time.monotonic() + FILES_SECONDS


def _send_all(folder: Path, uri: str, known: Known, with_logs: bool = False) -> None:
    """Upload what the bucket does not have yet; then delete what is no longer needed."""
    # A training state names checkpoints: they are seen after it, and uploaded before it. Files are read after both.
    parts = sorted(_local_parts(folder), reverse=True)
    taken = {part: _snapshot(folder, part, known.get(part)) for part in parts}
    try:
        send_files(folder, uri, known, with_logs)
        for part, snapshot in reversed(taken.items()):
            if snapshot is not None:
                known[part] = None
                object_store.upload_folder(snapshot, f"{uri}/{part}")
                known[part] = object_store.make_manifest(snapshot)
    finally:
        shutil.rmtree(folder / SNAPSHOTS, ignore_errors=True)
    for part in [name for name in known if _part_of(f"{name}/") and name not in taken]:
        object_store.remove_folder(f"{uri}/{part}")
        del known[part]


def _snapshot(folder: Path, part: str, known: object_store.Manifest | None) -> Path | None:
    """Hold a folder's files by links of their own, so that a slow upload outlives its deletion.

    None if the bucket has the folder already, or it has been deleted by now.
    """
    snapshot = folder / SNAPSHOTS / part
    try:
        if object_store.make_manifest(folder / part) == known:
            return None
        shutil.copytree(folder / part, snapshot, copy_function=os.link)
    except (shutil.Error, OSError):
        if not (folder / part).exists():
            return None
        shutil.copytree(folder / part, snapshot, dirs_exist_ok=True)  # a file system without links
    return snapshot


def send_files(folder: Path, uri: str, known: Known, with_logs: bool = False) -> None:
    """Upload the files that changed, the config first: whoever has it has a run."""
    patterns = FILES + LOGS * with_logs
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(paths, key=lambda path: (path.name != CONFIG, path)):
        name, state = path.relative_to(folder).as_posix(), path.stat()
        if path.name.startswith(".") or path.name == RAY_LIST or known.get(name) == [state.st_size, state.st_mtime_ns]:
            continue
        content = path.read_bytes()
        if path.suffix == ".jsonl":  # a line may be half-written
            content = content[: content.rfind(b"\n") + 1]
        object_store.write_file(f"{uri}/{name}", content)
        known[name] = [state.st_size, state.st_mtime_ns]
