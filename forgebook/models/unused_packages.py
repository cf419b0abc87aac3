"""Packages that a library imports wherever they are installed, only to compare objects with their classes.

    with without_unused("bitsandbytes"):
        ...                                 no object can be of a class that this process has not imported

Each takes a process seconds: bitsandbytes imports Inductor, DeepSpeed imports its compilers, SciPy its solvers.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

__all__ = ["without_unused"]


@contextlib.contextmanager
def without_unused(package: str) -> Iterator[None]:
    """Let libraries find no such package in a block, unless this process has imported it."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # Python's own sign for "cannot be imported"
    try:
        yield
    finally:
        del sys.modules[package]
