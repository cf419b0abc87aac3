"""Before the run: the data read, checked, tokenised and fitted; the gaps of the config filled; the data report.

prepared = prepare(config, run)         Prepared(config without gaps, train, valid, report)
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from forgebook.config.parse import FinetuneConfig
from forgebook.data import batching, readers, token_store
from forgebook.data import tokenize as data
from forgebook.data.token_store import Tokens
from forgebook.errors import DataError
from forgebook.models import families
from forgebook.models.tokenizer import locate, tokenizer_of, tokenizer_source
from forgebook.planning import auto_config, schedule
from forgebook.planning.auto_config import Choice
from forgebook.planning.feasibility import micro_batch_for
from forgebook.planning.hardware import found_hardware, hardware_in
from forgebook.planning.token_count import Statistics
from forgebook.runs import atomic
from forgebook.runs import run as storage
from forgebook.runs.run import Run

__all__ = ["Prepared", "prepare", "report_rows"]

SHOWN_PLACES = 5


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that is ready to start: a config without gaps, tokens, and the report on the data."""

    config: FinetuneConfig
    train: Tokens
    valid: Tokens | None
    report: dict[str, Any]


def prepare(
    config: FinetuneConfig, run: Run, on_progress: Callable[[str, int, int], None] = lambda name, done, total: None
) -> Prepared:
    """Read, check, tokenise and fit the data; fill in what the config leaves to it.

    Tokens are kept under `<storage_path>/.tokens`, to be found again by the next run on the same data. Where
    rows are bad and `on_bad_rows` is fail, all of them are written to the run's data_report.json.
    on_progress: called with (set, pieces done, pieces).

    Raises DataError, ModelError or StorageError.
    """
    if config.is_default:
        auto_config.core_shape(config)  # refused now rather than after the data is tokenised
        config = auto_config.choose_task(config, auto_config.first_rows(config))
    tokenizer = tokenizer_of(config)
    paths = {"train": config.train_path} | ({"valid": config.valid_path} if config.valid_path else {})
    recipe, kept = data.Recipe.of(config), run.folder.parent / ".tokens"
    sets, notes = {}, {}
    for name, path in paths.items():
        sets[name], notes[name] = data.tokenize(
            readers.find_sources(path), tokenizer, recipe, kept, config.seed,
            lambda done, total, name=name: on_progress(name, done, total),
        )  # fmt: skip
    _check_rows(config, paths, sets, notes, run)
    choices: list[Choice] = []
    if config.is_default:
        config, choices = _choose(config, sets)
    config = _fill_gaps(config, sets)
    report = {"tokenizer": tokenizer_source(config), "context_length": config.context_length}
    for name, path in paths.items():
        whole = sets[name]
        losses = token_store.truncation_losses(whole, config.context_length)
        sets[name], cut = token_store.fit_context(
            whole, config.context_length, config.truncation, shown_path(path), _together(config)
        )
        report[name] = {
            "path": shown_path(path), **_told(notes[name]), **token_store.token_statistics(whole), "truncation": losses,
            **cut, **_duplicates(whole), "fingerprint": _fingerprint(sets[name]),
        }  # fmt: skip
    if "valid" in sets:
        report["overlap"] = _overlap(sets["train"], sets["valid"])
    report["train"] |= _padding(config, sets["train"])
    report |= {"choices": [dataclasses.asdict(choice) for choice in choices]} if choices else {}
    return Prepared(config, sets["train"], sets.get("valid"), report)


def shown_path(path: Any) -> str:
    """Write a config's data path, or list of paths, in one line."""
    if isinstance(path, str):
        return path
    return ", ".join(entry if isinstance(entry, str) else f"{entry.path} x {entry.weight:g}" for entry in path)


def _check_rows(config: FinetuneConfig, paths, sets, notes, run: Run) -> None:
    """Raise DataError for bad rows, unless they are to be dropped, and for sets with no row left."""
    bad = {name: one for name, one in notes.items() if one.problems}
    if bad and config.on_bad_rows == "fail":
        report = {name: {"path": shown_path(paths[name]), **_told(one)} for name, one in bad.items()}
        run.folder.mkdir(parents=True, exist_ok=True)
        atomic.write_json(run.data_report, report)
        errors = [str(data.bad_rows_error(shown_path(paths[name]), one)) for name, one in bad.items()]
        raise DataError(
            "\n".join(errors)
            + f"\nAll of them: {storage.display_path(run.data_report)}. Mend them, or set on_bad_rows: drop"
        )
    for name, path in paths.items():
        if not len(sets[name]):
            raise data.empty_error(shown_path(path))


def _told(notes: data.SetNotes) -> dict[str, Any]:
    """Say what was met while a set was read."""
    told = {
        "rows_read": notes.rows, "rows_bad": len(notes.problems), "turns": notes.turns,
        "formats": dict(notes.formats), "ignored_columns": dict(notes.ignored),
    }  # fmt: skip
    told |= {"rows_per_label": dict(notes.labels)} if notes.labels else {}
    return told | ({"problems": notes.problems} if notes.problems else {})


