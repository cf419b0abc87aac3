"""A save that ends while training continues.

saving = BackgroundSave()
saving.start(write)     write() runs in a thread of each rank; an earlier one ends first
saving.wait()           collective: raises on all ranks what write() raised on any
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from forgebook.training import distributed

__all__ = ["BackgroundSave"]


class BackgroundSave:
    """At most one save at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Run `write` in a thread, once the save before it has ended. Collective."""
        self.wait()
        # A process that ends with an error does not wait for it: what is saved is complete or absent.
        self._thread = threading.Thread(target=self._run, args=(write,), daemon=True)
        self._thread.start()

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Wait for the save to end; raise on all ranks what it raised on any. Collective."""
        if self._thread is None:  # on all ranks alike
            return
        self._thread.join()
        error, self._thread, self._error = self._error, None, None
        with distributed.raised_everywhere():
            if error is not None:
                raise error
