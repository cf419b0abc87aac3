"""What past runs on this machine achieved, for the expected time of the next one: paces.jsonl in the cache folder.

keep_pace(Pace(...))                                a line at the end of each complete run
paces, note = past_paces()                          those lines; what cannot be read is left out, and noted
usual_pace(paces, "A10G", config, 8e9)              the median of the runs most like this one, or None
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from forgebook.runs.download import cache_folder

if TYPE_CHECKING:
    from forgebook.config.parse import FinetuneConfig

__all__ = ["Pace", "UsualPace", "keep_pace", "method_of", "paces_file", "past_paces", "usual_pace"]

# A model of another order of size fills a device differently: within this factor runs are compared.
ALIKE_IN_SIZE = 4
# Runs looked at: the latest; drivers, libraries and machines change.
LATEST = 10
KEPT_LINES = 1000


@dataclass(frozen=True)
class Pace:
    """What one run achieved. flops_per_second: of one worker, padding counted, without the warm-up step."""

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
class UsualPace:
    """FLOP/s of one worker, padding counted, and the number of runs here that tell it."""

    flops_per_second: float
    runs: int


def paces_file() -> Path:
    """Name the file of this machine's paces."""
    return cache_folder() / "paces.jsonl"


def method_of(config: FinetuneConfig) -> str:
    """Name what is trained: full, lora, or lora on quantised weights."""
    if not config.is_lora:
        return "full"
    return f"lora {config.quantization}" if config.quantization else "lora"


def keep_pace(pace: Pace) -> str:
    """Add what a run achieved; return a note if the file cannot be written: the run is good all the same."""
    path = paces_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(pace)) + "\n")
    except OSError as error:
        return f"{path} cannot be written, so plans will not know this run's pace: {error.strerror}"
    return ""


def past_paces() -> tuple[list[Pace], str]:
    """Read what past runs here achieved, the latest last, and a note if there are lines that cannot be read."""
    path, found, bad = paces_file(), [], 0
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-KEPT_LINES:]
    except OSError:
        return [], ""
    for line in lines:
        try:
            pace = Pace(**json.loads(line))
            if not (pace.flops_per_second > 0 and pace.parameters > 0):
                raise ValueError(line)
            found.append(pace)
        except (ValueError, TypeError):
            bad += 1
    return found, f"{path}: {bad} lines cannot be read and are left out; the file may be deleted" if bad else ""


def usual_pace(paces: Sequence[Pace], device: str, config: FinetuneConfig, parameters: int) -> UsualPace | None:
    """Take the median of the runs most like this one; None if none is like it.

    They have its device, method and dtype, and a model of like size; if possible also its model, its number of
    workers, and its recomputing of activations or not.
    """
    alike = [
        one
        for one in paces
        if (one.device, one.method, one.dtype) == (device, method_of(config), config.dtype)
        and 1 / ALIKE_IN_SIZE <= one.parameters / parameters <= ALIKE_IN_SIZE
    ]
    wanted = {
        "model_id": config.model_id,
        "workers": max(1, config.num_devices),
        "recomputes": config.gradient_checkpointing,
    }
    for name, value in wanted.items():
        alike = [one for one in alike if getattr(one, name) == value] or alike
    if not alike:
        return None
    latest = [one.flops_per_second for one in alike[-LATEST:]]
    return UsualPace(statistics.median(latest), len(latest))
