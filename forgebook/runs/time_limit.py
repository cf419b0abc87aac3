"""Calls into a library that has no time limit of its own: they are given up, and left to themselves in a thread."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["GIVE_UP_SECONDS", "Limited", "within_limit"]

GIVE_UP_SECONDS = 30
T = TypeVar("T")


class Limited:
    """A file system or an open file whose methods raise TimeoutError after GIVE_UP_SECONDS."""

    def __init__(self, inner: Any):
        self._inner = inner

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = within_limit(functools.partial(getattr(self._inner, name), *args, **kwargs))
            return Limited(result) if name.startswith("open_") else result

        return call

    def __enter__(self) -> Limited:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, TimeoutError):  # closing would wait, too
            self.close()


def within_limit(call: Callable[[], T]) -> T:
    """Return what a call returns; raise TimeoutError after GIVE_UP_SECONDS, and leave it to itself."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return future.result(GIVE_UP_SECONDS)
    except TimeoutError:
        raise TimeoutError(f"timed out after {GIVE_UP_SECONDS} s") from None
