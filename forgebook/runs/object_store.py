"""Buckets: s3:// (any S3-compatible endpoint through AWS_ENDPOINT_URL) and gs://, listed, read and written.

upload_folder(folder, uri)              a manifest, written last, marks the folder complete
download_folder(uri, folder) -> bool    what the manifest names, or nothing

Credentials come from where the AWS and Google SDKs look for them, the region from AWS_REGION or the bucket itself. Each
request is retried with growing pauses, AWS_MAX_ATTEMPTS times in all (default 3); a server that sends nothing is given
up after 30 s. What still fails is a StorageError with the fix, a BucketBusyError if a later try may succeed.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from forgebook.errors import BucketBusyError, StorageError, first_line
from forgebook.runs.atomic import atomic_folder
from forgebook.runs.time_limit import GIVE_UP_SECONDS, Limited, within_limit

__all__ = [
    "MANIFEST",
    "download_file",
    "download_files",
    "download_folder",
    "file_version",
    "folder_version",
    "has_file",
    "is_bucket",
    "is_remote",
    "list_files",
    "list_folders",
    "make_manifest",
    "open_bucket",
    "read_at_most",
    "read_file",
    "read_manifest",
    "remove_files",
    "remove_folder",
    "upload_files",
    "upload_folder",
    "write_file",
    "write_manifest",
]

SCHEMES = ("s3://", "gs://")
MANIFEST = "manifest.json"
# Bytes copied at a time: on S3 each read is a request, elsewhere it has to end within GIVE_UP_SECONDS.
CHUNKS = {"s3": 8 << 20, "gs": 1 << 20}
Manifest = dict[str, list[int]]  # name -> [bytes, modification time in ns]

_DENIED = "the credentials do not allow it: ask the bucket's owner for permission to list, read, write and delete"
# A pattern in a bucket's answer -> the fix; the first match counts.
_FIXES = {
    r"OAuth2 access token": "no credentials were found: set GOOGLE_APPLICATION_CREDENTIALS to a key file",
    r"NO_SUCH_BUCKET|bucket does not exist": "there is no such bucket: correct the path, or create the bucket",
    r"PermanentRedirect|AuthorizationHeaderMalformed|region '|status 301": "set AWS_DEFAULT_REGION to the bucket's "
    "region",
    r"INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|InvalidToken|ExpiredToken": "the credentials are wrong or have "
    "expired: correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE)",
    r"ACCESS_DENIED|PERMISSION_DENIED|UNAUTHENTICATED|status 40[13]": _DENIED,
    r"(ListObjects|CreateResumableUpload).*404": "there is no such bucket: correct the path, or create the bucket",
    r"does not exist|NotFound|NO_SUCH_KEY|NOT_FOUND": "nothing has that name: correct the path",
}
_NO_CREDENTIALS = (
    "no credentials were found, and the bucket is not open to everyone: set AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
)
_BUSY = re.compile(
    r"NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|THROTTLING|UNAVAILABLE|REQUEST_TIMEOUT"
    r"|status (429|5\d\d)|[Tt]imed? ?out|DEADLINE_EXCEEDED"
)


def is_remote(path: str) -> bool:
    """Check whether a path is in a bucket or at a web address."""
    return path.startswith((*SCHEMES, "https://"))


def is_bucket(path: str) -> bool:
    """Check whether a path is in a bucket, which can be written to."""
    return path.startswith(SCHEMES)


# Files ----------------------------------------------------------------------------------------------


def download_file(uri: str, target: Path) -> None:
    """Download one file to a local path."""
    bucket, path = _calls(uri)
    with _readable_errors(uri), bucket.open_input_stream(path) as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, CHUNKS[uri[:2]])


def _upload(path: Path, uri: str) -> None:
    # Not pyarrow's copy_files: it drops the errors that come when a stream is closed. S3 gets most of a file then, and
    # that may take long: only its client knows whether bytes are moving.
    bucket, name = open_bucket(uri) if uri.startswith("s3://") else _calls(uri)
    with _readable_errors(uri, "written"), open(path, "rb") as file, bucket.open_output_stream(name) as target:
        shutil.copyfileobj(file, target, CHUNKS[uri[:2]])


def list_files(uri: str) -> dict[str, int]:
    """Map the names of all files below a URI to their sizes in bytes; empty if there are none."""
    start = len(_calls(uri)[1]) + 1
    return {info.path[start:]: info.size for info in _listing(uri, recursive=True) if info.is_file}


def file_version(uri: str) -> str:
    """Ask what a file is now: its ETag or generation, its size, else its modification time."""
    bucket, path = _calls(uri)
    # A stream: pyarrow opens Google's files for random access without releasing the GIL, so that no limit applies.
    with _readable_errors(uri), bucket.open_input_stream(path) as file:
        about = {key.lower(): value for key, value in (file.metadata() or {}).items()}
        known = [about[key] for key in ("etag", "versionid", "generation") if about.get(key)]
        size = about.get("size") or about.get("content-length") or b""
        return " ".join(map(os.fsdecode, [*known, size])) if known else _dated(bucket.get_file_info(path))


def folder_version(uri: str) -> tuple[str, list[str]]:
    """Ask what the files below a URI are now, by size and modification time; return that and their names."""
    start = len(_calls(uri)[1]) + 1
    files = sorted((info.path[start:], _dated(info)) for info in _listing(uri, recursive=True) if info.is_file)
    return hashlib.sha256(repr(files).encode()).hexdigest(), [name for name, _ in files]


def _dated(info: Any) -> str:
    return f"{info.size} {info.mtime_ns}"


def list_folders(uri: str) -> list[str]:
    """List the names of the folders directly below a URI."""
    if uri.startswith("gs://"):  # there pyarrow sees a folder only if it has a marker
        return sorted({name.split("/")[0] for name in list_files(uri) if "/" in name})
    return sorted(info.base_name for info in _listing(uri, recursive=False) if not info.is_file)


def _listing(uri: str, recursive: bool) -> list[Any]:
    from pyarrow import fs

    bucket, path = _calls(uri)
    with _readable_errors(uri):
        try:
            return bucket.get_file_info(fs.FileSelector(path, recursive=recursive))
        except OSError as error:
            # Nothing below it. For a missing bucket S3 answers NO_SUCH_BUCKET, Google ListObjects ... NOT_FOUND.
            is_absent = isinstance(error, FileNotFoundError) or str(error).startswith("No such file or directory")
            if is_absent and "NOT_FOUND" not in str(error):
                return []
            raise


def has_file(uri: str) -> bool:
    """Check whether there is a file at a URI."""
    bucket, path = _calls(uri)
    with _readable_errors(uri):
        return bucket.get_file_info(path).is_file


def read_file(uri: str) -> bytes:
    """Read a small file into memory."""
    bucket, path = _calls(uri)
    with _readable_errors(uri), bucket.open_input_stream(path) as source:
        return source.read()


def read_at_most(uri: str, most: int) -> bytes | None:
    """Read a file into memory; return None, and fetch nothing of it, if it has more than `most` bytes."""
    bucket, path = _calls(uri)
    with _readable_errors(uri):
        return read_file(uri) if (bucket.get_file_info(path).size or 0) <= most else None


def write_file(uri: str, content: bytes) -> None:
    """Write a small file; readers see the old one or the new one, never half."""
    bucket, path = _calls(uri)
    with _readable_errors(uri, "written"), bucket.open_output_stream(path) as target:
        target.write(content)


def remove_folder(uri: str) -> None:
    """Delete all files below a URI."""
    bucket, path = _calls(uri)
    names = list_files(uri)
    with _readable_errors(uri, "deleted"):
        if names:
            if MANIFEST in names:  # a half-deleted folder must not look complete
                write_manifest(uri, {}, is_complete=False)
            with contextlib.suppress(FileNotFoundError):  # Google's, for a folder without a marker
                bucket.delete_dir(path)


def remove_files(uri: str, names: Iterable[str]) -> None:
    """Delete the named files below a URI, manifests first: a half-deleted folder must not look complete."""
    bucket, path = _calls(uri)
    with _readable_errors(uri, "deleted"):
        for name in sorted(names, key=lambda name: not name.endswith(MANIFEST)):
            with contextlib.suppress(FileNotFoundError):
                bucket.delete_file(f"{path}/{name}")


# Folders that are complete or absent ------------------------------------------------------------------


def make_manifest(folder: Path) -> Manifest:
    """Describe a local folder's files: name -> [bytes, modification time in ns]."""
    files = {path.relative_to(folder).as_posix(): path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()}


