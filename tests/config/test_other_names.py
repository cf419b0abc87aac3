"""An unknown key that another tool knows gets the name that it has here."""

import pytest

from forgebook.config.lora_block import LORA_KEYS
from forgebook.config.other_names import OTHER_NAMES, suggest_key
from forgebook.config.schema import FinetuneConfig
from forgebook.errors import ConfigError


def test_every_name_leads_to_a_key_of_today_and_is_none_itself():
    today = set(FinetuneConfig.model_fields) | {f"lora_config.{key}" for key in LORA_KEYS}
    assert set(OTHER_NAMES) <= today
    others = " ".join(OTHER_NAMES.values()).split()
    assert len(others) == len(set(others)) and not set(others) & today


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("per_device_train_batch_size", ": it is called 'train_batch_size_per_device' here"),
        ("warmup_ratio", ": it is called 'num_warmup_steps' here"),
        ("lora_r", ": it is called 'lora_config.r' here"),
        ("num_epoch", ": did you mean 'num_epochs'?"),
        ("zzz", ""),
        (3, ""),
    ],
)
def test_suggestions(key, suggestion):
    assert suggest_key(key, FinetuneConfig.model_fields) == suggestion


def test_the_error_of_a_config_names_it(load_yaml):
    with pytest.raises(ConfigError, match="unknown key 'cutoff_len': it is called 'context_length' here"):
        load_yaml("cutoff_len: 512\n")