def _duplicates(whole: Tokens) -> dict[str, Any]:
    """Name the first rows that repeat an earlier one."""
    _, first = np.unique(whole.content, return_index=True)
    repeats = np.setdiff1d(np.arange(len(whole)), first)[:SHOWN_PLACES]
    return {"duplicates": [whole.where(k) for k in repeats]} if len(repeats) else {}


def _overlap(train: Tokens, valid: Tokens) -> dict[str, Any]:
    """Count the validation rows that are trained on, too: their loss says nothing."""
    shared = np.flatnonzero(np.isin(valid.content, train.content))
    return {"rows": len(shared), "places": [valid.where(k) for k in shared[:SHOWN_PLACES]]}


def _padding(config: FinetuneConfig, train: Tokens) -> dict[str, Any]:
    """Say how the rows fill the batches of the first epoch."""
    sequences = batching.make_sequences(train, config)
    share = batching.padding_share(train, sequences, config)
    return {"sequences": len(sequences), "padding_share": round(share, 4)}


def _choose(config: FinetuneConfig, sets: dict[str, Tokens]) -> tuple[FinetuneConfig, list[Choice]]:
    """Choose what --default leaves to the program, by the tokens of the data and the hardware named or found."""
    data = Statistics(tuple(sets["train"].lengths.tolist()), 1.0, "the tokenised rows")
    longest_valid = int(sets["valid"].lengths.max()) if "valid" in sets else 0
    hardware = hardware_in(config) or found_hardware()
    return auto_config.choose(config, auto_config.core_shape(config), hardware, data, longest_valid)


def _fill_gaps(config: FinetuneConfig, sets: dict[str, Tokens]) -> FinetuneConfig:
    """Choose what the config leaves open: context length, batch sizes, epochs (LLMForge's rules)."""
    chosen: dict[str, Any] = {}
    if config.context_length is None:
        p95 = max(token_store.token_statistics(one)["tokens_p95"] for one in sets.values())
        chosen["context_length"] = max(p95, families.native_context_length(locate(config.model_id)))
    context = config.context_length or chosen["context_length"]
    micro = micro_batch_for(context)
    for name in ("train_batch_size_per_device", "eval_batch_size_per_device"):
        if getattr(config, name) is None:
            chosen[name] = micro
    if chosen:
        config = config.resolve(**chosen)
    if config.num_epochs is None:
        policy = "drop" if config.truncation == "error" else config.truncation
        fitted, _ = token_store.fit_context(sets["train"], context, policy, together=_together(config))
        sequences = batching.make_sequences(fitted, config)
        epoch_steps = schedule.steps_per_epoch(len(sequences), config.global_batch_size)
        config = config.resolve(num_epochs=schedule.epochs_for(config.min_update_steps, epoch_steps))
    return config


def _together(config: FinetuneConfig) -> int:
    return 2 if config.task == "preference_tuning" else 1


def _fingerprint(fitted: Tokens) -> str:
    """Hash what is trained, so that a continued run can tell whether its data changed."""
    digest = hashlib.sha256()
    for array in (fitted.content, fitted.begin, fitted.end):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def report_rows(report: dict[str, Any]) -> list[list[str]]:
    """Lay the data report out as lines of a table: name, training set, validation set."""
    sets = [report[name] for name in ("train", "valid") if name in report]

    def line(name: str, tell: Callable[[dict], str]) -> list[str]:
        return [name, *(tell(one) for one in sets)]

    lines = [
        line("data", lambda s: s["path"]),
        line("rows", lambda s: f"{s['rows']:,}" + (f" ({s['rows_bad']:,} bad, dropped)" if s["rows_bad"] else "")),
        line("format", lambda s: ", ".join(f"{n:,} {name}" for name, n in s["formats"].items())),
        line("turns", lambda s: f"{s['turns']:,}"),
        line("tokens", lambda s: f"{s['tokens']:,}"),
        line("trained tokens", lambda s: f"{s['supervised_tokens']:,} ({s['supervised_share']:.0%})"),
        line(
            "tokens per row",
            lambda s: "p50 {tokens_p50:,}  p95 {tokens_p95:,}  p99 {tokens_p99:,}  max {tokens_max:,}".format(**s),
        ),
        line(f"longer than {report['context_length']:,}", lambda s: _longer(s)),
        line("duplicates", lambda s: f"{s['duplicate_rows']:,}"),
    ]
    if any(s["ignored_columns"] for s in sets):
        lines.append(line("ignored keys", lambda s: ", ".join(s["ignored_columns"])))
    if any("rows_per_label" in s for s in sets):
        lines.append(
            line("rows per label", lambda s: ", ".join(f"{n:,} {t}" for t, n in sorted(s["rows_per_label"].items())))
        )
    if report.get("overlap", {}).get("rows"):
        lines.append(["also trained on", "", f"{report['overlap']['rows']:,} rows"])
    lines.append(["padding", f"{report['train']['padding_share']:.1%}", *[""] * (len(sets) - 1)])
    return lines


def _longer(one: dict[str, Any]) -> str:
    if not one["truncation"]["longer_rows"]:
        return "0"
    lost = f", {one['answer_tokens_cut']:,} trained tokens lost" if one["answer_tokens_cut"] else ""
    return f"{one['truncation']['longer_rows']:,} rows: {one['rows_cut']:,} cut, {one['rows_dropped']:,} dropped{lost}"
