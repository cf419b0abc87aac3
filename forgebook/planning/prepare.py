"""Before the run: read, check and tokenize the data, fill the gaps of the config, and report on the data.

prepared = prepare(config, run)         Prepared(config without gaps, train, valid, report)
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from forgebook.config.blocks import labels_of
from forgebook.config.data_block import HeldOut
from forgebook.data import batching, split, token_store, truncation
from forgebook.data import tokenize as data
from forgebook.data.data_sources import Source, describe_source, find_sources
from forgebook.data.examples import DatasetNotes, bad_rows_error, display_paths, no_examples_error, read_notes
from forgebook.data.image_tokens import ImageTokens
from forgebook.data.token_store import Tokens
from forgebook.errors import DataError
from forgebook.models.families import native_context_length
from forgebook.models.image_load import with_images
from forgebook.models.processor import processor_of
from forgebook.models.tokenizer import locate, tokenizer_of, tokenizer_source
from forgebook.models.versions import model_versions
from forgebook.planning import auto_config, schedule
from forgebook.planning.auto_config import Choice
from forgebook.planning.feasibility import micro_batch_for
from forgebook.planning.hardware import hardware_in, local_hardware
from forgebook.planning.image_report import image_line, image_report
from forgebook.planning.token_count import Statistics
from forgebook.runs import atomic
from forgebook.runs.run import Run, display_path, open_run

if TYPE_CHECKING:
    from forgebook.config.schema import FinetuneConfig, ResolvedConfig

__all__ = ["Prepared", "check_rows", "prepare", "report_rows", "row_warnings"]

LISTED_PLACES = 5


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that is ready to start: a config without gaps, tokens, and the report on the data.

    held_out: the rows of the training files that are held out for validation, by source.
    """

    config: ResolvedConfig
    train: Tokens
    valid: Tokens | None
    report: dict[str, Any]
    held_out: dict[Source, set[split.Row]] | None = None

    def write_held_out(self, path: Path) -> None:
        """Write the examples that are held out, so that whoever reads the run later has the same ones."""
        if self.held_out is not None:
            labels = labels_of(self.config.classifier_config)
            split.write_examples(self.held_out, self.config.task, labels, path)


def _no_progress(name: str, done: int, total: int) -> None:
    pass


def prepare(config: FinetuneConfig, run: Run, on_progress: Callable[[str, int, int], None] = _no_progress) -> Prepared:
    """Read, check and tokenize the data, cut it to the context length, and fill the gaps of the config.

    Tokens are cached under `<storage_path>/.tokens` for the next run on the same data. If examples are bad and
    `on_bad_rows` is fail, all of them are written to the run's data_report.json.
    on_progress: called with (set, chunks of its files done, chunks).

    Raises DataError, ModelError or StorageError.
    """
    if config.is_default:
        auto_config.core_shape(config.model_id)  # fails now rather than after the data is tokenized
        config = auto_config.choose_task(config, auto_config.first_rows(config.train_path))
    paths = {"train": config.train_path} | ({"valid": config.valid_path} if config.valid_path else {})
    tokenizer = tokenizer_of(config)
    processor = processor_of(config, tokenizer)
    store = token_store.image_store(_cache_of(run))
    images = None if processor is None else ImageTokens(processor, store)
    sets, notes, split_counts, held_out = _tokenize(config, paths, run, on_progress, tokenizer, images)
    _check_examples(config, paths, sets, notes, run)
    choices: list[Choice] = []
    if config.is_default:
        config, choices = _choose(config, sets, images)
    resolved = _fill_gaps(config, sets, run.name)
    starts = resolved.initial_adapter_model_ckpt_path, resolved.initial_base_model_ckpt_path
    source = tokenizer_source(resolved.model_id, *starts)
    report: dict[str, Any] = {"tokenizer": source, "context_length": resolved.context_length}
    report |= {"models": models} if (models := model_versions(resolved)) else {}
    for name, path in paths.items():
        whole = sets[name]
        losses = truncation.truncation_losses(whole, resolved.context_length)
        sets[name], cut = truncation.fit_context(
            whole, resolved.context_length, resolved.truncation, display_paths(path), batching.group_size(resolved.task)
        )
        report[name] = {
            "path": display_paths(path),
            **_reading_report(notes[name]),
            **token_store.token_statistics(whole),
            **({"images": image_report(whole, images)} if images else {}),
            "truncation": losses,
            **cut,
            **_duplicates(whole),
            "fingerprint": _fingerprint(sets[name]),
        }
        if not isinstance(path, HeldOut):
            report[name]["sources"] = [describe_source(source) for source in find_sources(path)]
    if held_out is not None:
        report["valid"]["held_out"] = split_counts
    if "valid" in sets:
        report["overlap"] = _overlap(sets["train"], sets["valid"])
    report["train"] |= _padding(resolved, sets["train"])
    report |= {"choices": [dataclasses.asdict(choice) for choice in choices]} if choices else {}
    return Prepared(resolved, sets["train"], sets.get("valid"), report, held_out)