def read_manifest(uri: str) -> Manifest | None:
    """Read the manifest of a bucket's folder; None if the folder is not complete."""
    manifest = json.loads(read_file(f"{uri}/{MANIFEST}"))
    return manifest["files"] if manifest["complete"] else None


def upload_folder(folder: Path, uri: str) -> None:
    """Upload a folder. Its manifest has `complete: false` until all files are there in full length.

    Raises BucketBusyError if a file did not arrive whole.
    """
    write_manifest(uri, {}, is_complete=False)
    write_manifest(uri, upload_files(folder, uri), is_complete=True)


def upload_files(folder: Path, uri: str) -> Manifest:
    """Upload a folder's files without a manifest and return what was sent; several machines may fill one `uri`.

    Raises BucketBusyError if a file did not arrive whole.
    """
    files = make_manifest(folder)
    _each(lambda name: _upload(folder / name, f"{uri}/{name}"), files)
    sizes = list_files(uri)
    for name, (size, _) in files.items():
        if sizes.get(name) != size:
            raise BucketBusyError(f"{uri}/{name} could not be written: {size} bytes sent, {sizes.get(name)} arrived")
    return files


def write_manifest(uri: str, files: Manifest, is_complete: bool) -> None:
    """Write which files a folder of a bucket holds, and whether all of them are there."""
    write_file(f"{uri}/{MANIFEST}", json.dumps({"complete": is_complete, "files": files}, indent=1).encode())


