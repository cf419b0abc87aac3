"""Near duplicates by embeddings: where they come from, and which examples are close.

    embedder = Embedder(settings, sources, validation_sources, on_progress)
    embedder.add(example, row=0, is_validation=False)       in the order of DuplicateIndex.add
    for left, right, cosine in embedder.similar_pairs(): ...

Up to EXACT examples are all compared, by products of blocks. More are divided into cells: each example belongs to the
cells of the CELLS nearest of some randomly chosen examples, and is compared within these, as an index of inverted lists
does; the work grows with n^1.5 instead of n^2, and close pairs nearly always share a cell.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from forgebook.config.curation_blocks import EmbeddingsConfig, EndpointConfig
from forgebook.curation.duplicates import compared_text
from forgebook.curation.endpoint import EmbeddingRequest, Endpoint
from forgebook.data import readers
from forgebook.data.data_sources import Source
from forgebook.data.row_formats import Example
from forgebook.errors import ConfigError, DataError, shown_value

__all__ = ["Embedder", "close_pairs"]

EXACT, CELLS, BLOCK = 20_000, 3, 1024
MOST_PER_EXAMPLE = 8  # earlier ones that each example is paired with, per cell: many copies of one make no n^2 pairs
TEXTS_PER_REQUEST = 64
OnProgress = Callable[[str, int, int], None]


class Embedder:
    """The embeddings of examples, read or asked for once all examples are known."""

    def __init__(
        self,
        settings: EmbeddingsConfig,
        sources: Sequence[Source],
        validation_sources: Sequence[Source],
        on_progress: OnProgress = lambda name, done, total: None,
    ):
        """Take the settings, and the files with the examples, for embeddings in a column of theirs."""
        self._settings, self._on_progress = settings, on_progress
        self._sources, self._validation_sources = sources, validation_sources
        self._rows: list[int] = []  # of each example in its files
        self._texts: list[str] = []
        self._validation_count = 0
        self._report: dict[str, Any] = {}

    def add(self, example: Example, row: int, is_validation: bool = False) -> None:
        """Add an example; validation examples come first. row: its number in its files, from 0, malformed ones too."""
        self._rows.append(row)
        self._validation_count += is_validation
        if self._settings.endpoint is not None:
            self._texts.append(compared_text(example))

    def similar_pairs(self) -> Iterator[tuple[int, int, float]]:
        """Yield (left, right, cosine) of examples that are close, left < right.

        Raises ConfigError for embeddings that do not fit the examples.
        """
        vectors = self._vectors()
        count = 0
        for pair in close_pairs(vectors, self._settings.similarity, self._on_progress):
            count += 1
            yield pair
        self._report |= {"examples": len(vectors), "dimensions": vectors.shape[1], "close_pairs": count}

    def report(self) -> dict[str, Any]:
        """Describe the embeddings: their number and size, the pairs that are close, and what was asked."""
        return {"similarity": self._settings.similarity, **self._report}

    def _vectors(self) -> np.ndarray:
        """Return [examples, size], each of length 1, or 0 where an example has no embedding."""
        rows, count = np.array(self._rows), self._validation_count
        if (endpoint := self._settings.endpoint) is not None:
            vectors = self._asked(endpoint)
        elif (column := self._settings.column) is not None:
            training = _read_column(self._sources, column, rows[count:])
            validation = _read_column(self._validation_sources, column, rows[:count]) if count else training[:0]
            vectors = _joined(validation, training)
        else:
            assert self._settings.file is not None
            training = _read_file("file", self._settings.file, rows[count:])
            validation = np.zeros((count, training.shape[1]), np.float32)
            if self._settings.validation_file is not None:
                validation = _read_file("validation_file", self._settings.validation_file, rows[:count])
            vectors = _joined(validation, training)
        if not np.isfinite(vectors).all():
            raise ConfigError("curation.embeddings: some are not finite numbers")
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.divide(vectors, lengths, out=vectors, where=lengths > 0)  # a copy would double the memory

    def _asked(self, settings: EndpointConfig) -> np.ndarray:
        endpoint = Endpoint(settings)
        starts = range(0, len(self._texts), TEXTS_PER_REQUEST)
        requests = (EmbeddingRequest(tuple(self._texts[start : start + TEXTS_PER_REQUEST])) for start in starts)
        parts: dict[int, np.ndarray] = {}
        for number, reply in endpoint.ask_all(requests):
            texts = min(TEXTS_PER_REQUEST, len(self._texts) - starts[number])
            parts[number] = np.frombuffer(base64.b64decode(reply.text), np.float32).reshape(texts, -1)
            self._on_progress("embeddings", len(parts), len(starts))
        self._report |= endpoint.usage.as_json(settings)
        return np.concatenate([parts[number] for number in range(len(starts))])


def close_pairs(
    vectors: np.ndarray, similarity: float, on_progress: OnProgress = lambda name, done, total: None
) -> Iterator[tuple[int, int, float]]:
    """Yield (left, right, cosine) of vectors of length 1 that are at least as similar, left < right, each pair once."""
    cells = [np.arange(len(vectors))] if len(vectors) <= EXACT else _cells(vectors)
    seen: set[tuple[int, int]] = set()
    for done, members in enumerate(cells, 1):
        chosen = vectors[members]
        for start in range(0, len(members), BLOCK):
            stop = start + BLOCK
            cosines = chosen[start:stop] @ chosen[:stop].T  # [right, left]: numbers ascend, so the left come before
            is_close = cosines >= similarity
            is_close &= np.arange(cosines.shape[1]) < np.arange(start, start + len(cosines))[:, None]
            is_close &= np.cumsum(is_close, axis=1, dtype=np.int32) <= MOST_PER_EXAMPLE
            for right, left in np.argwhere(is_close).tolist():
                pair = int(members[left]), int(members[start + right])
                if len(cells) == 1 or pair not in seen:
                    seen.add(pair)
                    yield *pair, float(cosines[right, left])
        on_progress("groups of embeddings", done, len(cells))


def _cells(vectors: np.ndarray) -> list[np.ndarray]:
    """Divide vectors into overlapping cells of about 2 * CELLS * sqrt(n) members; return the numbers in each."""
    count = int(len(vectors) ** 0.5)
    chosen = np.random.default_rng(0).choice(len(vectors), count, replace=False)
    centers = vectors[np.sort(chosen)].T
    nearest = np.empty((len(vectors), CELLS), np.int32)
    for start in range(0, len(vectors), BLOCK):
        cosines = vectors[start : start + BLOCK] @ centers
        nearest[start : start + BLOCK] = np.argpartition(-cosines, CELLS, axis=1)[:, :CELLS]
    cell = nearest.reshape(-1)
    order = np.argsort(cell, kind="stable")
    bounds = np.searchsorted(cell[order], np.arange(count + 1))
    return [order[low:high] // CELLS for low, high in itertools.pairwise(bounds) if high - low > 1]


def _read_file(key: str, path: str, rows: np.ndarray) -> np.ndarray:
    """Read the embeddings of some rows from a .npy or .parquet file. Raises ConfigError if it has other rows."""
    where = f"curation.embeddings.{key}: {path}"
    try:
        matrix = _read_parquet(path) if path.endswith(".parquet") else np.load(Path(path).expanduser(), mmap_mode="r")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from None
    if matrix.ndim != 2:
        raise ConfigError(f"{where} has the shape {list(matrix.shape)}, must be one embedding per row of the data")
    if len(rows) and len(matrix) <= rows[-1]:
        raise ConfigError(f"{where} has {len(matrix):,} embeddings for at least {rows[-1] + 1:,} rows of the data")
    return np.asarray(matrix[rows], np.float32)


def _read_parquet(path: str) -> np.ndarray:
    """Read the column of a Parquet file that holds lists; of several the one named embedding."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.read_schema(Path(path).expanduser())
    lists = [one.name for one in schema if pa.types.is_list(one.type) or pa.types.is_fixed_size_list(one.type)]
    name = "embedding" if "embedding" in lists else lists[0] if len(lists) == 1 else None
    if name is None:
        raise ValueError(f"needs one column of lists of numbers, or one named embedding; it has {schema.names}")
    column = pq.read_table(Path(path).expanduser(), columns=[name])[name].combine_chunks()
    if column.null_count:
        raise ValueError(f"{column.null_count} rows of {name} are empty")
    numbers = column.flatten().to_numpy(zero_copy_only=False)
    if len(column) == 0 or len(numbers) % len(column):
        raise ValueError(f"the lists of {name} differ in length")
    return numbers.reshape(len(column), -1)


