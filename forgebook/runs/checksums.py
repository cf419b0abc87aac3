"""The files of a saved folder and their checksums: written when it is complete, compared when it is opened.

write_checksums(folder)         checksums.json: name -> [bytes, sha256]
check_files(folder)             CheckpointError that names a file that is not as it was saved

SHA-256, which CPUs compute at 1 to 2 GB/s per core, one thread per file; each file is read once per process.
"""

from __future__ import annotations

import functools
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from forgebook.errors import CheckpointError
from forgebook.runs.atomic import read_json, write_json

__all__ = ["CHECKSUMS", "check_files", "write_checksums"]

CHECKSUMS = "checksums.json"
ADAPTER_CONFIG = "adapter_config.json"
# The card is the user's to edit; the base may be at another path on another machine.
NOT_CHECKED, FREE_KEY = ("README.md", CHECKSUMS), "base_model_name_or_path"
WEIGHTS = (".safetensors", ".pt")
THREADS = 8


def write_checksums(folder: Path) -> None:
    """Write the checksums of a folder's files, those in its subfolders included."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if name not in NOT_CHECKED]
    with ThreadPoolExecutor(THREADS) as pool:
        write_json(
            folder / CHECKSUMS, dict(zip(names, pool.map(lambda name: _state(folder / name), names), strict=True))
        )


def check_files(folder: str | Path, with_weights: bool = True) -> None:
    """Compare a folder's files with their checksums; one without checksums was not saved by this version.

    with_weights: also those that take long to read.

    Raises CheckpointError, which names the first file that is missing or different.
    """
    folder = Path(folder)
    if not (folder / CHECKSUMS).is_file():
        return
    saved = {
        name: state
        for name, state in read_json(folder / CHECKSUMS).items()
        if with_weights or not name.endswith(WEIGHTS)
    }
    if not all(isinstance(state, list) and len(state) == 2 for state in saved.values()):
        raise CheckpointError(f"{folder / CHECKSUMS} is damaged, so that no file can be checked: {_fix(folder)}")
    for name, (size, _) in saved.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing: {_fix(folder)}")
        if Path(name).name != ADAPTER_CONFIG and (actual := (folder / name).stat().st_size) != size:
            raise CheckpointError(f"{folder / name} has {actual:,} bytes, but was saved with {size:,}: {_fix(folder)}")
    with ThreadPoolExecutor(THREADS) as pool:
        states = pool.map(lambda name: _state(folder / name), saved)
        for name, state in zip(saved, states, strict=True):
            if state[1] != saved[name][1]:
                raise CheckpointError(f"{folder / name} is not as it was saved (another SHA-256): {_fix(folder)}")


def _fix(folder: Path) -> str:
    others = sorted(path.name for path in folder.parent.glob("[!.]*") if path.is_dir() and path != folder)
    instead = (
        f"use another checkpoint (checkpoint={others[-1]})" if others else "restore it from a copy, or train again"
    )
    return f"{instead}; if you changed the file yourself, delete {folder / CHECKSUMS}"


def _state(path: Path) -> list[int | str]:
    status = path.stat()
    return [status.st_size, _sha256(path, status.st_size, status.st_mtime_ns)]


@functools.lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, modified: int) -> str:
    """Hash a file; size, modified: of the file, so that one that changes is read again."""
    if path.name == ADAPTER_CONFIG:
        settings = {key: value for key, value in read_json(path).items() if key != FREE_KEY}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
