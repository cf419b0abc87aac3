"""Python's garbage collector, set for processes that import the libraries of the field.

Their modules are two thirds of a million objects, nearly all of which stay. At Python's defaults importing them starts
the collector 1,500 times, which takes a sixth of the time.
"""

from __future__ import annotations

import gc

__all__ = ["collect_rarely"]

# New objects before the young ones are looked at (700 by default), and how many times that before older ones are.
THRESHOLDS = (10_000, 50, 100)


def collect_rarely() -> None:
    """Let this process look for garbage less often; call it before the libraries are imported."""
    gc.set_threshold(*THRESHOLDS)
