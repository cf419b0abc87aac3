"""Keys that have no effect given the others: each is a warning, and reads again once the others are changed."""

import json

import pytest

from forgebook.config.parse import load_config
from forgebook.config.unread_keys import UNREAD, unread_keys

# Each sets keys that nothing reads; `valid_path` and the like make them read.
CONTEXT = {
    "num_devices",
    "num_epochs",
    "lr_scheduler_type",
    "optimizer",
    "deepspeed",
}  # set beside the keys that are unread
UNREAD_KEYS = [
    ({"adam_betas": (0.9, 0.95), "optimizer": "adafactor", "deepspeed": "none"}, {"optimizer": "adamw"}),
    ({"adam_epsilon": 1e-6, "optimizer": "adafactor", "deepspeed": "none"}, {"optimizer": "adamw"}),
    ({"lr_scheduler_type": "constant", "min_lr_ratio": 0.1, "lr_decay_ratio": 0.2}, {"lr_scheduler_type": "wsd"}),
    ({"decay_norms_and_biases": True}, {"weight_decay": 0.1}),
    ({"eval_first": True, "eval_batch_size_per_device": 4}, {"valid_path": "v.jsonl"}),
    ({"min_update_steps": 50, "num_epochs": 2}, {"num_epochs": None}),
    ({"train_on": "last", "rewritten_turns": "expand"}, {"task": "instruction_tuning"}),
    ({"num_devices": 0, "max_failures": 1, "address": "auto"}, {"num_devices": 2}),
    ({"num_devices": 0, "worker_resources": {"A": 1}, "trainer_resources": {"B": 1}}, {"num_devices": 2}),
    ({"liger_kernel": {"enabled": False, "kwargs": {"rope": True}}}, {"liger_kernel": {"kwargs": {"rope": True}}}),
    ({"fsdp": {"cpu_offload": True}}, {"sharding": "fsdp", "num_devices": 2}),
    ({"tf32": True}, {"tf32": True, "dtype": "float32"}),
    (
        {"preference_tuning_config": {"loss": "ipo", "label_smoothing": 0.1}},
        {"preference_tuning_config": {"loss": "dpo", "label_smoothing": 0.1}},
    ),
    ({"num_data_blocks_per_device": 8}, {"preference_tuning_config": {"logprob_processor_scaling_config": {}}}),
]  # fmt: skip


@pytest.mark.parametrize("values, remedy", UNREAD_KEYS)
def test_a_key_that_nothing_reads_is_a_warning(values, remedy, write_yaml):
    def warned(values):
        minimal = {"model_id": "tiny", "train_path": "t.jsonl"}
        return unread_keys(load_config(write_yaml(json.dumps(minimal | values))))

    unread = values.keys() - CONTEXT
    assert {text.split()[0].split(".")[0] for text in warned(values)} == unread
    assert warned(values | remedy) == []


def test_a_default_is_never_unread(write_yaml):
    minimal = {"model_id": "tiny", "train_path": "t.jsonl"}
    assert unread_keys(load_config(write_yaml(json.dumps(minimal)))) == []
    unread = {rule.keys[0] for rule in UNREAD}
    assert unread == {key for values, _ in UNREAD_KEYS for key in values} - CONTEXT
