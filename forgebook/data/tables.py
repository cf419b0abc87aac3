"""Rows of Parquet and Arrow files and of the hub's data sets: columns with types, and names for ClassLabel numbers.

An Arrow file is a shard of a folder that `datasets.save_to_disk` wrote. All three store what a column of labels means
in the schema, as the library `datasets` writes it; a row has the label's name in place of its number.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from forgebook.data.json_values import check_unique, without_nulls
from forgebook.errors import DataError, StorageError, first_line

__all__ = [
    "HUB", "BrokenFileError", "hub_dataset", "hub_revision", "read_arrow", "read_hub", "read_parquet", "split_arrow",
    "split_parquet",
]  # fmt: skip

HUB = "hf://"
ARROW_FILE = b"ARROW1"
NO_LABEL = -1  # of ClassLabel: the row has none


class BrokenFileError(DataError):
    """What is wrong at a place of a file after which nothing can be read: how many rows follow is unknown."""


# Parquet ----------------------------------------------------------------------------------------------


def split_parquet(uri: str, path: Path) -> list[int]:
    """Return the rows of each row group. Raises DataError for a file that is not Parquet."""
    import pyarrow.parquet as pq

    try:
        about = pq.ParquetFile(path).metadata
        check_unique(about.schema.to_arrow_schema().names, "column")
        return [about.row_group(group).num_rows for group in range(about.num_row_groups)]
    except DataError as error:
        raise DataError(f"{uri}: {error}") from None
    except Exception as error:  # Arrow raises what its decoders and Python's conversions raise
        raise DataError(f"{uri}: not a readable Parquet file ({first_line(error)}): copy it again") from None


def read_parquet(path: Path, group: int, first: int) -> Iterator[tuple[int, Any]]:
    """Yield (number, row) of one row group, BrokenFileError the last; first: the number of its first row."""
    import pyarrow.parquet as pq

    number = first
    try:
        file = pq.ParquetFile(path)
        names = _class_names(file.schema_arrow.metadata)
        for batch in file.iter_batches(batch_size=1_000, row_groups=[group]):
            for row in _batch_rows(batch):
                yield number, row if isinstance(row, DataError) else _named(row, names)
                number += 1
    except Exception as error:
        # Nothing after this in its row group can be read: a damaged page holds many rows.
        yield number, BrokenFileError(f"the Parquet file is damaged here ({first_line(error)}): copy it again")


# Arrow ------------------------------------------------------------------------------------------------


def split_arrow(uri: str, path: Path) -> list[int]:
    """Return the rows of each record batch. Raises DataError for a file that is not Arrow."""
    try:
        return [len(batch) for batch in _record_batches(path)]
    except Exception as error:
        raise DataError(f"{uri}: not a readable Arrow file ({first_line(error)}): copy it again") from None


def read_arrow(path: Path, start: int, stop: int, first: int) -> Iterator[tuple[int, Any]]:
    """Yield (number, row) of the record batches from `start` to `stop`; first: the number of the first row."""
    number = first
    for k, batch in enumerate(_record_batches(path)):
        if start <= k < stop:
            names = _class_names(batch.schema.metadata)
            for row in _batch_rows(batch):
                yield number, row if isinstance(row, DataError) else _named(row, names)
                number += 1


def _record_batches(path: Path) -> Iterator[Any]:
    """Map the record batches of an Arrow file or stream: nothing is read until it is needed."""
    import pyarrow as pa

    mapped = pa.memory_map(str(path))
    if mapped.read(len(ARROW_FILE)) == ARROW_FILE:
        reader = pa.ipc.open_file(mapped)
        yield from (reader.get_batch(k) for k in range(reader.num_record_batches))
        return
    mapped.seek(0)
    yield from pa.ipc.open_stream(mapped)


def _batch_rows(batch: Any) -> Iterator[Any]:
    """Convert a batch to Python; row by row, with a DataError in the place of a bad one, if it has any."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, a date outside Python's
        for k in range(len(batch)):
            try:
                yield from batch.slice(k, 1).to_pylist()
            except (ValueError, OverflowError) as error:
                yield DataError(f"a cell cannot be read ({first_line(error)}): save text as UTF-8")


# Labels -----------------------------------------------------------------------------------------------


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Map the columns of ClassLabel to the names of their labels, from what `datasets` writes into a schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {
        name: feature["names"]
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list)
    }


class _LabelName(str):
    """The name of a label, for whoever asks for its number instead."""

    number: int


def _named(row: dict[str, Any], names: Mapping[str, list[str]]) -> dict[str, Any]:
    """Put the names of labels in the place of their numbers, and leave out what has no value inside of the columns."""
    for key, labels in names.items():
        number = row.get(key)
        if number == NO_LABEL:
            row[key] = None
        elif isinstance(number, int) and 0 <= number < len(labels):
            row[key] = _LabelName(labels[number])
            row[key].number = number
    return {key: without_nulls(value) for key, value in row.items()}


# The hub ----------------------------------------------------------------------------------------------


def hub_dataset(uri: str, revision: str | None = None) -> Any:
    """Load hf://owner/name[/config]:split, or hf://folder:split for a folder that begins with . or /.

    revision: a branch, tag or commit; None: the main branch. Raises StorageError if it cannot be loaded.
    """
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
        dataset = datasets.load_dataset("/".join(owner_and_name), config, split=split, revision=revision)
        _leave_images(dataset.info.features)
        return dataset
    except Exception as error:  # the library raises whatever its readers, the hub and the network raise
        reason = first_line(error)
        raise StorageError(f"{uri} could not be loaded: {reason}") from None


def _leave_images(feature: Any) -> None:
    """Let the images of a data set be read as their bytes and paths, which `data.images` checks and decodes."""
    if hasattr(feature, "decode"):
        feature.decode = False
    inner = feature if isinstance(feature, dict | list) else getattr(feature, "feature", [])
    inner = list(inner.values()) if isinstance(inner, dict) else inner
    for part in inner if isinstance(inner, list) else [inner]:
        _leave_images(part)


def hub_revision(dataset: Any) -> str | None:
    """Return the commit that a data set of the hub was loaded from; None where the library does not record it."""
    for address in dataset.info.download_checksums or ():
        before, at, rest = str(address).partition("@")
        if at and before.startswith(f"{HUB}datasets/"):
            return rest.split("/")[0]
    return None


def read_hub(dataset: Any, start: int, stop: int, first: int) -> Iterator[tuple[int, Any]]:
    """Yield (number, row) of the rows from `start` to `stop`; first: the number of the first one."""
    features = dataset.features or {}
    names = {name: list(feature.names) for name, feature in features.items() if hasattr(feature, "int2str")}
    for number, row in enumerate(dataset.select(range(start, stop)), first):
        yield number, _named(row, names)
