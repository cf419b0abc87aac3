"""Sources of rows -> tokens, once per run and before any worker starts: small sets here, large ones with Ray Data.

    sources = find_sources(config.train_path)
    tokens, notes = tokenize(sources, tokenizer, EncodingOptions(task="instruction_tuning"), folder)

What is written under `folder` is named by a hash of all it depends on: the rows, the tokenizer, the template as it
renders, the options, and CACHE_VERSION. A change of any of these makes other files; none is ever stale.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import pickle
import queue
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from forgebook.config.blocks import labels_of
from forgebook.config.data_block import HeldOut
from forgebook.data import chat_template, forked, masking, readers, split, token_store
from forgebook.data.batching import group_size
from forgebook.data.chat_template import LossOn, RewrittenTurns
from forgebook.data.data_sources import Source, content_key
from forgebook.data.examples import DatasetNotes, noted_examples
from forgebook.data.image_tokens import ImageTokens
from forgebook.data.images import is_same
from forgebook.data.masking import Encoded
from forgebook.data.readers import FileChunk
from forgebook.data.row_formats import NAME_KEY, Example
from forgebook.data.special_tokens import special_texts
from forgebook.data.token_store import Tokens
from forgebook.errors import DataError
from forgebook.runs import atomic

if TYPE_CHECKING:
    from forgebook.config.blocks import PromptFormat
    from forgebook.config.schema import FinetuneConfig

__all__ = ["EncodingOptions", "TokenizedSet", "encode_examples", "encoding_options", "tokenize", "tokenize_and_split"]

# Part of the name of cached tokens. Raise it with every change of what a row becomes (readers, messages, row_formats,
# tools, chat_template and what it imports, masking) or of how shards are written (token_store).
# tests/data/test_tokenize.py pins the tokens of a small file, and fails where this was forgotten.
CACHE_VERSION = 18
# Examples per call of the tokenizer: enough for all its threads.
TOKENIZER_BATCH = 512
# Sources of more chunks than this (of about 2 MB) are worth a Ray cluster.
CHUNKS_HERE = 128
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


def encoding_options(config: FinetuneConfig) -> EncodingOptions:
    """Return the options of a config: what training, its preview and its pages have in common."""
    return EncodingOptions(
        config.task or "instruction_tuning",
        config.generation_config.prompt_format,
        config.train_on,
        config.rewritten_turns,
        labels_of(config.classifier_config),
    )


# Tokens -----------------------------------------------------------------------------------------------


def encode_examples(
    examples: list[Example], tokenizer, options: EncodingOptions, images: ImageTokens | None = None
) -> list[list[Encoded] | DataError]:
    """Encode examples. Pure: the same examples give the same tokens in any process.

    images: of task vision_language, which opens those of the examples.

    Returns for each example its encodings (one; two for a preference pair, the chosen first; more if its turns are
    expanded), or the DataError, with file:line, that says why it cannot be trained.
    """
    conversations, owners = [], []
    errors: dict[int, str] = {}
    for k, example in enumerate(examples):
        for messages in (example.messages, example.rejected):
            if messages is not None:
                try:
                    conversations.append((images.checked(messages) if images else messages, example.tools))
                    owners.append(k)
                except DataError as error:
                    errors[k] = str(error)
    results = masking.encode_many(
        conversations,
        tokenizer,
        options.prompt_format,
        loss_on=options.loss_on,
        rewritten_turns=options.rewritten_turns,
        images=images,
    )
    encodings: list[list[Encoded]] = [[] for _ in examples]
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


@dataclass(frozen=True)
class TokenizedSet:
    """The examples of some sources. source: [examples] the number of the source that each is from."""

    tokens: Tokens
    source: np.ndarray
    notes: DatasetNotes


def tokenize(
    sources: list[Source],
    tokenizer,
    options: EncodingOptions,
    folder: Path,
    seed: int = 0,
    on_progress: OnProgress = lambda done, total: None,
    images: ImageTokens | None = None,
) -> tuple[Tokens, DatasetNotes]:
    """Tokenize a set, or map what an earlier run wrote of it; mix its sources by their weights.

    folder: where shards are stored, one folder per source and options. on_progress: called with the chunks done
    and all chunks of all sources that are not cached. images: as of `encode_examples`.

    Raises DataError or StorageError if a source cannot be read at all; bad rows are in the notes.
    """
    whole = _tokenize(sources, tokenizer, options, folder, on_progress, images)
    return _mix(whole, np.arange(len(whole.tokens)), sources, seed, group_size(options.task)), whole.notes


def tokenize_and_split(
    sources: list[Source],
    tokenizer,
    options: EncodingOptions,
    folder: Path,
    held_out: HeldOut,
    seed: int = 0,
    on_progress: OnProgress = lambda done, total: None,
    images: ImageTokens | None = None,
) -> tuple[Tokens, TokenizedSet, DatasetNotes, dict[str, int]]:
    """Tokenize a set as `tokenize` does, and hold out a share of it before its sources are mixed.

    Returns the examples to train, those held out, the notes on all, and the counts of `split.hold_out`.
    Raises what `tokenize` and `split.hold_out` raise.
    """
    whole = _tokenize(sources, tokenizer, options, folder, on_progress, images)
    size = group_size(options.task)
    if not len(whole.tokens):
        return whole.tokens, whole, whole.notes, {}
    train, valid, counts = split.hold_out(whole.tokens, held_out.split, held_out.seed, size)
    out = TokenizedSet(whole.tokens.select(valid), whole.source[valid], DatasetNotes())
    return _mix(whole, train, sources, seed, size), out, whole.notes, counts


def _tokenize(
    sources: list[Source],
    tokenizer,
    options: EncodingOptions,
    folder: Path,
    on_progress: OnProgress,
    images: ImageTokens | None,
) -> TokenizedSet:
    folders = [folder / _cache_key(source, tokenizer, options, images) for source in sources]
    if images is not None:
        for path in folders:
            _forget_changed_images(path)
    missing = {path: source for path, source in zip(folders, sources, strict=True) if not path.is_dir()}
    chunks = {path: readers.split_source(source) for path, source in missing.items()}
    total, done = sum(map(len, chunks.values())), itertools.count(1)
    for path, parts in chunks.items():
        write = functools.partial(_write_shard, tokenizer=tokenizer, options=options, images=images)
        _write_shards(parts, write, path, lambda: on_progress(next(done), total))
    notes = DatasetNotes()
    for path in folders:
        notes += DatasetNotes.from_json(atomic.read_json(path / "notes.json"))
    shards = [sorted(path.glob("*.arrow")) for path in folders]
    tokens = token_store.map_shards(list(itertools.chain.from_iterable(shards)))
    # Files of the same content share their shards, which are mapped once for each.
    owners = np.repeat(np.arange(len(sources)), [_batches(paths) for paths in shards])
    return TokenizedSet(tokens, owners[tokens.part] if len(tokens) else np.zeros(0, int), notes)


def _batches(shards: list[Path]) -> int:
    return sum(token_store.count_batches(path) for path in shards)


def _mix(whole: TokenizedSet, examples: np.ndarray, sources: list[Source], seed: int, group: int) -> Tokens:
    """Select some examples of a set, those of each entry of the config as often as its weight says."""
    if all(source.weight == 1 for source in sources):
        return whole.tokens.select(examples) if len(examples) < len(whole.tokens) else whole.tokens
    # Not file by file: a share of a file of few rows may round to none of them.
    weights = {source.entry: source.weight for source in sources}
    entry = np.array([source.entry for source in sources])[whole.source[examples]]
    chosen = [token_store.repeat_examples(examples[entry == k], weights[k], seed + k, group) for k in weights]
    return whole.tokens.select(np.concatenate(chosen))


def _cache_key(source: Source, tokenizer, options: EncodingOptions, images: ImageTokens | None) -> str:
    """Hash everything that the tokens of a source depend on, but the files of its images."""
    try:
        probe = chat_template.render(PROBE, tokenizer, options.prompt_format)
    except DataError as error:
        probe = str(error)
    parts = [
        str(CACHE_VERSION),
        content_key(source),
        source.uri.rsplit("/", 1)[-1],  # it names the rows in messages
        repr(source.mapping),
        tokenizer.backend_tokenizer.to_str(),
        str(tokenizer.chat_template),
        probe,
        repr(options),
        *([images.key] if images else []),
        *(importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _forget_changed_images(folder: Path) -> None:
    """Remove the shards of a source of which an image's file is not what it was when they were written."""
    for path in folder.glob("*.arrow"):
        if not all(map(is_same, token_store.image_files(path))):
            shutil.rmtree(folder)
            return


