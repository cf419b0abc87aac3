"""Names that LLMForge's config files used over the years, and what they are called now."""

import json
import math
import re
from collections.abc import Callable
from typing import Any

__all__ = ["RetiredNameWarning", "current_deepspeed_file", "retired_keys", "translate_retired"]


class RetiredNameWarning(UserWarning):
    """A config uses a retired name; the message shows the current form."""


# DeepSpeed files that early trees kept per model or size (zero_3_llama_2_7b, zero_3_70b, zero_2_8b), and the shipped
# one with the nearest settings: all of stage 3 offloaded.
_SIZED_FILE = re.compile(r"(zero_[123])_(\w+_)?\d+(\.\d+|x\d+)?b\.json", re.IGNORECASE)
_OFFLOADED = "zero_3_offload_optim+param.json"

_FREQUENCY = "checkpoint_and_evaluation_frequency"

# A value of the wrong type passes unchanged, so that the schema rejects it under its new name.
_RENAMED = {
    "checkpoint_every_n_epochs": (_FREQUENCY, lambda n: {"unit": "epochs", "frequency": n}),
    "eval_path": ("valid_path", lambda path: path),
    "flash_attention_2": ("attention", lambda on: ("auto" if on else "sdpa") if isinstance(on, bool) else on),
    "min_num_update_steps": ("min_update_steps", lambda n: n),
    "model_tag": ("custom_model_tag", lambda tag: tag),
    "no_gradient_checkpoint": (
        "gradient_checkpointing",
        lambda off: not off if isinstance(off, bool) else off,
    ),
    "num_data_blocks": ("num_data_blocks_per_device", lambda n: n),
}

_IGNORED = {
    "dataset_size_scaling_factor": "data sets no longer have a size limit",
    "forward_checkpoint_config": "every fine-tuned model is listed; name it with custom_model_tag",
    "output_dir": "it was scratch space on one machine; storage_path sets where runs are stored",
}


def retired_keys() -> dict[str, str]:
    """List the retired keys of the top level, each with what it is read as or why it is ignored."""
    renamed = {old: f"read as {new}" for old, (new, _) in _RENAMED.items()}
    ignored = {old: f"ignored: {reason}" for old, reason in _IGNORED.items()}
    return renamed | ignored | {"max_num_checkpoints": f"read as {_FREQUENCY} where num_epochs is set"}


def current_deepspeed_file(name: str) -> str:
    """Return today's name of a DeepSpeed file of an early tree; any other name as it is."""
    sized = _SIZED_FILE.fullmatch(name)
    stage = sized[1].lower() if sized else ""
    if stage == "zero_3" or name == "zero_3_optimizer_parameter_offload.json":
        return _OFFLOADED
    return f"{stage}.json" if stage else name


def translate_retired(values: dict[str, Any], num_epochs: object = None) -> tuple[list[str], list[str]]:
    """Rename retired keys in place; return a note on each, and the contradictions with keys of the new names."""
    notes, problems = [], []

    def rename(block: dict[str, Any], old: str, new: str, convert: Callable[[Any], Any]) -> None:
        value = block.pop(old, None)
        if value is None:
            return
        if block.get(new) is not None:
            problems.append(f"{old} and {new} are both set: {old} is the retired name; keep only {new}")
            return
        block[new] = convert(value)
        notes.append(f"{old} is retired: read as {new}: {json.dumps(block[new], default=str, skipkeys=True)}")

    def ignore(old: str, reason: str) -> None:
        if values.pop(old, None) is not None:
            notes.append(f"{old} is retired and ignored: {reason}")

    # A number of checkpoints can be spread over the epochs, if their number is known before the data is read.
    count, epochs = values.get("max_num_checkpoints"), values.get("num_epochs", num_epochs)
    if values.get("checkpoint_every_n_epochs") is not None:
        ignore("max_num_checkpoints", "checkpoint_every_n_epochs is set, too, and decides")
    elif type(count) is int and count > 0 and type(epochs) is int:
        spread = {"unit": "epochs", "frequency": math.ceil(epochs / count)}
        rename(values, "max_num_checkpoints", _FREQUENCY, lambda _: spread)
    else:
        ignore("max_num_checkpoints", f"without num_epochs, every epoch ends with one; see {_FREQUENCY}")

    for old, (new, convert) in _RENAMED.items():
        rename(values, old, new, convert)
    for old, reason in _IGNORED.items():
        ignore(old, reason)

    if isinstance(lora := values.get("lora_config"), dict):
        rename(lora, "rank", "r", lambda rank: rank)
    preference = values.get("preference_tuning_config")
    scaling = preference.get("logprob_processor_scaling_config") if isinstance(preference, dict) else None
    if isinstance(scaling, dict):
        rename(scaling, "worker_resources", "custom_resources", lambda resources: resources)
    return notes, problems
