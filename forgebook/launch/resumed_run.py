"""A run that is in its folder already: whether this config, data and models continue it, and what was edited."""

from __future__ import annotations

import datetime
import json
from typing import Any

from forgebook.config.parse import load_config
from forgebook.config.schema import FinetuneConfig
from forgebook.errors import StorageError
from forgebook.models import versions
from forgebook.planning import schedule
from forgebook.planning.prepare import Prepared
from forgebook.planning.resume import resume_changes
from forgebook.runs import atomic, object_store
from forgebook.runs.run import Run
from forgebook.training.training_state import Position, latest_state

__all__ = ["check_same", "record_changes"]


def check_same(run: Run, prepared: Prepared) -> list[str]:
    """Return what edits of the config mean for the run in an existing folder; none where it is the same.

    Raises StorageError for edits that it cannot be resumed with, and if its data or a model has changed.
    """
    config = prepared.config
    steps = schedule.steps_per_epoch(prepared.report["train"]["sequences"], config.global_batch_size)
    earlier = _as_it_ran(load_config(run.config))
    saved = latest_state(run.resume)
    position = saved[1] if saved else Position()
    step, names = position.step, {f"step-{position.step}", f"epoch-{position.step / steps:g}"}
    has_checkpoint = not names.isdisjoint(position.losses)
    changes = resume_changes(earlier, config, step, steps, run.location, run.is_complete, has_checkpoint)
    report = atomic.read_json(run.data_report, ["train"])
    for name in ("train", "valid"):
        if name in report and report[name]["fingerprint"] != prepared.report[name]["fingerprint"]:
            raise StorageError(
                f"{_changed_files(report[name], prepared.report[name])} is not what {run.location} was started with: "
                "choose another run_name, or on_existing=overwrite"
            )
    if not run.is_complete or changes:
        versions.check_versions(report.get("models", {}), config)
    return changes


def _as_it_ran(written: FinetuneConfig) -> FinetuneConfig:
    """Fill in what a run of an earlier version did without a key for it: weight decay was of norms and biases, too."""
    if written.weight_decay == 0 or written.is_lora or "decay_norms_and_biases" in written.explicit_keys:
        return written
    return written.resolve(decay_norms_and_biases=True)


def record_changes(run: Run, changes: list[str]) -> None:
    """Add edits of the config to the run's list of them, and reopen a complete run."""
    if changes:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with open(run.changes, "a") as file:
            file.write(json.dumps({"step": run.saved_step, "time": now, "changes": changes}) + "\n")
        run.summary.unlink(missing_ok=True)
        if run.uri and object_store.has_file(f"{run.uri}/{run.summary.name}"):
            object_store.remove_files(run.uri, [run.summary.name])


def _changed_files(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Name the files of a set that have changed, each with its version then and now; the set where none is known."""
    known = {source["uri"]: source for source in before.get("sources", ())}
    changed = [
        (source["uri"], *(one.get("version") or one["content"][:12] for one in (known[source["uri"]], source)))
        for source in now.get("sources", ())
        if source["uri"] in known and source["content"] != known[source["uri"]]["content"]
    ]
    return ", ".join(f"{uri} (it was {then}, it is {today})" for uri, then, today in changed) or now["path"]
