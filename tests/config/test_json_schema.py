"""The JSON schema of a config accepts what loads and rejects what an editor can know to be wrong."""

import jsonschema
import pytest

from conftest import REPOSITORY
from forgebook.config.json_schema import config_schema
from forgebook.config.legacy_keys import RetiredNameWarning
from forgebook.config.schema import FinetuneConfig
from forgebook.config.yaml_source import parse_yaml
from forgebook.errors import ConfigError

SCHEMA = config_schema()
CONFIGS = sorted((REPOSITORY / "training_configs").rglob("*.yaml"))
NEEDED = "model_id: m\ntrain_path: t.jsonl\n"


def errors_of(text: str) -> list[str]:
    values, _ = parse_yaml(text, "c.yaml")
    return [error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(values)]


def test_it_is_a_schema_with_a_text_for_every_key():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert set(FinetuneConfig.model_fields) <= set(SCHEMA["properties"])
    blocks = [SCHEMA, *SCHEMA["$defs"].values()]
    assert all(node["description"] for block in blocks for node in block["properties"].values())


def test_another_name_of_a_metric_is_valid():
    assert errors_of(f"{NEEDED}metrics: [tool_accuracy]\nbest_metric: tool_accuracy\n") == []
    assert errors_of(f"{NEEDED}metrics: [accuracy]\n")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_config_of_the_repository_is_valid(path):
    assert errors_of(path.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "learning_rate: 1e-4",
        "learning_rate: ${RATE:-0.001}\ngradient_checkpointing: ${RECOMPUTE:-true}\ndtype: ${DTYPE:-float32}",
        "learning_rate:",
        "deepspeed: zero_2",
        "deepspeed: none",
        "num_devices: {min: 1, max: 2}\ndeepspeed: none",
        "x-lora: &lora {r: 8, lora_alpha: 16}\nlora_config: *lora",
        "lora_config: {r: 4, target_modules: all-linear, init_lora_weights: pissa, bias: null}\ndeepspeed: none",
        "rope_scaling: {type: linear, factor: 2.0}",
        "valid_path: {split: 0.05}",
        "valid_path: [a.jsonl, {path: b.csv, weight: 0.5, columns: {user: q, assistant: a}}]",
        "logger: [{provider: wandb, provider_config: {project: p}}, {provider: tensorboard}]",
        "torch_compile: {mode: max-autotune}",
        "worker_resources: {memory: 53687091200}",
    ],
)
def test_every_form_that_loads_is_valid(load_yaml, text):
    load_yaml(text + "\n")
    assert errors_of(NEEDED + text) == []


@pytest.mark.parametrize("key", ["eval_path: v.jsonl", "no_gradient_checkpoint: true", "lora_config: {rank: 4}"])
def test_retired_names_are_valid_and_marked(load_yaml, key):
    with pytest.warns(RetiredNameWarning):
        load_yaml(key + "\n")
    assert errors_of(NEEDED + key) == []
    assert SCHEMA["properties"]["eval_path"] == {"deprecated": True, "description": "Retired: read as valid_path."}


@pytest.mark.parametrize(
    "text",
    [
        "learning_rat: 1.0e-4",
        "learning_rate: fast",
        "learning_rate: 0",
        "learning_rate: true",
        "num_epochs: 0",
        "num_epochs: 1.5",
        "seed: null",
        "adam_betas: [0.9]",
        "adam_betas: [0.9, 1.0]",
        "dtype: float64",
        "gradient_checkpointing: 1",
        "num_devices: {min: 1}",
        "lora_config: {r: 8, lora_alhpa: 16}",
        "lora_config: {r: eight}",
        "lora_config: {target_modules: 3}",
        "rope_scaling: {rope_type: ntk, factor: 2}",
        "rope_scaling: {rope_type: linear, factor: 0.5}",
        "valid_path: {split: 1}",
        "train_path: []",
        "early_stopping: {min_delta: 0.1}",
        "logger: {provider: neptune}",
        "deepspeed: {path: zero_2.json}",
        "generation_config: {chat_template_kwargs: {enable thinking: false}}",
        "classifier_config: {label_tokens: [a]}",
        "worker_resources: {memory: much}",
    ],
)
def test_a_mistake_is_invalid_and_does_not_load(load_yaml, text):
    with pytest.raises(ConfigError):
        load_yaml(text + "\n")
    assert errors_of((NEEDED if "train_path" not in text else "model_id: m\n") + text) != []


def test_the_two_required_keys():
    assert len(errors_of("seed: 1\n")) == 2 and errors_of(NEEDED) == []
