"""The run folder, on this machine or in a bucket: opened, looked up, deleted; its checkpoints.

open_run(config)        -> Run      the run folder, new or to be resumed
find_run(name)          -> Run      a run by its folder, URI or name
find_checkpoint(name)   -> Path     a run's best checkpoint, or the named one

A run in a bucket has a local folder below the cache, which `forgebook.runs.upload` keeps in step with the bucket.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgebook.errors import StorageError
from forgebook.runs import object_store, run_lock, upload
from forgebook.runs.atomic import read_json, write_json
from forgebook.runs.download import cache_folder
from forgebook.runs.object_store import is_remote
from forgebook.runs.run_files import LOCK, MARKER, delete_run_files, is_run_file, is_run_folder

if TYPE_CHECKING:
    from forgebook.config.schema import FinetuneConfig

__all__ = [
    "Run",
    "best_checkpoint",
    "candidate_runs",
    "display_path",
    "find_checkpoint",
    "find_run",
    "has_run",
    "open_run",
    "rank_checkpoints",
    "remove_run",
    "run_at",
    "save_json",
]


def display_path(path: Path) -> str:
    """Write a path for a person to read: relative to the working directory if it is below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


@dataclass(frozen=True)
class Run:
    """The paths of a run folder. uri: where in a bucket it is stored, None for a run on this machine alone.

    In a worker, `uri` means that the workers upload what they write themselves, because not all of their machines see
    the run's folder; otherwise the process that started the run uploads it, and a worker's `uri` is None.
    """

    folder: Path
    uri: str | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def location(self) -> str:
        return self.uri or display_path(self.folder)  # for a person to read

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"  # every value and its origin

    @property
    def data_report(self) -> Path:
        return self.folder / "data_report.json"  # examples, tokens, what was cut

    @property
    def rejected_rows(self) -> Path:
        return self.folder / "rejected_rows.json"  # of a later start of the run, whose data was rejected

    @property
    def held_out(self) -> Path:
        return self.folder / "held_out.jsonl"  # the validation examples, where they are a share of the training data

    @property
    def changes(self) -> Path:
        return self.folder / "changes.jsonl"  # edits of the config with which the run was resumed, one line each

    @property
    def saved_step(self) -> int:
        """Return the last step whose training state is saved here; 0 without one."""
        steps = [int(path.parent.name.removeprefix("step-")) for path in self.resume.glob("step-*/place.json")]
        return max(steps, default=0)

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"  # memory, time and cost, estimated before the run

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"  # one line per step and evaluation

    @property
    def summary(self) -> Path:
        return self.folder / "summary.json"  # written last: a run that has it is complete

    @property
    def loss_curve(self) -> Path:
        return self.folder / "loss.png"  # training and evaluation loss

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"  # the model, for use

    @property
    def resume(self) -> Path:
        return self.folder / "resume"  # the training state, for resuming

    @property
    def adapter_start(self) -> Path:
        return self.folder / "adapter_start.safetensors"  # for an adapter that changed its base (PiSSA)

    @property
    def tokens(self) -> Path:
        return self.folder / "tokens"  # tokenized examples, memory-mapped by workers

    @property
    def logs(self) -> Path:
        return self.folder / "logs"  # what Ray, DeepSpeed and torch print

    @property
    def is_complete(self) -> bool:
        return self.summary.exists()


def run_at(storage_path: str, name: str) -> Run:
    """Return the run of that name under a storage path; one in a bucket has a local folder below the cache."""
    if "://" not in storage_path:
        return Run(Path(storage_path).expanduser().resolve() / name)
    if not object_store.is_bucket(storage_path):
        raise StorageError(f"storage_path {storage_path}: runs are stored in a local folder, s3:// or gs://")
    parent = storage_path.rstrip("/")
    digest = hashlib.sha256(parent.encode()).hexdigest()[:16]
    return Run(cache_folder().resolve() / "runs" / digest / name, f"{parent}/{name}")


def open_run(config: FinetuneConfig) -> Run:
    """Open the run folder that a config names. Creates nothing: the caller does, once the data is known to be good.

    A run in a bucket is downloaded, unless it is to be overwritten. Raises StorageError if the folder exists and
    `on_existing` is fail, if it is not a run folder, or if another process writes it.
    """
    if config.run_name is None:
        raise StorageError("run_name: the run needs a name, since its config was not read from a file")
    run = run_at(config.storage_path, config.run_name)
    run_lock.check_free(run.folder)
    if run.uri:
        names = list(object_store.list_files(run.uri))
    else:
        names = [path.name for path in run.folder.iterdir()] if run.folder.is_dir() else []
    exists = run.config.name in names
    # A run whose data was rejected leaves its data report, and nothing else.
    if not exists and set(names) - {run.data_report.name, MARKER, LOCK}:
        raise StorageError(f"{run.location} exists and is not a run folder (no config.yaml): choose another run_name")
    if exists and not has_run(run):
        raise StorageError(
            f"{run.location} exists and is not a run folder (its config.yaml was not written by a run): choose another "
            "run_name"
        )
    if exists and config.on_existing == "fail":
        raise StorageError(
            f"the run {run.location} exists: choose another run_name, or on_existing=resume or overwrite"
        )
    if run.uri and config.on_existing != "overwrite":
        upload.download_run(run.uri, run.folder)
    return run


