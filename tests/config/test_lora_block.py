"""lora_config: the names of PEFT, and values of other types, refused when the config is loaded."""

import dataclasses

import pytest

from forgebook.config.lora_block import LORA_KEYS, lora_problems
from support_config import refusal


def test_keys_are_those_of_the_installed_peft():
    peft = pytest.importorskip("peft")
    assert {field.name for field in dataclasses.fields(peft.LoraConfig) if field.init} == LORA_KEYS


@pytest.mark.parametrize(
    "block",
    [
        {},
        {"r": 1, "lora_alpha": 0.5, "lora_dropout": 0, "bias": "lora_only", "use_dora": True},
        {"target_modules": "all-linear", "exclude_modules": "lm_head"},
        {"target_modules": r".*\.(q|v)_proj", "layers_to_transform": 3},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "modules_to_save": []},
        {
            "target_parameters": ["mlp.experts.gate_up_proj"],
            "rank_pattern": {"^q": 4},
            "alpha_pattern": {"k_proj": 8.5},
        },
        {"init_lora_weights": "pissa_niter_16", "task_type": "CAUSAL_LM", "layers_pattern": None},
    ],
)
def test_what_peft_takes_is_taken(block):
    assert lora_problems(block) == []


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("r: 0", "r: got 0, must be a whole number from 1 to 65,536"),
        ("r: 8.5", "r: got 8.5"),
        ("r: " + "9" * 40, "r: got 9999"),
        ("rr: 8", "unknown key 'rr': did you mean 'r'?"),
        ("lora_alpha: -1", "lora_alpha: got -1, must be a number above 0"),
        ("lora_alpha: .inf", "lora_alpha: got inf"),
        ("lora_dropout: 1", "lora_dropout: got 1, must be a number from 0 to below 1"),
        ("lora_dropout: often", "lora_dropout: got 'often'"),
        ("target_modules: true", "target_modules: got True, must be all-linear, a list of names, or a regular"),
        ("target_modules: 5", "target_modules: got 5"),
        ("target_modules: [1]", "target_modules: got [1]"),
        ("target_modules: '*_proj'", "target_modules: got '*_proj', must be all-linear, a list of names, or a regular"),
        ("target_modules: {q_proj: 1}", "target_modules: got {'q_proj': 1}"),
        ("exclude_modules: 1.5", "exclude_modules: got 1.5"),
        ("modules_to_save: lm_head", "modules_to_save: got 'lm_head', must be a list of names"),
        ("target_parameters: [[]]", "target_parameters: got [[]]"),
        ("layers_to_transform: [a]", "layers_to_transform: got ['a']"),
        ("layers_to_transform: true", "layers_to_transform: got True"),
        ("rank_pattern: [4]", "rank_pattern: got [4]"),
        ("rank_pattern: {q_proj: many}", "rank_pattern: got {'q_proj': 'many'}"),
        ("rank_pattern: {'(': 4}", "rank_pattern: got {'(': 4}"),
        ("alpha_pattern: {q_proj: 0}", "alpha_pattern: got {'q_proj': 0}"),
        ("bias: true", "bias: got True, must be none, all or lora_only"),
        ("use_dora: 'yes'", "use_dora: got 'yes', must be true or false"),
        ("init_lora_weights: [gaussian]", "init_lora_weights: got ['gaussian'], must be true, gaussian"),
    ],
)  # fmt: skip
def test_values_of_another_type_are_refused(load_yaml, block, message):
    refused = refusal(load_yaml, f"lora_config: {{{block}}}")
    assert f"lora_config: {message}" in refused and "tiny.yaml:3" in refused


def test_a_null_is_pefts_default(load_yaml):
    assert load_yaml("lora_config: {r: 4, lora_dropout: null, layers_pattern: null}").lora_config == {"r": 4}
