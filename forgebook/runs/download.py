"""Local copies of remote files: s3://, gs://, https://; a local path is used as it is.

find_files(glob)            -> [uri]    the files that a path or a glob names
file_version(uri)           -> str      what a remote file is now, by one request
fetch_file(uri, version)    -> Path     a local copy of one file, of that version
fetch_folder(uri)           -> Path     a local copy of a folder: model or adapter weights

A copy is named by its address and its version, so that it is used for as long as the file stays what it was.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import hashlib
import http.client
import os
import re
import shutil
import stat
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forgebook.errors import StorageError
from forgebook.runs import object_store
from forgebook.runs.atomic import atomic_file
from forgebook.runs.object_store import is_bucket, is_remote

__all__ = ["cache_folder", "fetch_file", "fetch_folder", "file_version", "find_files"]


def cache_folder() -> Path:
    """Return the folder of local copies: $FORGEBOOK_CACHE, or ~/.cache/forgebook."""
    return Path(os.environ.get("FORGEBOOK_CACHE", "~/.cache/forgebook")).expanduser()


def file_version(uri: str) -> str:
    """Ask what a remote file is now: its ETag or generation, else its size and modification time.

    Two answers are equal as long as the file is the same. Raises StorageError if there is none.
    """
    return object_store.file_version(uri) if is_bucket(uri) else _web_version(uri)


def fetch_file(uri: str, version: str | None = None) -> Path:
    """Return a local path holding the file at `uri`; raise StorageError if there is none.

    version: of a remote file, as of `file_version`; None: what it is now. Raises StorageError if it is another by now.
    """
    if not is_remote(uri):
        path = Path(uri).expanduser()
        try:
            kind = path.stat().st_mode
        except FileNotFoundError:
            raise StorageError(f"{uri} does not exist (looked from {Path.cwd()})") from None
        except (OSError, ValueError) as error:  # ValueError: a zero byte
            raise StorageError(f"{uri!r} cannot be read: {getattr(error, 'strerror', error)}") from None
        if stat.S_ISDIR(kind):
            raise StorageError(f"{uri} is a folder; name a file in it")
        if not stat.S_ISREG(kind):  # a pipe is read only once, and a device may never end
            raise StorageError(f"{uri} is a pipe or a device: write its content to a file, and name that")
        if not os.access(path, os.R_OK):
            raise StorageError(f"{uri} cannot be read: Permission denied")
        return path
    wanted = version or file_version(uri)
    target = _cached(uri, wanted)
    if not target.exists():
        with atomic_file(target) as temporary:
            (object_store.download_file if is_bucket(uri) else _download)(uri, temporary)
            if file_version(uri) != wanted:
                raise StorageError(f"{uri} was changed while it was read: run the same command again once it is final")
    return target


def fetch_folder(uri: str) -> Path:
    """Return a local folder with the contents of `uri` (local, s3:// or gs://).

    Raises StorageError if it is empty, or its upload has not finished.
    """
    if not is_remote(uri):
        path = Path(uri).expanduser()
        if not path.is_dir():
            raise StorageError(f"the folder {uri} does not exist (looked from {Path.cwd()})")
        return path
    if not is_bucket(uri):
        raise StorageError(f"{uri}: a folder can be read from a local path, s3:// or gs://, not over https://")
    version, names = object_store.folder_version(uri)
    if not names:
        raise StorageError(f"{uri} could not be read: no files there")
    target = _cached(uri, version)
    if target.exists():
        return target
    if object_store.MANIFEST not in names:
        with atomic_file(target) as temporary:
            temporary.mkdir()
            object_store.download_files(uri, temporary, names)
            if object_store.folder_version(uri)[0] != version:
                raise StorageError(f"{uri} was changed while it was read: run the same command again once it is final")
    elif not object_store.download_folder(uri, target):
        raise StorageError(f"{uri} is not complete: its upload was interrupted or is still running")
    return target


def find_files(pattern: str) -> list[str]:
    """List the files that a glob (`*`, `?`, `[...]`) matches, sorted; local, s3:// or gs://.

    A plain path is returned unchecked. Folders and files whose own names hold these signs are taken as they are
    written. Raises StorageError if a glob matches nothing.
    """
    if not any(sign in pattern for sign in "*?[") or pattern.startswith("https://"):
        return [pattern]
    if not is_remote(pattern):
        matches = glob.glob(_escape_existing(Path(pattern).expanduser()), recursive=True)
        matches = [path for path in matches if not Path(path).is_dir()]
    else:
        folder = re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]
        uris = [f"{folder}/{name}" for name in object_store.list_files(folder)]
        matches = [pattern] if pattern in uris else fnmatch.filter(uris, pattern)
    if not matches:
        raise StorageError(f"{pattern} matches no file")
    return sorted(matches)


def _escape_existing(pattern: Path) -> str:
    """Escape, from the left, the parts of a glob that exist as they are written."""
    existing, escaped = Path(), Path()
    for part in pattern.parts:
        existing /= part
        escaped /= glob.escape(part) if existing.exists() else part
    return str(escaped)


def _cached(uri: str, version: str) -> Path:
    """Name the local copy of one version of a remote path."""
    name = uri.partition("?")[0].rstrip("/").rsplit("/", 1)[-1][-100:]  # signed addresses are longer than a name can be
    return cache_folder() / hashlib.sha256(f"{uri}\0{version}".encode()).hexdigest()[:16] / name


def _download(url: str, target: Path) -> None:
    with _opened(urllib.request.Request(url)) as response, open(target, "wb") as file:
        shutil.copyfileobj(response, file)
        if response.length:  # of bytes that were announced; http.client takes an early end for the end
            raise StorageError(f"{url} could not be read: the connection ended {response.length:,} bytes early")


def _web_version(url: str) -> str:
    """Ask what a web address holds: its ETag, else its size and date, else a hash of its content."""
    try:
        with _opened(urllib.request.Request(url, method="HEAD")) as response:
            headers = response.headers
    except StorageError:  # an address that is signed for GET alone
        with _opened(urllib.request.Request(url, headers={"Range": "bytes=0-0"})) as response:
            headers = response.headers
    size = headers.get("Content-Range", headers.get("Content-Length"))
    if headers.get("ETag") or headers.get("Last-Modified"):
        return " ".join(filter(None, (headers.get("ETag") or headers["Last-Modified"], str(size))))
    with _opened(urllib.request.Request(url)) as response:
        return hashlib.file_digest(response, "sha256").hexdigest()


@contextlib.contextmanager
def _opened(request: urllib.request.Request) -> Iterator[Any]:
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            yield response
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise StorageError(f"{request.full_url} could not be read: {getattr(error, 'reason', error)}") from None
