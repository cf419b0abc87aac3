"""What trains, counted from shapes: as many parameters as PEFT adds to transformers' models."""

import pytest
import torch

from forgebook.catalog import Shape, shape_of
from forgebook.planning.trainable import trainable_parameters

LLMFORGE_TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj embed_tokens lm_head".split()
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 3,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
ADAPTERS = {
    "all-linear": {"target_modules": "all-linear"},
    "names": {"target_modules": LLMFORGE_TARGETS},
    "dora": {"target_modules": ["q_proj", "o_proj", "down_proj"], "use_dora": True},
    "pattern": {"target_modules": r".*\.1\.self_attn\.(q|v)_proj"},
    "ranks": {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"k_proj": 3}, "layers_to_transform": [0, 2]},
    "saved": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"], "exclude_modules": ["2.self_attn.v_proj"]},
}


def meta_model(kind: str):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[kind](**SMALL, tie_word_embeddings=kind.startswith("gemma"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "mixtral", "phi3"])
def test_counts_are_those_of_transformers_and_peft(kind):
    from forgebook.models.adapters import add_lora

    experts = {"experts": 8, "active_experts": 2} if kind == "mixtral" else {}
    shape = Shape(kind, 3, 64, 96, 4, 2, 16, 128, 64, tied=kind.startswith("gemma"), **experts)
    assert shape.parameters == sum(p.numel() for p in meta_model(kind).parameters())
    for name, settings in ADAPTERS.items():
        if kind in ("mixtral", "phi3") and name != "all-linear":
            continue  # their layers have other names
        model = add_lora(meta_model(kind), {"r": 8, **settings})
        counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trainable_parameters({"r": 8, **settings}, shape) == counted, name


def test_all_parameters_are_trained_without_an_adapter():
    assert trainable_parameters(None, shape_of("tiny")) == 2_885_888


MIXTURES = {
    "mixtral": ["q_proj", "w1", "w2", "w3"],
    "qwen3_moe": ["q_proj", "gate_proj", "up_proj", "down_proj"],
    "glm4_moe": ["o_proj", "gate_proj", "up_proj", "down_proj"],  # its first layer is dense
    "gpt_oss": ["q_proj", "o_proj"],
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", MIXTURES)
def test_adapters_of_experts_are_counted_by_whatever_name_they_are_reached(kind):
    """PEFT gives one to each expert, 128 of them in Qwen3 30B-A3B, where a config names gate_proj as for Llama."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from forgebook.models.adapters import add_lora
    from forgebook.models.shapes import count_shape

    def model():
        experts = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_intermediate_size": 32}
        config = CONFIG_MAPPING[kind](**SMALL, **experts)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)

    shape = count_shape(model())
    down = MIXTURES[kind][-2 if kind == "mixtral" else -1]
    settings = [
        {"target_modules": MIXTURES[kind]},
        {"target_modules": ["q_proj", "gate"]},
        {"target_modules": ["v_proj"], "target_parameters": ["experts.down_proj"]},
        {"target_modules": rf".*\.1\.(self_attn\.q_proj|mlp\.experts\.{down})"},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": MIXTURES[kind], "layers_to_transform": [1]},
    ]
    for one in settings:
        adapted = add_lora(model(), {"r": 4, **one})
        counted = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert trainable_parameters({"r": 4, **one}, shape) == counted, one
