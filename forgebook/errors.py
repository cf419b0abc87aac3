"""The errors that users see: each message says what is wrong, where, and what to do."""

import difflib
from collections.abc import Iterable, Iterator

__all__ = [
    "BucketBusyError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ForgebookError",
    "ModelError",
    "ResourceError",
    "StoppedError",
    "StorageError",
    "TrainingError",
    "first_line",
    "last_line",
    "near_miss",
    "shown_value",
]


class ForgebookError(Exception):
    """Stop with one readable message; `main.py` prints it without a traceback and exits with `exit_code`."""

    exit_code = 2


class ConfigError(ForgebookError):
    """A config file, an override, or values that contradict each other."""


class DataError(ForgebookError):
    """Malformed examples, named by `file:line`."""


class ModelError(ForgebookError):
    """A model, a tokenizer or an adapter that cannot be used for this."""


class ResourceError(ForgebookError):
    """A run that needs more than these machines have."""


class StorageError(ForgebookError):
    """A path or bucket that cannot be read or written, or a run folder that is in use."""


class BucketBusyError(StorageError):
    """A bucket that does not answer or is overloaded: the same request may succeed later."""


class CheckpointError(ForgebookError):
    """A checkpoint that is damaged or incomplete."""

    exit_code = 1


class StoppedError(ForgebookError):
    """A run that received SIGTERM and saved its state; the exit code is that of a process ended by SIGTERM."""

    exit_code = 143


class TrainingError(ForgebookError):
    """Training that failed, such as a loss that is NaN or gradients that are all zero."""

    exit_code = 1


def near_miss(key: object, known: Iterable[str]) -> str:
    """Suggest the known key that was probably meant; empty when none is close."""
    close = difflib.get_close_matches(str(key), sorted(known), n=1)
    return f": did you mean {close[0]!r}?" if close else ""


def first_line(error: object) -> str:
    """Return the first line of an error's message, or of a text, that is not blank; else the name of its class."""
    return next(_lines(error), type(error).__name__)


def last_line(error: object) -> str:
    """Return the last such line, without its full stop: in a traceback, the one that says what happened."""
    return [type(error).__name__, *_lines(error)][-1].rstrip(".")


def _lines(error: object) -> Iterator[str]:
    return filter(None, map(str.strip, str(error).splitlines()))


def shown_value(value: object, limit: int = 80) -> str:
    """Write a value for a message, cut to `limit` characters."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
