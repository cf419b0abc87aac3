"""`profile: true`: where the time of a few training steps goes, as a trace to look at and a table.

profiler = StepProfiler(run, is_on)
with profiler.measured(k): ...          around the k-th step of this process
with phase("forward"): ...              inside it: a part of the step that has a line in the table
facts = profiler.finish()               for summary.json; None where nothing was profiled
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, supported_activities

from forgebook.runs import object_store
from forgebook.runs.run import Run

__all__ = ["FIRST", "LAST", "StepProfiler", "phase"]

# The first steps compile, allocate and fill caches: they say nothing about the others.
FIRST, LAST = 5, 8
OPERATORS = 10  # in the table
_PREFIX = "step: "


def phase(name: str) -> contextlib.AbstractContextManager[Any]:
    """Mark a part of a step; free where nothing is profiled."""
    return record_function(_PREFIX + name)


class StepProfiler:
    """Profile steps 5 to 8 of a process; on every rank but one, and without `profile: true`, do nothing."""

    def __init__(self, run: Run, is_on: bool):
        self._run, self._is_on = run, is_on
        self._profile: profile | None = None
        self._began, self._steps = 0.0, 0
        self._facts: dict[str, Any] | None = None

    @contextlib.contextmanager
    def measured(self, number: int) -> Iterator[None]:
        """Profile a block that runs a step, if it is one of them. number: of the step, from 1 in this process."""
        if self._is_on and number == FIRST:
            self._profile = profile(activities=supported_activities() & {ProfilerActivity.CPU, ProfilerActivity.CUDA})
            self._profile.__enter__()
            self._began = time.perf_counter()
        yield
        if self._profile is not None:
            self._steps += 1
            if number == LAST:
                self.finish()

    def finish(self) -> dict[str, Any] | None:
        """End the profile, if one is running, and write its trace; return the table of the one that has ended.

        The table has the seconds of each phase and the largest operators, by the time on the GPU where there is one.
        """
        if self._profile is None:
            return self._facts
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the steps have been queued, not computed
        seconds = time.perf_counter() - self._began
        self._profile.__exit__(None, None, None)
        path = self._run.folder / "profile" / "trace.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(path))
        if self._run.uri:  # no other machine sees this folder
            object_store.write_file(f"{self._run.uri}/profile/{path.name}", path.read_bytes())
        events = self._profile.key_averages()
        # A range has an event of its own on the GPU, from its first kernel to its last: of a phase the host's counts.
        on_host = [event for event in events if event.device_type == DeviceType.CPU]
        phases = {
            event.key.removeprefix(_PREFIX): event.cpu_time_total / 1e6
            for event in on_host
            if event.key.startswith(_PREFIX)
        }
        operators = [event for event in on_host if not event.key.startswith(_PREFIX)]
        is_gpu = any(event.self_device_time_total for event in operators)
        own = {event: event.self_device_time_total if is_gpu else event.self_cpu_time_total for event in operators}
        largest = sorted(operators, key=lambda event: -own[event])[:OPERATORS]
        self._facts = {
            "trace": f"profile/{path.name}",
            "steps": self._steps,
            "seconds": seconds,
            "phases": phases | {"other": max(0.0, seconds - sum(phases.values()))},
            "operators_on": "gpu" if is_gpu else "cpu",
            "operators": {event.key: {"seconds": own[event] / 1e6, "calls": event.count} for event in largest},
        }
        self._profile = None
        return self._facts
