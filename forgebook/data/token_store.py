"""Tokenised rows: Arrow shards on disk, mapped into memory, and views of them.

    write_shard(rows, path)                     one file of rows
    tokens = map_shards([path, ...])            nothing is read until it is needed, nothing is copied
    tokens, cut = fit_context(tokens, 512, "error")
    save_view(tokens, path); load_view(path)    which rows of which shards, from where to where

Truncation, mixing and dropping make views: a few numbers per row, whatever the rows' length.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forgebook.errors import DataError
from forgebook.runs.atomic import atomic_file

if TYPE_CHECKING:
    from forgebook.data.masking import Encoded

__all__ = [
    "Tokens",
    "collect_shards",
    "fit_context",
    "load_view",
    "map_shards",
    "relocate_view",
    "repetitions",
    "save_view",
    "token_statistics",
    "truncation_losses",
    "write_shard",
]

# What a view holds of each row.
COLUMNS = ("part", "begin", "end", "supervised", "line", "content")
BATCH_ROWS = 10_000


@dataclass(frozen=True)
class Tokens:
    """Rows as slices of flat arrays.

    parts: for each record batch of each shard, (input_ids [tokens] int32, trained [tokens] bool).
    part, begin, end: [rows] where each row lies. supervised: [rows] its tokens that are targets of the loss
    (a row's first token never is). line: [rows] its line in its file. content: [rows] a 64-bit hash.
    files, batches: for each part, its shard and the number of the batch in it. names: the data file it is of.
    """

    parts: tuple[tuple[np.ndarray, np.ndarray], ...]
    part: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    supervised: np.ndarray
    line: np.ndarray
    content: np.ndarray
    names: tuple[str, ...]
    files: tuple[tuple[str, int], ...] = ()

    def __len__(self) -> int:
        return len(self.part)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """[rows] tokens per row."""
        return self.end - self.begin

    def row(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return row k's ids and trained marks, as views."""
        input_ids, trained = self.parts[self.part[k]]
        piece = slice(self.begin[k], self.end[k])
        return input_ids[piece], trained[piece]

    def where(self, k: int) -> str:
        """Name the file:line that row k came from."""
        return f"{self.names[self.part[k]]}:{self.line[k]}"

    def select(self, rows: np.ndarray) -> Tokens:
        """View some of the rows, in this order."""
        return replace(self, **{name: getattr(self, name)[rows] for name in COLUMNS})

    @classmethod
    def from_rows(cls, rows: Iterable[tuple[Sequence[int], Sequence[bool]]], name: str = "rows") -> Tokens:
        """Hold rows of (ids, trained) in memory."""
        table = _table((ids, trained, line) for line, (ids, trained) in enumerate(rows, 1))
        return _view(table.to_batches(), [name], [("", 0)])


# Files ------------------------------------------------------------------------------------------------


def write_shard(rows: Iterable[tuple[Encoded, int]], path: Path, name: str) -> None:
    """Write rows of (encoded, line) as one Arrow file; `name` is the file they came from."""
    import pyarrow as pa

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = None
    with pa.OSFile(str(path), "wb") as file:
        for batch in _batched(rows, BATCH_ROWS):
            table = _table((one.input_ids, one.loss_mask, line) for one, line in batch)
            writer = writer or pa.ipc.new_file(file, table.schema.with_metadata({"name": name}))
            writer.write_table(table)
        if writer:
            writer.close()
    if not writer:
        path.unlink()


def _batched(rows: Iterable, count: int):
    rows = iter(rows)
    while batch := list(itertools.islice(rows, count)):
        yield batch


def _table(rows: Iterable[tuple[Sequence[int], Sequence[bool], int]]):
    import pyarrow as pa

    ids, trained, lines, supervised, contents = [], [], [], [], []
    for row_ids, row_trained, line in rows:
        ids.append(np.asarray(row_ids, np.int32))
        trained.append(np.asarray(row_trained, bool))
        lines.append(line)
        supervised.append(int(trained[-1][1:].sum()))
        digest = hashlib.blake2b(ids[-1].tobytes() + trained[-1].tobytes(), digest_size=8).digest()
        contents.append(int.from_bytes(digest, "little"))
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in ids])]).astype(np.int64)
    flat_ids = np.concatenate(ids or [np.zeros(0, np.int32)])
    flat_trained = np.concatenate(trained or [np.zeros(0, bool)]).view(np.int8)
    return pa.table(
        {
            "input_ids": pa.LargeListArray.from_arrays(offsets, flat_ids),
            "trained": pa.LargeListArray.from_arrays(offsets, flat_trained),
            "supervised": np.array(supervised, np.int32),
            "line": np.array(lines, np.int64),
            "content": np.array(contents, np.uint64),
        }
    )


