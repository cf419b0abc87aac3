"""The tokens of the training examples, counted in about two seconds, without torch or transformers.

data = count_data(config)       Statistics, or None where the data cannot be read here
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forgebook.catalog import model_folder
from forgebook.config.blocks import labels_of
from forgebook.config.data_block import HeldOut
from forgebook.data import readers
from forgebook.data.data_sources import find_sources
from forgebook.data.images import IMAGE
from forgebook.data.row_formats import Example, parse_chunk
from forgebook.data.token_store import repeat_examples
from forgebook.errors import DataError
from forgebook.planning.image_count import image_counter
from forgebook.runs import object_store

if TYPE_CHECKING:
    from forgebook.config.data_block import DataPath
    from forgebook.config.schema import FinetuneConfig

__all__ = ["Statistics", "count_data", "data_is_here"]

COUNTING_SECONDS = 2.0
CHARACTERS_PER_TOKEN = 4
# What a chat template adds to a message: the role, its delimiters, the end-of-turn token (five in Llama 3's).
TOKENS_PER_MESSAGE = 5
# A mix is at most so many times as many examples as were counted.
MOST_COPIES = 4


@dataclass
class _Entry:
    """What was counted of an entry of train_path.

    size, read: bytes of its chunks, and of those that were read. examples: the tokens of each one's sequences, and the
    pixels of its images.
    """

    weight: float
    size: int = 0
    read: int = 0
    examples: list[tuple[list[int], int]] = field(default_factory=list)


@dataclass(frozen=True)
class Statistics:
    """Tokens of the training examples, by example: two for a preference pair.

    scale: how many times as many examples there are, if only a part was counted. how: the way of counting. pixels: of
    images, as the processor resizes them, per token of all examples.
    """

    lengths: tuple[int, ...]
    scale: float
    how: str
    pixels: float = 0.0

    @property
    def examples(self) -> int:
        """Count the examples of an epoch."""
        return round(len(self.lengths) * self.scale)

    @property
    def tokens(self) -> int:
        """Count the tokens of an epoch, before truncation."""
        return round(sum(self.lengths) * self.scale)

    @property
    def p95(self) -> int:
        """Return the length that 95% of the examples do not exceed."""
        return sorted(self.lengths)[math.ceil(0.95 * len(self.lengths)) - 1]

    @property
    def longest(self) -> int:
        """Return the length of the longest example."""
        return max(self.lengths)


def count_data(config: FinetuneConfig) -> Statistics | None:
    """Count the tokens of the training examples within a few seconds: of a part of them if there are many.

    Counts with the tokenizer.json of a local model, else assumes four characters per token. Bad examples are left out.
    None if the data is stored elsewhere (nothing is downloaded) or does not exist.
    """
    if not data_is_here(config.train_path):
        return None
    assert config.task is not None  # filled in when the config is checked
    count, how = _counter(config.model_id)
    images, about_images = image_counter(config) or (None, "")
    labels = labels_of(config.classifier_config)
    entries, chunks = _chunks(config.train_path)
    until = time.monotonic() + COUNTING_SECONDS
    for entry, chunk, size in chunks:
        if time.monotonic() > until and any(one.examples for one in entries):
            break
        parsed = parse_chunk(chunk, config.task, labels)
        for example in (item[0] for item in parsed if not isinstance(item, DataError)):
            added, pixels = images(example) if images else (0, 0)
            entry.examples.append(([length + added for length in count(example)], pixels))
        entry.read += size
    if not any(one.examples for one in entries):
        return None
    share = sum(one.read for one in entries) / sum(one.size for one in entries)
    part = "" if share == 1 else f", from {share:.0%} of the data"
    held_out = config.valid_path.split if isinstance(config.valid_path, HeldOut) else 0.0
    mixed, scale = _mixed(entries)
    scale *= 1 - held_out
    if config.max_examples is not None:
        scale = min(scale, config.max_examples / len(mixed))
    lengths = tuple(length for sequences, _ in mixed for length in sequences)
    return Statistics(lengths, scale, how + about_images + part, sum(pixels for _, pixels in mixed) / sum(lengths))


def _chunks(path: DataPath) -> tuple[list[_Entry], list[tuple[_Entry, readers.FileChunk, int]]]:
    """List the entries of a path, and their chunks with their bytes, in turn: one of each entry, the smallest first."""
    entries: dict[int, _Entry] = {}
    chunks: dict[int, list[tuple[_Entry, readers.FileChunk, int]]] = {}
    for source in find_sources(path):
        entry = entries.setdefault(source.entry, _Entry(source.weight))
        for chunk, size in readers.sized_chunks(source):
            entry.size += size
            chunks.setdefault(source.entry, []).append((entry, chunk, size))
    # So some of each is read if time is short: a chunk of CSV may take longer than there is.
    turns = ([one for one in turn if one is not None] for turn in itertools.zip_longest(*chunks.values()))
    return list(entries.values()), [one for turn in turns for one in sorted(turn, key=lambda one: one[2])]


def _mixed(entries: list[_Entry]) -> tuple[list[tuple[list[int], int]], float]:
    """Repeat the counted examples of each entry as its weight and its unread part say; return them and their scale."""
    read = [(one.examples, one.weight * one.size / one.read) for one in entries if one.examples]
    counted = sum(len(examples) for examples, _ in read)
    total = sum(len(examples) * times for examples, times in read)
    # One copy of the rarest, so that every length is there; but no mix of any size.
    unit = max(min(times for _, times in read), total / (MOST_COPIES * counted))
    mixed = []
    for examples, times in read:
        chosen = repeat_examples(np.arange(len(examples)), times / unit, seed=0).tolist()
        longest = max(range(len(examples)), key=lambda k: max(examples[k][0]))
        # What a batch needs is decided by the longest.
        mixed += [examples[k] for k in (chosen if times >= unit else {*chosen, longest})]
    # What no time was left for is taken to have as many examples per byte as the others.
    unread = sum(one.weight * one.size for one in entries if not one.read)
    total += unread * counted / sum(one.read for one in entries)
    return mixed, total / len(mixed)


def data_is_here(path: DataPath | HeldOut) -> bool:
    """Check whether a config's data is stored on this machine; a share that is held out has no path of its own."""
    entries = path if isinstance(path, list) else [path]
    names: list[str] = [entry if isinstance(entry, str) else getattr(entry, "path", "") for entry in entries]
    if any(object_store.is_remote(name) or name.startswith("hf://") for name in names):
        return False
    return all(any(sign in name for sign in "*?[") or Path(name).expanduser().exists() for name in names)


