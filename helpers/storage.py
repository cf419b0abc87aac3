"""Where things lie: local, s3://, gs:// and https:// paths, and the run folder.

find_files(glob)    -> [uri]    the files that a path or a glob names
fetch_file(uri)     -> Path     a local copy of one file (the file itself if it is local)
fetch_folder(uri)   -> Path     a local copy of a folder: model or adapter weights
open_run(config)    -> Run      the run folder, new or to be continued
published(folder)               a folder that appears complete, or not at all
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import hashlib
import json
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.errors import StorageError

if TYPE_CHECKING:
    from helpers.config import FinetuneConfig

__all__ = [
    "Run",
    "aside",
    "cache_folder",
    "fetch_file",
    "fetch_folder",
    "find_files",
    "find_run",
    "is_remote",
    "open_run",
    "published",
    "read_json",
    "shown",
    "write_json",
]

BUCKETS = ("s3://", "gs://")


def shown(path: Path) -> str:
    """Write a path as a person would: from the working directory, if it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def is_remote(path: str) -> bool:
    """Tell whether a path names a bucket or a web address."""
    return path.startswith((*BUCKETS, "https://"))


# Fetching ---------------------------------------------------------------------------------------------


def fetch_file(uri: str) -> Path:
    """Return a local path holding the file at `uri`; raise StorageError if there is none."""
    if not is_remote(uri):
        path = Path(uri).expanduser()
        if path.is_dir():
            raise StorageError(f"{uri} is a folder, need a file")
        if not path.exists():
            raise StorageError(f"{uri} does not exist (looked from {Path.cwd()})")
        return path
    target = _cached(uri)
    if not target.exists():
        with aside(target) as temporary:
            _download(uri, temporary)
    return target


def fetch_folder(uri: str) -> Path:
    """Return a local folder holding what lies under `uri` (local, s3:// or gs://)."""
    if not is_remote(uri):
        path = Path(uri).expanduser()
        if not path.is_dir():
            raise StorageError(f"the folder {uri} does not exist (looked from {Path.cwd()})")
        return path
    if not uri.startswith(BUCKETS):
        raise StorageError(f"{uri}: a folder can be read from a local path, s3:// or gs://, not over https://")
    target = _cached(uri)
    if not target.exists():
        from pyarrow import fs

        with aside(target) as temporary:
            temporary.mkdir()
            bucket, path = _bucket(uri)
            with _readable_errors(uri):
                listing = bucket.get_file_info(fs.FileSelector(path, recursive=True))
                files = [info for info in listing if info.type == fs.FileType.File]
                if not files:
                    raise StorageError(f"{uri}: no files there")
                fs.copy_files(path, str(temporary), source_filesystem=bucket)
    return target


def find_files(pattern: str) -> list[str]:
    """List the files that a path or a glob (`*`, `?`, `[...]`) names, sorted; local, s3:// or gs://.

    Raises StorageError if a glob finds none; a plain path is returned unseen.
    """
    if not any(sign in pattern for sign in "*?[") or pattern.startswith("https://"):
        return [pattern]
    if not is_remote(pattern):
        found = glob.glob(str(Path(pattern).expanduser()), recursive=True)
        found = [path for path in found if not Path(path).is_dir()]
    else:
        from pyarrow import fs

        bucket, path = _bucket(pattern)
        folder = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
        scheme = pattern.split("://")[0]
        with _readable_errors(pattern):
            listing = bucket.get_file_info(fs.FileSelector(folder, recursive=True))
        files = [info.path for info in listing if info.type == fs.FileType.File]
        found = [f"{scheme}://{file}" for file in fnmatch.filter(files, path)]
    if not found:
        raise StorageError(f"{pattern}: no file there has such a name")
    return sorted(found)


def cache_folder() -> Path:
    """Name the folder of local copies: $FORGEBOOK_CACHE, or ~/.cache/forgebook."""
    return Path(os.environ.get("FORGEBOOK_CACHE", "~/.cache/forgebook")).expanduser()


def _cached(uri: str) -> Path:
    """Name the local copy of a remote path. One cache entry per address: addresses are taken as immutable."""
    name = uri.rstrip("/").rsplit("/", 1)[-1]
    return cache_folder() / hashlib.sha256(uri.encode()).hexdigest()[:16] / name


def _download(uri: str, target: Path) -> None:
    if uri.startswith("https://"):
        try:
            with urllib.request.urlopen(uri, timeout=60) as response, open(target, "wb") as file:
                shutil.copyfileobj(response, file)
        except (urllib.error.URLError, OSError) as error:
            raise StorageError(f"{uri} could not be read: {getattr(error, 'reason', error)}") from None
        return
    bucket, path = _bucket(uri)
    with _readable_errors(uri), bucket.open_input_stream(path) as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file)


def _bucket(uri: str):
    """Open the file system of an s3:// or gs:// address; credentials come from the environment."""
    from pyarrow import fs

    path = uri.split("://", 1)[1].rstrip("/")
    if uri.startswith("gs://"):
        return fs.GcsFileSystem(), path
    import boto3

    # Without credentials a public bucket can be read all the same, but only if none are sent.
    session = boto3.Session()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return fs.S3FileSystem(
        endpoint_override=endpoint, region=session.region_name, anonymous=session.get_credentials() is None
    ), path


@contextlib.contextmanager
def _readable_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise StorageError(f"{uri} could not be read: {reason}. Are the path and the credentials right?") from None


@contextlib.contextmanager
def aside(target: Path) -> Iterator[Path]:
    """Yield a temporary name beside `target`, renamed to it once the block has ended well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


# The run folder ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """The paths of a run folder."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"  # every value, and where it came from

    @property
    def data_report(self) -> Path:
        return self.folder / "data_report.json"  # rows, tokens, what was cut

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


def open_run(config: FinetuneConfig) -> Run:
    """Open the run folder that a config names; what is there already is treated as `on_existing` says.

    Raises StorageError if the folder exists and `on_existing` is fail, or holds a run with another config.
    Creates nothing: the caller does, once the data is known to be good.
    """
    if is_remote(config.storage_path):
        raise StorageError(
            f"storage_path {config.storage_path}: run folders in a bucket are not supported yet: use a local path"
        )
    run = Run(Path(config.storage_path).expanduser().resolve() / config.run_name)
    if not run.config.exists():
        # A data report alone is what a run leaves whose data was refused.
        if run.folder.is_dir() and any(path != run.data_report for path in run.folder.iterdir()):
            raise StorageError(f"{run.folder} exists and is not a run folder (no config.yaml): choose another run_name")
        return run
    if config.on_existing == "fail":
        raise StorageError(f"the run {run.folder} exists: choose another run_name, or on_existing=resume or overwrite")
    return run


def find_run(name: str, storage_path: str = "runs") -> Run:
    """Find a run by its folder, or by its name under storage_path."""
    for folder in (Path(name).expanduser(), Path(storage_path) / name):
        if (folder / "config.yaml").exists():
            return Run(folder.resolve())
    raise StorageError(f"no run {name!r}: neither a run folder nor a name under {storage_path}/")


@contextlib.contextmanager
def published(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder` to write into; it takes the name `folder` once the block ends well.

    What a killed process leaves behind starts with a dot and is swept the next time.
    """
    aside = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        _flush(aside)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Bring a folder's files to the disk, so that a power cut cannot leave a named but hollow checkpoint."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """Read a JSON file of a run folder."""
    return json.loads(path.read_text())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is complete or absent."""
    with aside(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
