"""Tiny random models of the published classes, one per model family that people start with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support_models import QWEN_TOWER, TOWER, WINDOWS, WITH_TOWERS

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
SHARED = {"shared_expert_intermediate_size": 16}
LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
GROUPS = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
GEMMA4 = {
    "num_hidden_layers": 4, "sliding_window": 16, "layer_types": 2 * WINDOWS["layer_types"],
    "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128,
    "global_head_dim": 16,
}  # fmt: skip
MAMBA = {
    "layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
    "mamba_n_groups": 1, "shared_intermediate_size": 48,
}  # fmt: skip

# What people call it -> (model_type, what its config says beside TEXT). Qwen3.6 is published as Qwen3.5's classes.
FAMILIES = {
    "Llama 3": ("llama", {}),
    "Llama 4": ("llama4", {**WITH_TOWERS["Llama4"][0], "text_config": TEXT | {
        "intermediate_size_mlp": 48, "num_local_experts": 4, "no_rope_layers": [1, 0]}}),
    "Llama 4 (text)": ("llama4_text", {"intermediate_size_mlp": 48, "num_local_experts": 4, "no_rope_layers": [1, 0]}),
    "Qwen 2.5": ("qwen2", {}),
    "Qwen 3": ("qwen3", {}),
    "Qwen 3 MoE": ("qwen3_moe", EXPERTS),
    "Qwen 3 Next": ("qwen3_next", EXPERTS | DELTA | SHARED),
    "Qwen 3.5, 3.6": ("qwen3_5", {"text_config": TEXT | DELTA, "vision_config": QWEN_TOWER | {"out_hidden_size": 32}}),
    "Qwen 3.5, 3.6 MoE": ("qwen3_5_moe", {
        "text_config": TEXT | DELTA | EXPERTS | SHARED, "vision_config": QWEN_TOWER | {"out_hidden_size": 32}}),
    "Gemma 2": ("gemma2", {}),
    "Gemma 3 1B": ("gemma3_text", WINDOWS),
    "Gemma 3": ("gemma3", {"text_config": TEXT | WINDOWS, "vision_config": TOWER | {"vision_use_head": False},
        "mm_tokens_per_image": 4}),
    "Gemma 4": ("gemma4", {"text_config": TEXT | GEMMA4, "vision_config": TOWER | {
        "head_dim": 16, "num_key_value_heads": 2}}),
    "gpt-oss": ("gpt_oss", EXPERTS | WINDOWS),
    "Mistral": ("mistral", {}),
    "Mixtral": ("mixtral", EXPERTS),
    "Ministral 3": ("ministral3", {}),
    "Mistral Small 3": ("mistral3", {"text_config": TEXT | {"model_type": "mistral"}, "vision_config": TOWER | {
        "model_type": "pixtral"}}),
    "Phi 4": ("phi3", {}),
    "SmolLM 3": ("smollm3", {}),
    "OLMo 3": ("olmo3", WINDOWS),
    "OLMoE": ("olmoe", EXPERTS),
    "Granite 3": ("granite", {}),
    "Granite 4": ("granitemoehybrid", EXPERTS | MAMBA),
    "LFM 2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48, "block_multiple_of": 8}),
    "LFM 2 MoE": ("lfm2_moe", EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "GLM 4": ("glm4", {}),
    "GLM 4.5, 4.6": ("glm4_moe", EXPERTS | GROUPS),
    "GLM 4.7 Flash": ("glm4_moe_lite", EXPERTS | GROUPS | LATENT),
    "DeepSeek V3": ("deepseek_v3", EXPERTS | GROUPS | LATENT),
}  # fmt: skip

# The row of tests/oracles/chat_templates.md with the family's template, where it has another name.
TEMPLATES = {
    "Llama 3": "Llama 3.1, 3.2, 3.3",
    "Llama 4 (text)": "Llama 4",
    "Qwen 2.5": "Qwen 2, 2.5, SmolLM 2",
    "Qwen 3 MoE": "Qwen 3 Instruct 2507, Qwen 3 VL",
    "Qwen 3 Next": "Qwen 3 Instruct 2507, Qwen 3 VL",
    "Qwen 3.5, 3.6": "Qwen 3.6",
    "Qwen 3.5, 3.6 MoE": "Qwen 3.6",
    "Gemma 2": "Gemma 1, 2",
    "Gemma 3 1B": "Gemma 3",
    "Mistral": "Mistral v3",
    "Mixtral": "Mistral 7B v0.2, Mixtral",
    "Ministral 3": "Ministral 3, Magistral",
    "Mistral Small 3": "Mistral Small 3.2",
    "GLM 4.7 Flash": "GLM 4.7",
    "OLMo 3": "OLMo 3 Instruct",
    "OLMoE": "OLMo 2",
    "Granite 3": "Granite 3.3",
    "LFM 2 MoE": "LFM 2",
}


def save_family(name: str, folder: Path, **settings: Any) -> str:
    """Save a random model of a family as it is published, with other settings if any; return its folder."""
    import torch
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as READS_IMAGES

    from forgebook.models.load import auto_class, model_class

    kind, own = FAMILIES[name]
    settings = own | settings
    if "text_config" in settings:
        config = CONFIG_MAPPING[kind](**settings, architectures=[READS_IMAGES[kind]])
    else:
        config = CONFIG_MAPPING[kind](**TEXT | settings)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config)
    assert type(model) is model_class(config)
    model.save_pretrained(folder)
    return str(folder)
