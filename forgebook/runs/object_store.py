"""Buckets: s3:// (any S3-compatible endpoint through AWS_ENDPOINT_URL) and gs://, listed, read and written.

list_files(uri)              -> {name: bytes}
upload_folder(folder, uri)               upload a folder: a manifest, written last, makes it complete
download_folder(uri, folder)              the way back: what the manifest names, or nothing

Credentials and region come from the environment, as the AWS and Google SDKs read them. Each request is tried
again with growing pauses, AWS_MAX_ATTEMPTS times in all (default 5); what stays wrong is a StorageError that says
how to mend it, a BucketBusyError if it may pass by itself.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from forgebook.errors import BucketBusyError, StorageError
from forgebook.runs.atomic import atomic_folder

__all__ = [
    "MANIFEST",
    "download_file",
    "download_files",
    "download_folder",
    "has_file",
    "is_bucket",
    "is_remote",
    "list_files",
    "list_folders",
    "make_manifest",
    "read_file",
    "read_manifest",
    "remove_folder",
    "upload_folder",
    "write_file",
]

SCHEMES = ("s3://", "gs://")
MANIFEST = "manifest.json"
CHUNK = 16 << 20  # bytes read at a time
Manifest = dict[str, list[int]]  # name -> [bytes, time of change in ns]

# What a bucket answers -> how to mend it; the first that is found in the answer.
_MENDS = {
    r"OAuth2 access token": "no credentials were found: set GOOGLE_APPLICATION_CREDENTIALS to a key file",
    r"NO_SUCH_BUCKET|bucket does not exist": "there is no such bucket: correct the path, or create the bucket",
    r"PermanentRedirect|AuthorizationHeaderMalformed|region '|status 301": "set AWS_DEFAULT_REGION to the bucket's "
    "region",
    r"INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|InvalidToken|ExpiredToken": "the credentials are wrong or have "
    "expired: correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE)",
    r"ACCESS_DENIED|PERMISSION_DENIED|UNAUTHENTICATED|status 40[13]": "the credentials do not allow it: ask the "
    "bucket's owner for the right to list, read and (for runs) write and delete",
    r"(ListObjects|CreateResumableUpload).*404": "there is no such bucket: correct the path, or create the bucket",
    r"does not exist|NotFound|NO_SUCH_KEY|NOT_FOUND": "nothing has that name: correct the path",
}
_NO_CREDENTIALS = (
    "no credentials were found, and the bucket is not open to everyone: set AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
)
_BUSY = re.compile(r"NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|THROTTLING|UNAVAILABLE|"
                   r"REQUEST_TIMEOUT|status (429|5\d\d)|[Tt]imed? ?out|DEADLINE_EXCEEDED")  # fmt: skip


def is_remote(path: str) -> bool:
    """Tell whether a path names a bucket or a web address."""
    return path.startswith((*SCHEMES, "https://"))


def is_bucket(path: str) -> bool:
    """Tell whether a path lies in a bucket, where things can be written, too."""
    return path.startswith(SCHEMES)


# Files ----------------------------------------------------------------------------------------------


def download_file(uri: str, target: Path) -> None:
    """Copy one file of a bucket to a local path."""
    bucket, path = _opened(uri)
    with _readable_errors(uri), bucket.open_input_stream(path) as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, CHUNK)


def _upload(path: Path, uri: str) -> None:
    # Not pyarrow's copy_files: it drops the errors that come when a stream is closed.
    bucket, name = _opened(uri)
    with _readable_errors(uri, "written"), open(path, "rb") as file, bucket.open_output_stream(name) as target:
        shutil.copyfileobj(file, target, CHUNK)


def list_files(uri: str) -> dict[str, int]:
    """Map the names of all files under an address to their sizes in bytes; empty if there are none."""
    start = len(_opened(uri)[1]) + 1
    return {info.path[start:]: info.size for info in _listing(uri, recursive=True) if info.is_file}


def list_folders(uri: str) -> list[str]:
    """List the names of the folders right below an address."""
    if uri.startswith("gs://"):  # there pyarrow sees a folder only if it has a marker
        return sorted({name.split("/")[0] for name in list_files(uri) if "/" in name})
    return sorted(info.base_name for info in _listing(uri, recursive=False) if not info.is_file)


def _listing(uri: str, recursive: bool) -> list[Any]:
    from pyarrow import fs

    bucket, path = _opened(uri)
    with _readable_errors(uri):
        try:
            return bucket.get_file_info(fs.FileSelector(path, recursive=recursive))
        except OSError as error:
            # Nothing below; of a missing bucket S3 says NO_SUCH_BUCKET and Google ListObjects ... NOT_FOUND.
            is_absent = isinstance(error, FileNotFoundError) or str(error).startswith("No such file or directory")
            if is_absent and "NOT_FOUND" not in str(error):
                return []
            raise


def has_file(uri: str) -> bool:
    """Tell whether there is a file at an address."""
    from pyarrow import fs

    bucket, path = _opened(uri)
    with _readable_errors(uri):
        return bucket.get_file_info(path).type == fs.FileType.File


def read_file(uri: str) -> bytes:
    """Read a small file whole."""
    bucket, path = _opened(uri)
    with _readable_errors(uri), bucket.open_input_stream(path) as source:
        return source.read()


def write_file(uri: str, content: bytes) -> None:
    """Write a small file; readers see the old one or the new one."""
    bucket, path = _opened(uri)
    with _readable_errors(uri, "written"), bucket.open_output_stream(path) as target:
        target.write(content)


def remove_folder(uri: str) -> None:
    """Delete all files under an address."""
    bucket, path = _opened(uri)
    names = list_files(uri)
    with _readable_errors(uri, "deleted"):
        if names:
            if MANIFEST in names:  # nobody shall take what is left for the whole
                write_file(f"{uri}/{MANIFEST}", _manifest_text(False, {}))
            with contextlib.suppress(FileNotFoundError):  # Google's, for a marker of the folder that never was
                bucket.delete_dir(path)


# Folders that are complete or absent ------------------------------------------------------------------


def make_manifest(folder: Path) -> Manifest:
    """Describe a local folder's files: name -> [bytes, time of change in ns]."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): [path.stat().st_size, path.stat().st_mtime_ns] for path in files
    }  # fmt: skip


