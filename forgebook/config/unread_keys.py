"""Keys that have no effect given the others: a warning is printed if the file or an override sets one.

SUPPORT.md prints the table.
"""

from __future__ import annotations

from forgebook.config.deepspeed_file import read_deepspeed_config, zero_of
from forgebook.config.rules import Rule
from forgebook.config.schema import FinetuneConfig

__all__ = ["UNREAD", "unread_keys"]

UNREAD: tuple[Rule, ...] = (
    *(
        Rule(
            (key,),
            lambda config, zero: config.optimizer == "adafactor",
            f"{key} has no effect with optimizer: adafactor, which has constants of its own",
            "set optimizer: adamw, or remove it",
        )
        for key in ("adam_betas", "adam_epsilon")
    ),
    *(
        Rule(
            (key,),
            lambda config, zero: config.valid_path is None,
            f"{key} has no effect without valid_path",
            "set valid_path, or remove it",
        )
        for key in ("eval_first", "eval_batch_size_per_device")
    ),
    Rule(
        ("fsdp",),
        lambda config, zero: config.sharding != "fsdp",
        "fsdp has no effect without sharding: fsdp",
        "set sharding: fsdp, or remove the block",
    ),
    Rule(
        ("min_update_steps",),
        lambda config, zero: config.num_epochs is not None,
        "min_update_steps has no effect when num_epochs is set",
        "remove one of them",
    ),
    *(
        Rule(
            (key,),
            lambda config, zero: config.task == "causal_lm",
            f"{key} has no effect in task: causal_lm, whose loss covers every token",
            "set task: instruction_tuning, or remove it",
        )
        for key in ("train_on", "rewritten_turns")
    ),
    *(
        Rule(
            (key,),
            lambda config, zero: config.num_devices == 0,
            f"{key} has no effect with num_devices: 0, which runs without Ray",
            "set num_devices, or remove it",
        )
        for key in ("address", "worker_resources", "trainer_resources", "max_failures")
    ),
    Rule(
        ("min_lr_ratio",),
        lambda config, zero: config.lr_scheduler_type == "constant",
        "min_lr_ratio has no effect with lr_scheduler_type: constant",
        "set another lr_scheduler_type, or remove it",
    ),
    Rule(
        ("lr_decay_ratio",),
        lambda config, zero: config.lr_scheduler_type != "wsd",
        "lr_decay_ratio has no effect without lr_scheduler_type: wsd",
        "set lr_scheduler_type: wsd, or remove it",
    ),
    Rule(
        ("decay_norms_and_biases",),
        lambda config, zero: config.weight_decay == 0,
        "decay_norms_and_biases has no effect without weight_decay",
        "set weight_decay, or remove it",
    ),
    Rule(
        ("tf32",),
        lambda config, zero: config.tf32 and config.dtype != "float32",
        "tf32 has no effect with dtype: bfloat16",
        "set dtype: float32, or remove it",
    ),
    Rule(
        ("liger_kernel",),
        lambda config, zero: bool(config.liger_kernel.kwargs) and config.liger_kernel.enabled is False,
        "liger_kernel.kwargs has no effect while liger_kernel.enabled is false",
        "set enabled: true, or remove the block",
    ),
    Rule(
        ("preference_tuning_config",),
        lambda config, zero: (
            (block := config.preference_tuning_config) is not None and block.label_smoothing > 0 and block.loss != "dpo"
        ),
        "preference_tuning_config.label_smoothing has no effect on a loss other than dpo",
        "set loss: dpo, or remove it",
    ),
    Rule(
        ("num_data_blocks_per_device",),
        lambda config, zero: (
            (block := config.preference_tuning_config) is None or block.logprob_processor_scaling_config is None
        ),
        "num_data_blocks_per_device has no effect without separate log-probability workers",
        "set preference_tuning_config.logprob_processor_scaling_config, or remove it",
    ),
)


def unread_keys(config: FinetuneConfig) -> list[str]:
    """List a warning for each key that the file or an override sets and nothing reads."""
    zero = zero_of(read_deepspeed_config(config.deepspeed, config.source))
    return [str(rule) for rule in UNREAD if rule.keys[0] in config.explicit_keys and rule.is_broken(config, zero)]
