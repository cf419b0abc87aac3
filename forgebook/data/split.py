"""The share of the training examples that is held out for validation.

    train, valid, counts = hold_out(tokens, 0.05, seed=0)      numbers of examples
    rows = rows_of(valid, source, sources)                     which rows of which sources these are
    write_examples(rows, "instruction_tuning", (), run.held_out)

An example's side depends on the seed, its first user message and the other examples, not on the order of files, the
number of workers or how often the run was started.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from forgebook.data.data_sources import Source
from forgebook.data.image_parts import as_parts
from forgebook.data.images import IMAGES, image_identity
from forgebook.data.readers import split_source
from forgebook.data.row_formats import Example, parse_chunk
from forgebook.data.token_store import Tokens
from forgebook.errors import DataError
from forgebook.runs.atomic import atomic_file

__all__ = ["Row", "as_row", "group_of", "hold_out", "rows_of", "write_examples"]

# The smallest group may be at most this many times the share asked for.
MOST_OVER = 2
# The line of a file and the group of the example there: a JSON array may have all its examples in one line.
Row = tuple[int, int]


def group_of(example: Example) -> int:
    """Hash what examples that belong together share: the first user message, but for case and spaces, and its images.

    Plain text, and a conversation without a user message, belong with their own copies alone.
    """
    # Not the system message: the same question under another one, or none, has much the same answer.
    asked = next((message for message in example.messages or () if message["role"] == "user"), None)
    text = json.dumps(as_row(example)) if asked is None else " ".join(asked["content"].lower().split())
    # The same question about another image is another question.
    text = "\0".join([text, *(image_identity(image) for image in (asked or {}).get(IMAGES) or ())])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def hold_out(tokens: Tokens, share: float, seed: int, size: int = 1) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Divide examples into those to train and those held out for validation, without the duplicates of the latter.

    share: of the distinct examples; whole groups are held out, at least one. size: this many adjacent examples are one
    (2: a pair). Returns the numbers of both in their order, and the counts prompts, duplicates_left_out.

    Raises DataError if all examples have the same first user message, or every such group is far larger than the share.
    """
    units = np.arange(len(tokens)).reshape(-1, size)
    # A pair is a duplicate if both of its conversations are.
    content = np.bitwise_xor.reduce(tokens.content[units] * np.arange(1, 2 * size, 2, dtype=np.uint64), axis=1)
    group = tokens.group[units[:, 0]]
    _, first = np.unique(content, return_index=True)
    groups, counts = np.unique(group[first], return_counts=True)
    if len(groups) < 2:
        raise DataError(
            "valid_path.split: all examples have the same first user message, so none can be held out without its like "
            "in training: name a file of validation examples"
        )
    wanted, taken = max(1, round(share * len(first))), 0
    chosen: list[Any] = []
    for k in np.argsort(_mixed(groups, seed)):
        if taken + counts[k] <= wanted and len(chosen) < len(groups) - 1:
            chosen.append(k)
            taken += counts[k]
        if taken == wanted:
            break
    if not chosen:  # every group is larger than the share
        smallest = int(counts.min())
        if smallest > MOST_OVER * wanted:
            raise DataError(
                f"valid_path.split: {share:g} of {len(first)} distinct examples is {wanted}, but examples with the same"
                f" first user message are held out together, and the smallest such group has {smallest}: name a"
                " file of validation examples, or hold out a larger share"
            )
        chosen = [np.argmin(counts)]
    is_out = np.isin(group, groups[chosen])
    is_valid = np.zeros(len(units), bool)
    is_valid[first] = is_out[first]
    report = {"prompts": len(chosen), "duplicates_left_out": int(is_out.sum() - is_valid.sum())}
    return units[~is_out].reshape(-1), units[is_valid].reshape(-1), report


def _mixed(numbers: np.ndarray, seed: int) -> np.ndarray:
    """Mix 64-bit numbers with a seed (splitmix64): their order is as good as random, and the same everywhere."""
    start = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "little")
    mixed = numbers ^ np.uint64(start)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed


def rows_of(tokens: Tokens, source: np.ndarray, sources: Sequence[Source]) -> dict[Source, set[Row]]:
    """List the rows of each source that examples were read from. source: [examples] the number of each one's source."""
    rows: dict[Source, set[Row]] = {one: set() for one in sources}  # a source may be listed twice
    for number, line, group in zip(source.tolist(), tokens.line.tolist(), tokens.group.tolist(), strict=True):
        rows[sources[number]].add((line, group))
    return rows


def write_examples(rows: Mapping[Source, Collection[Row]], task: str, labels: Sequence[str], path: Path) -> None:
    """Write some rows of sources as JSON lines in the formats of messages, preference or text: a run's own copy.

    Raises DataError or StorageError if a source cannot be read.
    """
    written = set[str]()
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for source, wanted in rows.items():
            for chunk in split_source(source) if wanted else ():
                for parsed in parse_chunk(chunk, task, labels):
                    if isinstance(parsed, DataError) or (parsed[0].line, group_of(parsed[0])) not in wanted:
                        continue
                    row = json.dumps(as_row(parsed[0]), ensure_ascii=False)
                    if row not in written:  # duplicates may share a line
                        written.add(row)
                        file.write(row + "\n")


def as_row(example: Example) -> dict[str, Any]:
    """Write an example as a row in the format of messages, preference or text."""
    if example.messages is None:
        return {"text": example.text}
    tools = {"tools": example.tools} if example.tools else {}
    if example.rejected is not None:
        return {"chosen": example.messages, "rejected": example.rejected, **tools}
    return {"messages": as_parts(example.messages), **tools}
