"""A run's metrics and progress: files that rank 0 writes and anyone may read.

    <run>/metrics.jsonl          one line per optimizer step and per evaluation, under LLMForge's names
    <run>/logs/progress.jsonl    the same and the stages between them, as they happen; console and trackers read it

A run that resumes from step k drops the metrics after k: they will be written again.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from forgebook.runs.atomic import atomic_file, parse_object
from forgebook.runs.run import Run, find_run

__all__ = ["Progress", "read_curve", "read_metrics", "read_new_lines", "watch_lines"]


class Progress:
    """Append to the run's metrics and progress files."""

    def __init__(self, run: Run, resume_step: int = 0, silent: bool = False):
        """Open the files. resume_step: the step resumed from. silent: write nothing (every rank but 0)."""
        self._silent = silent
        if silent:
            return
        run.logs.mkdir(parents=True, exist_ok=True)
        _drop_after(run.metrics, resume_step)
        self._metrics = open(run.metrics, "a")  # noqa: SIM115  (open for the length of the run)
        self._progress = open(run.logs / "progress.jsonl", "a")  # noqa: SIM115

    def step(self, **metrics: Any) -> None:
        """Record one optimizer step."""
        self._record("step", metrics)

    def evaluation(self, **metrics: Any) -> None:
        """Record one evaluation."""
        self._record("evaluation", metrics)

    def stage(self, text: str, **facts: Any) -> None:
        """Record the stage that begins, for the console; `facts` go with it."""
        if not self._silent:
            _append(self._progress, {"kind": "stage", "text": text, **facts})

    def _record(self, kind: str, metrics: dict[str, Any]) -> None:
        if not self._silent:
            _append(self._metrics, metrics)
            _append(self._progress, {"kind": kind, **metrics})


def _append(file, record: dict[str, Any]) -> None:
    file.write(json.dumps(record) + "\n")
    file.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a run's metrics; evaluations are the lines with `eval_loss`."""
    with open(path, encoding="utf-8", errors="replace") as file:
        # A process that was killed while writing leaves half a line, which the resumed run replaces.
        lines = [line for line in file if line.endswith("\n")]
    return [parse_object(line.encode(), f"{path}:{number}") for number, line in enumerate(lines, 1)]


def read_curve(run: str, key: str) -> tuple[list[int], list[float]]:
    """Read one metric of a run, by its name or folder: the steps at which it was recorded, and its values there."""
    records = [record for record in read_metrics(find_run(run).metrics) if key in record]
    return [record["step"] for record in records], [record[key] for record in records]


def read_new_lines(log: Path, offset: int, ended: threading.Event, every: float) -> Iterator[list[dict[str, Any]]]:
    """Yield the complete lines added to `log` after byte `offset`, a list every so many seconds, possibly empty.

    Once `ended` is set, the rest comes at once and the iteration ends.
    """
    while True:
        is_last_look = ended.wait(every)
        events = []
        if log.exists():
            with open(log) as file:
                file.seek(offset)
                while (line := file.readline()).endswith("\n"):
                    events.append(json.loads(line))
                    offset = file.tell()
        yield events
        if is_last_look:
            return


@contextlib.contextmanager
def watch_lines(log: Path, offset: int, every: float, handle: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Call a function, in a thread, with each line added to `log` after byte `offset` while the block runs."""
    ended = threading.Event()

    def watch() -> None:
        for events in read_new_lines(log, offset, ended, every):
            for event in events:
                handle(event)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _drop_after(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after a step."""
    if not path.exists():
        return
    records = [record for record in read_metrics(path) if record["step"] <= step]
    with atomic_file(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
