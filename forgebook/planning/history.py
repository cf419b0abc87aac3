"""Throughputs of this machine's runs, for the next one's expected time: throughputs.jsonl in the cache folder.

note = record_throughput(Throughput(...))              one line at the end of each complete run
throughputs, note = read_throughputs()                 all lines; unreadable ones are left out, and noted
typical_throughput(throughputs, "A10G", ...)           the median of the runs most like this one, or None
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from forgebook.runs.download import cache_folder

__all__ = [
    "RunKind",
    "Throughput",
    "TypicalThroughput",
    "history_file",
    "method_name",
    "read_throughputs",
    "record_throughput",
    "typical_throughput",
]

# A model of another order of magnitude uses a device differently: runs are compared within this factor.
SIZE_FACTOR = 4
# Only the latest runs count: drivers, libraries and machines change.
LATEST_RUNS = 10
MOST_LINES = 1000


@dataclass(frozen=True)
class RunKind:
    """What two runs must share to have about the same throughput. method: see method_name."""

    model_id: str
    parameters: int
    method: str
    dtype: str
    workers: int
    recomputes: bool


@dataclass(frozen=True)
class Throughput:
    """What one run achieved: a line of the history.

    flops_per_second: of one worker, padding included, the first step excluded (it warms up). recomputes: whether
    gradient checkpointing was on.
    """

    device: str
    model_id: str
    parameters: int
    method: str
    dtype: str
    workers: int
    recomputes: bool
    flops_per_second: float
    date: str


@dataclass(frozen=True)
class TypicalThroughput:
    """FLOP/s of one worker, padding included, and the number of earlier runs it is the median of."""

    flops_per_second: float
    runs: int


def history_file() -> Path:
    """Return the path of this machine's history."""
    return cache_folder() / "throughputs.jsonl"


def method_name(is_lora: bool, quantization: str | None) -> str:
    """Name what is trained: full, lora, or lora with the quantization of the frozen weights."""
    if not is_lora:
        return "full"
    return f"lora {quantization}" if quantization else "lora"


def record_throughput(throughput: Throughput) -> str:
    """Append what a run achieved; return a warning if the file cannot be written, which must not fail the run."""
    path = history_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(throughput)) + "\n")
    except OSError as error:
        return f"{path} cannot be written, so plans will not know the throughput of this run: {error.strerror}"
    return ""


def read_throughputs() -> tuple[list[Throughput], str]:
    """Read what earlier runs achieved, the latest last, and a warning if there are unreadable lines."""
    path = history_file()
    throughputs: list[Throughput] = []
    unreadable = 0
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-MOST_LINES:]
    except OSError:
        return [], ""
    for line in lines:
        try:
            throughput = Throughput(**json.loads(line))
            if not (throughput.flops_per_second > 0 and throughput.parameters > 0):
                raise ValueError(line)
            throughputs.append(throughput)
        except (ValueError, TypeError):  # another version's line, or a line cut off by a power loss
            unreadable += 1
    if not unreadable:
        return throughputs, ""
    lines_word = "line" if unreadable == 1 else "lines"
    return throughputs, f"{path}: {unreadable} unreadable {lines_word} skipped; the file can be deleted"


def typical_throughput(throughputs: Sequence[Throughput], device: str, run: RunKind) -> TypicalThroughput | None:
    """Return the median of the runs most like this one; None if no run is comparable.

    Comparable runs share the device, the method and the dtype, with a model of similar size. Of these, runs with the
    same model, then the same number of workers, then the same gradient checkpointing are preferred where there are any.
    """
    similar = [
        earlier
        for earlier in throughputs
        if (earlier.device, earlier.method, earlier.dtype) == (device, run.method, run.dtype)
        and 1 / SIZE_FACTOR <= earlier.parameters / run.parameters <= SIZE_FACTOR
    ]
    for name in ("model_id", "workers", "recomputes"):
        similar = [earlier for earlier in similar if getattr(earlier, name) == getattr(run, name)] or similar
    if not similar:
        return None
    latest = [earlier.flops_per_second for earlier in similar[-LATEST_RUNS:]]
    return TypicalThroughput(statistics.median(latest), len(latest))