def map_shards(paths: Sequence[Path]) -> Tokens:
    """Map shards into memory as one set of rows."""
    batches, names, files = [], [], []
    for path in paths:
        reader = _open_shard(str(path))
        for number in range(reader.num_record_batches):
            batches.append(reader.get_batch(number))
            names.append(_name_of(reader))
            files.append((str(path), number))
    return _view(batches, names, files)


def _open_shard(path: str):
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(path))


def _name_of(reader) -> str:
    return reader.schema.metadata[b"name"].decode()


def _arrays(batch) -> tuple[np.ndarray, np.ndarray]:
    """View the ids and trained marks of a record batch."""
    return batch.column("input_ids").values.to_numpy(), batch.column("trained").values.to_numpy().view(bool)


def _view(batches: list, names: list[str], files: list[tuple[str, int]]) -> Tokens:
    """View all rows of some record batches."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    for number, batch in enumerate(batches):
        offsets = batch.column("input_ids").offsets.to_numpy()
        columns["part"].append(np.full(len(batch), number, np.int32))
        columns["begin"].append(offsets[:-1])
        columns["end"].append(offsets[1:])
        for name in ("supervised", "line", "content"):
            columns[name].append(batch.column(name).to_numpy())
    joined = {name: np.concatenate(arrays) if arrays else np.zeros(0, np.int64) for name, arrays in columns.items()}
    return Tokens(tuple(map(_arrays, batches)), names=tuple(names), files=tuple(files), **joined)


def save_view(tokens: Tokens, path: Path) -> None:
    """Write which rows of which shards `tokens` shows; the shards stay where they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shards, numbers = zip(*tokens.files, strict=True)
    columns = {name: getattr(tokens, name) for name in COLUMNS}
    with open(path, "wb") as file:
        np.savez(file, shards=np.array(shards), batches=np.array(numbers), **columns)


def load_view(path: Path) -> Tokens:
    """Map the rows of save_view into memory."""
    with np.load(path) as saved:
        columns = {name: saved[name] for name in COLUMNS}
        files = tuple(zip(saved["shards"].tolist(), saved["batches"].tolist(), strict=True))
    readers = {shard: _open_shard(shard) for shard, _ in files}
    parts = tuple(_arrays(readers[shard].get_batch(number)) for shard, number in files)
    names = tuple(_name_of(readers[shard]) for shard, _ in files)
    return Tokens(parts, names=names, files=files, **columns)


def collect_shards(path: Path, folder: Path) -> None:
    """Give a saved view shards of its own in `folder`, linked where the disk allows it, else copied."""
    folder.mkdir(parents=True, exist_ok=True)

    def collect(shard: str) -> str:
        source = Path(shard)
        target = folder / (source.name if source.parent == folder else f"{source.parent.name}-{source.name}")
        if not target.exists():
            with atomic_file(target) as temporary:
                try:
                    os.link(source, temporary)
                except OSError:
                    shutil.copyfile(source, temporary)
        return str(target)

    relocate_view(path, collect)