def check_rows(config: FinetuneConfig) -> None:
    """Raise DataError or StorageError for what is wrong with the rows, before the GPU stack is imported.

    Reads for two seconds at most, after downloads; `prepare` checks every example, and as the chat template renders it.
    """
    paths, bad = _bad_rows(config)
    if bad and config.on_bad_rows == "fail":
        _refuse_bad_rows(config.task, paths, bad, open_run(config))


def row_warnings(config: FinetuneConfig) -> list[str]:
    """List what `check_rows` would raise about the rows, one text per set; nothing is written.

    Raises DataError or StorageError for a file that cannot be read at all.
    """
    paths, bad = _bad_rows(config)
    follows = "the run stops at these" if config.on_bad_rows == "fail" else "the run drops these"
    return [
        f"{bad_rows_error(paths[name], note, f'{name}_path', config.task or '')}\n  {follows}"
        for name, note in bad.items()
    ]


def _bad_rows(config: FinetuneConfig) -> tuple[dict[str, Any], dict[str, DatasetNotes]]:
    """Read the rows of each set for a while; return the paths by set, and the notes on those with bad rows."""
    if config.is_default:
        config = auto_config.choose_task(config, auto_config.first_rows(config.train_path))
    assert config.task is not None  # filled in when the config is checked
    paths = {"train": config.train_path} | ({"valid": config.valid_path} if config.valid_path else {})
    read = {name: path for name, path in paths.items() if not isinstance(path, HeldOut)}
    notes = {name: read_notes(path, config.task, labels_of(config.classifier_config)) for name, path in read.items()}
    return paths, {name: note for name, note in notes.items() if note}


def _cache_of(run: Run) -> Path:
    """Return where tokens are stored for all runs beside this one."""
    return run.folder.parent / ".tokens"


def _tokenize(
    config: FinetuneConfig,
    paths: dict[str, Any],
    run: Run,
    on_progress: Callable[[str, int, int], None],
    tokenizer: Any,
    images: ImageTokens | None,
) -> tuple[dict[str, Tokens], dict[str, DatasetNotes], dict[str, int], dict[Source, set[split.Row]] | None]:
    """Tokenize each set, or map its cached tokens, and hold out a share for validation where the config says so.

    Returns by set the tokens and the notes on reading; then the counts of the share held out, and its rows by source.
    """
    options = data.encoding_options(config)
    cache = _cache_of(run)
    sets: dict[str, Tokens] = {}
    notes: dict[str, DatasetNotes] = {}
    counts: dict[str, int] = {}
    held_out: dict[Source, set[split.Row]] | None = None
    share = paths.get("valid")
    for name, path in paths.items():
        if isinstance(path, HeldOut):
            continue
        report_progress = functools.partial(on_progress, name)
        sources = find_sources(path)
        if name == "train" and isinstance(share, HeldOut):
            sets["train"], out, notes["train"], counts = data.tokenize_and_split(
                sources, tokenizer, options, cache, share, config.seed, report_progress, images
            )
            sets["valid"], notes["valid"] = out.tokens, DatasetNotes(rows=len(out.tokens))
            held_out = split.rows_of(out.tokens, out.source, sources)
        else:
            sets[name], notes[name] = data.tokenize(
                sources, tokenizer, options, cache, config.seed, report_progress, images
            )
    if config.max_examples is not None:
        size = batching.group_size(config.task)
        sets = {name: token_store.sample_examples(one, config.max_examples, size) for name, one in sets.items()}
    return sets, notes, counts, held_out


def _check_examples(
    config: FinetuneConfig, paths: dict[str, Any], sets: dict[str, Tokens], notes: dict[str, DatasetNotes], run: Run
) -> None:
    """Raise DataError for bad examples, unless they are to be dropped, and for sets with no example left."""
    bad = {name: note for name, note in notes.items() if note.problems}
    if bad and config.on_bad_rows == "fail":
        _refuse_bad_rows(config.task, paths, bad, run)
    for name, path in paths.items():
        if not len(sets[name]):
            raise no_examples_error(path)


