"""Checkpoints are complete or absent, and what is saved is worth keeping."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import TINY_MODEL
from forgebook.errors import CheckpointError
from forgebook.models.adapters import add_lora
from forgebook.models.load import load_model
from forgebook.runs import atomic
from forgebook.runs.run import Run
from forgebook.training import checkpoints
from forgebook.training.optimizers import AdamW


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
    with pytest.raises(CheckpointError, match=r"holds 8 tensors, 9 were to be saved"):
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


def test_a_folder_is_published_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic.atomic_folder(tmp_path / "f") as aside:
        (aside / "a").write_text("a")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with atomic.atomic_folder(tmp_path / "f") as aside:
        (aside / "a").write_text("a")
        assert not (tmp_path / "f").exists()
    assert (tmp_path / "f/a").read_text() == "a"


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
    for name in losses:
        (tmp_path / name).mkdir()
    assert checkpoints.keep_best(tmp_path, losses, keep) == kept[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_training_state_comes_back(adapter, tmp_path):
    trained = [p for p in adapter.parameters() if p.requires_grad]
    optimizer = AdamW(trained, lr=0.1)
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step()
    checkpoints.save_resume(Run(tmp_path), {"step": 7, "note": "x"}, adapter, optimizer)
    after_saving = torch.rand(3)
    values = [p.detach().clone() for p in trained]
    for p in trained:
        p.data.zero_()
    fresh = AdamW(trained, lr=0.1)
    state, place = checkpoints.latest_resume(tmp_path / "resume")
    checkpoints.load_resume(state, place, adapter, fresh)
    assert place["step"] == 7 and place["note"] == "x"
    assert all(torch.equal(p, v) for p, v in zip(trained, values, strict=True))
    assert torch.equal(torch.rand(3), after_saving)
    assert fresh.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


def test_only_the_newest_complete_state_is_kept(adapter, tmp_path):
    optimizer = AdamW([p for p in adapter.parameters() if p.requires_grad], lr=0.1)
    for step in (9, 10):
        checkpoints.save_resume(Run(tmp_path), {"step": step}, adapter, optimizer)
    (tmp_path / "resume/step-11").mkdir()  # without its place: not complete
    assert checkpoints.latest_resume(tmp_path / "resume")[0].name == "step-10"
    assert not (tmp_path / "resume/step-9").exists()


def test_another_number_of_workers_is_refused(adapter, tmp_path):
    with pytest.raises(CheckpointError, match=r"saved by 2 workers .* set num_devices=2"):
        checkpoints.load_resume(tmp_path, {"world_size": 2}, adapter, None)
