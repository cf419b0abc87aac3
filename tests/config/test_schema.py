"""The two config classes: as written, and ready to train; and what the marks of their keys say."""

import pickle

import pytest
from pydantic import ValidationError

from forgebook.config.schema import (
    EVERY_EPOCH,
    FinetuneConfig,
    ResolvedConfig,
    auto_keys,
    flatten,
    keys_without_effect,
)

CHOSEN = {
    "context_length": 512,
    "train_batch_size_per_device": 4,
    "eval_batch_size_per_device": 8,
    "num_epochs": 3,
}


def config_of(**values) -> FinetuneConfig:
    return FinetuneConfig.model_validate({"model_id": "m", "train_path": "t.jsonl", "run_name": "r", **values})


# -- ready to train


def test_a_resolved_config_has_no_gaps_and_keeps_origins_and_source():
    written = config_of(seed=7).with_origins({"seed": "file"}, "tiny.yaml").explained({"seed": "a test"})
    done = written.resolved(**CHOSEN)
    assert type(done) is ResolvedConfig and done.source == "tiny.yaml" and not done.is_default
    assert done.checkpoint_and_evaluation_frequency == EVERY_EPOCH
    assert done.origins["seed"] == "auto: a test" and done.origins["context_length"] == "auto"
    assert done.origins["checkpoint_and_evaluation_frequency.unit"] == "auto"
    assert done.origins["padding"] == "default" and done.learning_rate == 1e-5


def test_a_resolved_config_stays_one():
    done = config_of().resolved(**CHOSEN)
    assert type(done.resolve(num_epochs=1)) is type(done.explained({"num_epochs": "why"})) is ResolvedConfig
    copy = pickle.loads(pickle.dumps(done))
    assert type(copy) is ResolvedConfig and copy == done and copy.origins == done.origins
    assert done.resolved() == done


@pytest.mark.parametrize("key", CHOSEN)
def test_a_gap_is_refused(key):
    with pytest.raises(ValidationError, match=key):
        config_of().resolved(**{name: value for name, value in CHOSEN.items() if name != key})


@pytest.mark.parametrize(("devices", "examples"), [(0, 12), (1, 12), (4, 48)])
def test_global_batch_size_counts_the_examples_of_all_devices(devices, examples):
    done = config_of(num_devices=devices, gradient_accumulation_steps=3).resolved(**CHOSEN)
    assert done.global_batch_size == examples


# -- marks


def test_marked_keys_are_keys_in_the_order_of_the_class():
    known = set(flatten(FinetuneConfig(model_id="m", train_path="t").model_dump()))
    names = {key.split(".")[0] for key in known}
    assert {key.split(".")[0] for key in (*auto_keys(), *keys_without_effect())} <= names
    assert auto_keys()[:2] == ("valid_path", "task") and "generation_config.prompt_format" in auto_keys()
    assert "num_devices" in auto_keys() and "num_devices" not in keys_without_effect()
    assert {"run_name", "generation_config.stopping_sequences"} <= keys_without_effect()
    assert "preference_tuning_config.logprob_processor_scaling_config" in keys_without_effect()


def test_a_resolved_config_carries_the_same_marks():
    for name, field in ResolvedConfig.model_fields.items():
        assert set(map(str, field.metadata)) >= {
            str(mark) for mark in FinetuneConfig.model_fields[name].metadata if str(mark).startswith("Mark.")
        }, name