def download_folder(uri: str, folder: Path) -> bool:
    """Download a complete folder, modification times included; return False if it is not complete.

    A local folder that is the same already is left alone. Raises StorageError for a file of another size.
    """
    files = read_manifest(uri)
    if files is None:
        return False
    if folder.is_dir() and make_manifest(folder) == files:
        return True
    with atomic_folder(folder) as temporary:
        download_files(uri, temporary, files)
        for name, (size, modified) in files.items():
            arrived = (temporary / name).stat().st_size
            if arrived != size:
                raise StorageError(f"{uri}/{name} has {arrived} bytes, its manifest has {size}")
            os.utime(temporary / name, ns=(modified, modified))
    return True


def download_files(uri: str, folder: Path, names: Iterable[str]) -> None:
    """Download the named files below a URI into a local folder."""

    def fetch(name: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        download_file(f"{uri}/{name}", folder / name)

    _each(fetch, names)


def _each(transfer: Callable[[str], None], names: Iterable[str]) -> None:
    """Transfer several files at a time."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(transfer, names))


# Opening ----------------------------------------------------------------------------------------------


def open_bucket(uri: str) -> tuple[Any, str]:
    """Open the file system of an s3:// or gs:// URI; return it and the path in it, which begins with the bucket.

    Raises StorageError for a URI without a bucket.
    """
    scheme, _, path = uri.partition(":")
    path = path.removeprefix("//")
    bucket = path.split("/", 1)[0]
    if not bucket:
        raise StorageError(f"{scheme}:// without a bucket: expected {scheme}://BUCKET/PATH")
    return _file_system(scheme, bucket, _settings()), path.rstrip("/")


def _calls(uri: str) -> tuple[Any, str]:
    """Open the bucket of a URI as `open_bucket` does, for calls that give up if it does not answer."""
    bucket, path = open_bucket(uri)
    return Limited(bucket), path


def _settings() -> tuple[tuple[str, str], ...]:
    """Collect the environment variables that concern buckets."""
    return tuple(
        item for item in sorted(os.environ.items()) if item[0].startswith(("AWS_", "CLOUD_STORAGE_", "GOOGLE_"))
    )


def _endpoint(settings: Mapping[str, str]) -> str | None:
    return settings.get("AWS_ENDPOINT_URL_S3") or settings.get("AWS_ENDPOINT_URL")


@functools.cache
def _file_system(scheme: str, bucket: str, environment: tuple[tuple[str, str], ...]) -> Any:
    """Make the file system of a bucket, with the environment's settings; the SDKs find the credentials."""
    from pyarrow import fs

    settings = dict(environment)
    if scheme == "gs":
        # An emulator knows no credentials.
        is_emulated = "CLOUD_STORAGE_EMULATOR_ENDPOINT" in settings
        return fs.GcsFileSystem(anonymous=is_emulated, retry_time_limit=datetime.timedelta(seconds=30))
    endpoint = _endpoint(settings)
    region = settings.get("AWS_REGION") or settings.get("AWS_DEFAULT_REGION")
    if region is None and endpoint is None:
        with contextlib.suppress(OSError):  # no network, no such bucket: the request itself reports it
            region = within_limit(lambda: fs.resolve_s3_region(bucket))
    attempts = int(settings.get("AWS_MAX_ATTEMPTS", "3"))
    seconds = 0.8 * GIVE_UP_SECONDS / attempts  # the rest is for the pauses between them
    # Without credentials the SDK does not sign its requests, so that a public bucket can be read.
    return fs.S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        connect_timeout=seconds,
        request_timeout=seconds,  # without a byte: what is sent or received may take longer
        allow_delayed_open=True,  # one request for a small file
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
    )