def _write_shards(
    chunks: list[FileChunk], write_shard: functools.partial, target: Path, on_chunk: Callable[[], None]
) -> None:
    """Tokenize the chunks of a source into shards under `target`, which appears when all are written."""
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write = functools.partial(write_shard, folder=aside)
    try:
        notes = DatasetNotes()
        # Processors of images compute with torch, whose threads do not survive a fork.
        forks = len(chunks) > 1 and forked.cores() > 1 and forked.can_fork() and write.keywords.get("images") is None
        spread = _with_ray if len(chunks) > CHUNKS_HERE else _in_processes if forks else _with_threads
        for one in spread(chunks, write):
            notes += one
            on_chunk()
        atomic.write_json(aside / "notes.json", vars(notes))
        with contextlib.suppress(OSError):  # another run was faster: what it wrote is the same
            os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_shard(
    number: int, chunk: FileChunk, *, tokenizer, options: EncodingOptions, images: ImageTokens | None, folder: Path
) -> DatasetNotes:
    """Tokenize one chunk into one shard."""
    notes = DatasetNotes()
    name = chunk.source.uri.rsplit("/", 1)[-1]
    encoded = _encoded(noted_examples(chunk, options.task, options.labels, notes), tokenizer, options, images, notes)
    token_store.write_shard(encoded, folder / f"{number:06d}.arrow", name)
    if options.prompt_format is None and chat_template.shows_names(tokenizer):
        del notes.ignored[NAME_KEY]
    return notes


