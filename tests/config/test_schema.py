"""The two config classes: as written, and ready to train; and what the marks of their keys say."""

import inspect
import pickle

import pytest
from pydantic import ValidationError

from forgebook.config import blocks, schema
from forgebook.config.block_keys import flatten
from forgebook.config.rules import auto_keys
from forgebook.config.schema import (
    EVERY_EPOCH,
    FinetuneConfig,
    ResolvedConfig,
    keys_without_effect,
)
from support_config import refusal

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


# -- as written


def test_two_keys_are_enough(load_yaml):
    config = load_yaml()
    assert (config.model_id, config.train_path) == ("org/model", "train.jsonl")
    assert config.run_name == "tiny"
    assert config.task == "causal_lm"
    assert config.learning_rate == 1e-5 and not config.is_lora
    assert config.deepspeed.config_path == "deepspeed_configs/zero_3_offload_optim+param.json"
    assert config.gradient_checkpointing == "auto" and config.padding == "longest" and config.truncation == "error"


def test_lora_raises_the_default_learning_rate(load_yaml):
    config = load_yaml("lora_config: {r: 8}")
    assert config.is_lora and config.learning_rate == 1e-4 and config.origins["learning_rate"] == "auto"
    assert load_yaml("lora_config: {r: 8}\nlearning_rate: 3e-5").learning_rate == 3e-5


def test_every_field_is_documented():
    kinds = [*vars(blocks).values(), schema.FinetuneConfig]
    kinds = [kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, blocks.StrictBlock)]
    assert len(kinds) > 10
    missing = [f"{kind.__name__}.{name}" for kind in kinds for name, field in kind.model_fields.items()
               if not field.description]  # fmt: skip
    assert not missing


def test_configs_are_frozen(load_yaml):
    with pytest.raises(Exception, match="frozen"):
        load_yaml().num_epochs = 3


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("", "causal_lm"),
        ("task: instruction_tuning", "instruction_tuning"),
        ("task:", "causal_lm"),
        ("classifier_config: {label_tokens: [a, b]}", "classification"),
        ("preference_tuning_config: {beta: 0.01}", "preference_tuning"),
        ("preference_tuning_config: {}", "preference_tuning"),
        ("task: preference_tuning", "preference_tuning"),
    ],
)
def test_task_follows_its_block(load_yaml, text, task):
    config = load_yaml(text)
    assert config.task == task
    assert config.origins["task"] == ("file" if "task: " in text else "auto")
    if task == "preference_tuning":
        assert config.preference_tuning_config.beta > 0


@pytest.mark.parametrize(
    "text",
    [
        "task: causal_lm\nclassifier_config: {label_tokens: [a, b]}",
        "task: classification\npreference_tuning_config: {beta: 0.1}",
        "classifier_config: {label_tokens: [a, b]}\npreference_tuning_config: {beta: 0.1}",
    ],
)
def test_a_task_that_contradicts_a_block_is_refused(load_yaml, text):
    assert "contradicts" in refusal(load_yaml, text)


def test_blocks_that_need_each_other(load_yaml):
    assert "needs classifier_config" in refusal(load_yaml, "task: classification")
    assert "needs lora_config" in refusal(load_yaml, "initial_adapter_model_ckpt_path: s3://b/a")


def test_origins_record_what_set_a_value(load_yaml):
    config = load_yaml("num_epochs: 3\nlogger: {provider: wandb}\nlearning_rate:\n", "seed=1", "deepspeed=zero_2")
    assert {key: config.origins[key] for key in (
        "num_epochs", "logger.provider", "logger.rank_zero_only", "seed", "deepspeed.config_path",
        "learning_rate", "task", "run_name", "padding", "context_length",
    )} == {
        "num_epochs": "file", "logger.provider": "file", "logger.rank_zero_only": "default",
        "seed": "override", "deepspeed.config_path": "override",
        "learning_rate": "auto", "task": "auto", "run_name": "auto",
        "padding": "default", "context_length": "default",
    }  # fmt: skip
    assert set(config.origins.values()) <= {"file", "override", "default", "auto"}


def test_a_reason_for_one_key_of_a_block_leaves_the_others(load_yaml):
    config = load_yaml("num_epochs: 3\n").resolve(lora_config={"r": 4, "lora_alpha": 8})
    origins = config.explained({"seed": "why", "lora_config.r": "fits"}).origins
    assert (origins["seed"], origins["lora_config.r"]) == ("auto: why", "auto: fits")
    assert origins["lora_config.lora_alpha"] == "auto" and origins["num_epochs"] == "file"


def test_resolve_returns_a_checked_copy(load_yaml):
    config = load_yaml("num_devices: 4\ntrain_batch_size_per_device: 2\nseed: 1\n")
    resolved = config.resolve(context_length=512, train_batch_size_per_device=8, seed=1)
    assert (config.context_length, resolved.context_length) == (None, 512)
    assert resolved.origins["context_length"] == resolved.origins["train_batch_size_per_device"] == "auto"
    assert resolved.origins["seed"] == resolved.origins["num_devices"] == "file"
    assert resolved.source == config.source
    with pytest.raises(ValueError, match="context_length"):
        config.resolve(context_length=-1)


@pytest.mark.parametrize(("devices", "rows"), [(0, 8), (1, 8), (4, 32)])
def test_global_batch_size(load_yaml, devices, rows):
    config = load_yaml(f"num_devices: {devices}\ngradient_accumulation_steps: 4\n")
    with pytest.raises(ValueError, match="train_batch_size_per_device"):
        _ = config.global_batch_size
    assert config.resolve(train_batch_size_per_device=2).global_batch_size == rows


def test_configs_cross_process_borders(load_yaml):
    config = load_yaml("num_epochs: 3")
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config and copy.origins == config.origins and copy.source == config.source


def test_tool_accuracy_is_another_name_of_the_metric_of_tool_calls():
    config = config_of(metrics=["exact_match", "tool_accuracy"], best_metric="tool_accuracy")
    assert config.metrics == ["exact_match", "tool_calls"] and config.best_metric == "tool_calls"
