"""Rows of Parquet, Arrow and the hub: labels by name, damaged cells in their place."""

import types

import datasets
import pyarrow as pa
import pytest

from forgebook.data import tables
from forgebook.errors import DataError

METADATA = {b"huggingface": b'{"info": {"features": {"l": {"names": ["no", "yes"], "_type": "ClassLabel"}, "x": []}}}'}


def write_arrow(path, batches, is_stream):
    with pa.OSFile(str(path), "wb") as file:
        writer = (pa.ipc.new_stream if is_stream else pa.ipc.new_file)(file, batches[0].schema)
        for batch in batches:
            writer.write_batch(batch)
        writer.close()


@pytest.mark.parametrize("is_stream", [True, False])
def test_arrow_batches(tmp_path, is_stream):
    schema = pa.schema({"l": pa.int64(), "t": pa.string()}, METADATA)
    batches = [pa.record_batch({"l": [k, -1], "t": ["a", None]}, schema) for k in (0, 1, 7)]
    write_arrow(tmp_path / "a", batches, is_stream)
    assert tables.split_arrow("a", tmp_path / "a") == [2, 2, 2]
    assert list(tables.read_arrow(tmp_path / "a", 1, 3, 3)) == [
        (3, {"l": "yes", "t": "a"}), (4, {"l": None, "t": None}), (5, {"l": 7, "t": "a"}), (6, {"l": None, "t": None}),
    ]  # fmt: skip


def test_what_is_no_arrow_file(tmp_path):
    (tmp_path / "a").write_bytes(b"\xff\xff\xff\xff rest")
    with pytest.raises(DataError, match="not a readable Arrow file"):
        tables.split_arrow("a", tmp_path / "a")


def test_the_commit_of_a_hub_data_set():
    def loaded(addresses):
        return types.SimpleNamespace(info=types.SimpleNamespace(download_checksums=addresses))

    assert tables.hub_revision(loaded({"hf://datasets/openai/gsm8k@e53f048/main/a.parquet": {}})) == "e53f048"
    assert tables.hub_revision(loaded({"/home/a@b/c": {}})) is tables.hub_revision(loaded(None)) is None


@pytest.mark.parametrize(
    ("uri", "name", "config"),
    [
        ("hf://openai/gsm8k/main:train", "openai/gsm8k", "main"),
        ("hf://owner/name:train", "owner/name", None),
        ("hf://squad:train", "squad", None),
        ("hf://./made/of/folders:train", "./made/of/folders", None),
        ("hf://./a/b:train", "./a/b", None),  # as many slashes as a name with a config has
    ],
)
def test_the_name_and_config_of_a_hub_data_set(monkeypatch, uri, name, config):
    """What is passed to `datasets.load_dataset`."""
    asked, rows = [], datasets.Dataset.from_list([{"text": "a"}])
    monkeypatch.setattr("datasets.load_dataset", lambda *words, **named: asked.append((*words, named["split"])) or rows)
    assert tables.hub_dataset(uri) is rows
    assert asked == [(name, config, "train")]
