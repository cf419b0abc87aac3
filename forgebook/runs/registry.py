"""The fine-tuned models under a storage path, local or in a bucket: listed, shown, deleted.

list_models("runs")     -> [Model]      oldest first; runs that have not finished are included
get_model(name)         -> Model        by the run's folder, URI or name, or by the model's id
delete_model(name)      -> Model        unless another run starts from it
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from forgebook.errors import BucketBusyError, StorageError, first_line
from forgebook.runs import object_store
from forgebook.runs.atomic import parse_object
from forgebook.runs.object_store import is_remote
from forgebook.runs.run import Run, candidate_runs, has_run, remove_run, run_at

__all__ = ["Model", "delete_model", "get_model", "list_models"]


@dataclass(frozen=True)
class Model:
    """The record of a run's model: LLMForge's fields, and its figures.

    id: custom_model_tag, else the run's name. ft_type: the task and the method. storage_uri: the run. figures:
    evaluation loss and perplexity of the best checkpoint, and the results of `evaluate`. starts_from: paths and hub ids
    of the weights that the run started from.
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


def list_models(storage_path: str = "runs", on_damaged: Callable[[str], None] = lambda reason: None) -> list[Model]:
    """List the models under a storage path (a folder, s3:// or gs://), oldest first, unfinished runs included.

    on_damaged: called for each run that is left out because a file of it is damaged, with a sentence about it.
    """
    if object_store.is_bucket(storage_path):
        runs = [run_at(storage_path, name) for name in object_store.list_folders(storage_path)]
    else:
        folder = Path(storage_path).expanduser()
        runs = [Run(path.resolve()) for path in folder.iterdir()] if folder.is_dir() else []
    models = []
    for run in runs:
        if run.name.startswith("."):
            continue
        try:
            model = _model_of(run)
        except BucketBusyError:
            raise
        except StorageError as error:
            on_damaged(str(error))
        else:
            models += [model] if model else []
    return sorted(models, key=lambda model: model.created_at)


def get_model(name: str, storage_path: str = "runs") -> Model:
    """Read the record of a model, by its run's folder, URI or name, or by its id.

    Raises StorageError if there is none, or several have that id.
    """
    for run in candidate_runs(name, storage_path):
        if model := _model_of(run):
            return model
    named = [model for model in list_models(storage_path) if model.id == name]
    if len(named) == 1:
        return named[0]
    if named:
        raise StorageError(f"{name!r} names {len(named)} models: {', '.join(model.storage_uri for model in named)}")
    raise StorageError(f"no model {name!r}: neither a run folder nor a name under {storage_path}/")


def delete_model(
    name: str, storage_path: str = "runs", on_kept: Callable[[list[str]], None] = lambda names: None
) -> Model:
    """Delete a model's run, here and in its bucket; return its record.

    on_kept: called with the names of files that stay because no run wrote them.

    Raises StorageError, and deletes nothing, if another run in its folder or under storage_path starts from it.
    """
    model = get_model(name, storage_path)
    parent = model.storage_uri.rpartition("/")[0]
    others = {other.storage_uri: other for place in {parent, storage_path} for other in list_models(place)}
    users = [
        other.storage_uri
        for other in others.values()
        if other.storage_uri != model.storage_uri
        and any(_is_within(path, model.storage_uri) for path in other.starts_from)
    ]
    if users:
        raise StorageError(f"{model.storage_uri} is what other runs start from: {', '.join(users)}. Delete those first")
    if kept := remove_run(run_at(parent, model.storage_uri.rpartition("/")[2])):
        on_kept(kept)
    return model


def _model_of(run: Run) -> Model | None:
    """Put a model's record together from its run's files, in the bucket if it has one; None if there is no run."""
    if not has_run(run):
        return None
    summary, evaluation = _object_of(run, run.summary), _object_of(run, run.folder / "evaluation.json")
    try:
        return _record(run, yaml.safe_load(_text_of(run, run.config) or ""), summary, evaluation)
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{run.location}/{run.config.name} is damaged: {first_line(error)}. Restore it from a copy; the run's "
            "checkpoints can be used by their folders"
        ) from None


def _record(run: Run, config: dict[str, Any], summary: dict[str, Any], evaluation: dict[str, Any]) -> Model:
    """Make a model's record from its run's files."""
    method = "full" if config["lora_config"] is None else f"LoRA r={config['lora_config'].get('r', 8)}"
    kind = f"{config['quantization']} {method}" if config.get("quantization") else method
    figures = {name: summary[name] for name in ("eval_loss", "perplexity") if summary.get(name) is not None}
    created = summary.get("created_at")
    if created is None:
        path = run.summary if run.summary.exists() else run.config
        created = _utc(path.stat().st_mtime) if path.exists() else ""
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


def _object_of(run: Run, path: Path) -> dict[str, Any]:
    """Read a JSON file of a run from where the run is stored; empty if it is not there."""
    text = _text_of(run, path)
    return {} if text is None else parse_object(text.encode(), path if run.uri is None else f"{run.uri}/{path.name}")


def _text_of(run: Run, path: Path) -> str | None:
    """Read a small file of a run from where the run is stored; None if it is not there."""
    if run.uri is None:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    uri = f"{run.uri}/{path.relative_to(run.folder).as_posix()}"
    return object_store.read_file(uri).decode("utf-8", "replace") if object_store.has_file(uri) else None


def _utc(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


def _is_within(path: str, folder: str) -> bool:
    """Check whether a config's path is a folder or below it."""
    if is_remote(path) or is_remote(folder):
        return f"{path.rstrip('/')}/".startswith(f"{folder}/")
    # A relative path may have been written from any folder above.
    starts = [Path.cwd(), *Path(folder).parents]
    return any((start / Path(path).expanduser()).resolve().is_relative_to(folder) for start in starts)