def relocate_view(path: Path, moved: Callable[[str], str]) -> None:
    """Write a saved view anew for shards that lie elsewhere; moved: the old place of a shard -> the new one."""
    with np.load(path) as saved:
        arrays = dict(saved)
    arrays["shards"] = np.array([moved(shard) for shard in arrays["shards"].tolist()])
    with open(path, "wb") as file:
        np.savez(file, **arrays)


# Statistics, truncation, mixing -----------------------------------------------------------------------


def token_statistics(tokens: Tokens) -> dict[str, Any]:
    """Summarise a set: rows, tokens, percentiles of the row length, share of tokens that are trained, duplicates."""
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


def truncation_losses(tokens: Tokens, context_length: int) -> dict[str, int]:
    """Count the rows longer than context_length, and the trained tokens that each truncation policy would lose."""
    long = np.flatnonzero(tokens.lengths > context_length)
    losses = {"drop": int(tokens.supervised[long].sum()), "left": 0, "right": 0}
    for k in long:
        trained = tokens.row(k)[1]
        losses["left"] += int(tokens.supervised[k] - trained[-context_length:][1:].sum())
        losses["right"] += int(trained[context_length:].sum())
    return {"longer_rows": len(long), **{f"answer_tokens_lost_{policy}": lost for policy, lost in losses.items()}}


def fit_context(
    tokens: Tokens, context_length: int, policy: str, name: str = "the data", together: int = 1
) -> tuple[Tokens, dict[str, int]]:
    """Apply the truncation policy to rows longer than context_length.

    policy: "error" refuses if a trained token would be lost (a prompt's unneeded tail may go), "drop" leaves
            such rows out, "left" / "right" cut that end off.
    together: rows that are dropped together, or not at all: 2 for the pairs of preference tuning.

    Returns the tokens and what it did: rows_cut, rows_dropped, tokens_cut, answer_tokens_cut.
    Raises DataError if anything would be lost under "error", or if nothing trained is left of the set.
    """
    long = np.flatnonzero(tokens.lengths > context_length)
    begin, end, supervised = tokens.begin.copy(), tokens.end.copy(), tokens.supervised.copy()
    kept = np.ones(len(tokens), bool)
    for k in long:
        trained = tokens.row(k)[1]
        trained = trained[-context_length:] if policy == "left" else trained[:context_length]
        supervised[k] = int(trained[1:].sum())
        if policy == "left":
            begin[k] = end[k] - context_length
        else:
            end[k] = begin[k] + context_length
        kept[k] = policy != "drop" and (policy == "error" or supervised[k] > 0)
    kept = np.repeat(kept.reshape(-1, together).all(axis=1), together)
    lost = int(tokens.supervised.sum() - supervised[kept].sum())
    if policy == "error" and lost:
        raise DataError(
            f"{len(long)} of {len(tokens)} rows of {name} (the first: {tokens.where(long[0])}) are longer than "
            f"context_length {context_length} and would lose {lost} trained tokens: set context_length to "
            f"{int(tokens.lengths.max())} to lose none, or truncation to drop, left or right"
        )
    if not kept.any():
        raise DataError(
            f"no row of {name} has a trained token within context_length {context_length}: "
            f"the longest row has {int(tokens.lengths.max())} tokens"
        )
    fitted = replace(tokens, begin=begin, end=end, supervised=supervised).select(np.flatnonzero(kept))
    dropped = int((~kept).sum())
    done = {
        "rows_cut": len(long) - dropped,
        "rows_dropped": dropped,
        "tokens_cut": int(tokens.lengths.sum() - fitted.lengths.sum()),
        "answer_tokens_cut": lost,
    }
    return fitted, done


def repetitions(rows: np.ndarray, weight: float, seed: int) -> np.ndarray:
    """Take every row `weight` times: whole copies, and for what is over a random part of the rows, in order."""
    whole, part = divmod(weight, 1)
    chosen = np.random.default_rng(seed).permutation(len(rows))[: round(part * len(rows))]
    return np.concatenate([np.tile(rows, int(whole)), rows[np.sort(chosen)]])
