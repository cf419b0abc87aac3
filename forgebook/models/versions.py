"""Which version of its models a run uses: recorded when it starts, and an error where it is another later.

versions = model_versions(config)       {"model_id": "a commit"}; nothing of models in local folders
check_versions(versions, config)        StorageError that names the model which has changed
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from forgebook.config.blocks import HubRepo
from forgebook.errors import StorageError
from forgebook.models.adapter_names import cached_file
from forgebook.models.tokenizer import copy_of
from forgebook.runs import object_store

if TYPE_CHECKING:
    from forgebook.config.schema import FinetuneConfig

__all__ = ["check_versions", "model_versions"]

KEYS = ("model_id", "initial_base_model_ckpt_path", "initial_adapter_model_ckpt_path")


def model_versions(config: FinetuneConfig) -> dict[str, str]:
    """Ask what the models of a config are now, by its keys: the commit on the hub, or the files of a bucket's folder.

    Models in folders of this machine, and on the hub those that are not downloaded yet, have none.
    """
    versions = {key: _version(getattr(config, key)) for key in KEYS}
    return {key: version for key, version in versions.items() if version is not None}


def _version(model: str | HubRepo | None) -> str | None:
    if model is None:
        return None
    name = model if isinstance(model, str) else model.repo_id
    if object_store.is_bucket(name):
        return object_store.folder_version(name)[0][:16]
    if not isinstance(model, str) and model.revision is not None:
        return model.revision
    if name.startswith((".", "/", "~")) or Path(copy_of(name)).is_dir():
        return None
    file = cached_file(name, "config.json") or cached_file(name, "adapter_config.json")
    return Path(file).parent.name if file else None  # the cache's folder snapshots/COMMIT


def check_versions(recorded: Mapping[str, str], config: FinetuneConfig) -> None:
    """Raise StorageError if a model is not what it was when the run started."""
    now = model_versions(config) if recorded else {}
    for key, version in recorded.items():
        if now.get(key, version) != version:
            raise StorageError(
                f"{key}: {getattr(config, key)} has changed since the run started (it was {version}, it is "
                f"{now[key]}), so the run cannot continue on it: choose another run_name, or on_existing=overwrite"
            )
