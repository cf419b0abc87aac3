"""One clean stream for the person who is waiting: the plan, a progress bar with time left, evaluations, the summary.

Meanwhile what Ray, DeepSpeed and torch print goes to `<run>/logs/driver.log` (workers have their own logs there), and
its last lines are shown when something fails.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from forgebook.reporting import divergence
from forgebook.runs import metrics

__all__ = [
    "last_lines",
    "make_console",
    "make_table",
    "progress_bar",
    "quiet_descriptors",
    "show_progress",
    "show_stages",
    "warner",
]

POLL_SECONDS = 0.2
PAGE_WIDTH = 96  # of tables without a terminal: what a code block on GitHub shows without scrolling
# Without a terminal a run prints about this many lines, a long one a line at least every so many seconds. In a
# notebook, which keeps them, it prints the evaluations, and steps only where these are far apart.
LINES_PER_RUN, SECONDS_PER_LINE, SECONDS_PER_LINE_IN_NOTEBOOK = 12, 300, 60


def make_console() -> Console:
    """Make the console that everything is printed on: colors and a live bar in a terminal, else plain lines.

    A notebook gives its cells' processes a terminal that cannot move its cursor: it counts as no terminal.
    """
    if sys.stdout.isatty() and not _is_in_notebook():
        return Console(highlight=False, soft_wrap=True)
    return Console(highlight=False, soft_wrap=True, force_terminal=False, width=PAGE_WIDTH)


def _is_in_notebook() -> bool:
    """Whether this process is a notebook's kernel or was started by one of its cells."""
    return "JPY_PARENT_PID" in os.environ


@contextlib.contextmanager
def quiet_descriptors(log: Path) -> Iterator[Console]:
    """Send file descriptors 1 and 2 to `log` for the length of a block; yield a console on the real output.

    Descriptors, because native libraries print too. Where sys.stdout is not the process's own (a notebook kernel, a
    test), printing is left alone.
    """
    console = make_console()
    if sys.stdout is not sys.__stdout__:
        yield console
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    _flush_streams()
    real_out, real_err = os.dup(1), os.dup(2)
    with open(log, "ab") as sink, os.fdopen(os.dup(real_out), "w") as stream:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        console.file = stream
        try:
            yield console
        finally:
            _flush_streams()
            os.dup2(real_out, 1)
            os.dup2(real_err, 2)
            os.close(real_out)
            os.close(real_err)


def _flush_streams() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


@contextlib.contextmanager
def show_progress(log: Path, console: Console) -> Iterator[None]:
    """Show what a run appends to its progress file while the block runs."""
    view = _Bar(console) if console.is_terminal else _Lines(console)
    start = log.stat().st_size if log.exists() else 0
    losses, warned = list[float](), False

    def show(event: dict[str, Any]) -> None:
        nonlocal warned
        view.show(event)
        if event["kind"] == "step" and not warned:
            losses.append(event["train_loss_batch"])
            if warning := divergence.risen(losses):
                warned = True
                warner(console)(f"step {event['step']}: {warning}")

    try:
        with metrics.watch_lines(log, start, POLL_SECONDS, show):
            yield
    finally:
        view.close()


class _Bar:
    """A live bar for a terminal, evaluations printed above it."""

    def __init__(self, console: Console):
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
        )
        self._task: TaskID | None = None

    def show(self, event: dict[str, Any]) -> None:
        if event["kind"] == "evaluation":
            self._console.print(_evaluation_text(event))
        elif event["kind"] == "step" and self._task is not None:
            self._progress.update(
                self._task, completed=event["step"], facts=_facts(event), description=f"epoch {event['epoch']}"
            )
        elif event["text"] == "training":
            # A restarted run gets a new bar: the time lost would distort the time left.
            self.close()
            self._progress.start()
            self._task = self._progress.add_task("epoch 1", total=event["steps"], completed=event["start"], facts="")
            self._console.print(_started_text(event))
        else:
            self._console.print(f"[dim]{event['text']}[/dim]")

    def close(self) -> None:
        if self._task is not None:
            self._progress.stop()
            self._progress.remove_task(self._task)
            self._task = None


