"""Compressed files -> plain copies in the cache: gzip, bzip2, xz and Zstandard, detected from their first bytes."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forgebook.errors import DataError, first_line
from forgebook.runs import atomic, download

__all__ = ["SUFFIXES", "plain_copy"]

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
# The first bytes of each kind, its name and its suffix.
KINDS = {
    b"\x1f\x8b": ("gzip", ".gz"),
    b"BZh": ("bzip2", ".bz2"),
    b"\xfd7zXZ\x00": ("xz", ".xz"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", ".zst"),
}


def plain_copy(path: Path) -> Path:
    """Return a file as it is, or the copy of a compressed one that is unpacked once.

    Raises DataError, with the line, for a compressed file that is damaged or cut off.
    """
    with open(path, "rb") as file:
        start = file.read(6)
    kind, suffix = next((about for magic, about in KINDS.items() if start.startswith(magic)), ("", ""))
    if not kind:
        return path
    about = path.stat()
    key = hashlib.sha256(f"{path.resolve()}:{about.st_size}:{about.st_mtime_ns}".encode()).hexdigest()[:16]
    plain = download.cache_folder() / "unpacked" / key / re.sub(rf"\{suffix}$", "", path.name, flags=re.IGNORECASE)
    if not plain.exists():
        with atomic.atomic_file(plain) as temporary, open(temporary, "wb") as file:
            try:
                with _open(path, kind) as packed:
                    while block := packed.read(2**20):
                        file.write(block)
            except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
                if getattr(error, "errno", None):  # the disk, not the data
                    raise
                file.flush()
                raise DataError(
                    f"{path.name}:{_count_lines(temporary) + 1}: the {kind} file is damaged or cut off here "
                    f"({first_line(error)}): copy it again"
                ) from None
    return plain


def _open(path: Path, kind: str) -> Any:
    if kind == "Zstandard":  # Python's own comes with 3.14
        import pyarrow as pa

        return pa.input_stream(str(path), compression="zstd")
    opens: dict[str, Callable[[Path], Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
    return opens[kind](path)


def _count_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))
