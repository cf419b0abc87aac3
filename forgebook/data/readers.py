"""Sources -> raw rows, each with its file:line, a chunk at a time.

    for source in find_sources(config.train_path):     see `data_sources`
        for chunk in split_source(source):             some megabytes each, readable in any process
            for where, raw in read_chunk(chunk):       a dict, or the DataError that says what is wrong there

JSON lines, JSON, Parquet, Arrow, CSV (also with tabs), compressed or not, and hf://dataset[/config]:split are detected
from their first bytes; CSV alone from its name. A bad row stops nothing: it is an error in its place. What makes the
rows after it unreadable is raised.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgebook.data import tables
from forgebook.data.columns import MappedRow, map_row
from forgebook.data.compressed import plain_copy
from forgebook.data.data_sources import Source, local_copy
from forgebook.data.json_values import check_unique, check_value, parse_json, unique_keys
from forgebook.data.tables import HUB, BrokenFileError
from forgebook.errors import DataError

__all__ = ["FileChunk", "chunks_of", "read_chunk", "sized_chunks", "split_source"]

# What one task reads at once: large enough to be worth a task, small enough to share work evenly.
CHUNK_BYTES = 2 * 2**20
CHUNK_ROWS = 2_500
MULTIPLE = 4  # the parts of a file are a multiple of it, so that two or four processes end together
# A longer line is rejected: it is a file without line ends, and tokenizing it would take hours.
LONGEST_LINE = 16 * 2**20
DELIMITERS = ",\t;"  # of CSV; the one that the header has most of
ARROW = (tables.ARROW_FILE, b"\xff\xff\xff\xff")  # of a file, and of a stream as `datasets` writes it


@dataclass(frozen=True)
class FileChunk:
    """A part of a source that can be read on its own.

    kind:        jsonl, parquet, arrow, hub, json or csv.
    start, stop: bytes (jsonl), row groups (parquet), record batches (arrow) or rows (hub); json and csv are one chunk.
    first:       the number of its first line or row, counting from 1.
    """

    source: Source
    kind: str
    start: int = 0
    stop: int = 0
    first: int = 1


def split_source(source: Source) -> list[FileChunk]:
    """Divide a source into chunks; raise DataError or StorageError if it cannot be read at all."""
    return list(chunks_of(source))


def chunks_of(source: Source) -> Iterator[FileChunk]:
    """Yield the chunks of a source: those of JSON lines as they are read. Raises as `split_source`."""
    if source.uri.startswith(HUB):
        rows = len(tables.hub_dataset(source.uri, source.version))
        starts = range(0, rows, CHUNK_ROWS)
        yield from (FileChunk(source, "hub", start, min(start + CHUNK_ROWS, rows), start + 1) for start in starts)
        return
    path = plain_copy(local_copy(source.uri, source.version))
    kind = _kind(path, source.uri)
    if kind == "jsonl":
        yield from (FileChunk(source, kind, *part) for part in _split_lines(path))
    elif kind in ("parquet", "arrow"):
        counts = (tables.split_parquet if kind == "parquet" else tables.split_arrow)(source.uri, path)
        fewest = 1 if kind == "parquet" else CHUNK_ROWS  # rows of a chunk: record batches are small
        yield from (FileChunk(source, kind, *part) for part in _joined(counts, fewest))
    else:
        yield FileChunk(source, kind)


def sized_chunks(source: Source) -> list[tuple[FileChunk, int]]:
    """Divide a file into chunks, each with about how many bytes it has, 1 or more. Raises as `split_source`."""
    chunks = split_source(source)
    if not chunks or chunks[0].kind == "jsonl":
        return [(chunk, chunk.stop - chunk.start) for chunk in chunks]
    size = plain_copy(local_copy(source.uri, source.version)).stat().st_size
    return [(chunk, max(1, size // len(chunks))) for chunk in chunks]


def _joined(counts: list[int], fewest: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, number of the first row) of runs of parts that have together at least `fewest` rows."""
    start, first, rows = 0, 1, 0
    for stop, count in enumerate(counts, 1):
        rows += count
        if rows >= fewest or stop == len(counts):
            yield start, stop, first
            start, first, rows = stop, first + rows, 0


def read_chunk(chunk: FileChunk) -> Iterator[tuple[str, Any]]:
    """Yield (file:line, row) of each row of a chunk; a DataError in the place of a row that cannot be read.

    Raises DataError where the rows after one cannot be read either: they would be lost without being counted.
    Where its source maps columns, a row is a `columns.MappedRow`. Of CSV and typed columns, which give every row the
    keys of all, empty cells are left out.
    """
    name = chunk.source.uri if chunk.source.uri.startswith(HUB) else chunk.source.uri.rstrip("/").rsplit("/", 1)[-1]
    for number, row in _rows(chunk):
        where = f"{name}:{number}"
        if isinstance(row, BrokenFileError):
            raise DataError(f"{where}: {row}. Nothing after this can be read, so on_bad_rows: drop does not skip it")
        if chunk.source.mapping and not isinstance(row, DataError):
            try:
                row = map_row(row, chunk.source.mapping)
            except DataError as error:
                row = error
        if chunk.kind not in ("jsonl", "json") and isinstance(row, dict) and not isinstance(row, MappedRow):
            row = {key: value for key, value in row.items() if value is not None}
        yield where, DataError(f"{where}: {row}") if isinstance(row, DataError) else row