def _counter(model_id: str) -> tuple[Callable[[Example], list[int]], str]:
    """Make a function from an example to the tokens of its one or two sequences, and describe how it counts."""
    file = model_folder(model_id) / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        how = f"contents by the model's tokenizer, plus {TOKENS_PER_MESSAGE} tokens per message for its template"

        def tokens(texts: list[str]) -> int:
            return sum(len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    else:
        how = (
            f"estimated from {CHARACTERS_PER_TOKEN} characters per token, plus {TOKENS_PER_MESSAGE} tokens per message"
        )

        def tokens(texts: list[str]) -> int:
            return math.ceil(sum(map(len, texts)) / CHARACTERS_PER_TOKEN)

    def of_messages(messages: list[dict[str, Any]], extra: str) -> int:
        texts = [(message.get("content") or "").replace(IMAGE, "") for message in messages]
        texts += [
            str(message[key]) for message in messages for key in ("reasoning_content", "tool_calls") if message.get(key)
        ]
        return tokens([*texts, extra]) + TOKENS_PER_MESSAGE * len(messages)

    def count(example: Example) -> list[int]:
        if example.messages is None:
            return [tokens([example.text or ""]) + 1]
        extra = str(example.tools) if example.tools else ""
        return [
            of_messages(messages, extra) for messages in (example.messages, example.rejected) if messages is not None
        ]

    return count, how
