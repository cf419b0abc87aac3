"""The arguments of peft.LoraConfig that a `lora_config` may hold: their names, and the values that they can have.

problems = lora_problems({"r": 8, "target_modules": ["q_proj"]})    one text per wrong key or value
lora_schema()                                                       the same as a JSON schema, for editors
"""

import re
from collections.abc import Callable
from typing import Any

from forgebook.errors import near_miss, shown_value

__all__ = ["LORA_KEYS", "lora_problems", "lora_schema"]

# The constructor arguments, written out so that a typo is found without importing peft (which imports torch); a test
# compares them with the installed peft.
LORA_KEYS = frozenset(
    """
    alora_invocation_tokens alpha_pattern arrow_config auto_mapping base_model_name_or_path bias corda_config
    ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights kasa_config
    layer_replication layers_pattern layers_to_transform loftq_config lora_alpha lora_bias lora_dropout lora_ga_config
    megatron_config megatron_core modules_to_save monteclora_config peft_type peft_version qalora_group_size r
    rank_pattern revision runtime_config target_modules target_parameters task_type trainable_token_indices
    use_bdlora use_dora use_qalora use_rslora velora_config
    """.split()
)
# Initializations of an adapter that leave the base weights unchanged, and PiSSA, whose checkpoints are converted.
_ADAPTER_INITS = re.compile(r"gaussian|orthogonal|pissa(_niter_\d+)?")
_HIGHEST_RANK = 65_536  # no layer is wider


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return _is_whole(value) and 1 <= value <= _HIGHEST_RANK


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**63


def _is_dropout(value: Any) -> bool:
    return (_is_whole(value) or isinstance(value, float)) and 0 <= value < 1


def _is_list(of: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, list) and all(map(of, value))


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except (re.error, OverflowError, RecursionError):
        return False


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_targets(value: Any) -> bool:
    return value == "all-linear" or _is_pattern(value) or _is_list(_is_name, value)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _by_pattern(of: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, dict) and all(_is_pattern(key) and of(item) for key, item in value.items())


def _is_initialization(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and _ADAPTER_INITS.fullmatch(value) is not None)


_A_RANK = f"a whole number from 1 to {_HIGHEST_RANK:,}"
_TARGETS = "all-linear, a list of names, or a regular expression that matches whole names"
_NAMES = "a list of names"
# What the plan, the rules and the checks of a run read; the rest is checked by PEFT. Of each: its check, what it must
# be, and its types in JSON.
_VALUES: dict[str, tuple[Callable[[Any], bool], str, tuple[str, ...]]] = {
    "r": (_is_rank, _A_RANK, ("integer",)),
    "lora_alpha": (_is_amount, "a number above 0", ("number",)),
    "lora_dropout": (_is_dropout, "a number from 0 to below 1", ("number",)),
    "target_modules": (_is_targets, _TARGETS, ("string", "array")),
    "exclude_modules": (_is_targets, _TARGETS, ("string", "array")),
    "target_parameters": (lambda value: _is_list(_is_name, value), _NAMES, ("array",)),
    "modules_to_save": (lambda value: _is_list(_is_name, value), _NAMES, ("array",)),
    "layers_to_transform": (
        lambda value: _is_whole(value) or _is_list(_is_whole, value),
        "the number of a layer, or a list of them",
        ("integer", "array"),
    ),
    "rank_pattern": (
        lambda value: _by_pattern(_is_rank, value),
        f"a block of names or patterns, each with {_A_RANK}",
        ("object",),
    ),
    "alpha_pattern": (
        lambda value: _by_pattern(_is_amount, value),
        "a block of names or patterns, each with a number above 0",
        ("object",),
    ),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only", ("string",)),
    **dict.fromkeys(
        ("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "inference_mode"),
        (_is_switch, "true or false", ("boolean",)),
    ),
    "init_lora_weights": (
        _is_initialization,
        "true, gaussian, orthogonal, pissa or pissa_niter_16: the others need data, train one matrix of the two, or "
        "change the base model so that a saved adapter would not fit it",
        ("boolean", "string"),
    ),
}


def lora_problems(block: dict[str, Any]) -> list[str]:
    """List what is wrong with a `lora_config`; a null stands for PEFT's default."""
    problems = [f"unknown key {key!r}{near_miss(key, LORA_KEYS)}" for key in block if key not in LORA_KEYS]
    for key, (is_valid, expected, _) in _VALUES.items():
        if (value := block.get(key)) is not None and not is_valid(value):
            problems.append(f"{key}: got {shown_value(value)}, must be {expected}")
    return problems


def lora_schema() -> dict[str, Any]:
    """Describe the block as a JSON schema."""
    properties: dict[str, Any] = {key: {} for key in sorted(LORA_KEYS)}
    for key, (_, expected, types) in _VALUES.items():
        properties[key] = {"type": [*types, "null"], "description": f"{expected[0].upper()}{expected[1:]}."}
    return {"type": "object", "properties": properties, "additionalProperties": False}
