"""Sources of rows -> tokens, once per run and before any worker starts: small sets here, large ones with Ray Data.

    sources = readers.find_sources(config.train_path)
    tokens, notes = tokenize(sources, tokenizer, EncodingOptions(task="instruction_tuning"), folder)

What is written under `folder` is named by a hash of all it depends on: the rows, the tokenizer, the template as it
renders, the options, and CACHE_VERSION. A change of any of these makes other files; none is ever stale.
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
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgebook.data import chat_template, masking, readers, row_formats, token_store
from forgebook.data.chat_template import LossOn, RewrittenTurns
from forgebook.data.masking import Encoded
from forgebook.data.readers import FileChunk, Source
from forgebook.data.row_formats import Example
from forgebook.data.token_store import Tokens
from forgebook.errors import DataError
from forgebook.runs import atomic

if TYPE_CHECKING:
    from forgebook.config.blocks import PromptFormat

__all__ = [
    "DatasetNotes",
    "EncodingOptions",
    "bad_rows_error",
    "encode_examples",
    "no_examples_error",
    "read_examples",
    "read_notes",
    "tokenize",
]

# Part of the name of cached tokens. Raise it with every change of what a row becomes (readers, messages, row_formats,
# tools, chat_template and what it imports, masking) or of how shards are written (token_store).
# tests/data/test_tokenize.py pins the tokens of a small file, and fails where this was forgotten.
CACHE_VERSION = 11
SHOWN_PROBLEMS = 20
TOKENIZER_BATCH = 512  # examples per call of the tokenizer: enough for all its threads
# Sources of more chunks than this (of about 2 MB) are worth a Ray cluster.
CHUNKS_IN_PROCESS = 128
# Tasks whose loss is on the last answer alone.
LAST_ANSWER_TASKS = ("classification", "preference_tuning")
# Rendered to see what a template does, and which date it prints.
PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class EncodingOptions:
    """What decides how an example becomes tokens; named as the keys of a config.

    labels: of task classification, the texts of its label tokens.
    """

    task: str = "instruction_tuning"
    prompt_format: PromptFormat | None = None
    train_on: str = "all"
    rewritten_turns: RewrittenTurns = "refuse"
    labels: tuple[str, ...] = ()

    @property
    def loss_on(self) -> LossOn:
        """Return which tokens are in the loss, as `masking.encode` names them."""
        if self.task == "causal_lm":
            return "all"
        return "last" if self.train_on == "last" or self.task in LAST_ANSWER_TASKS else "assistant"


@dataclass
class DatasetNotes:
    """What was seen while a set was read, for the data report. rows: of its files, bad ones included."""

    rows: int = 0
    turns: int = 0
    formats: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    ignored: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    labels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    problems: list[str] = dataclasses.field(default_factory=list)
    empty_answers: int = 0

    @classmethod
    def from_json(cls, written: dict[str, Any]) -> DatasetNotes:
        """Read what dataclasses.asdict wrote."""
        counters = {name: collections.Counter(written[name]) for name in ("formats", "ignored", "labels")}
        return cls(**{**written, **counters})

    def __add__(self, other: DatasetNotes) -> DatasetNotes:
        return DatasetNotes(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)}
        )


# Examples ---------------------------------------------------------------------------------------------


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
    chunks = itertools.chain.from_iterable(readers.split_source(one.uri) for one in readers.find_sources(path))
    parsed = itertools.chain.from_iterable(_noted(chunk, task, labels, notes) for chunk in chunks)
    examples = list(itertools.islice(parsed, limit))
    if notes.problems and (on_bad_rows == "fail" or not examples):
        raise bad_rows_error(path, notes)
    if not examples:
        raise no_examples_error(path)
    return examples


def read_notes(path: Any, task: str, labels: tuple[str, ...] = (), seconds: float = 2.0) -> DatasetNotes | None:
    """Check the rows of small files, remote ones too, without a tokenizer: those that can be read in some seconds.

    Returns None if all seem fine; else the notes on the whole set. Raises DataError or StorageError if a file cannot
    be read at all, DataError for a set without examples.
    """
    until, notes, is_whole = time.monotonic() + seconds, DatasetNotes(), True
    for source in readers.find_sources(path):
        if readers.is_large(source.uri):
            is_whole = False
            continue
        for chunk in readers.split_source(source.uri):
            if not notes.problems and time.monotonic() > until:
                return None
            collections.deque(_noted(chunk, task, labels, notes), maxlen=0)
    if is_whole and not notes.rows:
        raise no_examples_error(path)
    return notes if notes.problems else None


def _noted(chunk: FileChunk, task: str, labels: tuple[str, ...], notes: DatasetNotes) -> Iterator[Example]:
    """Yield the examples of a chunk; add what is seen to the notes."""
    for parsed in row_formats.parse_chunk(chunk, task, labels):
        notes.rows += 1
        if isinstance(parsed, DataError):
            notes.problems.append(str(parsed))
            continue
        example, about = parsed
        notes.formats[about.format] += 1
        notes.ignored.update(about.ignored)
        notes.empty_answers += about.has_empty_answer
        notes.turns += len(example.messages or ())
        if labels and example.messages:
            notes.labels[example.messages[-1]["content"]] += 1
        yield example


def bad_rows_error(path: Any, notes: DatasetNotes) -> DataError:
    """Make the error that names the bad rows of a set."""
    shown = "\n  ".join(notes.problems[:SHOWN_PROBLEMS])
    more = len(notes.problems) - SHOWN_PROBLEMS
    hidden = f"\n  ... and {more} more" if more > 0 else ""
    return DataError(f"{len(notes.problems)} of {notes.rows} rows of {path} are unusable:\n  {shown}{hidden}")


def no_examples_error(path: Any) -> DataError:
    """Make the error of a set without examples."""
    return DataError(f'{path} is empty: it needs at least one row like {{"messages": [...]}}')


# Tokens -----------------------------------------------------------------------------------------------


def encode_examples(examples: list[Example], tokenizer, options: EncodingOptions) -> list[list[Encoded] | DataError]:
    """Encode examples. Pure: the same examples give the same tokens in any process.

    Returns for each example its encodings (one; two for a preference pair, the chosen first; more if its turns are
    expanded), or the DataError, with file:line, that says why it cannot be trained.
    """
    conversations, owners = [], []
    for k, example in enumerate(examples):
        for messages in (example.messages, example.rejected):
            if messages is not None:
                conversations.append((messages, example.tools))
                owners.append(k)
    results = masking.encode_many(
        conversations,
        tokenizer,
        options.prompt_format,
        loss_on=options.loss_on,
        rewritten_turns=options.rewritten_turns,
    )
    encodings: list[list[Encoded]] = [[] for _ in examples]
    errors: dict[int, str] = {}
    for k, result in zip(owners, results, strict=True):
        if isinstance(result, DataError):
            errors.setdefault(k, str(result))
        else:
            encodings[k] += result
    labels = set(tokenizer.convert_tokens_to_ids(list(options.labels))) if options.task == "classification" else None
    for k, example in enumerate(examples):
        if example.text is not None:
            encodings[k] = [masking.encode_text(example.text, tokenizer)]
        elif labels is not None:
            encodings[k] = [_labels_only(one, labels) for one in encodings[k]]
        # The first token is predicted from nothing, so it is never a target.
        if k not in errors and not all(any(one.loss_mask[1:]) for one in encodings[k]):
            errors[k] = "no token of this example is in the loss: is its assistant turn empty?"
    return [
        DataError(f"{example.where}: {errors[k]}") if k in errors else encodings[k]
        for k, example in enumerate(examples)
    ]


def _labels_only(encoded: Encoded, labels: set[int]) -> Encoded:
    """Leave the label token alone in the loss, not the end of the turn after it."""
    tokens = zip(encoded.input_ids, encoded.loss_mask, strict=True)
    return Encoded(encoded.input_ids, [in_loss and token in labels for token, in_loss in tokens])


def tokenize(
    sources: list[Source],
    tokenizer,
    options: EncodingOptions,
    folder: Path,
    seed: int = 0,
    on_progress: OnProgress = lambda done, total: None,
) -> tuple[Tokens, DatasetNotes]:
    """Tokenize a set, or map what an earlier run wrote of it; mix its sources by their weights.

    folder: where shards are stored, one folder per source and options. on_progress: called with the chunks done
    and all chunks of all sources that are not cached.

    Raises DataError or StorageError if a source cannot be read at all; bad rows are in the notes.
    """
    folders = [folder / _cache_key(source.uri, tokenizer, options) for source in sources]
    missing = {path: source.uri for path, source in zip(folders, sources, strict=True) if not path.is_dir()}
    chunks = {path: readers.split_source(uri) for path, uri in missing.items()}
    total, done = sum(map(len, chunks.values())), itertools.count(1)
    for path, parts in chunks.items():
        _write_shards(parts, tokenizer, options, path, lambda: on_progress(next(done), total))
    notes = DatasetNotes()
    for path in folders:
        notes += DatasetNotes.from_json(atomic.read_json(path / "notes.json"))
    shards = [sorted(path.glob("*.arrow")) for path in folders]
    tokens = token_store.map_shards(list(itertools.chain.from_iterable(shards)))
    if all(source.weight == 1 for source in sources):
        return tokens, notes
    return _mixed(tokens, shards, [source.weight for source in sources], seed), notes


def _mixed(tokens: Tokens, shards: list[list[Path]], weights: list[float], seed: int) -> Tokens:
    import numpy as np

    chosen = []
    for number, (paths, weight) in enumerate(zip(shards, weights, strict=True)):
        names = {str(path) for path in paths}
        of_source = np.array([file in names for file, _ in tokens.files])
        examples = np.flatnonzero(of_source[tokens.part])
        chosen.append(token_store.repeat_examples(examples, weight, seed + number))
    return tokens.select(np.concatenate(chosen))


def _cache_key(uri: str, tokenizer, options: EncodingOptions) -> str:
    """Hash everything that the tokens of a source depend on."""
    try:
        probe = chat_template.render(PROBE, tokenizer, options.prompt_format)
    except DataError as error:
        probe = str(error)
    parts = [
        str(CACHE_VERSION),
        readers.content_key(uri),
        uri.rsplit("/", 1)[-1],  # it names the rows in messages
        tokenizer.backend_tokenizer.to_str(),
        str(tokenizer.chat_template),
        probe,
        repr(options),
        *(importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _write_shards(
    chunks: list[FileChunk], tokenizer, options: EncodingOptions, target: Path, on_chunk: Callable[[], None]
) -> None:
    """Tokenize the chunks of a source into shards under `target`, which appears when all are written."""
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write = functools.partial(_write_shard, tokenizer=tokenizer, options=options, folder=aside)
    try:
        notes = DatasetNotes()
        spread = _with_ray if len(chunks) > CHUNKS_IN_PROCESS else _with_threads
        for one in spread(chunks, write):
            notes += one
            on_chunk()
        atomic.write_json(aside / "notes.json", vars(notes))
        with contextlib.suppress(OSError):  # another run was faster: what it wrote is the same
            os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_shard(number: int, chunk: FileChunk, *, tokenizer, options: EncodingOptions, folder: Path) -> DatasetNotes:
    """Tokenize one chunk into one shard."""
    notes = DatasetNotes()
    encoded = _encoded(_noted(chunk, options.task, options.labels, notes), tokenizer, options, notes)
    token_store.write_shard(encoded, folder / f"{number:06d}.arrow", chunk.uri.rsplit("/", 1)[-1])
    if options.prompt_format is None and chat_template.shows_names(tokenizer):
        del notes.ignored[row_formats.NAME_KEY]
    return notes


def _encoded(
    examples: Iterable[Example], tokenizer, options: EncodingOptions, notes: DatasetNotes
) -> Iterator[tuple[Encoded, int]]:
    """Yield (encoded, line of its file) of examples that can be trained; note the others."""
    examples = iter(examples)
    while batch := list(itertools.islice(examples, TOKENIZER_BATCH)):
        for example, encoded in zip(batch, encode_examples(batch, tokenizer, options), strict=True):
            if isinstance(encoded, DataError):
                notes.problems.append(str(encoded))
                continue
            line = int(example.where.rsplit(":", 1)[1])
            yield from ((one, line) for one in encoded)


def _with_threads(chunks: list[FileChunk], write: functools.partial) -> Iterator[DatasetNotes]:
    """Map chunks to shards in this process: one thread renders while another's texts are being tokenized.

    Each thread has a tokenizer of its own: calls of one tokenizer wait for each other.
    """
    threads = max(1, min(os.cpu_count() or 1, len(chunks)))
    tokenizers: queue.SimpleQueue = queue.SimpleQueue()
    for _ in range(threads):
        tokenizers.put(copy.deepcopy(write.keywords["tokenizer"]))

    def write_one(number: int, chunk: FileChunk) -> DatasetNotes:
        tokenizer = tokenizers.get()
        try:
            return write(number, chunk, tokenizer=tokenizer)
        finally:
            tokenizers.put(tokenizer)

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(write_one, itertools.count(), chunks)


class _ShardWriter:
    """One Ray Data actor: it holds the tokenizer and writes shards to the run storage."""

    def __init__(self, write: Callable[[int, FileChunk], DatasetNotes]):
        self.write = write

    def __call__(self, batch: dict) -> dict:
        notes = [
            self.write(int(n), FileChunk(**json.loads(c))) for n, c in zip(batch["number"], batch["chunk"], strict=True)
        ]
        return {"number": batch["number"], "notes": [json.dumps(vars(one)) for one in notes]}


def _with_ray(chunks: list[FileChunk], write: functools.partial) -> Iterator[DatasetNotes]:
    """Map chunks to shards with Ray Data, streaming; only notes come back to this process."""
    import ray

    from forgebook import ray_cluster

    ray_cluster.start_ray()
    ray.data.DataContext.get_current().enable_progress_bars = False
    items = [{"number": k, "chunk": json.dumps(dataclasses.asdict(chunk))} for k, chunk in enumerate(chunks)]
    workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
    written = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _ShardWriter,
        batch_size=1,
        num_cpus=1,
        fn_constructor_args=(write,),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
    )
    for line in written.iter_rows():
        yield DatasetNotes.from_json(json.loads(line["notes"]))
