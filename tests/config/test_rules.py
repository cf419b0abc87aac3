"""Unsupported combinations: every rule is broken by an example, and nothing that the program advises breaks one."""

import itertools
import json
import re

import pytest

from conftest import config_for
from forgebook.catalog import hardware_of, shape_of
from forgebook.config.parse import load_config
from forgebook.config.rules import RULES, broken_rules, check_rules, open_keys
from forgebook.errors import ConfigError, ResourceError
from forgebook.planning.auto_config import choose, choose_task
from forgebook.planning.feasibility import fit
from forgebook.planning.plan import plan
from forgebook.planning.token_count import Statistics

LORA = {"r": 8, "target_modules": "all-linear"}
PISSA = LORA | {"init_lora_weights": "pissa"}
ANSWERS = {"valid_path": "v", "task": "instruction_tuning"}
FORMAT = dict.fromkeys(("system", "user", "assistant"), "{instruction}")
METRIC = {"metrics": ["exact_match"]}
LABELS = {"label_tokens": ["a", "b"]}

# Each breaks the rules whose messages contain these words, and no other.
BROKEN = [
    ({"classifier_config": LABELS, "task": "causal_lm"}, ["classifier_config sets task: classification"]),
    ({"preference_tuning_config": {}, "task": "causal_lm"}, ["preference_tuning_config sets task"]),
    ({"vision_language_config": {}, "task": "causal_lm"}, ["vision_language_config sets task"]),
    ({"vision_language_config": {}, "padding": "packed"}, ["does not pack examples with images"]),
    ({"vision_language_config": {}, "attention": "varlen"}, ["needs a line of its own"]),
    (
        {"vision_language_config": {"freeze_vision_encoder": False}, "lora_config": {}},
        ["an adapter is for the language model"],
    ),
    (
        {"vision_language_config": {}, "generation_config": {"prompt_format": FORMAT}},
        ["a prompt_format writes no images"],
    ),
    ({"vision_language_config": {}, "eval_generation": {}, "valid_path": "v"}, ["and would show it no images"]),
    ({"vision_language_config": {}, "liger_kernel": {"enabled": True}}, ["Liger's kernels are compared on text"]),
    ({"vision_language_config": {}, "torch_compile": True}, ["torch_compile does not work with images"]),
    ({"task": "classification"}, ["needs classifier_config"]),
    ({"task": "preference_tuning", "padding": "packed"}, ["cannot pack the pairs"]),
    ({"initial_adapter_model_ckpt_path": "a"}, ["needs lora_config"]),
    ({"quantization": "nf4", "deepspeed": "none"}, ["quantization needs lora_config"]),
    ({"quantization": "nf4", "lora_config": PISSA, "deepspeed": "none"}, ["weights that are not quantized"]),
    ({"lora_config": PISSA | {"use_dora": True}, "deepspeed": "none"}, ["pissa with use_dora"]),
    ({"min_devices": 1, "num_devices": 2, "deepspeed": "zero_1"}, ["min_devices does not work with DeepSpeed"]),
    ({"sharding": "fsdp", "deepspeed": "zero_2"}, ["sharding and deepspeed both say how devices share the model"]),
    ({"sharding": "zero_2", "deepspeed": "zero_1"}, ["sharding and deepspeed both say how devices share the model"]),
    ({"sharding": "zero_2", "deepspeed": "none"}, ["sharding and deepspeed both say how devices share the model"]),
    ({"sharding": "zero_2", "num_devices": 2, "min_devices": 1}, ["set sharding: fsdp or none, or remove min_dev"]),
    ({"sharding": "fsdp", "num_devices": 0}, ["divides a model among workers, and num_devices: 0 starts none"]),
    ({"sharding": "fsdp", "quantization": "nf4", "lora_config": LORA}, ["bitsandbytes' packed weights"]),
    ({"sharding": "fsdp", "lora_config": PISSA}, ["pissa does not work with sharding: fsdp"]),
    *(
        ({"sharding": "fsdp", "optimizer": name}, ["only optimizer: adamw works with sharding: fsdp"])
        for name in ("muon", "adafactor", "adamw_8bit", "paged_adamw_8bit")
    ),
    ({"sharding": "fsdp", "gradient_checkpointing": "offload"}, ["offload is not supported with sharding: fsdp"]),
    ({"sharding": "fsdp", "torch_compile": True}, ["torch_compile does not work with sharding: fsdp"]),
    ({"sequence_parallel": 2, "num_devices": 3, "sharding": "none"}, ["divides num_devices into groups"]),
    ({"sequence_parallel": 2, "num_devices": 0, "sharding": "none"}, ["divides num_devices into groups"]),
    ({"sequence_parallel": 2, "num_devices": 2, "deepspeed": "zero_3"}, ["which counts examples per worker"]),
    ({"sequence_parallel": 2, "num_devices": 2, "sharding": "fsdp", "min_devices": 1}, ["a group that loses a worker"]),
    (
        {"sequence_parallel": 2, "num_devices": 2, "sharding": "fsdp", "task": "preference_tuning"},
        ["sequence_parallel works with losses of single tokens"],
    ),
    (
        {"sequence_parallel": 2, "num_devices": 2, "sharding": "fsdp", "attention": "eager"},
        ["exchanges positions for heads"],
    ),
    ({"tiled_mlp": True, "deepspeed": "zero_3"}, ["workers would gather weights for different numbers of tiles"]),
    ({"tiled_mlp": True, "torch_compile": True, "deepspeed": "none"}, ["would compile each number of tiles"]),
    ({"tiled_mlp": True, "gradient_checkpointing": "selective", "deepspeed": "none"}, ["tiled_mlp computes again"]),
    ({"dtype": "float16"}, ["dtype: float16 does not work with DeepSpeed"]),
    ({"dtype": "float16", "sharding": "fsdp"}, ["dtype: float16 does not work with sharding: fsdp"]),
    *(
        ({"dtype": "float16", "optimizer": name, "deepspeed": "none"}, ["adamw works with dtype: float16"])
        for name in ("muon", "adafactor", "adamw_8bit", "paged_adamw_8bit")
    ),
    ({"quantization": "int8", "lora_config": LORA, "deepspeed": "zero_3"}, ["bitsandbytes' packed weights"]),
    ({"classifier_config": LABELS, "lora_config": LORA, "deepspeed": "zero_3"}, ["single rows of the embedding"]),
    ({"lora_config": PISSA, "deepspeed": "zero_3_offload_optim+param"}, ["pissa does not work with ZeRO-3"]),
    ({"optimizer": "adamw_8bit", "deepspeed": "zero_3_offload_optim"}, ["adamw_8bit does not work with an offloaded"]),
    ({"optimizer": "muon", "deepspeed": "zero_2"}, ["muon and adafactor do not work with DeepSpeed"]),
    ({"optimizer": "adafactor", "deepspeed": "zero_2"}, ["muon and adafactor do not work with DeepSpeed"]),
    ({"optimizer": "paged_adamw_8bit", "deepspeed": "zero_3_offload_optim"}, ["does not work with an offloaded"]),
    ({"optimizer": "muon", "lora_config": LORA, "deepspeed": "none"}, ["muon is for full fine-tuning"]),
    ({"quantization": "nf4", "deepspeed": "zero_3"}, ["needs lora_config", "bitsandbytes' packed weights"]),
    ({"early_stopping": {"patience": 1}}, ["early_stopping compares evaluation losses and needs valid_path"]),
    ({"eval_generation": {}, "task": "instruction_tuning"}, ["needs valid_path"]),
    ({"eval_generation": {}, "valid_path": "v", "task": "causal_lm"}, ["needs examples with answers"]),
    ({"metrics": ["exact_match"]}, ["metrics are of generated answers"]),
    ({"best_metric": "exact_match"}, ["best_metric is not among metrics"]),
    ({"best_metric": "exact_match", **METRIC, "eval_generation": {"every": 2}, **ANSWERS}, ["set every: 1"]),
    ({"loraplus_lr_ratio": 16}, ["loraplus_lr_ratio is of the matrices of an adapter and needs lora_config"]),
]  # fmt: skip
WORKS = [
    {},
    {"classifier_config": LABELS},
    {"classifier_config": LABELS, "lora_config": LORA, "deepspeed": "zero_2"},
    {"preference_tuning_config": {}, "lora_config": LORA},
    {"padding": "packed"},
    {"initial_adapter_model_ckpt_path": "a", "lora_config": LORA},
    {"quantization": "nf4", "lora_config": LORA, "deepspeed": "zero_2"},
    {"lora_config": PISSA, "deepspeed": "zero_2"},
    {"lora_config": LORA | {"use_dora": True}, "deepspeed": "zero_3"},
    {"min_devices": 1, "num_devices": 2, "deepspeed": "none"},
    {"sharding": "fsdp"},
    {"sharding": "fsdp", "deepspeed": "none", "num_devices": 2, "min_devices": 1},
    {"sharding": "fsdp", "num_devices": 4, "sequence_parallel": 2},
    {"sharding": "fsdp", "classifier_config": LABELS, "lora_config": LORA | {"use_dora": True}},
    {"sharding": "zero_2", "quantization": "nf4", "lora_config": LORA},
    {"sharding": "zero_2", "deepspeed": "zero_2"},
    {"sharding": "none", "optimizer": "muon"},
    {"tiled_mlp": True, "sharding": "fsdp", "gradient_checkpointing": True},
    {"optimizer": "adamw_8bit", "deepspeed": "zero_3"},
    {"optimizer": "muon", "deepspeed": "none"},
    {"best_metric": "tool_calls", "metrics": ["tool_calls"], "eval_generation": {}, **ANSWERS},
]