def _refuse_bad_rows(task: str | None, paths: dict[str, Any], bad: dict[str, DatasetNotes], run: Run) -> NoReturn:
    """Write the bad rows of the sets to the run's data report, and raise the error that names them.

    A run that has started needs the report that it has, to resume: its bad rows have a file of their own.
    """
    path = run.rejected_rows if run.config.exists() else run.data_report
    report = {name: {"path": display_paths(paths[name]), **_reading_report(note)} for name, note in bad.items()}
    run.folder.mkdir(parents=True, exist_ok=True)
    atomic.write_json(path, report)
    errors = [str(bad_rows_error(paths[name], note, f"{name}_path", task or "")) for name, note in bad.items()]
    where = f"All of them: {display_path(path)}. Fix them, or set on_bad_rows: drop"
    raise DataError("\n".join([*errors, where]))


def _reading_report(notes: DatasetNotes) -> dict[str, Any]:
    """Name what was noted while a set was read."""
    report = {
        "rows_read": notes.rows,
        "rows_bad": len(notes.problems),
        "turns": notes.turns,
        "formats": dict(notes.formats),
        "ignored_columns": dict(notes.ignored),
    }
    report |= {"empty_answers": notes.empty_answers} if notes.empty_answers else {}
    report |= {"special_tokens_in_texts": dict(notes.special)} if notes.special else {}
    report |= {"rows_per_label": dict(notes.labels)} if notes.labels else {}
    return report | ({"problems": notes.problems} if notes.problems else {})


def _duplicates(whole: Tokens) -> dict[str, Any]:
    """List the first examples that repeat an earlier one."""
    _, first = np.unique(whole.content, return_index=True)
    repeats = np.setdiff1d(np.arange(len(whole)), first)[:LISTED_PLACES]
    return {"duplicates": [whole.where(k) for k in repeats]} if len(repeats) else {}


def _overlap(train: Tokens, valid: Tokens) -> dict[str, Any]:
    """Count the validation examples that are training examples, too: their loss does not measure generalization."""
    shared = np.flatnonzero(np.isin(valid.content, train.content))
    return {"rows": len(shared), "places": [valid.where(k) for k in shared[:LISTED_PLACES]]}