def read_manifest(uri: str) -> Manifest | None:
    """Read what a folder of a bucket holds, or None if it is not complete."""
    told = json.loads(read_file(f"{uri}/{MANIFEST}"))
    return told["files"] if told["complete"] else None


def upload_folder(folder: Path, uri: str) -> None:
    """Upload a folder. Its manifest says `complete: false` until all files are there in full length."""
    files = make_manifest(folder)
    write_file(f"{uri}/{MANIFEST}", _manifest_text(False, files))
    _each(lambda name: _upload(folder / name, f"{uri}/{name}"), files)
    arrived = list_files(uri)
    for name, (size, _) in files.items():
        if arrived.get(name) != size:
            raise BucketBusyError(f"{uri}/{name} could not be written: {size} bytes sent, {arrived.get(name)} arrived")
    write_file(f"{uri}/{MANIFEST}", _manifest_text(True, files))


def download_folder(uri: str, folder: Path) -> bool:
    """Bring a complete folder of a bucket to this machine, times of change included; False if it is not complete.

    A local folder that is the same already is left as it is.
    """
    files = read_manifest(uri)
    if files is None:
        return False
    if folder.is_dir() and make_manifest(folder) == files:
        return True
    with atomic_folder(folder) as writing:
        download_files(uri, writing, files)
        for name, (size, changed) in files.items():
            if (writing / name).stat().st_size != size:
                raise StorageError(
                    f"{uri}/{name} has {(writing / name).stat().st_size} bytes, its manifest says {size}"
                )
            os.utime(writing / name, ns=(changed, changed))
    return True