def _rows(chunk: FileChunk) -> Iterator[tuple[int, Any]]:
    if chunk.kind == "hub":
        dataset = tables.hub_dataset(chunk.source.uri, chunk.source.version)
        return tables.read_hub(dataset, chunk.start, chunk.stop, chunk.first)
    path = plain_copy(local_copy(chunk.source.uri, chunk.source.version))
    if chunk.kind == "parquet":
        return tables.read_parquet(path, chunk.start, chunk.first)
    if chunk.kind == "arrow":
        return tables.read_arrow(path, chunk.start, chunk.stop, chunk.first)
    if chunk.kind == "jsonl":
        return _read_lines(path, chunk.start, chunk.stop, chunk.first)
    return (_read_json if chunk.kind == "json" else _read_csv)(path)


# Which kind of file -----------------------------------------------------------------------------------


def _kind(path: Path, uri: str) -> str:
    with open(path, "rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{uri}: UTF-16 or UTF-32 text: save the file as UTF-8")
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.startswith(ARROW):
        return "arrow"
    if path.name.lower().endswith((".csv", ".tsv")):  # which no first byte tells
        return "csv"
    if start.startswith(b"["):
        return "json"
    if start.lower().startswith((b"<!doctype html", b"<html")):
        raise DataError(f"{uri}: a web page, not a file of data: use the address of the file itself (raw, or resolve)")
    if start.startswith(b"version https://git-lfs"):
        raise DataError(f"{uri}: a pointer of Git LFS and not the file itself: run git lfs pull")
    if re.match(rb"\{\s*\n\s*\"", start):
        raise DataError(
            f"{uri}: a JSON object over several lines; expected one object per line, or one array of objects"
        )
    if b"\0" in start:
        raise DataError(
            f"{uri}: neither text nor Parquet; supported are JSON lines, JSON, Parquet, Arrow, CSV, and these "
            "compressed by gzip, bzip2, xz or Zstandard"
        )
    return "jsonl"


# JSON lines -------------------------------------------------------------------------------------------


def _split_lines(path: Path) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, number of the first line) of parts, alike in size, that end with a line."""
    size, start, line = path.stat().st_size, 0, 1
    parts = max(1, math.ceil(size / CHUNK_BYTES))
    if parts > 1:
        parts = MULTIPLE * math.ceil(parts / MULTIPLE)
    with open(path, "rb") as file:
        while block := file.read(math.ceil(size / parts)):
            lines = block.count(b"\n")
            if not block.endswith(b"\n"):
                lines += _skip_line(file)
            yield start, file.tell(), line
            start, line = file.tell(), line + lines


def _skip_line(file) -> int:
    """Move to the end of the line; return the number of line ends passed, 0 or 1."""
    while rest := file.readline(2**20):
        if rest.endswith(b"\n"):
            return 1
    return 0


def _read_lines(path: Path, start: int, stop: int, first: int) -> Iterator[tuple[int, Any]]:
    number = first - 1
    with open(path, "rb") as file:
        file.seek(start)
        while file.tell() < stop:
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


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """Read a JSON array element by element, so that each has its line."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield 1, BrokenFileError(f"not UTF-8 text (byte {error.start}): save the file as UTF-8")
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
                yield line, BrokenFileError("there is text after the end of the JSON array: join arrays into one")
            return
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            # Nothing after this can be parsed: where its elements begin is unknown.
            yield line, BrokenFileError(f"not valid JSON ({error}): the file must be one array of objects")
            return
        try:
            yield line, check_value(value, text[at:end])
        except DataError as error:
            yield line, error
        at = end


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(LONGEST_LINE)
    # Bytes that are not UTF-8 pass as half surrogates, to be reported with their row.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        header = file.readline(LONGEST_LINE)
        file.seek(0)
        rows = csv.reader(file, strict=True, delimiter=max(DELIMITERS, key=header.count))
        number = 1
        try:
            names = next(rows)
            check_unique(filter(None, names), "column")
            while True:
                number = rows.line_num + 1
                if cells := next(rows):  # not an empty line
                    yield number, _csv_row(names, cells)
        except StopIteration:
            return
        except DataError as error:
            yield number, BrokenFileError(error)
        except csv.Error as error:
            # A cell may have line breaks, so the next line need not begin a row.
            fix = "quote cells that contain commas, quotes or line breaks, and double the quotes in them"
            yield number, BrokenFileError(f"not valid CSV ({error}): {fix}")


def _csv_row(names: list[str], cells: list[str]) -> Any:
    try:
        "".join([*names, *cells]).encode()
    except UnicodeEncodeError:
        return DataError("not UTF-8 text: save the file as UTF-8")
    if len(cells) != len(names):
        return DataError("more or fewer cells than the header: quote cells that contain commas")
    return {name: cell or None for name, cell in zip(names, cells, strict=True)}