def _padding(config: ResolvedConfig, train: Tokens) -> dict[str, Any]:
    """Report how the examples fill the batches of the first epoch."""
    sequences = batching.make_sequences(train, config.padding, config.context_length, batching.group_size(config.task))
    by_length = batching.groups_by_length(config.task)
    steps = batching.epoch_batches(train, sequences, config.global_batch_size, config.seed, 0, by_length=by_length)
    width = config.context_length if config.padding == "max_length" else None
    shares = max(1, config.num_devices // config.sequence_parallel)
    share = batching.padding_share(train, steps, shares, config.gradient_accumulation_steps, width)
    return {"sequences": len(sequences), "padding_share": round(share, 4)}


def _choose(
    config: FinetuneConfig, sets: dict[str, Tokens], images: ImageTokens | None
) -> tuple[FinetuneConfig, list[Choice]]:
    """Choose what --default leaves open, from the tokens of the data and the hardware of the config or machine."""
    statistics = Statistics(tuple(sets["train"].lengths.tolist()), 1.0, "the tokenized examples")
    longest_valid = int(sets["valid"].lengths.max()) if "valid" in sets else 0
    hardware = hardware_in(config) or local_hardware()
    pixels = image_report(sets["train"], images)["resized_pixels"] / statistics.tokens if images else 0.0
    shape = with_images(auto_config.core_shape(config.model_id), config, pixels)
    return auto_config.choose(config, shape, hardware, statistics, longest_valid)


def _fill_gaps(config: FinetuneConfig, sets: dict[str, Tokens], run_name: str) -> ResolvedConfig:
    """Choose what the config leaves open: context length, batch sizes, epochs (LLMForge's rules)."""
    context = config.context_length
    if context is None:
        p95 = max(token_store.token_statistics(tokens)["tokens_p95"] for tokens in sets.values())
        context = max(p95, native_context_length(locate(config.model_id)))
    micro = micro_batch_for(context)
    sized = config.resolve(
        context_length=context,
        train_batch_size_per_device=config.train_batch_size_per_device or micro,
        eval_batch_size_per_device=config.eval_batch_size_per_device or micro,
        run_name=config.run_name or run_name,
    )
    group = batching.group_size(config.task)
    fitted, _ = truncation.fit_context(
        sets["train"], context, config.truncation, display_paths(config.train_path), group
    )
    sequences = batching.make_sequences(fitted, config.padding, context, group)
    epoch_steps = schedule.steps_per_epoch(len(sequences), sized.global_batch_size)
    epochs = config.num_epochs or schedule.epochs_for(config.min_update_steps, epoch_steps)
    steps = schedule.total_steps(epochs, epoch_steps, config.max_steps)
    warmup = config.num_warmup_steps
    if warmup >= steps and "num_warmup_steps" not in config.explicit_keys:
        warmup = schedule.warmup_steps(steps)  # a run of a few steps, to try something, is to train, too
    return sized.resolved(num_epochs=epochs, num_warmup_steps=warmup)


def _fingerprint(fitted: Tokens) -> str:
    """Hash the training tokens, so that a resumed run notices if its data changed."""
    digest = hashlib.sha256()
    for array in (fitted.content, fitted.begin, fitted.end):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def report_rows(report: dict[str, Any]) -> list[list[str]]:
    """Lay the data report out as lines of a table: name, training set, validation set."""
    sets = [report[name] for name in ("train", "valid") if name in report]

    def line(name: str, write: Callable[[dict], str]) -> list[str]:
        return [name, *map(write, sets)]

    lines = [
        line("data", lambda s: s["path"]),
        line("examples", lambda s: f"{s['rows']:,}" + (f" ({s['rows_bad']:,} bad, dropped)" if s["rows_bad"] else "")),
        line("format", lambda s: ", ".join(f"{n:,} {name}" for name, n in s["formats"].items())),
        line("turns", lambda s: f"{s['turns']:,}" if s["turns"] else ""),
        line("tokens", lambda s: f"{s['tokens']:,}"),
        line("supervised tokens", lambda s: f"{s['supervised_tokens']:,} ({s['supervised_share']:.0%})"),
        line(
            "tokens per example",
            lambda s: "p50 {tokens_p50:,}  p95 {tokens_p95:,}  p99 {tokens_p99:,}  max {tokens_max:,}".format(**s),
        ),
        *([line("images", image_line)] if any("images" in s for s in sets) else []),
        line(f"longer than {report['context_length']:,}", _truncated),
        line("duplicates", lambda s: f"{s['duplicate_rows']:,}"),
    ]
    if any(s["ignored_columns"] for s in sets):
        lines.append(line("ignored keys", _ignored))
    if any("special_tokens_in_texts" in s for s in sets):
        lines.append(line("special tokens in texts", _special))
    if any("empty_answers" in s for s in sets):
        lines.append(line("empty answers", lambda s: f"{s.get('empty_answers', 0):,} examples teach to answer nothing"))
    if any("rows_per_label" in s for s in sets):
        labels = line("examples per label", lambda s: ", ".join(f"{n:,} {t}" for t, n in _labels(s)))
        lines.append(labels)
    if held_out := report.get("valid", {}).get("held_out"):
        left_out = held_out["duplicates_left_out"]
        also = f"; {left_out:,} duplicate{'s' * (left_out > 1)} left out" if left_out else ""
        lines.append(["held out", "", f"{held_out['prompts']:,} prompt{'s' * (held_out['prompts'] > 1)}{also}"])
    if overlap := report.get("overlap", {}).get("rows"):
        lines.append(["also in training", "", f"{overlap:,} example{'s' * (overlap > 1)}"])
    lines.append(["padding", f"{report['train']['padding_share']:.1%}", *[""] * (len(sets) - 1)])
    return lines


def _ignored(report: dict[str, Any]) -> str:
    return ", ".join(f"{key} ({count:,})" for key, count in sorted(report["ignored_columns"].items()))


def _special(report: dict[str, Any]) -> str:
    counts = sorted(report.get("special_tokens_in_texts", {}).items())
    listed = ", ".join(f"{token} ({count:,})" for token, count in counts)
    return listed and f"{listed}: characters, not tokens, which only the template writes"


def _labels(report: dict[str, Any]) -> list[tuple[str, int]]:
    return sorted(report["rows_per_label"].items())


def _truncated(report: dict[str, Any]) -> str:
    """Write what truncation does to a set."""
    longer = report["truncation"]["longer_rows"]
    if not longer:
        return "0"
    cut = report["answer_tokens_cut"]
    lost = f", {cut:,} supervised tokens lost" if cut else ""
    return f"{longer:,} examples: {report['rows_cut']:,} cut, {report['rows_dropped']:,} dropped{lost}"
