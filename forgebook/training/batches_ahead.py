"""Batches made by other threads while the device computes, in their order and no more than a few.

for made in in_order(make, parts, threads):     as map(make, parts)

Threads, not forked processes: Pillow and numpy let others run while they work, a batch need not be copied from another
process, and a process with a GPU or Ray's threads in it cannot be forked safely.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from forgebook.data.forked import cores
from forgebook.data.image_batches import MOST_AHEAD

__all__ = ["in_order", "threads_for"]

Part = TypeVar("Part")
Made = TypeVar("Made")


def threads_for(on_gpu: bool) -> int:
    """Return how many threads make batches of images beside the one that trains.

    The workers of this machine share its cores. Where the device is the CPU itself, one: the step takes all cores.
    """
    workers = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # as torchrun and Ray set it
    return max(1, min(MOST_AHEAD, cores() // workers - 1)) if on_gpu else 1


def in_order(make: Callable[[Part], Made], parts: Iterable[Part], threads: int) -> Iterator[Made]:
    """Yield make(part) of each part in order; `threads` of them are made ahead. What `make` raises comes in its turn.

    0 makes each when it is taken.
    """
    if not threads:
        yield from map(make, parts)
        return
    queue, rest = deque[Future[Made]](), iter(parts)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="batches")
    try:
        queue.extend(pool.submit(make, part) for part in islice(rest, threads))
        while queue:
            made = queue.popleft().result()
            queue.extend(pool.submit(make, part) for part in islice(rest, 1))
            yield made
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
