"""The rows of a path -> checked examples, with notes on what was seen and what could not be used.

examples = read_examples(config.train_path, "instruction_tuning", limit=3)
notes = read_notes(config.train_path, "instruction_tuning")      what is wrong, without a tokenizer
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from forgebook.config.data_block import DataSource, HeldOut, ValidPath
from forgebook.data import columns, readers, row_formats
from forgebook.data.data_sources import find_sources, is_large
from forgebook.data.readers import FileChunk
from forgebook.data.row_formats import Example, UnknownFormatError
from forgebook.errors import DataError, StorageError
from forgebook.runs.run import Run

__all__ = [
    "DatasetNotes", "bad_rows_error", "display_paths", "no_examples_error", "noted_examples", "read_examples",
    "read_notes", "validation_source",
]  # fmt: skip

SHOWN_PROBLEMS = 20
COUNTERS = ("formats", "ignored", "labels", "unknown", "special")


@dataclass
class DatasetNotes:
    """What was seen while a set was read, for the data report.

    rows: of its files, bad ones included. unknown: rows of no known format, by their file and keys as JSON.
    special: examples by the special tokens that stand in their texts.
    unread: sources of which only the first rows were read.
    """

    rows: int = 0
    turns: int = 0
    formats: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    ignored: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    labels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    unknown: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    special: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    problems: list[str] = dataclasses.field(default_factory=list)
    empty_answers: int = 0
    unread: int = 0

    @classmethod
    def from_json(cls, written: dict[str, Any]) -> DatasetNotes:
        """Read what dataclasses.asdict wrote."""
        counters = {name: collections.Counter(written[name]) for name in COUNTERS}
        return cls(**{**written, **counters})

    def __add__(self, other: DatasetNotes) -> DatasetNotes:
        return DatasetNotes(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)}
        )


def read_examples(
    path: Any,
    task: str = "instruction_tuning",
    limit: int | None = None,
    labels: tuple[str, ...] = (),
    on_bad_rows: str = "fail",
) -> list[Example]:
    """Read and check the examples of a path, the first `limit`.

    Raises DataError that names every bad row, unless `on_bad_rows` drops them and some are left, and for a path
    without examples.
    """
    notes = DatasetNotes()
    chunks = itertools.chain.from_iterable(readers.split_source(one) for one in find_sources(path))
    parsed = itertools.chain.from_iterable(noted_examples(chunk, task, labels, notes) for chunk in chunks)
    examples = list(itertools.islice(parsed, limit))
    if notes.problems and (on_bad_rows == "fail" or not examples):
        raise bad_rows_error(path, notes, task=task)
    if not examples:
        raise no_examples_error(path)
    return examples


def read_notes(path: Any, task: str, labels: tuple[str, ...] = (), seconds: float = 2.0) -> DatasetNotes | None:
    """Check rows without a tokenizer: those that can be read in some seconds, after downloads.

    Returns None if all seem fine; else the notes on the whole set, of large files and data sets of the hub on the first
    rows alone. Raises DataError or StorageError if a file cannot be read at all, DataError for a set without examples.
    """
    until, notes = time.monotonic() + seconds, DatasetNotes()
    for source in find_sources(path):
        patience = until if is_large(source) else math.inf
        for chunk in readers.chunks_of(source):
            if time.monotonic() > (patience if notes.problems else until):
                notes.unread += 1
                break
            collections.deque(noted_examples(chunk, task, labels, notes, patience), maxlen=0)
    if not notes.rows and not notes.unread:
        raise no_examples_error(path)
    return notes if notes.problems else None


def noted_examples(
    chunk: FileChunk, task: str, labels: tuple[str, ...], notes: DatasetNotes, until: float = math.inf
) -> Iterator[Example]:
    """Yield the examples of a chunk; add what is seen to the notes. until: of time.monotonic, when to stop."""
    for parsed in row_formats.parse_chunk(chunk, task, labels):
        if time.monotonic() > until:
            notes.unread += 1
            return
        notes.rows += 1
        if isinstance(parsed, DataError):
            notes.problems.append(str(parsed))
            if isinstance(parsed, UnknownFormatError):
                notes.unknown[json.dumps([chunk.source.uri, *map(str, parsed.keys)])] += 1
            continue
        example, about = parsed
        notes.formats[about.format] += 1
        notes.ignored.update(about.ignored)
        notes.empty_answers += about.has_empty_answer
        notes.turns += len(example.messages or ())
        if labels and example.messages:
            notes.labels[example.messages[-1]["content"]] += 1
        yield example


def bad_rows_error(path: Any, notes: DatasetNotes, key: str = "train_path", task: str = "") -> DataError:
    """Make the error that names the bad rows of a set, with the mapping to write for rows of no known format.

    key: of the config, whose value is `path`. task: by which the mapping is guessed.
    """
    shown = "\n  ".join(notes.problems[:SHOWN_PROBLEMS])
    more = len(notes.problems) - SHOWN_PROBLEMS
    hidden = f"\n  ... and {more} more" if more > 0 else ""
    mapping = ""
    if notes.unknown:
        uri, *keys = json.loads(notes.unknown.most_common(1)[0][0])
        yaml = columns.mapping_text(keys, path if isinstance(path, str) else uri, key, task).replace("\n", "\n  ")
        mapping = f"\nMap the columns in the config, if this guess says what they hold:\n  {yaml}"
    where = display_paths(path)
    read = f"the first {notes.rows}" if notes.unread else f"{notes.rows}"
    return DataError(f"{len(notes.problems)} of {read} rows of {where} are unusable:\n  {shown}{hidden}{mapping}")


def no_examples_error(path: Any) -> DataError:
    """Make the error of a set without examples."""
    return DataError(f'{display_paths(path)} is empty: it needs at least one row like {{"messages": [...]}}')


def validation_source(run: Run, valid_path: ValidPath | None) -> Any:
    """Return the path of a run's validation examples; None without any. A share that was held out is in its folder.

    Raises StorageError if a run that holds out a share has not started.
    """
    if not isinstance(valid_path, HeldOut):
        return valid_path
    if not run.held_out.exists():
        raise StorageError(f"{run.location} has no {run.held_out.name}, its validation examples: start the run first")
    return str(run.held_out)


def display_paths(path: Any) -> str:
    """Write a config's data path, or list of paths, in one line."""
    entries = path if isinstance(path, list) else [path]
    return ", ".join(_display(entry) for entry in entries)


def _display(entry: str | DataSource | HeldOut) -> str:
    if isinstance(entry, str):
        return entry
    if isinstance(entry, HeldOut):
        return f"{entry.split:.3g} of the training examples"
    return entry.path if entry.weight == 1 else f"{entry.path} x {entry.weight:g}"
