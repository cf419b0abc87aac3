"""What a config's train_path or valid_path names -> files and data sets, each with its version and its columns.

    for source in find_sources(config.train_path):     globs, folders and remote files, one request for each of these

A source's version is what it was when it was found: whoever reads it later reads that, or gets an error that names it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgebook.config.data_block import DataSource
from forgebook.data.columns import ColumnMapping
from forgebook.data.compressed import SUFFIXES
from forgebook.data.tables import HUB, hub_dataset, hub_revision
from forgebook.errors import StorageError
from forgebook.runs import atomic, download, object_store

__all__ = ["Source", "content_key", "describe_source", "find_sources", "is_large", "local_copy"]

LARGE_FILE = 64 * 2**20
KINDS = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".arrow", ".ndjson")
# Files beside the shards of a data set that hold none of its rows.
NO_SHARDS = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json", "config.json")
_SPLITS = re.compile(
    r"(?<![a-z])(?:(train)(?:ing)?|(val)(?:id(?:ation)?)?|(dev)(?:elopment)?|(test)(?:ing)?|(eval)(?:uation)?"
    r"|(hold|held)[_.-]?out)(?![a-z])"
)

_HUB_ID = re.compile(r"[\w-]+/[\w-]+")


@dataclass(frozen=True)
class Source:
    """One file or data set.

    weight:  how often the examples of its entry are repeated per epoch.
    mapping: which columns hold what; None: as the format of its rows says.
    version: of a remote file, as of `download.file_version`; of a hub data set the requested revision.
    entry:   the number of the config's entry that names it: a glob or folder is one of many files.
    """

    uri: str
    weight: float = 1.0
    mapping: ColumnMapping | None = None
    version: str | None = None
    entry: int = 0


def find_sources(paths: str | DataSource | Sequence[str | DataSource]) -> list[Source]:
    """List what a config's train_path or valid_path names: globs and folders expanded, remote files with versions.

    Raises StorageError where there is no such file.
    """
    sources = []
    for entry, written in enumerate([paths] if isinstance(paths, str | DataSource) else paths):
        about = DataSource(path=written) if isinstance(written, str) else written
        mapping = ColumnMapping.of(about.columns, about.system, about.labels)
        if about.path.startswith(HUB):
            sources.append(Source(about.path, about.weight, mapping, about.revision, entry))
            continue
        if about.revision is not None:
            raise StorageError(f"{about.path}: revision is for data sets of the hub (hf://): remove it")
        if _HUB_ID.fullmatch(about.path) and not Path(about.path).parent.exists():
            raise StorageError(f"there is no file {about.path}; a data set of the hub is {HUB}{about.path}:train")
        for uri in _files(about.path):
            version = download.file_version(uri) if object_store.is_remote(uri) else None
            sources.append(Source(uri, about.weight, mapping, version, entry))
    return sources


def local_copy(uri: str, version: str | None) -> Path:
    """Return a local path that holds a source's file as it was found. Raises StorageError if it has changed since."""
    return download.fetch_file(uri, version)


def content_key(source: Source) -> str:
    """Hash the content of a source."""
    if source.uri.startswith(HUB):
        return hub_dataset(source.uri, source.version)._fingerprint
    with open(local_copy(source.uri, source.version), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_large(source: Source) -> bool:
    """Report whether a source takes long to read only once: a large file, or a data set of the hub."""
    if source.uri.startswith(HUB):
        return True
    return local_copy(source.uri, source.version).stat().st_size > LARGE_FILE


def describe_source(source: Source) -> dict[str, Any]:
    """Describe what was read, for the data report: the URI, its content's hash, size, and version or revision."""
    report: dict[str, Any] = {"uri": source.uri, "content": content_key(source)}
    if source.uri.startswith(HUB):
        revision = hub_revision(hub_dataset(source.uri, source.version)) or source.version
        return report | ({"revision": revision} if revision else {})
    report["bytes"] = local_copy(source.uri, source.version).stat().st_size
    return report | ({"version": source.version} if source.version else {})


# Folders ----------------------------------------------------------------------------------------------


def _files(path: str) -> list[str]:
    """List the files that a path, a glob or a folder names."""
    if any(sign in path for sign in "*?[") or path.startswith("https://"):
        return download.find_files(path)
    if object_store.is_bucket(path):
        if not path.endswith("/") and "." in path.rsplit("/", 1)[-1]:
            return [path]
        folder = path.rstrip("/")
        names = list(object_store.list_files(folder))
        return _shards(path, folder, names) if names else [path]
    folder_path = Path(path).expanduser()
    if not folder_path.is_dir():
        return [path]
    if (folder_path / "dataset_dict.json").exists():
        splits = ", ".join(f"{path.rstrip('/')}/{name}" for name in _saved_splits(folder_path))
        raise StorageError(f"{path} holds several splits, as datasets.save_to_disk wrote them: name one of {splits}")
    if (folder_path / "state.json").exists():
        state = atomic.read_json(folder_path / "state.json", ["_data_files"])
        return [str(folder_path / file["filename"]) for file in state["_data_files"]]
    names = [one.relative_to(folder_path).as_posix() for one in folder_path.rglob("*") if one.is_file()]
    return _shards(path, path.rstrip("/"), names)


def _saved_splits(folder: Path) -> list[str]:
    return atomic.read_json(folder / "dataset_dict.json", ["splits"])["splits"]


def _shards(path: str, folder: str, names: list[str]) -> list[str]:
    """List the data files of a folder.

    names: relative to it. Raises StorageError if there are none, and if some may not be meant: those in folders of it,
    and those of several splits.
    """
    deeper = sorted(name for name in names if "/" in name and _is_data(name))
    if deeper:
        raise StorageError(
            f"{path} holds data files in folders of its own ({', '.join(deeper[:3])}): name one folder, or all files "
            f"with {folder}/**/*{Path(deeper[0]).suffix}"
        )
    shards = [name for name in sorted(names) if _is_data(name)]
    if not shards:
        raise StorageError(f"{path} is a folder without data files ({', '.join(KINDS)}, also compressed): name a file")
    splits = {match[match.lastindex or 0] if (match := _SPLITS.search(name.lower())) else "" for name in shards}
    if len(splits) > 1 and splits != {"train", ""}:
        raise StorageError(
            f"{path} holds files of several splits ({', '.join(shards[:5])}): name those to read, as in "
            f"{folder}/{shards[-1].split('.')[0].split('-')[0]}*"
        )
    return [f"{folder}/{name}" for name in shards]


def _is_data(name: str) -> bool:
    """Report whether a file of a folder may hold rows; name: relative to it. Hidden files and folders do not."""
    *_, written = parts = name.lower().split("/")
    plain = next((written.removesuffix(suffix) for suffix in SUFFIXES if written.endswith(suffix)), written)
    is_hidden = any(part.startswith((".", "_")) for part in parts)
    return plain.endswith(KINDS) and written not in NO_SHARDS and not is_hidden
