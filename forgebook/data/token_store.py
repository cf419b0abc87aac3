"""Tokenized examples: Arrow shards on disk, mapped into memory, and views of them.

    write_shard(encoded, path, name)            one file of examples
    tokens = map_shards([path, ...])            nothing is read until it is needed, nothing is copied
    save_view(tokens, path); load_view(path)    which examples of which shards, from where to where

Truncation (truncation.py), mixing and dropping make views: a few numbers per example, whatever its length.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forgebook.data.image_tokens import PlacedImage
from forgebook.data.images import ImageFile, collect_image
from forgebook.runs.atomic import link_or_copy

if TYPE_CHECKING:
    from forgebook.data.masking import Encoded

__all__ = [
    "Tokens",
    "collect_shards",
    "count_batches",
    "image_files",
    "image_store",
    "load_view",
    "map_shards",
    "relocate_view",
    "repeat_examples",
    "sample_examples",
    "save_view",
    "token_statistics",
    "write_shard",
]

# What a view stores of each example.
COLUMNS = ("part", "begin", "end", "supervised", "line", "content", "group")
# Examples per record batch of a shard.
RECORD_BATCH = 10_000


@dataclass(frozen=True)
class Tokens:
    """Examples as slices of flat arrays.

    parts:            for each record batch of each shard, (input_ids [tokens] int32, loss_mask [tokens] bool).
    part, begin, end: [examples] the part of each, and its tokens there.
    supervised:       [examples] tokens that are targets of the loss (the first token of an example never is).
    line:             [examples] the line in its data file.
    content:          [examples] a 64-bit hash.
    group:            [examples] a 64-bit hash of the first user message: see `split.group_of`.
    names, files:     for each part, its data file; its shard and the number of the record batch there.
    images:           for each part, (where its examples begin, for each its images as JSON, empty without any).
    """

    parts: tuple[tuple[np.ndarray, np.ndarray], ...]
    part: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    supervised: np.ndarray
    line: np.ndarray
    content: np.ndarray
    group: np.ndarray
    names: tuple[str, ...]
    files: tuple[tuple[str, int], ...] = ()
    images: tuple[tuple[np.ndarray, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.part)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """[examples] tokens per example."""
        return self.end - self.begin

    def example(self, k: int | np.integer) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids and the loss mask of example k, as views."""
        input_ids, loss_mask = self.parts[self.part[k]]
        tokens = slice(self.begin[k], self.end[k])
        return input_ids[tokens], loss_mask[tokens]

    def images_of(self, k: int | np.integer) -> list[PlacedImage]:
        """List the images of example k whose tokens it has, with their places among these."""
        if not self.images:
            return []
        starts, listed = self.images[self.part[k]]
        row = int(np.searchsorted(starts, self.begin[k], "right")) - 1
        begin, length = int(self.begin[k] - starts[row]), int(self.end[k] - self.begin[k])
        placed = (_placed(one, begin) for one in json.loads(listed[row].as_py() or "[]"))
        return [one for one in placed if one.start >= 0 and one.stop <= length]

    def store_of(self, k: int | np.integer) -> Path:
        """Return the folder that holds those images of example k that are no local files."""
        return image_store(Path(self.files[self.part[k]][0]).parent.parent)

    def where(self, k: int | np.integer) -> str:
        """Name the file:line that example k was read from."""
        return f"{self.names[self.part[k]]}:{self.line[k]}"

    def select(self, examples: np.ndarray) -> Tokens:
        """View some of the examples, in this order."""
        return replace(self, **{name: getattr(self, name)[examples] for name in COLUMNS})

    @classmethod
    def from_examples(cls, examples: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> Tokens:
        """Hold examples of (ids, loss mask) in memory."""
        table = _table((ids, mask, line, None, ()) for line, (ids, mask) in enumerate(examples, 1))
        return _view(table.to_batches(), ["examples"], [("", 0)])

    @classmethod
    def from_encoded(cls, encoded: Iterable[Encoded]) -> Tokens:
        """Hold encoded examples in memory, with where their images are."""
        table = _table((one.input_ids, one.loss_mask, line, None, one.images) for line, one in enumerate(encoded, 1))
        return _view(table.to_batches(), ["examples"], [("", 0)])


# Files ------------------------------------------------------------------------------------------------


def write_shard(examples: Iterable[tuple[Encoded, int, int | None]], path: Path, name: str) -> None:
    """Write examples of (encoded, line, group) as one Arrow file; `name` is the data file they were read from.

    group: None for an example that belongs with its own copies alone.
    """
    import pyarrow as pa

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = None
    with pa.OSFile(str(path), "wb") as file:
        for batch in _batched(examples, RECORD_BATCH):
            table = _table((one.input_ids, one.loss_mask, line, group, one.images) for one, line, group in batch)
            writer = writer or pa.ipc.new_file(file, table.schema.with_metadata({"name": name}))
            writer.write_table(table)
        if writer:
            writer.close()
    if not writer:
        path.unlink()


def _batched(examples: Iterable, count: int):
    examples = iter(examples)
    while batch := list(itertools.islice(examples, count)):
        yield batch


def _table(examples: Iterable[tuple[Sequence[int], Sequence[bool], int, int | None, Sequence[PlacedImage]]]):
    import pyarrow as pa

    ids, masks, lines, supervised, contents, groups, images = [], [], [], [], [], [], []
    for example_ids, mask, line, group, placed in examples:
        ids.append(np.asarray(example_ids, np.int32))
        masks.append(np.asarray(mask, bool))
        lines.append(line)
        supervised.append(int(masks[-1][1:].sum()))
        seen = "".join(one.file.digest for one in placed).encode()
        digest = hashlib.blake2b(ids[-1].tobytes() + masks[-1].tobytes() + seen, digest_size=8).digest()
        images.append(json.dumps([_written(one) for one in placed]) if placed else "")
        contents.append(int.from_bytes(digest, "little"))
        groups.append(contents[-1] if group is None else group)
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in ids])]).astype(np.int64)
    flat_ids = np.concatenate(ids or [np.zeros(0, np.int32)])
    flat_mask = np.concatenate(masks or [np.zeros(0, bool)]).view(np.int8)
    return pa.table(
        {
            "input_ids": pa.LargeListArray.from_arrays(_to_arrow(offsets), _to_arrow(flat_ids)),
            "loss_mask": pa.LargeListArray.from_arrays(_to_arrow(offsets), _to_arrow(flat_mask)),
            "supervised": _to_arrow(np.array(supervised, np.int32)),
            "line": _to_arrow(np.array(lines, np.int64)),
            "content": _to_arrow(np.array(contents, np.uint64)),
            "group": _to_arrow(np.array(groups, np.uint64)),
            "images": _strings(images),
        }
    )