@pytest.fixture
def write(tmp_path):
    """Write a config of some values, a key per line, and return its path."""

    def write(values: dict):
        path = tmp_path / "tiny.yaml"
        lines = {"model_id": "org/model", "train_path": "t.jsonl"} | values
        path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items()))
        return path

    return write


# -- the table


@pytest.mark.parametrize(("values", "words"), BROKEN, ids=lambda value: json.dumps(value)[:60])
def test_what_does_not_go_together_breaks_its_rule_alone(values, words):
    broken = broken_rules(config_for("org/model", **values))
    assert len(broken) == len(words) and all(word in str(rule) for word, rule in zip(words, broken, strict=True))
    with pytest.raises(ConfigError, match=re.escape(words[0])):
        check_rules(config_for("org/model", **values))


@pytest.mark.parametrize("values", WORKS, ids=json.dumps)
def test_what_goes_together_breaks_none(values):
    assert broken_rules(config_for("org/model", **values)) == []
    check_rules(config_for("org/model", **values))


def test_every_rule_is_broken_by_an_example():
    broken = {id(rule) for values, _ in BROKEN for rule in broken_rules(config_for("org/model", **values))}
    assert broken == {id(rule) for rule in RULES}


def test_rules_name_keys_that_exist_and_a_fix():
    known = set(type(config_for("m")).model_fields)
    for rule in RULES:
        assert rule.keys and {key.split(".")[0] for key in rule.keys} <= known
        assert rule.fix and str(rule) == f"{rule.message}: {rule.fix}" and not str(rule).endswith(".")


