"""Where runs are kept, on this machine or in a bucket: the run folder, opened, found and removed; the list of models.

open_run(config)    -> Run      the run folder, new or to be continued
find_run(name)      -> Run      a run by its folder, address or name
list_models(place)  -> [Model]  what was fine-tuned under a storage path; get_model(name), delete_model(name)

A run in a bucket has a local folder below the cache, which `forgebook.runs.upload` keeps in step with the bucket.
Files at any address come from `forgebook.runs.download`, folders that are complete or absent from
`forgebook.runs.atomic`; both are named here, too.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from forgebook.errors import StorageError
from forgebook.runs import object_store, upload
from forgebook.runs.atomic import aside, published, read_json, write_json
from forgebook.runs.download import cache_folder, fetch_file, fetch_folder, find_files
from forgebook.runs.object_store import is_remote

if TYPE_CHECKING:
    from forgebook.config.parse import FinetuneConfig

__all__ = [
    "Model",
    "Run",
    "aside",
    "cache_folder",
    "delete_model",
    "fetch_file",
    "fetch_folder",
    "find_checkpoint",
    "find_files",
    "find_run",
    "get_model",
    "is_remote",
    "keep_json",
    "list_models",
    "open_run",
    "published",
    "read_json",
    "remove_run",
    "shown",
    "write_json",
]


def shown(path: Path) -> str:
    """Write a path as a person would: from the working directory, if it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


@dataclass(frozen=True)
class Run:
    """The paths of a run folder; `uri`: where in a bucket it is kept, None for a run of this machine alone.

    home: in a worker that has a folder of its own because it does not see the run's: how it reaches that one.
    """

    folder: Path
    uri: str | None = None
    home: Any = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def place(self) -> str:
        return self.uri or shown(self.folder)  # as a person would write it

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"  # every value, and where it came from

    @property
    def data_report(self) -> Path:
        return self.folder / "data_report.json"  # rows, tokens, what was cut

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"  # memory, time and cost, told before the run

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
        return self.folder / "resume"  # the training state, for continuing

    @property
    def adapter_start(self) -> Path:
        return self.folder / "adapter_start.safetensors"  # of an adapter that changed its base (PiSSA)

    @property
    def tokens(self) -> Path:
        return self.folder / "tokens"  # tokenised rows, mapped by workers

    @property
    def logs(self) -> Path:
        return self.folder / "logs"  # what Ray, DeepSpeed and torch print

    @property
    def is_complete(self) -> bool:
        return self.summary.exists()


def _run_at(storage_path: str, name: str) -> Run:
    """Name the run of that name under a storage path; one in a bucket has a local folder of its own."""
    if not is_remote(storage_path):
        return Run(Path(storage_path).expanduser().resolve() / name)
    if not object_store.is_bucket(storage_path):
        raise StorageError(f"storage_path {storage_path}: runs are kept in a local folder, s3:// or gs://")
    parent = storage_path.rstrip("/")
    digest = hashlib.sha256(parent.encode()).hexdigest()[:16]
    return Run(cache_folder().resolve() / "runs" / digest / name, f"{parent}/{name}")


def open_run(config: FinetuneConfig) -> Run:
    """Open the run folder that a config names; what is there already is treated as `on_existing` says.

    A run in a bucket is brought to this machine. Raises StorageError if the folder exists and `on_existing` is fail,
    or is not a run's. Creates nothing: the caller does, once the data is known to be good.
    """
    run = _run_at(config.storage_path, config.run_name)
    if run.uri:
        names = list(object_store.list_files(run.uri))
    else:
        names = [path.name for path in run.folder.iterdir()] if run.folder.is_dir() else []
    exists = run.config.name in names
    # A data report alone is what a run leaves whose data was refused.
    if not exists and set(names) - {run.data_report.name}:
        raise StorageError(f"{run.place} exists and is not a run folder (no config.yaml): choose another run_name")
    if exists and config.on_existing == "fail":
        raise StorageError(f"the run {run.place} exists: choose another run_name, or on_existing=resume or overwrite")
    if run.uri and config.on_existing != "overwrite":
        upload.pull(run.uri, run.folder)
    return run


def find_run(name: str, storage_path: str = "runs") -> Run:
    """Find a run by its folder or address, or by its name under storage_path (a folder, s3:// or gs://).

    A run in a bucket is brought to this machine, without its training state.
    """
    for run in _candidates(name, storage_path):
        if run.uri:
            upload.pull(run.uri, run.folder, with_state=False)
        if run.config.exists():
            return run
    if is_remote(name):
        raise StorageError(f"no run at {name} (it has no config.yaml)")
    raise StorageError(f"no run {name!r}: neither a run folder nor a name under {storage_path}/")


def _candidates(name: str, storage_path: str) -> list[Run]:
    """List the runs that a user may mean."""
    if is_remote(name):
        parent, _, last = name.rstrip("/").rpartition("/")
        return [_run_at(parent, last)]
    return [Run(Path(name).expanduser().resolve()), _run_at(storage_path, name)]


def find_checkpoint(name: str, checkpoint: str | None = None) -> Path:
    """Find the checkpoint folder that a name means: a run's best one or the named one, or a model folder itself.

    Raises StorageError if there is none, or the run is not complete and no checkpoint is named.
    """
    folder = Path(name).expanduser()
    if checkpoint is None and any((folder / file).exists() for file in ("adapter_config.json", "config.json")):
        return folder.resolve()
    run = find_run(name)
    if checkpoint is None:
        if not run.is_complete:
            raise StorageError(f"the run {run.name} has not ended well yet: its command continues it")
        return run.folder / read_json(run.summary)["best_checkpoint"]
    found = run.checkpoints / checkpoint
    if not found.is_dir() or checkpoint != Path(checkpoint).name:
        kept = ", ".join(sorted(path.name for path in run.checkpoints.glob("[!.]*"))) or "none"
        raise StorageError(f"the run {run.name} has no checkpoint {checkpoint!r}: it keeps {kept}")
    return found


