"""Packages that a library imports if they are installed, only to compare objects with their classes.

    with without_unused("bitsandbytes"):
        ...                                 no object can be of a class that this process has not imported

Each takes a process seconds: bitsandbytes imports Inductor, DeepSpeed imports its compilers, SciPy its solvers.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["without_unused"]


@contextlib.contextmanager
def without_unused(package: str, *checks: Any) -> Iterator[None]:
    """Let libraries find no such package in a block, unless this process has imported it.

    checks: functions of a library that look for the package and keep what they found; they look again in the block, and
    after it.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # Python's own sign for "cannot be imported"
    _forget(checks)
    try:
        yield
    finally:
        del sys.modules[package]
        _forget(checks)


def _forget(checks: tuple[Any, ...]) -> None:
    for check in checks:
        check.cache_clear()