# -- when a config is loaded


@pytest.mark.parametrize(("values", "words"), BROKEN, ids=lambda value: json.dumps(value)[:60])
def test_loading_names_the_file_and_the_line(write, values, words):
    with pytest.raises(ConfigError) as refused:
        load_config(write(values))
    lines = str(refused.value).splitlines()
    assert len(lines) == len(words)
    for line, word in zip(lines, words, strict=True):
        assert word in line and re.search(r"tiny\.yaml:[3-6]\)$", line), line


def test_an_override_that_breaks_a_rule_is_named(write):
    with pytest.raises(ConfigError, match=r"\(override padding=packed\)$"):
        load_config(write({}), ["task=preference_tuning", "padding=packed"])
    assert load_config(write({"padding": "packed"}), ["padding=longest", "task=preference_tuning"])


def test_rules_about_keys_that_default_mode_may_choose_wait(write):
    values = {"lora_config": LORA, "quantization": "nf4"}
    with pytest.raises(ConfigError, match="packed weights"):
        load_config(write(values))  # the default is ZeRO-3
    config = load_config(write(values), default=True)
    assert len(broken_rules(config)) == 1 and broken_rules(config, open_keys(config)) == []
    with pytest.raises(ConfigError, match="packed weights"):
        load_config(write(values | {"deepspeed": "zero_3"}), default=True)


