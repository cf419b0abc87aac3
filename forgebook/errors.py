"""What a user can get wrong: each message names the value got, the value needed and the place to change."""

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
    """Refuse a config file, an override, or values that contradict each other."""


class DataError(ForgebookError):
    """Refuse rows, naming `file:line`."""


class ModelError(ForgebookError):
    """Refuse a model, a tokenizer or an adapter that cannot be used as asked."""


class ResourceError(ForgebookError):
    """Refuse a run that the machines at hand cannot hold."""


class StorageError(ForgebookError):
    """Refuse a path or bucket that cannot be read or written, or a run folder that is in use."""


class BucketBusyError(StorageError):
    """Report a bucket that does not answer or is overloaded: the same request may go well later."""


class CheckpointError(ForgebookError):
    """Report a checkpoint that is damaged or incomplete."""

    exit_code = 1


class StoppedError(ForgebookError):
    """Report a run that was asked to stop and has saved its state; the code is that of a process ended by SIGTERM."""

    exit_code = 143


class TrainingError(ForgebookError):
    """Report training that went wrong, such as a loss that is NaN or gradients that are all zero."""

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
