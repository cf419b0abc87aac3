"""Sources of rows -> tokens, once per run and before any worker starts; small sets here, large ones with Ray Data.

    sources = rows.find_sources(config.train_path)
    tokens, notes = tokenize(sources, tokenizer, Recipe.of(config), folder)

What is written under `folder` is named by a hash of all it depends on: the rows, the tokenizer, the template
as it renders, what is trained, and the code. A change of any of these makes other files; none is ever stale.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import queue
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgebook.data import (
    chat_template,
    masking,
    special_tokens,
    token_store,
    tools,
)
from forgebook.data import (
    readers as rows,
)
from forgebook.data import (
    row_formats as formats,
)
from forgebook.data.chat_template import LossOn
from forgebook.data.readers import Piece, Source
from forgebook.data.row_formats import Row
from forgebook.data.token_store import Tokens
from forgebook.errors import DataError
from forgebook.runs import atomic

if TYPE_CHECKING:
    from forgebook.config.parse import FinetuneConfig, PromptFormat

__all__ = ["Recipe", "SetNotes", "bad_rows_error", "empty_error", "encode_rows", "read_rows", "tokenize", "write_piece"]

SHOWN_PROBLEMS = 20
# Rows per call of the tokenizer: enough for all its threads.
CHUNK_ROWS = 512
# Sets of more pieces than this (of about 2 MB) are worth a Ray cluster.
PIECES_IN_PROCESS = 128
# Tasks whose loss is on the last answer alone.
LAST_ANSWER_TASKS = ("classification", "preference_tuning")
# What the conversation is to be that shows how a template renders (and what date it prints).
PROBE = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """All of a config that decides how a row becomes tokens."""

    task: str = "instruction_tuning"
    prompt_format: PromptFormat | None = None
    train_on: str = "all"
    rewritten_turns: str = "refuse"
    labels: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: FinetuneConfig) -> Recipe:
        """Take it out of a config."""
        labels = tuple(config.classifier_config.label_tokens) if config.classifier_config else ()
        prompt_format = config.generation_config.prompt_format
        return cls(config.task, prompt_format, config.train_on, config.rewritten_turns, labels)

    @property
    def loss_on(self) -> LossOn:
        """Return which tokens are in the loss, as `masking.encode` names them."""
        if self.task == "causal_lm":
            return "all"
        return "last" if self.train_on == "last" or self.task in LAST_ANSWER_TASKS else "assistant"


@dataclass
class SetNotes:
    """What was met while a set was read: for the data report."""

    rows: int = 0
    turns: int = 0
    formats: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    ignored: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    labels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    problems: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def from_json(cls, written: dict[str, Any]) -> SetNotes:
        """Read what dataclasses.asdict wrote."""
        counters = {name: collections.Counter(written[name]) for name in ("formats", "ignored", "labels")}
        return cls(**{**written, **counters})

    def __add__(self, other: SetNotes) -> SetNotes:
        return SetNotes(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)})


# Rows -------------------------------------------------------------------------------------------------


def read_rows(
    path: Any,
    task: str = "instruction_tuning",
    limit: int | None = None,
    labels: tuple[str, ...] = (),
    on_bad_rows: str = "fail",
) -> list[Row]:
    """Read and check the rows of a path, the first `limit`; raise DataError naming every bad one, or drop them."""
    good, notes = [], SetNotes()
    sources = rows.find_sources(path)
    pieces = itertools.chain.from_iterable(rows.cut(source.uri) for source in sources)
    for piece in pieces:
        for row in _checked(piece, Recipe(task, labels=labels), notes):
            good.append(row)
            if len(good) == limit:
                break
        if len(good) == limit:
            break
    if notes.problems and on_bad_rows == "fail":
        raise bad_rows_error(path, notes)
    if not good:
        raise empty_error(path)
    return good


def _checked(piece: Piece, recipe: Recipe, notes: SetNotes) -> Iterator[Row]:
    """Yield the good rows of a piece; note the bad."""
    for where, raw in rows.read_piece(piece):
        notes.rows += 1
        try:
            if isinstance(raw, DataError):
                raise raw
            row, about = formats.parse_row(raw, where, recipe.task, recipe.labels)
        except DataError as error:
            notes.problems.append(str(error))
            continue
        notes.formats[about.format] += 1
        notes.ignored.update(about.ignored)
        notes.turns += len(row.messages or ())
        if recipe.labels:
            notes.labels[row.messages[-1]["content"]] += 1
        yield row


def bad_rows_error(path: Any, notes: SetNotes) -> DataError:
    """Make the error that names the bad rows of a set."""
    shown = "\n  ".join(notes.problems[:SHOWN_PROBLEMS])
    more = len(notes.problems) - SHOWN_PROBLEMS
    hidden = f"\n  ... and {more} more" if more > 0 else ""
    return DataError(f"{len(notes.problems)} of {notes.rows} rows of {path} are unusable:\n  {shown}{hidden}")


def empty_error(path: Any) -> DataError:
    """Make the error that a set without rows gives."""
    return DataError(f'{path} is empty: it needs at least one row like {{"messages": [...]}}')


# Tokens -----------------------------------------------------------------------------------------------


def encode_rows(batch: list[Row], tokenizer, recipe: Recipe) -> list[list[masking.Encoded] | DataError]:
    """Encode rows and mark what the task trains. Pure: the same rows give the same tokens in any process.

    Returns for each row its encodings (one; two for a preference pair, the chosen first; more if its turns are
    expanded), or the DataError, with file:line, that says why it cannot be trained.
    """
    conversations, owners = [], []
    for k, row in enumerate(batch):
        for messages in (row.messages, row.rejected):
            if messages is not None:
                conversations.append((messages, row.tools))
                owners.append(k)
    results = masking.encode_many(
        conversations, tokenizer, recipe.prompt_format,
        loss_on=recipe.loss_on, rewritten_turns=recipe.rewritten_turns,
    )  # fmt: skip
    encoded: list[Any] = [[] for _ in batch]
    for k, result in zip(owners, results, strict=True):
        if isinstance(encoded[k], list):
            encoded[k] = result if isinstance(result, DataError) else encoded[k] + result
    if recipe.task == "classification":
        encoded = [
            result if isinstance(result, DataError) else _labels_only(result, tokenizer, recipe) for result in encoded
        ]
    for k, row in enumerate(batch):
        if row.text is not None:
            encoded[k] = [masking.encode_text(row.text, tokenizer)]
        if isinstance(encoded[k], DataError):
            encoded[k] = DataError(f"{row.where}: {encoded[k]}")
        elif not all(any(one.loss_mask[1:]) for one in encoded[k]):
            encoded[k] = DataError(f"{row.where}: no token of this row would be trained: is its assistant turn empty?")
    return encoded


def _labels_only(encoded: list[masking.Encoded], tokenizer, recipe: Recipe) -> list[masking.Encoded]:
    """Train the label token alone, not the end of the turn after it."""
    labels = set(tokenizer.convert_tokens_to_ids(list(recipe.labels)))
    return [
        masking.Encoded(one.input_ids, [t and i in labels for i, t in zip(one.input_ids, one.loss_mask, strict=True)])
        for one in encoded
    ]


def tokenize(
    sources: list[Source],
    tokenizer,
    recipe: Recipe,
    folder: Path,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tokens, SetNotes]:
    """Tokenise a set, or map what an earlier run wrote of it; mix its sources by their weights.

    folder: where shards are kept, one folder per source and recipe. on_progress: called with (pieces done, all).

    Raises DataError or StorageError if a source cannot be read at all; bad rows are in the notes.
    """
    parts, total = [], SetNotes()
    for source in sources:
        kept = folder / _cache_key(source.uri, tokenizer, recipe)
        if not kept.is_dir():
            _write_shards(source.uri, tokenizer, recipe, kept, on_progress)
        total += SetNotes.from_json(atomic.read_json(kept / "notes.json"))
        parts.append((sorted(kept.glob("*.arrow")), source.weight))
    mixed = token_store.map_shards([shard for shards, _ in parts for shard in shards])
    if all(weight == 1 for _, weight in parts):
        return mixed, total
    return _mixed(mixed, parts, seed), total


def _mixed(whole: Tokens, parts: list[tuple[list[Path], float]], seed: int) -> Tokens:
    import numpy as np

    taken = []
    for number, (shards, weight) in enumerate(parts):
        names = {str(shard) for shard in shards}
        of_source = np.array([file in names for file, _ in whole.files])
        mine = np.flatnonzero(of_source[whole.part])
        taken.append(token_store.repetitions(mine, weight, seed + number))
    return whole.select(np.concatenate(taken))


def _cache_key(uri: str, tokenizer, recipe: Recipe) -> str:
    """Hash everything that the tokens of a source depend on."""
    try:
        probe = chat_template.render(PROBE, tokenizer, recipe.prompt_format)
    except DataError as error:
        probe = str(error)
    code = b"".join(
        Path(m.__file__).read_bytes()
        for m in (formats, chat_template, rows, special_tokens, token_store, tools, masking)
    )
    parts = [
        rows.content_key(uri),
        uri.rsplit("/", 1)[-1],  # it names the rows in messages
        tokenizer.backend_tokenizer.to_str(),
        str(tokenizer.chat_template),
        probe,
        repr(recipe),
        code.decode(),
        Path(__file__).read_text(),
        *(importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _write_shards(uri: str, tokenizer, recipe: Recipe, target: Path, on_progress) -> None:
    """Tokenise a source piece by piece into shards under `target`, which appears when all are there."""
    pieces = rows.cut(uri)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write = functools.partial(write_piece, tokenizer=tokenizer, recipe=recipe, folder=aside)
    try:
        notes = SetNotes()
        spread = _with_ray if len(pieces) > PIECES_IN_PROCESS else _with_threads
        for done, one in enumerate(spread(pieces, write), 1):
            notes += one
            on_progress(done, len(pieces))
        atomic.write_json(aside / "notes.json", vars(notes))
        with contextlib.suppress(OSError):  # another run was faster: what it wrote is the same
            os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_piece(number: int, piece: Piece, *, tokenizer, recipe: Recipe, folder: Path) -> SetNotes:
    """Tokenise one piece into one shard; return what was met."""
    notes = SetNotes()
    name = piece.uri.rsplit("/", 1)[-1]
    written = _encoded(_checked(piece, recipe, notes), tokenizer, recipe, notes)
    token_store.write_shard(written, folder / f"{number:06d}.arrow", name)
    return notes


def _encoded(good: Iterable[Row], tokenizer, recipe: Recipe, notes: SetNotes) -> Iterator[tuple[masking.Encoded, int]]:
    good = iter(good)
    while batch := list(itertools.islice(good, CHUNK_ROWS)):
        for row, encoded in zip(batch, encode_rows(batch, tokenizer, recipe), strict=True):
            if isinstance(encoded, DataError):
                notes.problems.append(str(encoded))
                continue
            line = int(row.where.rsplit(":", 1)[1])
            yield from ((one, line) for one in encoded)


def _with_threads(pieces: list[Piece], write: functools.partial) -> Iterator[SetNotes]:
    """Map pieces to shards in this process: one thread renders while another's texts are being tokenised.

    Each thread has a tokenizer of its own: calls of one tokenizer wait for each other.
    """
    threads = max(1, min(os.cpu_count() or 1, len(pieces)))
    free: queue.SimpleQueue = queue.SimpleQueue()
    for _ in range(threads):
        free.put(copy.deepcopy(write.keywords["tokenizer"]))

    def write_one(number: int, piece: Piece) -> SetNotes:
        mine = free.get()
        try:
            return write(number, piece, tokenizer=mine)
        finally:
            free.put(mine)

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(write_one, itertools.count(), pieces)


class _PieceWriter:
    """One Ray Data actor: it holds the tokenizer and writes shards to the run storage."""

    def __init__(self, write):
        self.write = write

    def __call__(self, batch: dict) -> dict:
        notes = [
            self.write(int(n), Piece(**json.loads(p))) for n, p in zip(batch["number"], batch["piece"], strict=True)
        ]
        return {"number": batch["number"], "notes": [json.dumps(vars(one)) for one in notes]}


def _with_ray(pieces: list[Piece], write) -> Iterator[SetNotes]:
    """Map pieces to shards with Ray Data, streaming; only notes come back to this process."""
    import ray

    from forgebook import ray_cluster

    ray_cluster.start_ray()
    ray.data.DataContext.get_current().enable_progress_bars = False
    items = [{"number": k, "piece": json.dumps(dataclasses.asdict(piece))} for k, piece in enumerate(pieces)]
    workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
    written = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _PieceWriter, batch_size=1, num_cpus=1, fn_constructor_args=(write,),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
    )  # fmt: skip
    for row in written.iter_rows():
        yield SetNotes.from_json(json.loads(row["notes"]))