# -- what the program advises

DATA = Statistics((900,) * 2000, 1.0, "counted")
METHODS = [None, LORA, PISSA, LORA | {"use_dora": True}]
TASKS = [
    {},
    {"classifier_config": LABELS},
    {"preference_tuning_config": {}},
]
SWITCHES = [
    {},
    {"optimizer": "adamw_8bit"},
    {"quantization": "nf4", "deepspeed": "zero_2"},
    {"num_devices": 8, "min_devices": 2},
]
RUNS = [
    ("meta-llama/Llama-3.3-70B-Instruct", "8xA100-80G"),
    ("meta-llama/Llama-3.3-70B-Instruct", "8xA100-40G"),
    ("meta-llama/Llama-3.1-8B", "8xL4"),
    ("meta-llama/Llama-3.1-8B", "1xL40S"),
]


def grid() -> list:
    """List configs that break no rule, each with hardware that is small for it."""
    cases = []
    for lora, task, switch, (model, hardware) in itertools.product(METHODS, TASKS, SWITCHES, RUNS):
        values = {"deepspeed": "none", "context_length": 2048, "train_batch_size_per_device": 1}
        values |= {"num_devices": hardware_of(hardware)[0], "lora_config": lora, **task, **switch}
        if hardware[0] == "1" and "min_devices" in values:
            continue
        config = config_for(model, **values)
        if not broken_rules(config):
            cases.append((config, hardware))
    return cases


def advised(config, changes: tuple[str, ...]):
    """Apply the `key=value` of a plan, as a reader would."""
    values = {}
    for word in " ".join(changes).split():
        key, equals, value = word.partition("=")
        if equals:
            values[key] = (
                None
                if value == "none"
                else json.loads(value)
                if value[0].isdigit() or value in ("true", "false")
                else value
            )
    if "lora_config.r" in values:
        values["lora_config"] = (config.lora_config or {}) | {"r": values.pop("lora_config.r")}
    return config.resolve(**values)


def test_what_a_plan_advises_breaks_no_rule():
    cases, changed = grid(), 0
    for config, hardware in cases:
        changes = plan(config, shape_of(config.model_id), hardware_of(hardware)).changes
        changed += bool(changes)
        assert broken_rules(advised(config, changes)) == [], (changes, config)
    assert len(cases) > 60 and changed > len(cases) / 3


def test_what_fit_finds_breaks_no_rule():
    fitted = [fit(config, shape_of(config.model_id), hardware_of(hardware)) for config, hardware in grid()]
    fitted = [config for config in fitted if config is not None]
    assert len(fitted) > 30
    for config in fitted:
        assert broken_rules(config) == [], config


def test_what_default_mode_chooses_breaks_no_rule(write):
    chosen = 0
    for task, switch, (model, hardware), lora in itertools.product(
        TASKS, [*SWITCHES, {"quantization": "nf4"}], RUNS[::2], [{}, {"lora_config": PISSA}, {"lora_config": None}]
    ):
        values = {**task, **switch, **lora, "hardware": hardware, "model_id": model}
        try:
            config = choose_task(load_config(write(values), default=True), [])
        except ConfigError:  # the file itself breaks a rule
            continue
        try:
            config, _ = choose(config, shape_of(model), hardware_of(hardware), DATA)
        except ResourceError:  # nothing fits
            continue
        chosen += 1
        assert broken_rules(config) == [], config
    assert chosen > 30


def test_default_mode_says_which_rule_the_written_keys_break(write):
    config = load_config(write({"padding": "packed", "model_id": "meta-llama/Llama-3.1-8B"}), default=True)
    with pytest.raises(ConfigError, match="cannot pack the pairs"):
        choose_task(config, [{"prompt": "a", "chosen": "b", "rejected": "c"}])