def _strings(values: list[str]):
    """Make a column of texts from their bytes: of a list pyarrow asks pandas, whose import takes half a second."""
    import pyarrow as pa

    data = [value.encode() for value in values]
    offsets = np.cumsum([0, *map(len, data)], dtype=np.int64)
    return pa.LargeStringArray.from_buffers(len(data), pa.py_buffer(offsets), pa.py_buffer(b"".join(data)))


def _written(placed: PlacedImage) -> list[Any]:
    return [*dataclasses.astuple(placed.file), placed.start, placed.stop]


def _placed(written: list[Any], begin: int = 0) -> PlacedImage:
    *file, start, stop = written
    return PlacedImage(ImageFile(*file), start - begin, stop - begin)


def image_store(folder: Path) -> Path:
    """Return where images that are no local files are kept, beside the folders of shards."""
    return folder / "images"


def image_files(path: Path) -> Iterator[ImageFile]:
    """Yield the images of a shard."""
    reader = _open_shard(str(path))
    for number in range(reader.num_record_batches):
        for written in reader.get_batch(number).column("images").to_pylist():
            yield from (_placed(one).file for one in json.loads(written or "[]"))


# Arrow's own conversions from and to numpy import pandas, which takes half a second.


def _to_arrow(values: np.ndarray):
    """View numbers as an Arrow array without nulls."""
    import pyarrow as pa

    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def _to_numpy(array) -> np.ndarray:
    """View the numbers of an Arrow array without nulls."""
    dtype = array.type.to_pandas_dtype()
    if not len(array):
        return np.zeros(0, dtype)
    return np.frombuffer(array.buffers()[1], dtype)[array.offset : array.offset + len(array)]


def map_shards(paths: Sequence[Path]) -> Tokens:
    """Map shards into memory as one set of examples."""
    batches, names, files = [], [], []
    for path in paths:
        reader = _open_shard(str(path))
        for number in range(reader.num_record_batches):
            batches.append(reader.get_batch(number))
            names.append(_name_of(reader))
            files.append((str(path), number))
    return _view(batches, names, files)


def count_batches(path: Path) -> int:
    """Count the record batches of a shard: the parts of `Tokens` that it is mapped to."""
    return _open_shard(str(path)).num_record_batches


def _open_shard(path: str):
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(path))


def _name_of(reader) -> str:
    return reader.schema.metadata[b"name"].decode()


def _arrays(batch) -> tuple[np.ndarray, np.ndarray]:
    """View the ids and loss masks of a record batch."""
    return _to_numpy(batch.column("input_ids").values), _to_numpy(batch.column("loss_mask").values).view(bool)


def _images(batch) -> tuple[np.ndarray, Any]:
    """View where the examples of a record batch begin, and their images."""
    return _to_numpy(batch.column("input_ids").offsets)[:-1], batch.column("images")