@contextlib.contextmanager
def _readable_errors(uri: str, action: str = "read") -> Iterator[None]:
    """Turn an SDK's error into a StorageError with the fix; into a BucketBusyError if a later try may succeed."""
    try:
        yield
    except OSError as error:
        reason = _cause(uri, error)
        if _BUSY.search(reason) and "OAuth2" not in reason:
            endpoint = _endpoint(os.environ)
            at = f" of {endpoint}" if endpoint and uri.startswith("s3://") else ""
            raise BucketBusyError(
                f"{uri} could not be {action}: the server{at} does not answer or is overloaded ({_brief(reason)})"
            ) from None
        fix = next((text for pattern, text in _FIXES.items() if re.search(pattern, reason)), _brief(reason))
        if fix == _DENIED and uri.startswith("s3://") and not _names_credentials():
            fix = _NO_CREDENTIALS
        raise StorageError(f"{uri} could not be {action}: {fix} ({_brief(reason)})") from None


def _cause(uri: str, error: OSError) -> str:
    """Find out why a request failed: HEAD requests are answered without a reason, a listing with one."""
    reason = first_line(error)
    if not uri.startswith("s3://") or _BUSY.search(reason) or not re.search("No response body|not exist", reason):
        return reason
    bucket, path = _calls(uri)
    from pyarrow import fs

    try:
        bucket.get_file_info(fs.FileSelector(path))
    except FileNotFoundError:
        return reason
    except OSError as listing_error:
        return first_line(listing_error)
    return reason


def _names_credentials() -> bool:
    """Check whether the environment or a credentials file names S3 credentials (a machine's role is not seen here)."""
    files = (
        Path(os.environ.get(name, f"~/.aws/{file}")).expanduser()
        for name, file in (("AWS_SHARED_CREDENTIALS_FILE", "credentials"), ("AWS_CONFIG_FILE", "config"))
    )
    variables = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE")
    containers = ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
    return any(name in os.environ for name in (*variables, *containers)) or any(file.exists() for file in files)


def _brief(reason: str) -> str:
    """Reduce an SDK's message to what happened."""
    return re.sub(r"\s*\(Request ID: .*?\)", "", reason.rpartition("AWS Error ")[2]).strip().rstrip(".")
