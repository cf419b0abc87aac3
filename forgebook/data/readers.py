"""Files, buckets and data sets -> raw rows, each with its file:line, a chunk at a time.

    for source in find_sources(config.train_path):     globs expanded, with weights
        for chunk in split_source(source.uri):         some megabytes each, readable in any process
            for where, raw in read_chunk(chunk):       a dict, or the DataError that says what is wrong there

JSON lines, JSON, Parquet, CSV (also with tabs), gzip of these, and hf://dataset[/config]:split are detected
from their first bytes, not from their names. A bad line stops nothing: it is an error in its place.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgebook.config.blocks import DataSource
from forgebook.data.json_values import check_unique, check_value, parse_json, unique_keys
from forgebook.errors import DataError, StorageError, first_line
from forgebook.runs import atomic, download

__all__ = [
    "FileChunk", "Source", "content_key", "find_sources", "is_large", "read_chunk", "split_source",
    "without_nulls",
]  # fmt: skip

# What one task reads at once: large enough to be worth a task, small enough to share work evenly.
CHUNK_BYTES = 2 * 2**20
CHUNK_ROWS = 2_500
# A longer line is rejected: it is a file without line ends, and tokenizing it would take hours.
LONGEST_LINE = 16 * 2**20
HUB = "hf://"
LARGE_FILE = 64 * 2**20
DELIMITERS = ",\t;"  # of CSV; the one that the header has most of


@dataclass(frozen=True)
class Source:
    """One file or data set, and how often its examples are repeated per epoch."""

    uri: str
    weight: float = 1.0


@dataclass(frozen=True)
class FileChunk:
    """A part of a source that can be read on its own.

    kind:        jsonl, parquet, hub, json or csv.
    start, stop: bytes (jsonl), row groups (parquet) or rows (hub); json and csv are one chunk.
    first:       the number of its first line or row, counting from 1.
    """

    uri: str
    kind: str
    start: int = 0
    stop: int = 0
    first: int = 1


def find_sources(paths: str | Sequence[str | DataSource]) -> list[Source]:
    """List what a config's train_path or valid_path names, globs expanded.

    Raises StorageError where there is no such file.
    """
    sources = []
    for entry in [paths] if isinstance(paths, str) else paths:
        path, weight = (entry, 1.0) if isinstance(entry, str) else (entry.path, entry.weight)
        uris = [path] if path.startswith(HUB) else download.find_files(path)
        sources += [Source(uri, weight) for uri in uris]
    return sources


def content_key(uri: str) -> str:
    """Hash the content of a source."""
    if uri.startswith(HUB):
        return _hub_dataset(uri)._fingerprint
    with open(download.fetch_file(uri), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_large(uri: str) -> bool:
    """Report whether a source takes long to read only once: a large file, or a data set of the hub."""
    return uri.startswith(HUB) or download.fetch_file(uri).stat().st_size > LARGE_FILE


def split_source(uri: str) -> list[FileChunk]:
    """Divide a source into chunks; raise DataError or StorageError if it cannot be read at all."""
    if uri.startswith(HUB):
        rows = len(_hub_dataset(uri))
        starts = range(0, rows, CHUNK_ROWS)
        return [FileChunk(uri, "hub", start, min(start + CHUNK_ROWS, rows), start + 1) for start in starts]
    path = _plain_copy(uri)
    kind = _kind(path, uri)
    if kind == "jsonl":
        return list(_split_lines(uri, path))
    if kind == "parquet":
        return list(_split_parquet(uri, path))
    return [FileChunk(uri, kind)]


def read_chunk(chunk: FileChunk) -> Iterator[tuple[str, Any]]:
    """Yield (file:line, row) of each row of a chunk; a DataError in the place of a row that cannot be read."""
    read = {"jsonl": _read_lines, "json": _read_json, "csv": _read_csv, "parquet": _read_parquet, "hub": _read_hub}
    name = chunk.uri if chunk.uri.startswith(HUB) else chunk.uri.rstrip("/").rsplit("/", 1)[-1]
    for number, row in read[chunk.kind](chunk):
        where = f"{name}:{number}"
        yield where, DataError(f"{where}: {row}") if isinstance(row, DataError) else row


# Which kind of file -----------------------------------------------------------------------------------


def _plain_copy(uri: str) -> Path:
    """Fetch a file; unpack it if it is gzip, once."""
    path = download.fetch_file(uri)
    with open(path, "rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return path
    about = path.stat()
    key = hashlib.sha256(f"{path.resolve()}:{about.st_size}:{about.st_mtime_ns}".encode()).hexdigest()[:16]
    plain = download.cache_folder() / "unpacked" / key / re.sub(r"\.gz$", "", path.name, flags=re.IGNORECASE)
    if not plain.exists():
        with atomic.atomic_file(plain) as temporary, gzip.open(path, "rb") as packed, open(temporary, "wb") as file:
            try:
                while block := packed.read(2**20):
                    file.write(block)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                lines = _count_lines(temporary, file)
                raise DataError(
                    f"{path.name}:{lines + 1}: the gzip file is damaged or cut off here ({error}): copy it again"
                ) from None
    return plain


def _count_lines(path: Path, written) -> int:
    written.flush()
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


def _kind(path: Path, uri: str) -> str:
    with open(path, "rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{uri}: UTF-16 or UTF-32 text: save the file as UTF-8")
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.startswith(b"["):
        return "json"
    if path.name.lower().endswith((".csv", ".tsv")):
        return "csv"
    if start.startswith(b"version https://git-lfs"):
        raise DataError(f"{uri}: a pointer of Git LFS and not the file itself: run git lfs pull")
    if re.match(rb"\{\s*\n\s*\"", start):
        raise DataError(
            f"{uri}: a JSON object over several lines; expected one object per line, or one array of objects"
        )
    if b"\0" in start:
        raise DataError(
            f"{uri}: neither text nor Parquet; supported are JSON lines, JSON, Parquet, CSV, and gzip of these"
        )
    return "jsonl"


# JSON lines -------------------------------------------------------------------------------------------


def _split_lines(uri: str, path: Path) -> Iterator[FileChunk]:
    start, line = 0, 1
    with open(path, "rb") as file:
        while block := file.read(CHUNK_BYTES):
            lines = block.count(b"\n")
            if not block.endswith(b"\n"):
                lines += _skip_line(file)
            yield FileChunk(uri, "jsonl", start, file.tell(), line)
            start, line = file.tell(), line + lines


def _skip_line(file) -> int:
    """Move to the end of the line; return the number of line ends passed, 0 or 1."""
    while rest := file.readline(2**20):
        if rest.endswith(b"\n"):
            return 1
    return 0


def _read_lines(chunk: FileChunk) -> Iterator[tuple[int, Any]]:
    number = chunk.first - 1
    with open(_plain_copy(chunk.uri), "rb") as file:
        file.seek(chunk.start)
        while file.tell() < chunk.stop:
            raw = file.readline(LONGEST_LINE)
            number += 1
            if len(raw) == LONGEST_LINE and not raw.endswith(b"\n"):
                begin = file.tell() - len(raw)
                _skip_line(file)
                megabytes = (file.tell() - begin) / 2**20
                limit = f"more than {LONGEST_LINE // 2**20}: split the text into lines"
                yield number, DataError(f"a line of {megabytes:.0f} MB, {limit}")
                continue
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                yield number, DataError(f"not UTF-8 text (byte {error.start}): save the file as UTF-8")
                continue
            if line:
                yield number, _parse(line)


def _parse(line: str) -> Any:
    """Parse one line; return a DataError for what is not JSON."""
    try:
        return parse_json(line)
    except DataError as error:
        is_syntax = str(error).startswith("not valid JSON")
        return DataError(f"{error}: each line must be one JSON object") if is_syntax else error


# JSON, CSV --------------------------------------------------------------------------------------------


def _read_json(chunk: FileChunk) -> Iterator[tuple[int, Any]]:
    """Read a JSON array element by element, so that each has its line."""
    try:
        text = _plain_copy(chunk.uri).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield 1, DataError(f"not UTF-8 text (byte {error.start}): save the file as UTF-8")
        return
    decoder = json.JSONDecoder(object_pairs_hook=unique_keys)
    blank = re.compile(r"[\s,]*")
    at = text.index("[") + 1
    line, counted = 1, 0
    while True:
        if space := blank.match(text, at):
            at = space.end()
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            if text[at + 1 :].strip():
                yield line, DataError("there is text after the end of the JSON array")
            return
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            # Nothing after this can be parsed: where its elements begin is unknown.
            yield line, DataError(f"not valid JSON ({error}): the file must be one array of objects")
            return
        try:
            yield line, check_value(value, text[at:end])
        except DataError as error:
            yield line, error
        at = end


def _read_csv(chunk: FileChunk) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(LONGEST_LINE)
    # Bytes that are not UTF-8 pass as half surrogates, to be reported with their row.
    with open(_plain_copy(chunk.uri), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        header = file.readline(LONGEST_LINE)
        file.seek(0)
        reader = csv.DictReader(file, strict=True, delimiter=max(DELIMITERS, key=header.count))
        number = 1
        try:
            check_unique(filter(None, reader.fieldnames or ()), "column")  # reads the header
            while True:
                number = reader.line_num + 1
                yield number, _csv_row(next(reader))
        except StopIteration:
            return
        except DataError as error:
            yield number, error
        except csv.Error as error:
            fix = "quote cells that contain commas, quotes or line breaks"
            yield number, DataError(f"not valid CSV ({error}): {fix}")


def _csv_row(row: dict) -> Any:
    try:
        "".join(text for cell in row.items() for text in cell if isinstance(text, str)).encode()
    except UnicodeEncodeError:
        return DataError("not UTF-8 text: save the file as UTF-8")
    if None in row or None in row.values():
        return DataError("more or fewer cells than the header: quote cells that contain commas")
    return {key: cell for key, cell in row.items() if cell != ""}


# Parquet and the hub ----------------------------------------------------------------------------------


def _split_parquet(uri: str, path: Path) -> Iterator[FileChunk]:
    import pyarrow.parquet as pq

    try:
        about = pq.ParquetFile(path).metadata
        counts = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
        check_unique(about.schema.to_arrow_schema().names, "column")
    except DataError as error:
        raise DataError(f"{uri}: {error}") from None
    except Exception as error:  # Arrow raises what its decoders and Python's conversions raise
        raise DataError(f"{uri}: not a readable Parquet file ({first_line(error)}): copy it again") from None
    first = 1
    for group, count in enumerate(counts):
        yield FileChunk(uri, "parquet", group, group + 1, first)
        first += count


def _read_parquet(chunk: FileChunk) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet as pq

    number = chunk.first
    try:
        for batch in pq.ParquetFile(_plain_copy(chunk.uri)).iter_batches(batch_size=1_000, row_groups=[chunk.start]):
            for row in _batch_rows(batch):
                yield number, row if isinstance(row, DataError) else without_nulls(row)
                number += 1
    except Exception as error:
        # Nothing after this in its row group can be read: a damaged page holds many rows.
        yield number, DataError(f"the Parquet file is damaged here ({first_line(error)}): copy it again")


def _batch_rows(batch) -> Iterator[Any]:
    """Convert a batch to Python; row by row, with a DataError in the place of a bad one, if it has any."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, a date outside Python's
        for k in range(len(batch)):
            try:
                yield from batch.slice(k, 1).to_pylist()
            except (ValueError, OverflowError) as error:
                yield DataError(f"a cell cannot be read ({first_line(error)}): save text as UTF-8")