def _view(batches: list, names: list[str], files: list[tuple[str, int]]) -> Tokens:
    """View all examples of some record batches."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    for number, batch in enumerate(batches):
        offsets = _to_numpy(batch.column("input_ids").offsets)
        columns["part"].append(np.full(len(batch), number, np.int32))
        columns["begin"].append(offsets[:-1])
        columns["end"].append(offsets[1:])
        for name in ("supervised", "line", "content", "group"):
            columns[name].append(_to_numpy(batch.column(name)))
    joined = {name: np.concatenate(arrays) if arrays else np.zeros(0, np.int64) for name, arrays in columns.items()}
    images = tuple(map(_images, batches))
    return Tokens(tuple(map(_arrays, batches)), names=tuple(names), files=tuple(files), images=images, **joined)


def save_view(tokens: Tokens, path: Path) -> None:
    """Write which examples of which shards `tokens` shows; the shards stay where they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shards, numbers = zip(*tokens.files, strict=True)
    columns = {name: getattr(tokens, name) for name in COLUMNS}
    with open(path, "wb") as file:
        np.savez(file, shards=np.array(shards), batches=np.array(numbers), **columns)


def load_view(path: Path) -> Tokens:
    """Map the examples of save_view into memory."""
    with np.load(path) as saved:
        columns = {name: saved[name] for name in COLUMNS}
        files = tuple(zip(saved["shards"].tolist(), saved["batches"].tolist(), strict=True))
    readers = {shard: _open_shard(shard) for shard, _ in files}
    batches = [readers[shard].get_batch(number) for shard, number in files]
    names = tuple(_name_of(readers[shard]) for shard, _ in files)
    images = tuple(map(_images, batches))
    return Tokens(tuple(map(_arrays, batches)), names=names, files=files, images=images, **columns)


def collect_shards(path: Path, folder: Path) -> None:
    """Give a saved view shards of its own in `folder`, and images beside it: linked if the disk allows, or copied."""
    folder.mkdir(parents=True, exist_ok=True)

    def collect(shard: str) -> str:
        source = Path(shard)
        target = folder / (source.name if source.parent == folder else f"{source.parent.name}-{source.name}")
        if not target.exists():
            link_or_copy(source, target)
        if source.parent != folder:
            for file in image_files(source):
                collect_image(file, image_store(source.parent.parent), image_store(folder.parent))
        return str(target)

    relocate_view(path, collect)


def relocate_view(path: Path, moved: Callable[[str], str]) -> None:
    """Rewrite a saved view for shards that were moved; moved: the old path of a shard -> the new one."""
    with np.load(path) as saved:
        arrays = dict(saved)
    arrays["shards"] = np.array([moved(shard) for shard in arrays["shards"].tolist()])
    with open(path, "wb") as file:
        np.savez(file, **arrays)


# Statistics, mixing -----------------------------------------------------------------------------------


def token_statistics(tokens: Tokens) -> dict[str, Any]:
    """Summarize a set: examples, tokens, percentiles of their length, share of tokens in the loss, duplicates."""
    p50, p95, p99 = np.percentile(tokens.lengths, [50, 95, 99], method="inverted_cdf")
    _, first = np.unique(tokens.content, return_index=True)
    return {
        "rows": len(tokens),
        "tokens": int(tokens.lengths.sum()),
        "supervised_tokens": int(tokens.supervised.sum()),
        "supervised_share": round(float(tokens.supervised.sum() / max(1, tokens.lengths.sum())), 4),
        "tokens_p50": int(p50),
        "tokens_p95": int(p95),
        "tokens_p99": int(p99),
        "tokens_max": int(tokens.lengths.max()),
        "duplicate_rows": len(tokens) - len(first),
    }


def repeat_examples(examples: np.ndarray, weight: float, seed: int, group: int = 1) -> np.ndarray:
    """Repeat examples `weight` times: whole copies, and for the fraction a random part of them, in order.

    At least one is taken, if there are any. group: this many adjacent examples stay together: 2 for preference pairs.
    """
    copies, fraction = divmod(weight, 1)
    units = len(examples) // group
    least = int(copies == 0 and units > 0)
    extra = np.sort(np.random.default_rng(seed).permutation(units)[: max(round(fraction * units), least)])
    return np.concatenate([np.tile(examples, int(copies)), examples.reshape(-1, group)[extra].reshape(-1)])


def sample_examples(tokens: Tokens, most: int, group: int = 1) -> Tokens:
    """View at most so many examples, at random but the same each time, in order; group: as of `repeat_examples`."""
    units = np.arange(len(tokens)).reshape(-1, group)
    if len(units) <= most:
        return tokens
    return tokens.select(units[np.sort(np.random.default_rng(0).permutation(len(units))[:most])].reshape(-1))