def _manifest_text(is_complete: bool, files: Manifest) -> bytes:
    return json.dumps({"complete": is_complete, "files": files}, indent=1).encode()


def download_files(uri: str, folder: Path, names: Iterable[str]) -> None:
    """Copy the named files from under an address into a local folder."""

    def fetch(name: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        download_file(f"{uri}/{name}", folder / name)

    _each(fetch, names)


def _each(work: Callable[[str], None], names: Iterable[str]) -> None:
    """Move several files at a time."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, names))


# Opening ----------------------------------------------------------------------------------------------


def _opened(uri: str):
    """Open the file system of an s3:// or gs:// address."""
    scheme, path = uri.split("://", 1)
    return _file_system(scheme, _settings())[0], path.rstrip("/")


def _settings() -> tuple[tuple[str, str], ...]:
    """Collect what the environment says of buckets."""
    return tuple(
        item for item in sorted(os.environ.items()) if item[0].startswith(("AWS_", "CLOUD_STORAGE_", "GOOGLE_"))
    )


@functools.cache
def _file_system(scheme: str, environment: tuple) -> tuple[Any, bool]:
    """Make a file system for what the environment says; tell whether it has credentials."""
    from pyarrow import fs

    if scheme == "gs":
        # An emulator knows no credentials.
        is_emulated = "CLOUD_STORAGE_EMULATOR_ENDPOINT" in dict(environment)
        return fs.GcsFileSystem(anonymous=is_emulated, retry_time_limit=datetime.timedelta(seconds=30)), True
    import boto3

    # Without credentials a public bucket can be read all the same, but only if none are sent.
    session, settings = boto3.Session(), dict(environment)
    has_credentials = session.get_credentials() is not None
    made = fs.S3FileSystem(
        endpoint_override=settings.get("AWS_ENDPOINT_URL_S3") or settings.get("AWS_ENDPOINT_URL"),
        region=session.region_name,
        anonymous=not has_credentials,
        connect_timeout=10,
        request_timeout=60,
        allow_delayed_open=True,  # one request for a small file
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=int(settings.get("AWS_MAX_ATTEMPTS", "5"))),
    )
    return made, has_credentials


@contextlib.contextmanager
def _readable_errors(uri: str, done: str = "read") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = _cause(uri, error)
        if _BUSY.search(reason) and "OAuth2" not in reason:
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            at = f" of {endpoint}" * bool(endpoint and uri.startswith("s3://"))
            raise BucketBusyError(
                f"{uri} could not be {done}: the server{at} does not answer or is overloaded ({_brief(reason)})"
            ) from None
        mend = next((text for pattern, text in _MENDS.items() if re.search(pattern, reason)), _brief(reason))
        if uri.startswith("s3://") and "do not allow" in mend and not _has_credentials():
            mend = _NO_CREDENTIALS
        raise StorageError(f"{uri} could not be {done}: {mend} ({_brief(reason)})") from None


def _cause(uri: str, error: OSError) -> str:
    """Find out why a request failed: HEAD requests are answered without a reason, a listing with one."""
    reason = str(error).splitlines()[0]
    if not uri.startswith("s3://") or _BUSY.search(reason) or not re.search("No response body|not exist", reason):
        return reason
    bucket, path = _opened(uri)
    try:
        from pyarrow import fs

        bucket.get_file_info(fs.FileSelector(path))
    except FileNotFoundError:
        return reason
    except OSError as told:
        return str(told).splitlines()[0]
    return reason


def _has_credentials() -> bool:
    return _file_system("s3", _settings())[1]


def _brief(reason: str) -> str:
    """Keep the part of an SDK's message that says what happened."""
    return re.sub(r"\s*\(Request ID: .*?\)", "", reason.rpartition("AWS Error ")[2]).strip().rstrip(".")
