"""Python code on all cores at once: in forked processes, which start at once and share what is loaded.

for result in map_forked(write, items):     in order; `write` and what it holds are not copied

Threads gain nothing where most of the time is Python's: half of what tokenizing takes is rendering, checking and masks,
of which one thread runs at a time.
"""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from forgebook.errors import DataError

__all__ = ["can_fork", "cores", "map_forked"]

PARALLELISM = "TOKENIZERS_PARALLELISM"
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl
T = TypeVar("T")
_function: Callable[..., Any] | None = None  # of a forked process: pickling it would copy a tokenizer for every item


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def can_fork() -> bool:
    """Return whether this process can be forked: on Linux, unless Ray's threads run in it."""
    ray = sys.modules.get("ray")
    return sys.platform == "linux" and not (ray is not None and ray.is_initialized())


def map_forked(function: Callable[[int, Any], T], items: Sequence[Any]) -> Iterator[T]:
    """Yield function(number, item) for each item, in order, computed in as many processes as there are cores.

    Results are pickled, the function is not. Raises what it raises; DataError if a process is killed.
    """
    global _function
    _function = function
    configured = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = "false"  # each process has one core; and threads of the tokenizer do not survive a fork
    pool = ProcessPoolExecutor(
        min(cores(), len(items)), mp_context=multiprocessing.get_context("fork"), initializer=_begin
    )
    try:
        results = pool.map(_call, itertools.count(), items)  # forks here
        if configured is None:
            del os.environ[PARALLELISM]
        else:
            os.environ[PARALLELISM] = configured
        yield from results
    except BrokenProcessPool:
        raise DataError(
            "a process that tokenized examples was killed, probably for want of memory: free some, or tokenize on a "
            "larger machine"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        _function = None


def _begin() -> None:
    """Set up a forked process: Ctrl-C ends the parent, and with it this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)


def _call(number: int, item: Any) -> Any:
    assert _function is not None
    # In a thread: the limits on what a chat template may take cost the main thread signals and system calls for each
    # rendering, 55 microseconds instead of 2 (data/render_limits.py).
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_function, number, item).result()
