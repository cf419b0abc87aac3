"""What a lora_config names and no layer has: the catalog's shapes say the same as the models of transformers."""

import re

import pytest
import torch

from forgebook.catalog import shape_of
from forgebook.errors import ModelError
from forgebook.models import adapters
from forgebook.models.lora_targets import layers_of_shape, unmatched_targets

TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
KINDS = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "Phi3")
LLAMA_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    """A model without weights, and its shape as config.json states it."""
    import transformers

    config = getattr(transformers, f"{request.param}Config")(**TEXT)
    folder = tmp_path_factory.mktemp(request.param)
    config.save_pretrained(folder)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config), shape_of(str(folder))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": LLAMA_NAMES},
        {"target_modules": "all-linear"},
        {"target_modules": ["qkv_proj", "gate_up_proj", "mlp.down_proj"]},
        {"target_modules": ["q_proj", "query"], "modules_to_save": ["norm", "input_layernorm", "score"]},
        {"target_modules": r"model\.layers\.\d+\.mlp\.down_proj"},
        {"target_modules": "q_proj"},
        {"target_modules": ["o_proj"], "layers_to_transform": [0, 1, 7]},
    ],
    ids=lambda settings: str(settings)[:40],
)
def test_a_shape_agrees_with_the_model(both, settings):
    model, shape = both
    by_model, by_shape = (
        # The first layer serves as an example; the order within one is the model's own.
        [re.sub(r"such as \S+", "", text) for text in unmatched_targets(settings, layers)]
        for layers in (adapters.layers_of(model), layers_of_shape(shape))
    )
    assert by_shape == by_model


def test_names_of_experts_are_known():
    layers = layers_of_shape(shape_of("mistralai/Mixtral-8x7B-v0.1"))
    assert unmatched_targets({"target_modules": ["q_proj", "w1", "w2", "w3", "gate"]}, layers) == []
    assert "is named query" in unmatched_targets({"target_modules": ["query"]}, layers)[0]


def mixture(kind, **settings):
    import transformers

    config = transformers.CONFIG_MAPPING[kind](**TEXT, **settings)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


MIXTURES = {
    "mixtral": {"num_local_experts": 4},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 24},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 8},
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", MIXTURES)
def test_all_linear_leaves_routers_alone(kind):
    model = adapters.add_lora(mixture(kind, **MIXTURES[kind]), {"r": 2, "target_modules": "all-linear"})
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("q_proj" in name for name in trained) and not any(".gate." in n or ".router." in n for n in trained)


def test_a_router_that_is_more_than_a_product_is_refused():
    """PEFT wraps it and fails in the first forward pass, where Llama 4's returns two tensors."""
    with pytest.raises(ModelError, match=r"router computes more than a product .* leave it out of target_modules"):
        adapters.add_lora(mixture("llama4_text", **MIXTURES["llama4_text"]), {"r": 2, "target_modules": ["router"]})


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_all_linear_leaves_frozen_is_reported():
    model = mixture("llama4_text", **MIXTURES["llama4_text"])
    [text] = unmatched_targets({"target_modules": "all-linear"}, adapters.layers_of(model))
    assert "leaves feed_forward.experts.gate_up_proj, feed_forward.experts.down_proj frozen" in text
    named = {"target_modules": "all-linear", "target_parameters": ["feed_forward.experts.gate_up_proj"]}
    assert unmatched_targets(named, adapters.layers_of(model)) == []
    assert unmatched_targets({"target_modules": "all-linear"}, adapters.layers_of(mixture("mixtral"))) == []
