"""A training step with LoRA on all linear layers: fused products against PEFT's own forward pass, side by side.

    PYTHONPATH=. python benchmarks/lora/run.py          -> results.json

Llama shapes with random weights on one thread of a CPU, float32, rank 16, all tokens in the loss. Steps take turns
in one process; processor time, median of 9, without the first. Memory: the most that tensors held at a time during a
step beyond what stays between steps.
"""

import json
import platform
import statistics
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.tensors import step_peak
from forgebook.models.fused_lora import use_fused_products
from forgebook.training.losses import SupervisedLM

SHAPES = {
    "the tiny model, 8 x 100 tokens": ((256, 512, 4, 4, 2), (8, 100)),
    "hidden 576, 8 of 30 layers of SmolLM2-135M, 4 x 128 tokens": ((576, 1536, 8, 9, 3), (4, 128)),
}


def make(shape: tuple[int, ...], is_fused: bool) -> SupervisedLM:
    """Make the same model, with the adapter run by either."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    torch.manual_seed(0)
    config = LlamaConfig(**dict(zip(names, shape, strict=True)), vocab_size=2048, pad_token_id=0)
    settings = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_config(config), settings)
    if is_fused:
        use_fused_products(model)
    return SupervisedLM(model)


def step(wrapped: SupervisedLM, size: tuple[int, int]) -> float:
    """Compute loss and gradients of one batch; return the seconds of the processor."""
    ids = torch.arange(size[0] * size[1]).reshape(size)
    wrapped.zero_grad()
    began = time.process_time()
    wrapped(ids, ids.roll(-1, 1)).backward()
    return time.process_time() - began


def main() -> None:
    """Measure both on each shape."""
    torch.set_num_threads(1)
    results: dict[str, object] = {}
    for name, (shape, size) in SHAPES.items():
        models = {"peft": make(shape, is_fused=False), "fused": make(shape, is_fused=True)}
        seconds: dict[str, list[float]] = {kind: [] for kind in models}
        for _ in range(10):
            for kind, model in models.items():
                seconds[kind].append(step(model, size))
        medians = {kind: statistics.median(values[1:]) for kind, values in seconds.items()}
        results[name] = {
            "milliseconds": {kind: round(1000 * value, 1) for kind, value in medians.items()},
            "ratio": round(medians["peft"] / medians["fused"], 3),
            "peak_megabytes": {
                kind: round(step_peak(partial(step, model, size)) / 1e6, 1) for kind, model in models.items()
            },
        }
    results["environment"] = {"machine": platform.machine(), **{n: version(n) for n in ("torch", "peft")}}
    Path(__file__).with_name("results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
