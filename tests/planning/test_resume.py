"""Which edits of a config a run is resumed with, what they mean, and why others are refused."""

import pytest

from conftest import config_for
from forgebook.errors import StorageError
from forgebook.planning.resume import resume_changes

BASE = {
    "num_epochs": 3, "train_batch_size_per_device": 8, "gradient_accumulation_steps": 2,
    "eval_batch_size_per_device": 8, "context_length": 64, "num_devices": 2, "run_name": "r", "deepspeed": None,
    "learning_rate": 1e-3,
}  # fmt: skip


def changes(step=15, is_complete=False, base=None, **values):
    before = config_for("org/model", **{**BASE, **(base or {})}).resolved()
    now = config_for("org/model", **{**BASE, **(base or {}), **values}).resolved()
    return resume_changes(before, now, step, 10, "runs/r", is_complete)


def test_nothing_changed():
    assert changes() == [] == changes(max_failures=7)


@pytest.mark.parametrize(
    ("values", "meaning"),
    [
        ({"learning_rate": 2e-3}, "learning_rate: 0.001 -> 0.002.* after step 15.*learning rate of the new schedule"),
        ({"num_epochs": 5}, "num_epochs: 3 -> 5.*ends at step 50 instead of 30"),
        ({"max_steps": 20}, "max_steps: none -> 20.*ends at step 20 instead of 30"),
        ({"train_batch_size_per_device": 4, "gradient_accumulation_steps": 4}, "the same 32 examples"),
        ({"num_devices": 1, "gradient_accumulation_steps": 4}, "num_devices: 2 -> 1.*the same 32 examples"),
        (
            {"checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 5}},
            r"frequency: 1 -> 5.*unit: epochs -> steps.*of earlier steps stay",
        ),
        ({"sharding": "fsdp"}, "sharding: none -> fsdp.*resumes after step 15"),
        ({"save_state_minutes": 1}, "save_state_minutes: 15.0 -> 1.0"),
    ],
)
def test_what_may_change_is_explained(values, meaning):
    import re

    assert re.search(meaning, " | ".join(changes(**values)))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"seed": 7}, r"\(seed\): seed: the order of the examples"),
        ({"lora_config": {"r": 4}}, r"lora_config\.r: the saved state is of other weights"),
        ({"train_path": "b.jsonl", "context_length": 32}, "context_length: the examples.*train_path: the examples"),
        ({"train_batch_size_per_device": 4}, "examples of an optimizer step would change from 32 to 16"),
        ({"num_devices": 1}, "num_devices: the examples of an optimizer step"),
        ({"sharding": "zero_2", "deepspeed": "zero_2"}, "deepspeed.config_path: the saved state of the optimizer"),
        ({"weight_decay": 0.1}, "weight_decay: the saved state of the optimizer"),
        ({"max_grad_norm": 2}, "max_grad_norm: losses before and after could not be compared"),
        ({"num_epochs": 1}, "has trained 15 steps, and num_epochs would end it at step 10"),
        ({"max_steps": 15}, "has trained 15 steps, and max_steps would end it at step 15, whose model is not saved"),
    ],
)
def test_what_may_not_says_why(values, reason):
    with pytest.raises(StorageError, match=reason):
        changes(**values)


def test_deepspeeds_state_belongs_to_its_workers():
    with pytest.raises(StorageError, match="num_devices: DeepSpeed's saved state is divided among the workers"):
        changes(base={"deepspeed": "zero_2"}, num_devices=1, gradient_accumulation_steps=4)


def test_a_complete_run_goes_on_with_more_steps_alone():
    assert "ends at step 40 instead of 30" in changes(30, True, num_epochs=4)[2]
    with pytest.raises(StorageError, match="is complete, so learning_rate would change nothing of it"):
        changes(30, True, learning_rate=2e-3)


def test_a_run_that_stopped_early_goes_on_without_the_rule():
    base = {"early_stopping": {"patience": 1}, "valid_path": "v.jsonl"}
    assert "early_stopping" in changes(12, True, base=base, early_stopping=None)[0]
    with pytest.raises(StorageError, match="is complete, so early_stopping"):
        changes(30, True, base=base, early_stopping=None)
