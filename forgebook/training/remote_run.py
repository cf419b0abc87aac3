"""Workers on a machine that does not see the run's folder: what they read comes from it, what they write goes there.

    home = make_home(run)            where the run was started: an actor there, and a mark in the folder
    run = settle(run, home, rank)    in a worker: the same run, or one with a folder of its own and `run.home`
    fetch(run.home)                  what a worker reads, the newest training state included
    at_home(run.home, function, path, ...)    calls it where the run's folder is
    bring_home(run.home, folder)              moves a folder of the worker's there
    leave(run.home)                           the last lines, and an end

So the run's folder stays whole where the run was started, and `runs.upload` keeps its bucket in step. Files travel
in pieces through Ray. A disk that all machines share spares the journey: better for weights of many gigabytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forgebook.data import token_store
from forgebook.runs import atomic, download
from forgebook.runs.run import Run
from forgebook.training import distributed

__all__ = ["Home", "at_home", "bring_home", "fetch", "leave", "make_home", "settle"]

MARK = ".home"
SHARDS = ".shards"
PIECE = 64 << 20  # bytes that travel at a time
LOOK_SECONDS = 1
# What a worker reads, beside the newest training state and the shards of the views.
READ = ("metrics.jsonl", "plan.json", "adapter_start.safetensors", "tokens/*.npz", "tokens/reference-*.npy")
# What grows beside the folders. Logs are added to those at home, the others replace what is there.
LOGS, OTHERS = ("logs/*",), ("metrics.jsonl", "adapter_start.safetensors", "tokens/reference-*.npy")


@dataclass
class Home:
    """The run's folder on another machine, as a worker reaches it.

    own: the worker's folder. sent: name -> (inode, bytes) of its files that are at home.
    """

    folder: Path
    mark: str
    keeper: Any
    own: Path | None = None
    sent: dict[str, tuple[int, int]] = field(default_factory=dict)
    lock: Any = None


def make_home(run: Run) -> Home:
    """Start the actor on this machine, and leave a mark in the run's folder by which workers know that they see it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    keeper = ray.remote(num_cpus=0, scheduling_strategy=here)(_Keeper).remote(run.folder)
    mark = uuid.uuid4().hex
    (run.folder / MARK).write_text(mark)
    return Home(run.folder, mark, keeper)


class _Keeper:
    """An actor where the run's folder is."""

    def __init__(self, folder: Path):
        self.folder = folder

    def do(self, function: Callable, name: str, *arguments: Any) -> Any:
        return function(self.folder / name, *arguments)

    def wanted(self) -> dict[str, str]:
        """Map the names of what a worker reads to where it lies."""
        found = [path for pattern in READ for path in self.folder.glob(pattern)]
        states = sorted(self.folder.glob("resume/step-*/place.json"), key=lambda path: int(path.parent.name[5:]))
        found += [path for path in states[-1].parent.rglob("*") if path.is_file()] if states else []
        wanted = {path.relative_to(self.folder).as_posix(): str(path) for path in found}
        for view in self.folder.glob("tokens/*.npz"):
            wanted |= {_shard_name(shard): shard for shard in token_store.shards_of(view)}
        return wanted

    def read(self, path: str, start: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(PIECE)

    def write(self, name: str, piece: bytes, is_new: bool) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb" if is_new else "ab") as file:
            file.write(piece)


def _shard_name(shard: str) -> str:
    path = Path(shard)
    return f"{SHARDS}/{path.parent.name}/{path.name}"


# In a worker ------------------------------------------------------------------------------------------


def settle(run: Run, home: Home | None, rank: int) -> Run:
    """Return the run as this worker sees it: as it is, or with a folder of its own, whose logs go home as they grow."""
    mark = run.folder / MARK
    if home is None or (mark.is_file() and mark.read_text() == home.mark):
        return run
    home.own = download.cache_folder().resolve() / "relay" / f"{run.name}-{home.mark}"
    home.lock = threading.Lock()
    (home.own / "logs").mkdir(parents=True, exist_ok=True)
    (home.own / f"logs/worker-{rank}.log").unlink(missing_ok=True)  # sent already, by a worker that has failed
    if distributed.is_first_here():
        threading.Thread(target=_keep_sending, args=(home,), daemon=True).start()
    return dataclasses.replace(run, folder=home.own, uri=None, home=home)


def fetch(home: Home | None) -> None:
    """Bring what a worker reads, once per machine. Collective."""
    with distributed.raised_everywhere():
        if home is None or not distributed.is_first_here():
            return
        import ray

        for name in ("resume", "checkpoints"):
            shutil.rmtree(home.own / name, ignore_errors=True)
            (home.own / name).mkdir()
        for name in ("metrics.jsonl", "logs/progress.jsonl"):
            (home.own / name).unlink(missing_ok=True)
        for name, there in ray.get(home.keeper.wanted.remote()).items():
            target = home.own / name
            if name.startswith(SHARDS) and target.exists():
                continue
            with atomic.atomic_file(target) as temporary, open(temporary, "wb") as file:
                while piece := ray.get(home.keeper.read.remote(there, file.tell())):
                    file.write(piece)
            home.sent[name] = (target.stat().st_ino, target.stat().st_size)
        for view in home.own.glob("tokens/*.npz"):
            token_store.relocate_view(view, lambda shard: str(home.own / _shard_name(shard)))


def at_home(home: Home | None, function: Callable, path: Path, *arguments: Any) -> Any:
    """Call function(path, ...) on the machine that has the run's folder; path: as it is named here."""
    if home is None:
        return function(path, *arguments)
    import ray

    return ray.get(home.keeper.do.remote(function, _name(home, path), *arguments))


def bring_home(home: Home | None, folder: Path) -> None:
    """Move a folder's files into the folder of that name at home, behind the metrics that tell of it. Collective.

    Raises CheckpointError, on all ranks, if the disk there is full.
    """
    with distributed.raised_everywhere():
        if home is None or not distributed.is_first_here():
            return
        _send_growing(home)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            _send(home, path, 0, is_new=True)
        shutil.rmtree(folder, ignore_errors=True)


def leave(home: Home | None) -> None:
    """Send the last lines home, and remove the worker's own folder."""
    if home is not None and distributed.is_first_here():
        _send_growing(home)
        shutil.rmtree(home.own, ignore_errors=True)


def _send_growing(home: Home) -> None:
    """Send what was added to the logs and the metrics of this machine."""
    with home.lock:
        for pattern in (*OTHERS, *LOGS):
            for path in home.own.glob(pattern):
                state, (inode, done) = path.stat(), home.sent.get(_name(home, path), (None, 0))
                if (state.st_ino, state.st_size) != (inode, done):
                    is_new = pattern in OTHERS and state.st_ino != inode
                    done = _send(home, path, 0 if is_new else done, is_new)
                    home.sent[_name(home, path)] = (state.st_ino, done)


def _keep_sending(home: Home) -> None:
    """Send until the worker ends, or the run where it was started."""
    with contextlib.suppress(Exception):
        while True:
            time.sleep(LOOK_SECONDS)
            _send_growing(home)


def _send(home: Home, path: Path, start: int, is_new: bool) -> int:
    """Send a file from byte `start` on; return how far it was sent."""
    import ray

    with open(path, "rb") as file:
        file.seek(start)
        while (piece := file.read(PIECE)) or is_new:
            ray.get(home.keeper.write.remote(_name(home, path), piece, is_new))
            is_new = False
        return file.tell()


def _name(home: Home, path: Path) -> str:
    return path.relative_to(home.own).as_posix()