class _Lines:
    """Plain lines, for a notebook cell or a log file: a dozen of steps, and the evaluations."""

    def __init__(self, console: Console):
        self._console = console
        self._steps = self._start = 0
        self._began = self._printed = 0.0

    def show(self, event: dict[str, Any]) -> None:
        if event["kind"] == "evaluation":
            self._printed = time.monotonic()
            self._console.print(_evaluation_text(event))
        elif event["kind"] == "step":
            if self._is_due(event["step"]):
                self._printed = time.monotonic()
                self._console.print(self._step_text(event))
        elif event["text"] == "training":
            self._steps, self._start, self._began = event["steps"], event["start"], time.monotonic()
            self._console.print(_started_text(event))
        else:
            self._console.print(event["text"])

    def _is_due(self, step: int) -> bool:
        silence = time.monotonic() - max(self._began, self._printed)
        if _is_in_notebook():
            return silence > SECONDS_PER_LINE_IN_NOTEBOOK
        return step % max(1, self._steps // LINES_PER_RUN) == 0 or step == self._start + 1 or silence > SECONDS_PER_LINE

    def _step_text(self, event: dict[str, Any]) -> str:
        seconds_per_step = (time.monotonic() - self._began) / (event["step"] - self._start)
        left = _clock(seconds_per_step * (self._steps - event["step"]))
        return f"epoch {event['epoch']}  step {event['step']}/{self._steps}  {_facts(event)}  {left} left"

    def close(self) -> None:
        pass


def _clock(seconds: float) -> str:
    """Write a time as hours:minutes:seconds; a long run takes more than 24 hours."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest:02d}"


def _facts(event: dict[str, Any]) -> str:
    """Write a step's loss and throughput; on a GPU of the catalog also the MFU and the cost so far."""
    facts = f"loss {event['train_loss_batch']:.4f}  {event['trained_tokens_throughput']:,.0f} tok/s"
    facts += f"  MFU {event['mfu']:.0%}" if "mfu" in event else ""
    return facts + (f"  ${event['cost_usd']:,.2f} so far" if "cost_usd" in event else "")


def _started_text(event: dict[str, Any]) -> str:
    share = event["trainable_parameters"] / event["parameters"]
    resumed = ""
    if event["start"]:
        resumed = f", resumed after step {event['start']} with {event['workers']} worker{'s' * (event['workers'] > 1)}"
    return (
        f"training {event['trainable_parameters']:,} of {event['parameters']:,} parameters ({share:.1%}), "
        f"{event['steps']} steps{resumed}"
    )


def _evaluation_text(event: dict[str, Any]) -> str:
    where = f"[bold]epoch {event['epoch']}  step {event['step']}[/bold]"
    if "eval_loss" not in event:
        return f"{where}  saved {event['checkpoint_dir_name']}"
    best = "  best so far" if event.get("is_best") else ""
    for name in ("accuracy", "reward_accuracy", "tool_calls", "exact_match"):
        if f"eval_{name}" in event:
            best = f"  {name.replace('_', ' ')} {event[f'eval_{name}']:.1%}{best}"
    perplexity = f"  perplexity {event['perplexity']:.3f}" if "perplexity" in event else ""
    answers = "".join(
        f"\n    {escape(shorten(one['answer']))!s}  [dim](reference: {escape(shorten(one['reference']))})[/dim]"
        for one in event.get("generated", [])
    )
    return f"{where}  evaluation loss {event['eval_loss']:.4f}{perplexity}{best}{answers}"


def shorten(text: str) -> str:
    """Write a text on one line of at most 100 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 100 else f"{line[:97]}..."


# Without a terminal a wait is reported after this many seconds, then after twice as many and so on, at last every
# SECONDS_PER_LINE; one that takes less than the second figure is reported by nothing.
FIRST_LINE_SECONDS, SHORT_WAIT_SECONDS = 10, 2


@contextlib.contextmanager
def progress_bar(console: Console, action: str) -> Iterator[Callable[..., None]]:
    """Yield a function to call with (name, done, total): in a terminal it moves a bar, else it prints a few lines.

    Two more of its arguments make its figures better: tokens, generated so far, for the rate; begun, what is in
    progress as a number of finished ones, for the time left.
    """
    view = _CountBar(console, action) if console.is_terminal else _CountLines(console, action)
    try:
        yield view.show
    finally:
        view.close()


@dataclass(frozen=True)
class _Start:
    """When a count was first shown, and how many were done then: an interrupted command's are no part of the rate."""

    time: float
    done: int

    def text(self, done: int, total: int, tokens: int, begun: float) -> str:
        """Write the count, the rate and the time left."""
        seconds, now = max(time.monotonic() - self.time, 1e-9), done - self.done
        rate = f"{tokens / seconds:,.0f} tok/s" if tokens else f"{now / seconds:,.1f}/s"
        left = "--:--:--"
        if now + begun >= 1:  # before that, it is the time of reading the prompts, taken for that of few tokens
            left = _clock(seconds * max(0.0, total - done - begun) / (now + begun))
        return f"{done}/{total}  {rate}  {left} left"


class _CountBar:
    def __init__(self, console: Console, action: str):
        self._action, self._starts = action, dict[str, _Start]()
        self._tasks: dict[str, TaskID] = {}
        columns = TextColumn("{task.description}"), BarColumn(bar_width=30), TextColumn("{task.fields[count]}")
        self._progress = Progress(*columns, console=console, transient=True)
        self._progress.start()

    def show(self, name: str, done: int, total: int, tokens: int = 0, begun: float = 0.0) -> None:
        if name not in self._tasks:
            self._starts[name] = _Start(time.monotonic(), done)
            self._tasks[name] = self._progress.add_task(f"{self._action} {name}", total=total, count="")
        count = self._starts[name].text(done, total, tokens, begun)
        self._progress.update(self._tasks[name], completed=done + begun, total=total, count=count)

    def close(self) -> None:
        self._progress.stop()


class _CountLines:
    def __init__(self, console: Console, action: str):
        self._console, self._action, self._starts = console, action, dict[str, _Start]()
        self._due: dict[str, float] = {}  # by name: seconds after its start

    def show(self, name: str, done: int, total: int, tokens: int = 0, begun: float = 0.0) -> None:
        start = self._starts.setdefault(name, _Start(time.monotonic(), done))
        seconds, due = time.monotonic() - start.time, self._due.setdefault(name, FIRST_LINE_SECONDS)
        is_last = done == total and seconds > SHORT_WAIT_SECONDS and due < math.inf
        if is_last or seconds >= due:
            self._due[name] = math.inf if is_last else seconds + min(seconds, SECONDS_PER_LINE)
            self._console.print(f"{self._action} {name}  {start.text(done, total, tokens, begun)}")

    def close(self) -> None:
        pass


@contextlib.contextmanager
def show_stages(console: Console, text: str) -> Iterator[Callable[[str], None]]:
    """Show a wait whose length is unknown; yield a function that names what it waits for now.

    In a terminal a line with the time so far; else the text, and the stages of a wait that is longer than 2 seconds.
    """
    if console.is_terminal:
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(text)
            yield lambda stage: progress.update(task, description=f"{text}: {stage}")
        return
    console.print(text)
    began = time.monotonic()

    def show(stage: str) -> None:
        if (seconds := time.monotonic() - began) > SHORT_WAIT_SECONDS:
            console.print(f"{stage}, after {seconds:.0f} s")

    yield show


def make_table(title: str, columns: list[str], rows: Iterable[Iterable[str]]) -> Table:
    """Make a table for the console."""
    table = Table(title=title or None, title_justify="left", title_style="bold", expand=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))  # square brackets are text here
    return table


def last_lines(folder: Path, count: int = 8) -> str:
    """Quote the last lines of each log in a folder, for a message about a failure."""
    quoted = []
    for log in sorted(folder.glob("*.log")):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if lines:
            quoted.append(f"--- {log.name}, last lines ---\n" + "\n".join(lines[-count:]))
    return "\n".join(quoted)


def warner(console: Console) -> Callable[[str], None]:
    """Return a function that prints a warning while a run trains."""
    return lambda text: console.print(f"[yellow]{escape(text)}[/yellow]")