def _read_column(sources: Sequence[Source], column: str, rows: np.ndarray) -> np.ndarray:
    """Read the embeddings of some rows from a key of theirs."""
    wanted, vectors, number = set(rows.tolist()), [], 0
    for source in sources:
        plain = dataclasses.replace(source, mapping=None)  # a mapping leaves the other columns out
        for chunk in readers.chunks_of(plain):
            for where, row in readers.read_chunk(chunk):
                if number in wanted:
                    vectors.append(_numbers(row, column, where))
                number += 1
    sizes = sorted({len(vector) for vector in vectors})
    if len(sizes) > 1:
        raise ConfigError(f"curation.embeddings.column: {column} has lists of {sizes[0]} and of {sizes[-1]} numbers")
    return np.array(vectors, np.float32).reshape(len(vectors), -1)


def _numbers(row: Any, column: str, where: str) -> np.ndarray:
    value = row.get(column) if isinstance(row, dict) else None
    try:
        value = json.loads(value) if isinstance(value, str) else value  # of a CSV file
        vector = np.asarray(value, np.float32)
    except (ValueError, TypeError):
        vector = np.empty(0, np.float32)
    if vector.ndim != 1 or not vector.size:
        shown = "missing" if value is None else shown_value(value)
        raise DataError(f"{where}: {column}: {shown}; curation.embeddings.column needs a list of numbers in each row")
    return vector


def _joined(validation: np.ndarray, training: np.ndarray) -> np.ndarray:
    if not len(validation):
        return training
    if validation.shape[1] != training.shape[1]:
        sizes = f"{validation.shape[1]} and {training.shape[1]}"
        raise ConfigError(f"curation.embeddings: those of the validation and training examples have {sizes} numbers")
    return np.concatenate([validation, training])
