"""Compressed files are unpacked once, and a damaged one is an error with its line."""

import bz2
import gzip
import json
import lzma
import os

import pyarrow as pa
import pytest

from conftest import chat
from forgebook.data.compressed import plain_copy
from forgebook.data.examples import read_examples
from forgebook.errors import DataError

TEXT = "".join(json.dumps(chat(f"question {k} {os.urandom(20).hex()}", "a")) + "\n" for k in range(3000)).encode()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


KINDS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGEBOOK_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("suffix", KINDS)
def test_every_kind_gives_the_same_bytes_also_of_joined_files(tmp_path, suffix):
    half = TEXT.index(b"\n", len(TEXT) // 2) + 1
    for name, content in (
        (f"one.jsonl.{suffix}", KINDS[suffix](TEXT)),
        ("two", b"".join(map(KINDS[suffix], (TEXT[:half], TEXT[half:])))),
    ):
        (tmp_path / name).write_bytes(content)
        plain = plain_copy(tmp_path / name)
        assert plain.read_bytes() == TEXT and plain_copy(tmp_path / name) == plain
    assert len(read_examples(str(tmp_path / f"one.jsonl.{suffix}"))) == 3000


@pytest.mark.parametrize("suffix", KINDS)
def test_a_file_that_is_cut_off_names_its_last_line(tmp_path, suffix):
    packed = KINDS[suffix](TEXT)
    (tmp_path / "a").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"a:\d+: the \w+ file is damaged or cut off here"):
        plain_copy(tmp_path / "a")
    assert not list((tmp_path / "cache").rglob("a"))


def test_other_files_are_their_own_copies(tmp_path):
    (tmp_path / "a").write_bytes(b"BZ")
    assert plain_copy(tmp_path / "a") == tmp_path / "a"
