"""LoRA on all experts of a small mixture: products of low rank against PEFT's own way, side by side.

    PYTHONPATH=. python benchmarks/experts/run.py          -> results.json

Qwen3 MoE of 2 layers with 32 experts of 512 x 512, 4 at work on a token; random weights, float32 on the CPU, 2 x 128
tokens, all in the loss, rank 8, no gradient checkpointing. Steps of both alternate in one process; the median of 5
counts, without the first. Memory: the most that tensors held at a time during a step beyond what stays between steps.
"""

import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from benchmarks.tensors import step_peak
from forgebook.models.expert_adapters import use_low_rank_products
from forgebook.training.losses import SupervisedLM

CONFIG = {
    "hidden_size": 512, "intermediate_size": 512, "moe_intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 2048, "num_experts": 32,
    "num_experts_per_tok": 4, "pad_token_id": 0,
}  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(ours: bool) -> SupervisedLM:
    """Make the same model, with the adapter run by either."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**CONFIG))
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=TARGETS))
    if ours:
        use_low_rank_products(model)
    return SupervisedLM(model)


def step(wrapped: SupervisedLM) -> float:
    """Compute loss and gradients of one batch; return the seconds."""
    ids = torch.arange(256).reshape(2, 128)
    wrapped.zero_grad()
    began = time.perf_counter()
    wrapped(ids, ids.roll(-1, 1)).backward()
    return time.perf_counter() - began


def main() -> None:
    """Measure both."""
    models = {"peft": make(ours=False), "ours": make(ours=True)}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(6):
        for name, model in models.items():
            seconds[name].append(step(model))
    results = {
        name: {"seconds": round(statistics.median(seconds[name][1:]), 4), "peak_bytes": step_peak(partial(step, model))}
        for name, model in models.items()
    }
    results["experts_bytes"] = sum(p.numel() * 4 for p in models["ours"].parameters() if p.dim() == 3)
    results["torch_threads"] = torch.get_num_threads()
    Path(__file__).with_name("results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