def _encoded(
    examples: Iterable[Example], tokenizer, options: EncodingOptions, images: ImageTokens | None, notes: DatasetNotes
) -> Iterator[tuple[Encoded, int, int]]:
    """Yield (encoded, line of its file, group) of examples that can be trained; note the others."""
    examples = iter(examples)
    while batch := list(itertools.islice(examples, TOKENIZER_BATCH)):
        for example, encoded in zip(batch, encode_examples(batch, tokenizer, options, images), strict=True):
            if isinstance(encoded, DataError):
                notes.problems.append(str(encoded))
                continue
            notes.special.update(special_texts([example.messages, example.rejected, example.text], tokenizer))
            group = split.group_of(example)
            yield from ((one, example.line, group) for one in encoded)


def _in_processes(chunks: list[FileChunk], write: functools.partial) -> Iterator[DatasetNotes]:
    """Map chunks to shards in forked processes, one for each core."""
    return forked.map_forked(write, chunks)


def _with_threads(chunks: list[FileChunk], write: functools.partial) -> Iterator[DatasetNotes]:
    """Map chunks to shards in this process: one thread renders while another's texts are being tokenized.

    Each thread has a tokenizer of its own: calls of one tokenizer wait for each other.
    """
    threads = max(1, min(os.cpu_count() or 1, len(chunks)))
    tokenizers: queue.SimpleQueue = queue.SimpleQueue()
    for _ in range(threads):  # a processor of images holds its tokenizer: both are copied together
        tokenizers.put(copy.deepcopy({key: write.keywords[key] for key in ("tokenizer", "images")}))

    def write_one(number: int, chunk: FileChunk) -> DatasetNotes:
        own = tokenizers.get()
        try:
            return write(number, chunk, **own)
        finally:
            tokenizers.put(own)

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(write_one, itertools.count(), chunks)


class _ShardWriter:
    """One Ray Data actor: it holds the tokenizer and writes shards to the run storage."""

    def __init__(self, write: Callable[[int, FileChunk], DatasetNotes]):
        self.write = write

    def __call__(self, batch: dict) -> dict:
        notes = [self._notes(int(n), pickle.loads(c)) for n, c in zip(batch["number"], batch["chunk"], strict=True)]
        return {"number": batch["number"], "notes": notes}

    def _notes(self, number: int, chunk: FileChunk) -> str:
        try:
            return json.dumps(vars(self.write(number, chunk)))
        except DataError as error:  # as a text: Ray would wrap it in errors of its own
            return json.dumps(str(error))


def _with_ray(chunks: list[FileChunk], write: functools.partial) -> Iterator[DatasetNotes]:
    """Map chunks to shards with Ray Data, streaming; only notes come back to this process."""
    import ray

    from forgebook import ray_cluster

    ray_cluster.start_ray()
    ray.data.DataContext.get_current().enable_progress_bars = False
    items = [{"number": k, "chunk": pickle.dumps(chunk)} for k, chunk in enumerate(chunks)]
    workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
    written = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _ShardWriter,
        batch_size=1,
        num_cpus=1,
        fn_constructor_args=(write,),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
    )
    for line in written.iter_rows():
        notes = json.loads(line["notes"])
        if isinstance(notes, str):
            raise DataError(notes)
        yield DatasetNotes.from_json(notes)
