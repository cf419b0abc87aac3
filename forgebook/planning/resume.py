"""A run that is resumed with an edited config: what may change, what that means, and why the rest may not.

for text in resume_changes(earlier, config, step=120, steps_per_epoch=40): print(text)

What may change leaves the curve before the step true: the same weights, examples and losses would have come of it.
"""

from __future__ import annotations

from typing import Any

from forgebook.config.parse import config_differences
from forgebook.config.schema import FinetuneConfig, ResolvedConfig
from forgebook.errors import StorageError
from forgebook.planning import schedule

__all__ = ["resume_changes"]

RATE_KEYS = ("learning_rate", "lr_scheduler_type", "num_warmup_steps", "min_lr_ratio", "lr_decay_ratio")
LENGTH_KEYS = ("num_epochs", "max_steps")
BATCH_KEYS = ("train_batch_size_per_device", "gradient_accumulation_steps", "num_devices", "sequence_parallel")
# These change neither the weights nor the losses.
# `deepspeed` says what a change of `sharding` means, where it means anything: the state of FSDP2 fits DDP, and back.
FREE_KEYS = (
    "checkpoint_and_evaluation_frequency", "save_state_minutes", "min_update_steps", "early_stopping", "sharding",
)  # fmt: skip
# Why another key may not change, by the first part of its name; the rest of them change the loss itself.
_WEIGHTS = "the saved state is of other weights"
_DATA = "the examples, or their tokens, would be others than those trained before"
_OPTIMIZER = "the saved state of the optimizer was made with the other value"
_REASONS = {
    **dict.fromkeys(
        """
        model_id initial_base_model_ckpt_path initial_adapter_model_ckpt_path lora_config quantization dtype
        rope_scaling classifier_config
        """.split(),
        _WEIGHTS,
    ),
    **dict.fromkeys(
        """
        train_path valid_path max_examples task context_length truncation padding train_on rewritten_turns on_bad_rows
        generation_config
        """.split(),
        _DATA,
    ),
    **dict.fromkeys(
        """
        optimizer deepspeed weight_decay decay_norms_and_biases loraplus_lr_ratio adam_betas adam_epsilon
        """.split(),
        _OPTIMIZER,
    ),
    "seed": "the order of the examples would be another, some trained twice and some never",
}
_OTHERWISE = "losses before and after could not be compared"


def resume_changes(
    earlier: FinetuneConfig,
    now: ResolvedConfig,
    step: int,
    steps_per_epoch: int,
    place: str,
    is_complete: bool = False,
    has_checkpoint: bool = False,
) -> list[str]:
    """List what the changed keys of a config mean for a run that is resumed after a step.

    earlier: the run's own config. place: of the run, for a person. is_complete: whether it has taken its last step.
    has_checkpoint: whether it has evaluated and saved the model after this step, and not the training state alone.

    Raises StorageError for a change that cannot be resumed with, with the reason.
    """
    keys = config_differences(earlier, now)
    if not keys:
        return []
    before = earlier.resolved()
    _refuse(before, now, keys, place)
    last = [schedule.total_steps(one.num_epochs, steps_per_epoch, one.max_steps) for one in (before, now)]
    is_longer = any(key.split(".")[0] in (*LENGTH_KEYS, "early_stopping") for key in keys)
    if is_complete and (last[1] <= step or not is_longer):
        raise StorageError(
            f"{place} is complete, so {', '.join(keys)} would change nothing of it: set more num_epochs or max_steps, "
            "choose another run_name, or on_existing=overwrite"
        )
    if last[1] < step or (last[0] != last[1] == step and not has_checkpoint):
        also = ", whose model is not saved" if last[1] == step else ""
        raise StorageError(
            f"{place} has trained {step} steps, and {', '.join(k for k in keys if k in LENGTH_KEYS)} would end it at "
            f"step {last[1]}{also}: set more, or choose another run_name"
        )
    texts = [f"{key}: {_written(before, key)} -> {_written(now, key)}" for key in keys]
    meaning = [f"resumes after step {step}"] if step else ["starts again: no step is saved"]
    if last[0] != last[1]:
        meaning.append(f"ends at step {last[1]} instead of {last[0]}; the schedule of the learning rate is the new one")
    if step and any(key in RATE_KEYS for key in keys):
        meaning.append("the learning rate of the new schedule counts from the next step on")
    if any(key in BATCH_KEYS for key in keys):
        meaning.append(
            f"a step still has the same {now.global_batch_size} examples; sums are rounded in another order, and "
            "dropout is another"
        )
    if any(key.split(".")[0] == "checkpoint_and_evaluation_frequency" for key in keys):
        meaning.append("evaluations and checkpoints of earlier steps stay")
    return [f"changed: {'; '.join(texts)}", *meaning]


def _refuse(before: ResolvedConfig, now: ResolvedConfig, keys: list[str], place: str) -> None:
    """Raise StorageError for changes that would make the run's curve untrue."""
    may_change = (*RATE_KEYS, *LENGTH_KEYS, *BATCH_KEYS, *FREE_KEYS)
    refused = [key for key in keys if key.split(".")[0] not in may_change]
    reasons = {key: _REASONS.get(key.split(".")[0], _OTHERWISE) for key in refused}
    if before.global_batch_size != now.global_batch_size:
        sizes = f"{before.global_batch_size} to {now.global_batch_size}"
        why = f"the examples of an optimizer step would change from {sizes}, and with them the steps of an epoch"
        reasons |= {key: why for key in keys if key in BATCH_KEYS}
    elif "num_devices" in keys and now.deepspeed is not None and max(1, before.num_devices) != max(1, now.num_devices):
        reasons["num_devices"] = "DeepSpeed's saved state is divided among the workers that saved it"
    if reasons:
        texts = "; ".join(f"{key}: {reason} (it was {_written(before, key)})" for key, reason in reasons.items())
        raise StorageError(
            f"{place} holds a run with another config ({', '.join(reasons)}): {texts}. Choose another run_name, or "
            "on_existing=overwrite"
        )


def _written(config: ResolvedConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else value
