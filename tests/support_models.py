"""Tiny random models with the parts that published ones have: towers beside the text decoder."""

from __future__ import annotations

from pathlib import Path

TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 2048, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
WINDOWS = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_TOWER = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14, "out_hidden_size": 64,
}  # fmt: skip
# Class -> (its config's arguments, its towers).
WITH_TOWERS = {
    "Gemma3": (
        {"text_config": TEXT | WINDOWS, "vision_config": TOWER | {"vision_use_head": False}, "mm_tokens_per_image": 4},
        ["model.vision_tower", "model.multi_modal_projector"],
    ),
    "Gemma4": (
        {
            "text_config": TEXT | {
                "num_hidden_layers": 4, "sliding_window": 64, "layer_types": 2 * WINDOWS["layer_types"],
                "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 2048,
                "global_head_dim": 16,
            },
            "vision_config": TOWER | {"head_dim": 16, "num_key_value_heads": 2},
        },
        ["model.vision_tower", "model.embed_vision"],
    ),
    "Qwen3VL": (
        {"text_config": TEXT, "vision_config": QWEN_TOWER | {"deepstack_visual_indexes": [0]}},
        ["model.visual"],
    ),
    "Qwen3_5": (
        {
            "text_config": TEXT | {
                "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
                "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
            },
            "vision_config": QWEN_TOWER,
        },
        ["model.visual"],
    ),
    "Llama4": (
        {
            "text_config": TEXT | {"intermediate_size_mlp": 128, "num_local_experts": 2, "no_rope_layers": [1, 1]},
            "vision_config": TOWER | {
                "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
            },
        },
        ["vision_model", "multi_modal_projector"],
    ),
    "Mllama": (
        {
            "text_config": TEXT | {"cross_attention_layers": [1]},
            "vision_config": TOWER | {
                "num_global_layers": 1, "attention_heads": 2, "vision_output_dim": 64,
                "intermediate_layers_indices": [0],
            },
        },
        ["model.vision_model", "model.multi_modal_projector", "model.language_model.layers.1"],
    ),
}  # fmt: skip


def model_with_towers(name: str):
    """Make a random model of the class that checkpoints of this family are published as."""
    import torch
    import transformers

    from forgebook.models.load import auto_class

    torch.manual_seed(0)
    published = f"{name}ForConditionalGeneration"
    config = getattr(transformers, f"{name}Config")(**WITH_TOWERS[name][0], architectures=[published])
    model = auto_class(config).from_config(config)
    assert type(model).__name__ == published
    return model


def save_gemma3(folder: Path) -> str:
    """Save a random Gemma 3 with the tiny model's tokenizer."""
    from transformers import AutoTokenizer

    from conftest import TINY_MODEL

    model_with_towers("Gemma3").save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(folder)
    return str(folder)
