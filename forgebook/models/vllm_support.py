"""What vLLM can load: told from a config, without vLLM or torch."""

from __future__ import annotations

import re
from typing import Any

from forgebook.catalog import read_catalog

__all__ = ["VLLM_RANK", "vllm_loads", "vllm_serves"]

# The largest rank that vLLM's max_lora_rank takes.
VLLM_RANK = 512


def vllm_loads(model_config: dict[str, Any]) -> str:
    """Say whether vLLM can load a whole model with this config.json: "yes" or "perhaps: why"."""
    names = model_config.get("architectures") or ["an architecture without a name"]
    native = {family.architecture for family in read_catalog().families.values() if family.vllm}
    if native.intersection(names):
        return "yes"
    return f"perhaps: {names[0]} is not among those known here to run natively; vLLM tries transformers' own code"


def vllm_serves(lora_config: dict[str, Any]) -> str:
    """Say whether vLLM can load an adapter of these settings on top of its base: "yes" or "no: why"."""
    targets = lora_config.get("target_modules") or []
    ends = ("embed_tokens", "lm_head")
    if isinstance(targets, str):  # a pattern over whole names; all-linear leaves the output layer out
        names = {"lm_head": ("lm_head",), "embed_tokens": ("embed_tokens", "model.embed_tokens")}
        reached = [end for end in ends if targets != "all-linear" and any(re.fullmatch(targets, n) for n in names[end])]
    else:
        reached = [end for end in ends if any(name.split(".")[-1] == end for name in targets)]
    reasons = [f"target_modules include {', '.join(reached)}"] * bool(reached)
    if lora_config.get("modules_to_save"):
        reasons.append(f"modules_to_save include {', '.join(lora_config['modules_to_save'])}")
    reasons += [f"{key} is set" for key in ("use_dora", "lora_bias", "trainable_token_indices") if lora_config.get(key)]
    if lora_config.get("bias", "none") != "none":
        reasons.append(f"bias is {lora_config['bias']}")
    starts_from_base = str(lora_config.get("init_lora_weights")).startswith("pissa")
    rank = max([lora_config.get("r", 8), *(lora_config.get("rank_pattern") or {}).values()]) * (1 + starts_from_base)
    if rank > VLLM_RANK:
        reasons.append(f"its rank is {rank}, above {VLLM_RANK}")
    return f"no: {'; '.join(reasons)}" if reasons else "yes"
