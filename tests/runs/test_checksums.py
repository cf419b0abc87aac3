"""A saved folder is compared with its checksums when it is opened."""

import json

import pytest

from forgebook.errors import CheckpointError, ForgebookError
from forgebook.runs.checksums import CHECKSUMS, check_files, write_checksums


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoints/epoch-1"
    (folder / "deep").mkdir(parents=True)
    (folder.parent / "epoch-2").mkdir()
    for name, content in {
        "adapter_model.safetensors": bytes(range(256)) * 400,
        "deep/state.pt": b"abc",
        "tokenizer.json": b"{}",
        "README.md": b"# card",
        "adapter_config.json": json.dumps({"r": 8, "base_model_name_or_path": "/old"}).encode(),
    }.items():
        (folder / name).write_bytes(content)
    write_checksums(folder)
    return folder


def flip(path, position=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: flip(folder / "adapter_model.safetensors", 77_777),
            "adapter_model.*is not as it was",
        ),
        (lambda folder: flip(folder / "deep/state.pt"), "deep/state.pt is not as it was saved"),
        (lambda folder: flip(folder / "tokenizer.json"), "tokenizer.json is not as it was saved"),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""),
            "0 bytes, but was saved with 102,400",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (
            lambda folder: (folder / "adapter_config.json").write_text('{"r": 9}'),
            "adapter_config.*is not as it was",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text('{"r": '), "adapter_config.json is damaged"),
        (lambda folder: (folder / CHECKSUMS).write_text(""), "checksums.json is damaged: it is empty"),
        (lambda folder: (folder / CHECKSUMS).write_text('{"a": NaN}'), "checksums.json is damaged, so that"),
    ],
)
def test_a_file_that_changed_is_named(checkpoint, damage, message):
    check_files(checkpoint)
    damage(checkpoint)
    with pytest.raises(ForgebookError, match=message) as error:
        check_files(checkpoint)
    if isinstance(error.value, CheckpointError):
        assert "use another checkpoint (checkpoint=epoch-2)" in str(error.value) and CHECKSUMS in str(error.value)


def test_what_may_change_and_what_is_not_read(checkpoint, tmp_path):
    (checkpoint / "README.md").write_text("# mine")
    (checkpoint / "notes.txt").write_text("")
    (checkpoint / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/new", "r": 8}))
    check_files(checkpoint)
    flip(checkpoint / "adapter_model.safetensors")
    check_files(checkpoint, with_weights=False)
    (checkpoint / CHECKSUMS).unlink()  # as saved by an earlier version
    check_files(checkpoint)
    check_files(tmp_path / "nothing")
