"""Checkpoints are complete or absent, and what is saved is worth keeping."""

import json
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import TINY_MODEL
from forgebook.errors import CheckpointError, ModelError, StorageError
from forgebook.export.merge import merge_run
from forgebook.inference import loading
from forgebook.models.adapters import add_lora
from forgebook.models.load import load_model
from forgebook.models.saved_adapters import continue_lora
from forgebook.models.tokenizer import load_tokenizer
from forgebook.runs.run import Run
from forgebook.training import checkpoints


@pytest.fixture
def adapter():
    return add_lora(load_model(str(TINY_MODEL)), {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False})


@pytest.fixture
def saved(adapter, tokenizer, tmp_path):
    folder = tmp_path / "checkpoint"
    checkpoints.save_checkpoint(adapter, tokenizer, folder)
    return folder


def change(folder, edit):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: edit(name, tensor) for name, tensor in tensors.items()}, file)
    return len(tensors)


def test_a_checkpoint_has_all_it_takes_to_use_it(adapter, tokenizer, tmp_path):
    checkpoints.save_checkpoint(adapter, tokenizer, tmp_path / "c", prompt_format="bos: x\n")
    names = {path.name for path in (tmp_path / "c").iterdir()}
    assert names >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "generation_config.json", "prompt_format.yaml",
    }  # fmt: skip
    settings = json.loads((tmp_path / "c/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(TINY_MODEL)


def test_zero_sized_tensors_are_found(saved):
    """What peers save for LoRA under ZeRO-3 when nobody gathers."""
    count = change(saved, lambda name, tensor: torch.zeros(0))
    with pytest.raises(CheckpointError, match="has no elements"):
        checkpoints.verify_checkpoint(saved, count)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


OPENERS = {
    "generate": lambda folder: loading.load_together([folder]),
    "merge": lambda folder: merge_run(str(folder), folder.parent / "merged"),
    "continue": lambda folder: continue_lora(None, str(folder), {}),
    "tokenizer": lambda folder: load_tokenizer(str(folder)),
}


@pytest.mark.parametrize(
    ("opener", "name"),
    [(opener, "adapter_model.safetensors") for opener in ("generate", "merge", "continue")]
    + [(opener, "tokenizer.json") for opener in ("generate", "merge", "tokenizer")],
)
def test_a_flipped_byte_is_found_by_all_that_open_a_checkpoint(saved, opener, name):
    flip_a_byte(saved / name)
    with pytest.raises(CheckpointError, match=f"checkpoint/{name} is not as it was saved"):
        OPENERS[opener](saved)
    assert not (saved.parent / "merged").exists()


@pytest.mark.parametrize("content", ["", '{"r": '])
@pytest.mark.parametrize("opener", ["generate", "merge", "continue"])
def test_a_truncated_adapter_config_is_a_sentence(saved, opener, content):
    (saved / "adapter_config.json").write_text(content)
    with pytest.raises(StorageError, match=r"adapter_config\.json is damaged: .* use another checkpoint of the run"):
        OPENERS[opener](saved)


@pytest.mark.parametrize("opener", ["generate", "merge", "continue"])
def test_a_pickled_adapter_is_refused(saved, opener):
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    (saved / "checksums.json").unlink()
    with pytest.raises(ModelError, match=r"are pickled \(adapter_model.bin\)"):
        OPENERS[opener](saved)


def test_nan_is_found(saved):
    count = change(saved, lambda name, tensor: tensor * float("nan"))
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        checkpoints.verify_checkpoint(saved, count)


def test_an_adapter_of_zeros_is_found(saved):
    count = change(saved, lambda name, tensor: torch.zeros_like(tensor) if "lora_B" in name else tensor)
    with pytest.raises(CheckpointError, match="all zero"):
        checkpoints.verify_checkpoint(saved, count)
    checkpoints.verify_checkpoint(saved, count, trained=False)


def test_missing_tensors_are_found(saved):
    with pytest.raises(CheckpointError, match=r"holds 8 tensors instead of 9"):
        checkpoints.verify_checkpoint(saved, 9)
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds 0 tensors"):
        checkpoints.verify_checkpoint(saved, 8)


def test_a_failed_save_leaves_the_old_checkpoint_and_no_half_of_a_new_one(adapter, tokenizer, saved):
    before = (saved / "adapter_model.safetensors").read_bytes()
    for parameter in adapter.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(CheckpointError):
        checkpoints.save_checkpoint(adapter, tokenizer, saved)
    assert (saved / "adapter_model.safetensors").read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_an_unwritable_place_is_a_checkpoint_error(adapter, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        checkpoints.save_checkpoint(adapter, tokenizer, tmp_path / "file" / "checkpoint")


@pytest.mark.parametrize(
    ("losses", "keep", "kept"),
    [
        ({"a": 3.0, "b": 1.0, "c": 2.0}, 1, ["b"]),
        ({"a": 3.0, "b": 1.0, "c": 2.0}, 2, ["b", "c"]),
        ({"a": None, "b": None, "c": None}, 1, ["c"]),
        ({"a": 1.0, "b": 1.0}, 1, ["b"]),
        ({"a": 3.0, "b": float("nan"), "c": 2.0}, 1, ["c"]),
        ({"a": float("nan"), "b": 2.0, "c": None, "d": float("inf")}, 2, ["b", "d"]),
    ],
)
def test_the_best_are_kept(tmp_path, losses, keep, kept):
    run = Run(tmp_path)
    for name in losses:
        (run.checkpoints / name).mkdir(parents=True)
    assert checkpoints.keep_best(run, losses, keep) == kept[0]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == kept


class Bucket:
    """Record what `checkpoints` requests of a bucket."""

    def __init__(self, monkeypatch):
        self.requests = []
        self.folders = ["epoch-1", "epoch-2", "epoch-3"]
        monkeypatch.setattr(checkpoints, "worker_upload", self)
        monkeypatch.setattr(checkpoints, "object_store", self)

    def start_folder(self, uri):
        self.requests.append(f"start {uri}")

    def send_folder(self, folder, uri):
        self.requests.append(f"send {uri}")
        return {path.name: path.stat().st_size for path in folder.iterdir()}

    def send_run_files(self, folder, uri):
        self.requests.append(f"metrics {uri}")

    def finish_folder(self, uri, manifest):
        self.requests.append(f"finish {uri} {manifest}")

    def list_folders(self, uri):
        return self.folders

    def remove_folder(self, uri):
        self.requests.append(f"remove {uri}")


def test_a_folder_in_a_bucket_is_complete_once_all_of_it_and_its_metrics_are_there(tmp_path, monkeypatch):
    bucket = Bucket(monkeypatch)
    (tmp_path / "checkpoints/epoch-1").mkdir(parents=True)
    (tmp_path / "checkpoints/epoch-1/weights").write_text("12345")
    checkpoints.publish(Run(tmp_path), tmp_path / "checkpoints/epoch-1", "epoch-1")
    assert bucket.requests == []  # a run without a bucket
    checkpoints.publish(Run(tmp_path, uri="s3://b/run"), tmp_path / "checkpoints/epoch-1", "epoch-1")
    uri = "s3://b/run/checkpoints/epoch-1"
    assert bucket.requests == [
        f"start {uri}", f"send {uri}", "metrics s3://b/run", f"finish {uri} {{'weights': 5}}",
    ]  # fmt: skip


def test_all_but_the_best_leave_the_bucket_too(tmp_path, monkeypatch):
    bucket = Bucket(monkeypatch)
    losses = {"epoch-1": 3.0, "epoch-2": 1.0, "epoch-3": 2.0}
    assert checkpoints.keep_best(Run(tmp_path, uri="s3://b/run"), losses, 2) == "epoch-2"
    assert bucket.requests == ["remove s3://b/run/checkpoints/epoch-1"]


def test_a_save_is_tried_before_the_first_step(adapter, tokenizer, tmp_path):
    untrained = add_lora(load_model(str(TINY_MODEL)), {"r": 2, "target_modules": ["q_proj"]})
    checkpoints.try_save(untrained, tokenizer, tmp_path, copies=2)  # all zero, as every adapter before its first step
    assert list(tmp_path.iterdir()) == []
    for p in adapter.parameters():
        p.data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="NaN"):
        checkpoints.try_save(adapter, tokenizer, tmp_path, copies=2)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            RuntimeError("basic_ios::clear: iostream error: No space left on device"),
            r"the disk of .* is full: make room",
        ),
        (OSError(28, "No space left on device"), r"the disk of .* is full: make room"),
        (PermissionError(13, "Permission denied", "x"), r"could not be written: .*Permission denied"),
    ],
)
def test_a_failed_write_is_a_checkpoint_error(tmp_path, error, text):
    """Libraries report a full disk in words of their own."""
    with pytest.raises(CheckpointError, match=text), checkpoints.write_errors(tmp_path / "not" / "there"):
        raise error


def test_other_errors_of_a_write_stay_what_they_are(tmp_path):
    with pytest.raises(ZeroDivisionError), checkpoints.write_errors(tmp_path):
        raise ZeroDivisionError
    with pytest.raises(ModelError), checkpoints.write_errors(tmp_path):
        raise ModelError("as it is")


def test_a_disk_with_no_room_is_full_whatever_the_error_says(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match="is full"), checkpoints.write_errors(tmp_path):
        raise RuntimeError("unexpected pos 64 vs 0")


@pytest.mark.parametrize("method", ["pissa", True])
def test_the_start_of_an_adapter_that_changed_its_base_is_saved_and_read_again(tmp_path, method):
    def make():
        return add_lora(
            load_model(str(TINY_MODEL)), {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": method}
        )

    start = checkpoints.save_start(make(), tmp_path / "start.safetensors", is_resumed=False)
    if method is True:
        assert start is None and not (tmp_path / "start.safetensors").exists()
        return
    again = checkpoints.save_start(make(), tmp_path / "start.safetensors", is_resumed=True)
    assert start.keys() == again.keys() and all(torch.equal(start[name], again[name]) for name in start)