def without_nulls(value: Any, kept: tuple[str, ...] = ()) -> Any:
    """Leave out keys without a value: a column type gives every row the keys of all rows."""
    if isinstance(value, dict):
        return {key: without_nulls(item, kept) for key, item in value.items() if item is not None or key in kept}
    return [without_nulls(item, kept) for item in value] if isinstance(value, list) else value


def _hub_dataset(uri: str):
    """Load hf://owner/name[/config]:split, or hf://folder:split for a folder that begins with . or /."""
    name, colon, split = uri.removeprefix(HUB).rpartition(":")
    if not colon or not name or not split:
        raise StorageError(
            f"{uri}: the split is missing; expected hf://owner/name:train, or hf://owner/name/config:train"
        )
    is_folder = name.startswith((".", "/"))
    *owner_and_name, config = name.split("/") if not is_folder and name.count("/") == 2 else (name, None)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import datasets

    try:
        return datasets.load_dataset("/".join(owner_and_name), config, split=split)
    except Exception as error:  # the library raises whatever its readers, the hub and the network raise
        reason = first_line(error)
        raise StorageError(f"{uri} could not be loaded: {reason}") from None


def _read_hub(chunk: FileChunk) -> Iterator[tuple[int, Any]]:
    dataset = _hub_dataset(chunk.uri).select(range(chunk.start, chunk.stop))
    for number, row in enumerate(dataset, chunk.first):
        yield number, without_nulls(row)
