"""A config's training examples -> a filtered file, and a report of what was found. Nothing is changed in place.

    curation = curate(plan, out=Path("clean.jsonl"))
    curation.report        counts by reason, precision of the critic, cost; see `report`

Sources are read once to judge each example and once more to write those that stay, so that a set need not fit in
memory; only the label noise and the critic hold the examples that are left by then.
"""

from __future__ import annotations

import collections
import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from forgebook.config.blocks import labels_of
from forgebook.config.curation_blocks import REASONS, CurationConfig
from forgebook.config.data_block import HeldOut
from forgebook.config.schema import FinetuneConfig
from forgebook.curation.checks import Finding, TextChecks
from forgebook.curation.duplicates import DuplicateIndex
from forgebook.curation.embeddings import Embedder
from forgebook.data import data_sources, readers
from forgebook.data.examples import DatasetNotes, bad_rows_error, display_paths, no_examples_error, noted_examples
from forgebook.data.row_formats import Example
from forgebook.data.split import as_row
from forgebook.errors import ConfigError, DataError
from forgebook.runs.atomic import atomic_file
from forgebook.runs.object_store import is_remote

__all__ = ["Curation", "Judge", "Judged", "check_output", "curate", "dropped_path", "report_paths"]

# (name of what is counted, done, total)
OnProgress = Callable[[str, int, int], None]
REPORT_EVERY = 500  # examples


@dataclass(frozen=True)
class Judged:
    """What a judge of whole sets says: findings, and what the report shows of it beside."""

    findings: list[Finding]
    report: dict[str, Any]


# Looks at the examples that are left, by number; used for the label noise and the critic.
Judge = Callable[[dict[int, Example]], Judged]