def find_run(name: str) -> Run:
    """Find a run by its folder or URI, or by its name under runs/.

    A run in a bucket is downloaded, without its training state. Raises StorageError if there is none.
    """
    for run in candidate_runs(name, "runs"):
        if run.uri:
            upload.download_run(run.uri, run.folder, with_state=False)
        if run.config.exists():
            return run
    if is_remote(name):
        raise StorageError(f"no run at {name} (it has no config.yaml)")
    raise StorageError(f"no run {name!r}: neither a run folder nor a name under runs/")


def candidate_runs(name: str, storage_path: str) -> list[Run]:
    """List the runs that a name may mean: a folder or URI, and a name under storage_path."""
    if is_remote(name):
        parent, _, last = name.rstrip("/").rpartition("/")
        return [run_at(parent, last)]
    return [Run(Path(name).expanduser().resolve()), run_at(storage_path, name)]


def rank_checkpoints(losses: Mapping[str, float | None]) -> list[str]:
    """Order a run's checkpoints, the best first: by evaluation loss, the newest first where it is equal or missing.

    losses: checkpoint name -> evaluation loss, oldest first. NaN and infinity count as missing: a checkpoint that
    diverged is never better than one that can be measured.
    """
    names = list(losses)

    def rank(name: str) -> tuple[float, int]:
        loss = losses[name]
        return (loss if loss is not None and math.isfinite(loss) else math.inf, -names.index(name))

    return sorted(names, key=rank)


def best_checkpoint(run: Run) -> Path:
    """Name the folder of a complete run's best checkpoint. Raises StorageError if the run has not finished."""
    if not run.is_complete:
        run_lock.check_free(run.folder)
        raise StorageError(f"the run {run.name} has not finished; run its command again to resume it")
    name = read_json(run.summary).get("best_checkpoint")
    if not isinstance(name, str) or not (run.folder / name).is_dir():
        there = ", ".join(sorted(path.name for path in run.checkpoints.glob("[!.]*"))) or "none"
        raise StorageError(
            f"{run.summary} names {name!r} as the best checkpoint; the run has {there}: name one of them"
        )
    return run.folder / name


def find_checkpoint(name: str, checkpoint: str | None = None) -> Path:
    """Find a checkpoint folder: the best one of a run, its named one, or a model folder itself.

    Raises StorageError if there is none, or the run has not finished and no checkpoint is named.
    """
    folder = Path(name).expanduser()
    if checkpoint is None and any((folder / file).exists() for file in ("adapter_config.json", "config.json")):
        return folder.resolve()
    run = find_run(name)
    if checkpoint is None:
        return best_checkpoint(run)
    path = run.checkpoints / checkpoint
    if not path.is_dir() or checkpoint != Path(checkpoint).name:
        names = ", ".join(sorted(path.name for path in run.checkpoints.glob("[!.]*"))) or "none"
        raise StorageError(f"the run {run.name} has no checkpoint {checkpoint!r}; it has {names}")
    return path


def save_json(run: Run, name: str, value: Any) -> None:
    """Write a JSON file into a run's folder, and into its bucket if it has one."""
    write_json(run.folder / name, value)
    if run.uri:
        object_store.write_file(f"{run.uri}/{name}", (run.folder / name).read_bytes())


def has_run(run: Run) -> bool:
    """Check whether a run's folder, in the bucket if it has one, is a run's and not the user's own."""
    uri = run.uri
    if uri is None:
        return is_run_folder(lambda name: (run.folder / name).is_file(), lambda name: _text(run.folder / name))
    names = object_store.list_files(uri)
    read = object_store.read_file
    return is_run_folder(names.__contains__, lambda name: read(f"{uri}/{name}").decode("utf-8", "replace"))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def remove_run(run: Run, keep: frozenset[str] = frozenset()) -> list[str]:
    """Delete a run, here and in its bucket; files that no run writes stay. keep: names that stay here as well.

    Returns the names of the files that stay because they are the user's.

    Raises StorageError if the folder is not a run's, or another process writes it.
    """
    run_lock.check_free(run.folder)
    if not has_run(run):
        raise StorageError(f"{run.location} is not a run folder: nothing was deleted")
    users = delete_run_files(run.folder, keep)
    if run.uri:
        names = list(object_store.list_files(run.uri))
        users = [name for name in names if not is_run_file(name)]
        if users:
            object_store.remove_files(run.uri, [name for name in names if is_run_file(name)])
        else:
            object_store.remove_folder(run.uri)
    return users
