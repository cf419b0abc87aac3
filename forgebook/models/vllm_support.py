"""What vLLM can load, judged without vLLM: from a config, or a saved adapter; which inference engine answers."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgebook.catalog import read_catalog
from forgebook.errors import ConfigError, ForgebookError
from forgebook.models.adapter_names import saved_names, unserved_layers
from forgebook.models.adapters import read_lora_config
from forgebook.runs.atomic import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "choose_engine",
    "runs_eagerly",
    "unserved_settings",
    "vllm_ignores",
    "vllm_loads",
    "vllm_max_rank",
    "vllm_serves",
    "vllm_serves_saved",
]

# What a generation_config.json may do to answers in transformers and not in vLLM; the values that do nothing.
UNSERVED_SETTINGS: dict[str, tuple] = {
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length"), (0,)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"), ([], {})),
    **dict.fromkeys(("exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id"), ()),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale"), (1,)),
    "watermarking_config": (),
}
# The values that vLLM's max_lora_rank takes.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def vllm_loads(model_config: dict[str, Any]) -> str:
    """Report whether vLLM can load a whole model with this config.json: "yes" or "perhaps: why"."""
    names = model_config.get("architectures") or ["an architecture without a name"]
    native = {family.architecture for family in read_catalog().families.values() if family.vllm}
    if native.intersection(names):
        return "yes"
    return f"perhaps: {names[0]} is not among those known here to run natively; vLLM tries transformers' own code"


def vllm_serves_saved(folder: str | Path, base: PreTrainedModel | None = None) -> str:
    """Report whether vLLM can load a saved adapter on top of its base: "yes" or "no: why".

    base: the base model, if it is in memory.
    """
    lora_config = read_lora_config(folder) or {}
    file = Path(folder) / "adapter_model.safetensors"
    names = saved_names(file) if file.exists() else []
    return vllm_serves(lora_config, names, lora_config.get("base_model_name_or_path"), base)


def vllm_serves(
    lora_config: dict[str, Any],
    names: Iterable[str] = (),
    source: str | None = None,
    base: PreTrainedModel | None = None,
) -> str:
    """Report whether vLLM can load an adapter of these settings on top of its base: "yes" or "no: why".

    names: of its tensors, to be compared with those of the base's weights at `source`. base: that model, if it is in
    memory.
    """
    targets = lora_config.get("target_modules") or []
    ends = ("embed_tokens", "lm_head")
    if isinstance(targets, str):  # a pattern over whole names; all-linear leaves the output layer out
        wholes = {"lm_head": ("lm_head",), "embed_tokens": ("embed_tokens", "model.embed_tokens")}
        reached = [
            end for end in ends if targets != "all-linear" and any(re.fullmatch(targets, n) for n in wholes[end])
        ]
    else:
        reached = [end for end in ends if any(name.split(".")[-1] == end for name in targets)]
    reasons = [f"target_modules include {', '.join(reached)}"] * bool(reached)
    if lora_config.get("modules_to_save"):
        reasons.append(f"modules_to_save include {', '.join(lora_config['modules_to_save'])}")
    reasons += [f"{key} is set" for key in ("use_dora", "lora_bias", "trainable_token_indices") if lora_config.get(key)]
    if lora_config.get("bias", "none") != "none":
        reasons.append(f"bias is {lora_config['bias']}")
    starts_from_base = str(lora_config.get("init_lora_weights")).startswith("pissa")
    rank = _largest_rank(lora_config) * (1 + starts_from_base)
    if rank > VLLM_RANKS[-1]:
        reasons.append(f"its rank is {rank}, above {VLLM_RANKS[-1]}")
    if source is not None and not reasons and (unserved := _unserved(names, source, base)):
        reasons.append(unserved)
    return f"no: {'; '.join(reasons)}" if reasons else "yes"


def _unserved(names: Iterable[str], source: str, base: PreTrainedModel | None) -> str | None:
    try:
        return unserved_layers(names, source, base)
    except ForgebookError:  # the base is not here any more
        return None


def unserved_settings(settings: Mapping[str, Any], is_server: bool = False) -> list[str]:
    """List what a generation config does to answers in transformers and neither in vLLM nor in Ollama.

    is_server: also what vLLM leaves to each request.
    """
    idle = UNSERVED_SETTINGS | ({"min_new_tokens": (0,)} if is_server else {})
    return [name for name, values in idle.items() if settings.get(name) is not None and settings[name] not in values]


def vllm_ignores(folder: str | Path, is_server: bool = False) -> str:
    """Say what of a saved model's generation_config.json vLLM does not apply; empty if it applies all."""
    path = Path(folder) / "generation_config.json"
    names = unserved_settings(read_json(path), is_server) if path.exists() else []
    return f"its generation_config.json sets {', '.join(names)}, which vLLM does not apply" if names else ""


def vllm_max_rank(lora_configs: list[dict[str, Any]]) -> int:
    """Return the smallest max_lora_rank with which vLLM takes all these adapters."""
    rank = max(map(_largest_rank, lora_configs))
    return next(allowed for allowed in VLLM_RANKS if allowed >= rank)


def _largest_rank(lora_config: dict[str, Any]) -> int:
    return max([lora_config.get("r", 8), *(lora_config.get("rank_pattern") or {}).values()])


def choose_engine(requested: str, find_obstacle: Callable[[], str | None], is_worth_it: bool = True) -> str:
    """Choose what generates, "transformers" or "vllm"; auto takes vLLM where it is worth starting and can load it all.

    find_obstacle: called if vLLM is installed and a candidate; why it cannot load the model, None if it can.

    Raises ConfigError for an unknown engine, and for engine=vllm where vLLM is missing or cannot.
    """
    if requested not in ("auto", "transformers", "vllm"):
        raise ConfigError(f"engine must be auto, transformers or vllm, got {requested!r}")
    if requested == "transformers" or (requested == "auto" and not is_worth_it):
        return "transformers"
    is_installed = importlib.util.find_spec("vllm") is not None
    obstacle = find_obstacle() if is_installed else "it is not installed (pip install vllm; requirements-gpu.txt)"
    if obstacle and requested == "vllm":
        raise ConfigError(f"engine=vllm: vLLM cannot load this: {obstacle}; use engine=transformers")
    return "transformers" if obstacle else "vllm"


def runs_eagerly() -> bool:
    """Report whether vLLM is to skip compilation here: without a GPU that takes minutes."""
    import torch

    return not torch.cuda.is_available()