def keep_json(run: Run, name: str, value: Any) -> None:
    """Write a JSON file into a run's folder, and into its bucket if it has one."""
    write_json(run.folder / name, value)
    if run.uri:
        object_store.write_file(f"{run.uri}/{name}", (run.folder / name).read_bytes())


def remove_run(run: Run) -> None:
    """Delete a run, here and in its bucket."""
    if run.uri:
        object_store.remove_folder(run.uri)
    shutil.rmtree(run.folder, ignore_errors=True)


# The list of models -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """What is on record of a run's model: LLMForge's fields, and what it was found to be worth.

    id: custom_model_tag, else the run's name. ft_type: the task and how it was trained. storage_uri: the run. figures:
    evaluation loss and perplexity of the best checkpoint, with what `evaluate` found. starts_from: paths that the run
    began with.
    """

    id: str
    base_model_id: str
    ft_type: str
    generation_config: dict[str, Any]
    job_id: str | None
    storage_uri: str
    created_at: str
    is_complete: bool
    best_checkpoint: str | None
    figures: dict[str, Any]
    starts_from: list[str]


def list_models(storage_path: str = "runs") -> list[Model]:
    """List the models under a storage path (a folder, s3:// or gs://), the oldest first; runs going on are included."""
    if object_store.is_bucket(storage_path):
        runs = [_run_at(storage_path, name) for name in object_store.list_folders(storage_path)]
    else:
        folder = Path(storage_path).expanduser()
        runs = [Run(path.resolve()) for path in folder.iterdir()] if folder.is_dir() else []
    found = [_model_of(run) for run in runs if not run.name.startswith(".")]
    return sorted((model for model in found if model), key=lambda model: model.created_at)


def get_model(name: str, storage_path: str = "runs") -> Model:
    """Read what is on record of a model, by its run's folder, address or name, or by its id."""
    for run in _candidates(name, storage_path):
        if model := _model_of(run):
            return model
    named = [model for model in list_models(storage_path) if model.id == name]
    if len(named) == 1:
        return named[0]
    if named:
        raise StorageError(f"{name!r} names {len(named)} models: {', '.join(model.storage_uri for model in named)}")
    raise StorageError(f"no model {name!r}: neither a run folder nor a name under {storage_path}/")


def delete_model(name: str, storage_path: str = "runs") -> Model:
    """Delete a model's run, here and in its bucket; return what was on record of it.

    Raises StorageError, and deletes nothing, if another run beside it or under storage_path starts from it.
    """
    model = get_model(name, storage_path)
    parent = model.storage_uri.rpartition("/")[0]
    others = {other.storage_uri: other for place in {parent, storage_path} for other in list_models(place)}
    users = [
        other.storage_uri
        for other in others.values()
        if other.storage_uri != model.storage_uri
        and any(_lies_in(path, model.storage_uri) for path in other.starts_from)
    ]
    if users:
        raise StorageError(
            f"{model.storage_uri} is what other runs start from: {', '.join(users)}. Delete these first, or keep it"
        )
    remove_run(_run_at(parent, model.storage_uri.rpartition("/")[2]))
    return model


def _model_of(run: Run) -> Model | None:
    """Put together what a run's files say, in its bucket if it has one; None if it is no run."""
    config = yaml.safe_load(_text_of(run, run.config) or "null")
    if config is None:
        return None
    summary = json.loads(_text_of(run, run.summary) or "{}")
    evaluation = json.loads(_text_of(run, run.folder / "evaluation.json") or "{}")
    method = "full" if config["lora_config"] is None else f"LoRA r={config['lora_config'].get('r', 8)}"
    kind = f"{config['quantization']} {method}" if config.get("quantization") else method
    figures = {name: summary[name] for name in ("eval_loss", "perplexity") if summary.get(name) is not None}
    created = summary.get("created_at")
    if created is None:
        known = run.summary if run.summary.exists() else run.config
        created = _utc(known.stat().st_mtime) if known.exists() else ""
    starts = [config["model_id"]] + [config.get(f"initial_{kind}_model_ckpt_path") for kind in ("base", "adapter")]
    return Model(
        id=config.get("custom_model_tag") or run.name,
        base_model_id=config["model_id"],
        ft_type=f"{config['task']}, {kind}",
        generation_config=config.get("generation_config") or {},
        job_id=summary.get("job_id"),
        storage_uri=run.uri or str(run.folder),
        created_at=created,
        is_complete=bool(summary),
        best_checkpoint=summary.get("best_checkpoint"),
        figures=figures | evaluation,
        starts_from=[path for path in starts if isinstance(path, str)],
    )


def _text_of(run: Run, path: Path) -> str | None:
    """Read a small file of a run where the run is kept; None if it is not there."""
    if run.uri is None:
        return path.read_text() if path.is_file() else None
    uri = f"{run.uri}/{path.relative_to(run.folder).as_posix()}"
    return object_store.read_file(uri).decode() if object_store.has_file(uri) else None


def _utc(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


def _lies_in(path: str, folder: str) -> bool:
    """Tell whether a path of a config is a folder or lies below it."""
    if is_remote(path) or is_remote(folder):
        return f"{path.rstrip('/')}/".startswith(f"{folder}/")
    # A relative path may have been written from any folder above.
    starts = [Path.cwd(), *Path(folder).parents]
    return any((start / Path(path).expanduser()).resolve().is_relative_to(folder) for start in starts)
