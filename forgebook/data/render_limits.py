"""Limits on rendering a chat template, which is a program that comes with a model.

within_limits(render, name)     what `render` returns, or a ModelError that names the template
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import resource
import signal
import threading
import time
from collections.abc import Callable

from forgebook.errors import ModelError

__all__ = ["LargeOperationError", "within_limits"]

SECONDS = 5.0  # of this process's time; a conversation takes milliseconds
MEMORY = 1 << 30  # bytes, beyond what the process has
CHARACTERS = 1 << 26


WATCH_SECONDS = 0.1  # from one look at other threads to the next
LONG = 0.1  # of SECONDS: a rendering that is watched for its memory, too

# Of each thread that renders, by Python's number of it: the clock of its processor time, and when it began.
_rendering: dict[int, tuple[int, float]] = {}


class _TimeUp(Exception):
    pass


class LargeOperationError(MemoryError):
    """One operation of a template would make a value that is too large."""


def within_limits(render: Callable[[], str], name: str) -> str:
    """Call `render`, which renders one conversation with the template of tokenizer `name`, within limits.

    Outside the main thread, what the process takes in the meantime is compared with the limit on memory, ten times a
    second: a limit of the whole process would end other threads' work. What one operation makes is limited by itself.

    Raises ModelError if the template takes too long or too much memory.
    """
    from forgebook.data.template_sandbox import limit_operations

    limit_operations()
    too_much = f"the chat template of {name!r} "
    try:
        text = (_guarded if threading.current_thread() is threading.main_thread() else _watched)(render)
    except _TimeUp:
        raise ModelError(f"{too_much}ran for {SECONDS:g} s on one conversation: it may loop without end") from None
    except LargeOperationError as error:
        raise ModelError(f"{too_much}does {error}: it may be broken, or written to fill the memory") from None
    except MemoryError:
        raise ModelError(f"{too_much}took more than {MEMORY >> 30} GiB of memory for one conversation") from None
    if len(text) > CHARACTERS:
        raise ModelError(f"{too_much}wrote {len(text):,} characters for one conversation")
    return text


def _guarded(render: Callable[[], str]) -> str:
    def stop(number, frame) -> None:
        raise _TimeUp

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGVTALRM, stop)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (_address_space(soft), hard))
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        return render()
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, previous or signal.SIG_DFL)


def _watched(render: Callable[[], str]) -> str:
    """Call `render` in a thread that no timer can interrupt: another thread looks at its processor time."""
    _start_watching()
    thread = threading.get_ident()
    # Linux's clock of a thread. Unlike that of pthread_getcpuclockid, reading it is no more than an error once the
    # thread has ended.
    clock = ~threading.get_native_id() << 3 | 6
    _rendering[thread] = clock, time.thread_time()
    try:
        return render()
    finally:
        _rendering.pop(thread, None)


@functools.cache
def _start_watching() -> None:
    threading.Thread(target=_watch, name="render-limits", daemon=True).start()


def _watch() -> None:
    """Interrupt threads that render for too long, or in which the process takes too much memory.

    Python delivers the exception between two of their instructions.
    """
    before = _pages()[1]  # of memory, at the last look
    first_seen: dict[tuple[int, float], int] = {}  # the memory before each rendering that is going on
    while True:
        time.sleep(WATCH_SECONDS)
        now, rendering = _pages()[1], list(_rendering.items())
        first_seen = {one: first_seen.get(one, before) for _, one in rendering}
        for thread, one in rendering:
            with contextlib.suppress(OSError):  # it has ended, or another system numbers its clocks differently
                seconds = time.clock_gettime(one[0]) - one[1]
                grown = (now - first_seen[one]) * resource.getpagesize()
                # What others take while this one renders for milliseconds is not its own.
                is_large = seconds > LONG * SECONDS and grown > MEMORY
                if is_large or seconds > SECONDS:
                    _rendering.pop(thread, None)
                    reason = ctypes.py_object(MemoryError if is_large else _TimeUp)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), reason)
        before = now


def _pages() -> tuple[int, int]:
    """Read the pages of this process's address space, and those in memory; zeros where there is no /proc."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            size, resident = file.read(64).split()[:2]
    except OSError:
        return 0, 0
    return int(size), int(resident)


def _address_space(soft: int) -> int:
    """Compute the limit on this process's address space, in bytes; the present one where there is no /proc."""
    pages = _pages()[0]
    if not pages:
        return soft
    limit = pages * resource.getpagesize() + MEMORY
    return limit if soft == resource.RLIM_INFINITY else min(soft, limit)