@dataclass
class Curation:
    """What curate found. read: examples, malformed rows aside; their numbers, from 0, are those of the findings.

    shown: the examples of the report, by number. judges: what each judge reports, by its name. remarks: what the user
    should know of the file.
    """

    out: Path
    sources: str
    drop: tuple[str, ...]
    examples_per_reason: int
    read: int = 0
    written: int = 0
    notes: DatasetNotes = field(default_factory=DatasetNotes)
    findings: list[Finding] = field(default_factory=list)
    dropped: set[int] = field(default_factory=set)
    shown: dict[int, Example] = field(default_factory=dict)
    judges: dict[str, dict[str, Any]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def by_reason(self) -> dict[str, list[Finding]]:
        """Group the findings by their reason, in the order of REASONS."""
        groups: dict[str, list[Finding]] = {reason: [] for reason in REASONS}
        for finding in self.findings:
            groups[finding.reason].append(finding)
        return {reason: found for reason, found in groups.items() if found}


def report_paths(out: Path) -> tuple[Path, Path]:
    """Return where the report of a file is: as JSON and as a page."""
    return out.with_suffix(".report.json"), out.with_suffix(".report.html")


def dropped_path(out: Path) -> Path:
    """Return where the examples are that were left out of a file, with the reasons."""
    return out.with_suffix(".dropped.jsonl")


def curate(
    config: FinetuneConfig,
    out: Path,
    judges: dict[str, Judge] | None = None,
    on_progress: OnProgress = lambda name, done, total: None,
) -> Curation:
    """Write the training examples that stay to `out`, as JSON lines; return what was found.

    judges: called in their order with the examples that are left.

    Raises ConfigError if `out` may not be written, DataError if no example is left, or none could be read.
    """
    settings = config.curation or CurationConfig()
    labels = labels_of(config.classifier_config) if config.classifier_config else ()
    task = config.task or "instruction_tuning"
    sources = data_sources.find_sources(config.train_path)
    validation = [] if isinstance(config.valid_path, HeldOut) or config.valid_path is None else config.valid_path
    valid_sources = data_sources.find_sources(validation) if validation else []
    check_output(out, [*sources, *valid_sources], dropped_path(out))
    curation = Curation(
        out,
        display_paths(config.train_path),
        drop=tuple(settings.drop),
        examples_per_reason=settings.examples_per_reason,
    )
    if any(source.weight != 1 for source in sources):
        curation.remarks.append(
            "the weights of the mixture are not in the new file: curate its parts one by one to keep them"
        )

    index = DuplicateIndex(settings.similarity)
    embedder = Embedder(settings.embeddings, sources, valid_sources, on_progress) if settings.embeddings else None
    valid_notes = DatasetNotes()
    for example in _examples(valid_sources, task, labels, valid_notes):
        index.add(example, is_validation=True)
        if embedder is not None:
            embedder.add(example, valid_notes.rows - 1, is_validation=True)
    offset = len(index)  # of the training examples in the index
    checks = TextChecks(settings.min_answer_characters, settings.max_characters, settings.refusals, bool(labels))
    chunks = [chunk for source in sources for chunk in readers.chunks_of(source)]
    for done, chunk in enumerate(chunks, 1):
        for example in noted_examples(chunk, task, labels, curation.notes):
            curation.findings += checks.find(curation.read, example)
            index.add(example)
            if embedder is not None:
                embedder.add(example, curation.notes.rows - 1)
            curation.read += 1
        on_progress("parts of the data", done, len(chunks))
    if not curation.read:
        if curation.notes.problems:
            raise bad_rows_error(config.train_path, curation.notes, task=task)
        raise no_examples_error(config.train_path)
    curation.findings += checks.unfinished()
    _drop(curation)
    similar = embedder.similar_pairs() if embedder is not None else ()
    curation.findings += _repeated(index, offset, curation.dropped, similar)
    if embedder is not None:
        curation.judges["embeddings"] = embedder.report()
    _drop(curation)

    needed = _shown(curation)
    if judges:
        left = {k: e for k, e in _numbered(sources, task, labels) if k not in curation.dropped}
        for name, judge in judges.items():
            judged = judge(left)
            curation.findings += judged.findings
            curation.judges[name] = judged.report
            _drop(curation)
            left = {k: example for k, example in left.items() if k not in curation.dropped}
        needed |= _shown(curation)
        needed |= {k for report in curation.judges.values() for k in report.get("shown", ())}
    if len(curation.dropped) == curation.read:
        raise DataError(f"all {curation.read} examples would be dropped, so nothing was written: see curation.drop")
    with _writers(out, dropped_path(out)) as (kept_file, dropped_file):
        reasons = _reasons(curation)
        for number, example in _numbered(sources, task, labels):
            if number in needed:
                curation.shown[number] = example
            if number in curation.dropped:
                _write(dropped_file, {"where": example.where, "reasons": reasons[number], "row": as_row(example)})
            else:
                _write(kept_file, as_row(example))
                curation.written += 1
            if (number + 1) % REPORT_EVERY == 0:
                on_progress("examples written", number + 1, curation.read)
    if offset:
        curation.shown |= _validation_shown(curation, valid_sources, task, labels)
    return curation


@contextlib.contextmanager
def _writers(*paths: Path) -> Iterator[list[TextIO]]:
    """Open files that appear together once all is written."""
    with contextlib.ExitStack() as stack:
        temporary = [stack.enter_context(atomic_file(path)) for path in paths]
        yield [stack.enter_context(open(path, "w", encoding="utf-8")) for path in temporary]


def _write(file: TextIO, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _reasons(curation: Curation) -> dict[int, list[str]]:
    """List the reasons for which each example is dropped."""
    reasons = collections.defaultdict[int, list[str]](list)
    for finding in curation.findings:
        if finding.reason in curation.drop and finding.reason not in reasons[finding.number]:
            reasons[finding.number].append(finding.reason)
    return reasons


def check_output(out: Path, sources: Iterable[data_sources.Source], beside: Path) -> None:
    """Raise ConfigError if `out` is one of the files that are read, or a file that no such command wrote.

    beside: what such a command writes before `out`.
    """
    if is_remote(str(out)):
        raise ConfigError(f"out={out}: write a local file, and upload it")
    if out.suffix != ".jsonl":
        raise ConfigError(f"out={out}: must end with .jsonl, for JSON lines")
    for source in sources:
        if not is_remote(source.uri) and Path(source.uri).expanduser().resolve() == out.resolve():
            raise ConfigError(f"out={out} is a file that is read: name another one, for nothing is changed in place")
    if out.exists() and not beside.exists():
        raise ConfigError(f"out={out} exists and was not written by this command: name another file, or remove it")


def _examples(
    sources: Iterable[data_sources.Source], task: str, labels: tuple[str, ...], notes: DatasetNotes
) -> Iterator[Example]:
    """Yield the examples of sources; add to notes what could not be read."""
    for source in sources:
        for chunk in readers.chunks_of(source):
            yield from noted_examples(chunk, task, labels, notes)


def _numbered(
    sources: Iterable[data_sources.Source], task: str, labels: tuple[str, ...]
) -> Iterator[tuple[int, Example]]:
    return enumerate(_examples(sources, task, labels, DatasetNotes()))


def _repeated(
    index: DuplicateIndex, offset: int, dropped: set[int], similar: Iterable[tuple[int, int, float]]
) -> Iterator[Finding]:
    """Turn duplicates into findings. offset: the number of validation examples, which are first in the index.

    similar: pairs by their embeddings.

    A validation example that is repeated has a negative number: -1 is the first.
    """
    for one in index.find({number + offset for number in dropped}, similar):
        if one.example < offset:
            continue  # a validation example that repeats another
        of = one.of - offset if one.of >= offset else -1 - one.of
        detail = "the same" if one.similarity == 1 else f"{one.similarity:.0%} of the word pairs"
        detail = f"cosine {one.similarity:.3f} of the embeddings" if one.is_cosine else detail
        yield Finding(one.example - offset, one.kind, detail, of)


def _drop(curation: Curation) -> None:
    curation.dropped |= {one.number for one in curation.findings if one.reason in curation.drop}


def _shown(curation: Curation) -> set[int]:
    """List the examples that the report shows: the first of each reason, and those that they repeat."""
    shown = collections.defaultdict[str, list[Finding]](list)
    for finding in curation.findings:
        if len(shown[finding.reason]) < curation.examples_per_reason:
            shown[finding.reason].append(finding)
    found = [finding for group in shown.values() for finding in group]
    return {one.number for one in found} | {one.of for one in found if one.of is not None}


def _validation_shown(
    curation: Curation, sources: Iterable[data_sources.Source], task: str, labels: tuple[str, ...]
) -> dict[int, Example]:
    wanted = {one.of for one in curation.findings if one.of is not None and one.of < 0}
    return {-1 - k: e for k, e in _numbered(sources, task, labels) if -1 - k in wanted}
