"""SIGTERM, as a spot machine gets it before it goes: save at the end of the step, then end.

The process that started the run hears it and leaves a file in the run folder; rank 0 looks for it after each step.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["heard_sigterm", "is_asked"]

ASKED = ".stop"


@contextlib.contextmanager
def heard_sigterm(folder: Path) -> Iterator[None]:
    """Turn SIGTERM into a wish left in a run's folder for the length of a block; a second one ends the process.

    Nothing is done outside the main thread, where Python hears no signals.
    """
    (folder / ASKED).unlink(missing_ok=True)
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number, frame) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        (folder / ASKED).touch()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        (folder / ASKED).unlink(missing_ok=True)


def is_asked(folder: Path) -> bool:
    """Tell whether the run is to stop."""
    return (folder / ASKED).exists()
