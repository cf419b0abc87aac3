"""Local files and folders that are complete or absent, whenever the process is killed.

atomic_file(path)               a file that appears only when it is whole
atomic_folder(folder)           a folder that appears only when it is whole
delete_folder(folder)           a folder that disappears in one step
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from forgebook.errors import StorageError, first_line, shown_value

__all__ = ["atomic_file", "atomic_folder", "delete_folder", "link_or_copy", "parse_object", "read_json", "write_json"]


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary name next to `target`, renamed to it once the block succeeds."""
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


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file another name, linked where the disk allows it, else copied."""
    with atomic_file(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder next to `folder` to write into; it takes the name `folder` once the block succeeds.

    What a killed process leaves behind starts with a dot and is deleted by the next call.
    """
    temporary = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _flush(temporary)
        delete_folder(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def delete_folder(folder: Path) -> None:
    """Delete a folder if it exists; it is renamed first, so that a half-deleted one is never taken for complete."""
    doomed = folder.with_name(f".removing-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Sync a folder's files to disk, so that a power loss cannot leave a complete name over empty files."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


# What still can be done if a file of a run is damaged.
_REMEDIES = {
    "summary.json": "delete it, and the run's command writes it again; until then name a checkpoint, such as "
    "checkpoint=epoch-1",
    "data_report.json": "restore it from a copy, or train under another run_name; the run's checkpoints can be used",
    "evaluation.json": "delete it, and evaluate writes it again",
    "metrics.jsonl": "delete that line",
    "plan.json": "delete it: only the comparison with the plan needs it",
    "notes.json": "delete its folder, and the data is tokenized again",
    "place.json": "delete its folder; the run's command starts again from the state before it, or from the beginning",
    "manifest.json": "upload the folder again",
}
_REMEDY = "restore it from a copy, or use another checkpoint of the run"


def read_json(path: Path, needs: Iterable[str] = ()) -> dict[str, Any]:
    """Read a JSON object from a file of a run; needs: keys that it must have.

    Raises StorageError, which names the file and what still can be done, if it is damaged.
    """
    try:
        value = parse_object(path.read_bytes(), path)
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}") from None
    if missing := [key for key in needs if key not in value]:
        raise StorageError(f"{path} is damaged: it lacks {', '.join(missing)}. {_remedy(path)}")
    return value


def parse_object(content: bytes, path: Path | str) -> dict[str, Any]:
    """Parse the content of a JSON file; path: where it is from. Raises StorageError if it is no JSON object."""
    try:
        value = json.loads(content.decode("utf-8"))
        reason = None if isinstance(value, dict) else f"it holds {shown_value(value, 40)} instead of an object"
    except (ValueError, RecursionError) as error:
        value, reason = None, "it is empty" if not content.strip() else f"it is not complete JSON ({first_line(error)})"
    if reason:
        raise StorageError(f"{path} is damaged: {reason}. {_remedy(Path(path).name.partition(':')[0])}")
    return value


def _remedy(path: Path | str) -> str:
    name = Path(path).name.partition(":")[0]  # of a line in a file: name:number
    text = _REMEDIES.get(name, _REMEDY)
    return text[0].upper() + text[1:]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is complete or absent."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
