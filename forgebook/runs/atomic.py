"""Local files and folders that are complete or absent, whenever the process is killed.

published(folder)               a folder that appears whole
remove(folder)                  a folder that goes as a whole
aside(path)                     a file that appears whole
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["aside", "published", "read_json", "remove", "write_json"]


@contextlib.contextmanager
def aside(target: Path) -> Iterator[Path]:
    """Yield a temporary name beside `target`, renamed to it once the block has ended well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def published(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder` to write into; it takes the name `folder` once the block ends well.

    What a killed process leaves behind starts with a dot and is swept the next time.
    """
    aside = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        _flush(aside)
        remove(folder)
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete a folder, if it is there: its name goes first, so that nobody takes what is left for the whole."""
    leaving = folder.with_name(f".removing-{folder.name}")
    shutil.rmtree(leaving, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.replace(folder, leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Bring a folder's files to the disk, so that a power cut cannot leave a named but hollow checkpoint."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """Read a JSON file of a run folder."""
    return json.loads(path.read_text())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is complete or absent."""
    with aside(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
