"""Write forgebook/counted_shapes.json: shapes of published models whose parameters follow from no rule of the catalog.

    PYTHONPATH=. python tests/oracles/make_counted_shapes.py

Figures as in each model's config.json; the counts that follow are the published ones (tests/test_catalog.py).
"""

import dataclasses
import json
from pathlib import Path

OUT = Path(__file__).resolve().parents[2] / "forgebook" / "counted_shapes.json"

QWEN3_MOE = {
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128,
    "num_experts_per_tok": 8,
}  # fmt: skip
QWEN3_235B = QWEN3_MOE | {
    "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 94,
    "num_attention_heads": 64,
}  # fmt: skip
GPT_OSS = {
    "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "vocab_size": 201088, "max_position_embeddings": 131072, "num_experts_per_tok": 4, "sliding_window": 128,
}  # fmt: skip
# (ids, model_type, what config.json says)
MODELS = [
    (
        ["Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B-Base"], "qwen3_moe",
        QWEN3_MOE | {"max_position_embeddings": 40960},
    ),
    (
        [f"Qwen/Qwen3-{name}-2507" for name in ("30B-A3B-Instruct", "30B-A3B-Thinking")]
        + ["Qwen/Qwen3-Coder-30B-A3B-Instruct"],
        "qwen3_moe", QWEN3_MOE | {"max_position_embeddings": 262144},
    ),
    (["Qwen/Qwen3-235B-A22B"], "qwen3_moe", QWEN3_235B | {"max_position_embeddings": 40960}),
    (["openai/gpt-oss-20b"], "gpt_oss", GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32}),
    (["openai/gpt-oss-120b"], "gpt_oss", GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128}),
    (
        ["HuggingFaceTB/SmolLM3-3B"], "smollm3",
        {
            "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 4, "vocab_size": 128256, "tie_word_embeddings": True,
            "max_position_embeddings": 65536,
        },
    ),
    (
        ["allenai/Olmo-3-7B-Instruct", "allenai/Olmo-3-7B-Think", "allenai/Olmo-3-1025-7B"], "olmo3",
        {
            "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 32, "vocab_size": 100278, "max_position_embeddings": 65536,
        },
    ),
    (
        ["zai-org/GLM-4-9B-0414"], "glm4",
        {
            "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40, "num_attention_heads": 32,
            "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 151552, "attention_bias": True,
            "max_position_embeddings": 32768,
        },
    ),
    (
        ["LiquidAI/LFM2-1.2B"], "lfm2",
        {
            "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
            "vocab_size": 65536, "block_dim": 2048, "block_ff_dim": 12288, "block_auto_adjust_ff_dim": True,
            "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256, "max_position_embeddings": 128000,
            "layer_types": [
                "full_attention" if layer in (2, 5, 8, 10, 12, 14) else "conv" for layer in range(16)
            ],
        },
    ),
    (
        ["ibm-granite/granite-3.3-8b-instruct"], "granite",
        {
            "hidden_size": 4096, "intermediate_size": 12800, "num_hidden_layers": 40, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 49159, "tie_word_embeddings": True,
            "max_position_embeddings": 131072,
        },
    ),
]  # fmt: skip


def main() -> None:
    """Count each model on its class, without weights."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from forgebook.models.shapes import count_shape

    entries = []
    for ids, kind, settings in MODELS:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings, pad_token_id=None))
        shape = count_shape(model)
        print(f"{ids[0]}: {shape.parameters:,}, {shape.active_parameters:,} at work on a token")
        entries.append({"ids": ids, "shape": dataclasses.asdict(shape)})
    OUT.write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
