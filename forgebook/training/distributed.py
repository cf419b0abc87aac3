"""Which of the workers this process is, and errors that reach all of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch.distributed as dist

from forgebook.errors import CheckpointError, ForgebookError

__all__ = ["is_first_here", "is_main", "raised_everywhere", "rank", "world_size"]


def rank() -> int:
    """Return this process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of workers, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Tell whether this is rank 0, the one that writes files."""
    return rank() == 0


def is_first_here() -> bool:
    """Tell whether this is the first worker of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextlib.contextmanager
def raised_everywhere() -> Iterator[None]:
    """Raise on every rank what is raised on any within the block; otherwise the others would wait forever.

    Collective. An error of the operating system (no space, no permission) becomes a CheckpointError.
    """
    error: ForgebookError | None = None
    try:
        yield
    except ForgebookError as raised:
        error = raised
    except OSError as raised:
        error = CheckpointError(f"a file could not be written: {raised}")
    if world_size() > 1:
        errors: list[ForgebookError | None] = [None] * world_size()
        dist.all_gather_object(errors, error)
        error = next((one for one in errors if one is not None), None)
    if error is not None:
        raise error
