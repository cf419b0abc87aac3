"""Every YAML and every DeepSpeed file of the repository, one test each."""

import json

import pytest

from conftest import REPOSITORY
from helpers.config import load_config, read_deepspeed_config

CONFIGS = sorted(REPOSITORY.glob("training_configs/**/*.yaml")) + sorted(REPOSITORY.glob("cookbooks/**/*.yaml"))
DEEPSPEED = sorted(REPOSITORY.glob("deepspeed_configs/*.json"))
STAGES = {path.stem: int(path.stem.split("_")[1]) for path in DEEPSPEED}


def name(path):
    return str(path.relative_to(REPOSITORY))


def test_there_are_files_to_test():
    assert {path.stem for path in CONFIGS} >= {"quickstart", "pretrain", "gsm8k-lora", "gsm8k-full"}
    assert set(STAGES) >= {
        "zero_1", "zero_2", "zero_3", "zero_3_hpz", "zero_3_offload_optim", "zero_3_offload_optim+param",
    }  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_config_loads(path, recwarn):
    config = load_config(path)
    assert config.run_name == path.stem
    assert config.deepspeed is None or read_deepspeed_config(config)
    assert not recwarn.list, "a config of ours uses a retired name"


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_config_says_how_it_is_run(path):
    assert path.read_text().startswith("#") and f"python main.py {name(path)}" in path.read_text()


@pytest.mark.parametrize("path", DEEPSPEED, ids=name)
def test_deepspeed_file_is_understood_by_deepspeed(path):
    """DeepSpeed's own model of its ZeRO block accepts every key, with the stage that the file's name says."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    settings = json.loads(path.read_text())
    block = {key: value for key, value in settings["zero_optimization"].items() if value != "auto"}
    known = {field.alias or key for key, field in DeepSpeedZeroConfig.model_fields.items()}
    known |= set(DeepSpeedZeroConfig.model_fields)
    assert set(settings["zero_optimization"]) <= known
    assert DeepSpeedZeroConfig(**block).stage == STAGES[path.stem]
