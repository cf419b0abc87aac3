"""What Ray runs for a run: the loop in each training worker, and the receiver of its reports.

Where the worker reads and writes:

    all machines see the run's folder    there (a disk that they share, or one machine)
    some do not                          a folder of the machine's own, in step with the run's bucket

Either way a checkpoint that is reported to Ray is the run's own, where it is stored: Ray copies nothing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
from pyarrow import fs
from ray.train import Checkpoint, CheckpointUploadMode, UserCallback

from forgebook.collector import collect_rarely
from forgebook.config.schema import ResolvedConfig
from forgebook.errors import ForgebookError, StorageError
from forgebook.runs import object_store, worker_upload
from forgebook.runs.download import cache_folder
from forgebook.runs.run import Run

__all__ = ["Job", "ReportReceiver", "sees_folder", "storage_refusal", "train_worker"]

MARK = ".mark"  # holds Job.mark: who reads it sees the folder
LINES = "progress_lines"


@dataclass(frozen=True)
class Job:
    """What each worker is started with; run: as the process that started it sees it.

    mark: what the run folder's MARK holds, new for each start. through_bucket: not all machines see the folder.
    """

    config: ResolvedConfig
    run: Run
    mark: str
    working_directory: str
    through_bucket: bool = False

    def write_mark(self) -> None:
        """Leave the mark by which workers know that they see the run's folder."""
        (self.run.folder / MARK).write_text(self.mark)

    def storage(self) -> tuple[fs.FileSystem, str]:
        """Return the file system and the path at which the run is stored, as Ray takes them."""
        return (
            object_store.open_bucket(self.run.location)
            if self.through_bucket
            else (fs.LocalFileSystem(), str(self.run.folder))
        )


def sees_folder(folder: Path, mark: str) -> bool:
    """Return whether this machine sees the run's folder of another one."""
    with contextlib.suppress(OSError):
        return (folder / MARK).read_text() == mark
    return False


def storage_refusal(run: Run, machines: str) -> StorageError:
    """Make the error for machines that could not save: the run's folder is not theirs."""
    return StorageError(
        f"storage_path: {machines} cannot see {run.folder}, where the workers save: set storage_path to a bucket "
        "(s3:// or gs://) or to a disk that all machines of the cluster share"
    )


def train_worker(arguments: dict[str, Job]) -> dict[str, Any] | ForgebookError:
    """Run the loop in a Ray worker.

    A user's mistake is returned once all ranks have ended with one. An error of one rank alone, such as a GPU out of
    memory, leaves the others in a collective: it is raised, Ray ends them, and `ReportReceiver` prevents that it starts
    them again. arguments: the job, as Ray passes a dictionary.
    """
    collect_rarely()
    job = arguments["job"]
    rank = ray.train.get_context().get_world_rank()
    run = _own_run(job) if job.through_bucket else Run(job.run.folder)
    if os.path.isdir(job.working_directory):
        os.chdir(job.working_directory)
    if job.through_bucket or sees_folder(run.folder, job.mark):
        _redirect_output(run.logs / f"worker-{rank}.log", f"worker {rank}: process {os.getpid()}\n")

    from forgebook.training import distributed
    from forgebook.training.loop import train_loop

    try:
        with distributed.raised_everywhere():
            if not job.through_bucket and not sees_folder(run.folder, job.mark):
                raise storage_refusal(run, ray.util.get_node_ip_address())
        with _beside_the_bucket(run, distributed.is_main(), distributed.is_first_here()):
            return train_loop(job.config, run, _Reporter(job, run, rank))
    except ForgebookError as error:
        if distributed.all_end():
            return error
        raise


def _redirect_output(log: Path, first_line: str) -> None:
    """Let this process write to a log file of the run instead of Ray's."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, first_line.encode())
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


# Through the bucket -----------------------------------------------------------------------------------


def _own_run(job: Job) -> Run:
    """Name the folder of a run that this machine's workers have for themselves; it outlives a restart of theirs."""
    return Run(cache_folder().resolve() / "workers" / f"{job.run.name}-{job.mark}", job.run.uri)


@contextlib.contextmanager
def _beside_the_bucket(run: Run, is_main: bool, is_first_here: bool) -> Iterator[None]:
    """Fetch what the workers of this machine need, and upload their logs while a block runs. Collective."""
    if run.uri is None:
        yield
        return
    from forgebook.data import token_store
    from forgebook.training import distributed

    with distributed.raised_everywhere():
        if is_first_here:
            worker_upload.fetch_inputs(run.uri, run.folder)
            for view in run.tokens.glob("*.npz"):
                token_store.relocate_view(view, lambda shard: str(run.folder / ".tokens/shards" / Path(shard).name))
    if not is_first_here:
        yield
        return
    stop_file = run.folder / distributed.STOP_FILE
    stop_file.unlink(missing_ok=True)
    try:
        with worker_upload.uploading_logs(run.folder, run.uri, stop_file if is_main else None):
            yield
    except ForgebookError:
        shutil.rmtree(run.folder, ignore_errors=True)
        raise
    # After any other error it stays: Ray starts the workers again, and they need not fetch the shards twice.
    shutil.rmtree(run.folder, ignore_errors=True)


# Reports ----------------------------------------------------------------------------------------------


class _Reporter:
    """Report to Ray Train: the figures of a step, and the checkpoint saved after it.

    Rank 0 adds the new lines of its progress file where the process that started the run cannot read them itself.
    """

    def __init__(self, job: Job, run: Run, rank: int):
        self._storage = job.storage() if rank == 0 else None
        self._log = run.logs / "progress.jsonl" if job.through_bucket and rank == 0 else None
        self._position = 0

    def __call__(self, metrics: dict[str, Any], checkpoint: str | None) -> None:
        reported = dict(metrics)
        if self._log:
            reported[LINES] = self._new_lines(self._log)
        saved = None
        if checkpoint and self._storage:
            file_system, path = self._storage
            saved = Checkpoint(f"{path}/checkpoints/{checkpoint}", file_system)
        ray.train.report(reported, checkpoint=saved, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)

    def _new_lines(self, log: Path) -> list[str]:
        with open(log) as file:
            file.seek(self._position)
            lines = file.read()
            self._position = file.tell()
        return lines.splitlines()


class ReportReceiver(UserCallback):
    """Append the progress that workers report to a file here, and end the run where a worker raises a ForgebookError.

    Ray calls it on the machine that started the run.
    """

    def __init__(self, log: Path):
        self._log = log

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Take one report of all workers."""
        with open(self._log, "a") as file:
            file.writelines(f"{line}\n" for line in metrics[0].get(LINES, ()))

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise a worker's ForgebookError, which another start would not avoid: Ray ends all workers for good."""
        for error in worker_exceptions.values():
            if isinstance(error, ForgebookError):
                raise error
