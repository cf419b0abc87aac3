"""Combinations of keys that do not work, in one table: checked by loading, planning, --default and launching.

    check_rules(config)             ConfigError names every broken rule, and the fix
    if not broken_rules(config):    a change that the plan may propose

SUPPORT.md prints the table. What a machine lacks (a package, a GPU) is not here but in `training.kernels`.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from forgebook.config.block_keys import marked_keys
from forgebook.config.blocks import TASK_OF_BLOCK, DeepSpeed, Mark
from forgebook.config.deepspeed_file import Zero, read_deepspeed_config, zero_of
from forgebook.config.image_limits import IMAGE_LIMITS
from forgebook.config.schema import FinetuneConfig
from forgebook.errors import ConfigError

__all__ = ["RULES", "Rule", "auto_keys", "broken_rules", "check_rules", "open_keys"]


@dataclass(frozen=True)
class Rule:
    """A combination that cannot be trained. keys: those that take part; an error points at the first one written."""

    keys: tuple[str, ...]
    is_broken: Callable[[FinetuneConfig, Zero], bool]
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.message}: {self.fix}"


_WITHOUT_ZERO_3 = "set deepspeed: zero_2 or none"
_WITHOUT_FSDP = "set sharding: zero_2 or none"


def _is_pissa(lora_config: dict[str, Any] | None) -> bool:
    return str((lora_config or {}).get("init_lora_weights")).startswith("pissa")


def _agree(sharding: str, deepspeed: DeepSpeed | None) -> bool:
    """Return whether a DeepSpeed file is the one that `sharding` stands for."""
    file = None if deepspeed is None else PurePosixPath(deepspeed.config_path).stem
    return file == (None if sharding in ("none", "fsdp") else sharding)


def _fsdp_rule(key: str, is_broken: Callable[[FinetuneConfig], bool], message: str, fix: str = _WITHOUT_FSDP) -> Rule:
    return Rule((key, "sharding"), lambda config, zero: config.sharding == "fsdp" and is_broken(config), message, fix)


def _sequence_rule(
    key: str, is_broken: Callable[[FinetuneConfig], bool], message: str, fix: str = "set sequence_parallel: 1"
) -> Rule:
    return Rule(
        ("sequence_parallel", key),
        lambda config, zero: config.sequence_parallel > 1 and is_broken(config),
        f"sequence_parallel {message}",
        fix,
    )


def _task_rule(block: str, task: str) -> Rule:
    return Rule(
        (block, "task"),
        lambda config, zero: getattr(config, block) is not None and config.task != task,
        f"{block} sets task: {task}, which contradicts the config's task",
        "remove one of them",
    )


def _image_rule(key: str, is_broken: Callable[[FinetuneConfig], bool], message: str, fix: str) -> Rule:
    return Rule(
        ("vision_language_config", key),
        lambda config, zero: config.vision_language_config is not None and is_broken(config),
        message,
        fix,
    )


RULES: tuple[Rule, ...] = (
    # Tasks
    *(_task_rule(block, task) for block, task in TASK_OF_BLOCK.items()),
    *(_image_rule(*limit) for limit in IMAGE_LIMITS),
    Rule(
        ("task",),
        lambda config, zero: config.task == "classification" and config.classifier_config is None,
        "task: classification needs classifier_config",
        "add classifier_config with its label_tokens",
    ),
    Rule(
        ("padding", "task", "preference_tuning_config"),
        lambda config, zero: config.task == "preference_tuning" and config.padding == "packed",
        "padding: packed cannot pack the pairs of preference_tuning",
        "set padding: longest",
    ),
    # LoRA and quantization
    Rule(
        ("initial_adapter_model_ckpt_path", "lora_config"),
        lambda config, zero: config.initial_adapter_model_ckpt_path is not None and not config.is_lora,
        "initial_adapter_model_ckpt_path continues a LoRA adapter and needs lora_config",
        "add lora_config",
    ),
    Rule(
        ("quantization", "lora_config"),
        lambda config, zero: config.quantization is not None and not config.is_lora,
        "quantization needs lora_config, because quantized weights cannot be trained",
        "add lora_config, or remove quantization",
    ),
    Rule(
        ("lora_config", "quantization"),
        lambda config, zero: _is_pissa(config.lora_config) and config.quantization is not None,
        "init_lora_weights: pissa needs weights that are not quantized",
        "remove quantization, or init_lora_weights",
    ),
    Rule(
        ("lora_config",),
        lambda config, zero: _is_pissa(config.lora_config) and bool((config.lora_config or {}).get("use_dora")),
        "init_lora_weights: pissa with use_dora cannot be saved as an adapter of the unchanged base model",
        "remove one of them",
    ),
    # Sharding
    Rule(
        ("sharding", "deepspeed"),
        lambda config, zero: config.sharding is not None and not _agree(config.sharding, config.deepspeed),
        "sharding and deepspeed both say how devices share the model, and differ",
        "remove one of them",
    ),
    Rule(
        ("min_devices", "deepspeed", "sharding"),
        lambda config, zero: config.min_devices is not None and config.deepspeed is not None,
        "min_devices does not work with DeepSpeed, which shards the training state for a fixed number of workers",
        "set sharding: fsdp or none, or remove min_devices",
    ),
    _fsdp_rule(
        "num_devices",
        lambda config: config.num_devices == 0,
        "sharding: fsdp divides a model among workers, and num_devices: 0 starts none",
        "set num_devices: 1 or more, or sharding: none",
    ),
    _fsdp_rule(
        "quantization",
        lambda config: config.quantization is not None,
        "quantization does not work with sharding: fsdp, which cannot divide bitsandbytes' packed weights",
    ),
    _fsdp_rule(
        "lora_config",
        lambda config: _is_pissa(config.lora_config),
        "init_lora_weights: pissa does not work with sharding: fsdp, which divides the initial weights its checkpoints "
        "need",
    ),
    _fsdp_rule(
        "optimizer",
        lambda config: config.optimizer != "adamw",
        "only optimizer: adamw works with sharding: fsdp: muon and adafactor need whole matrices, and blocks of 8-bit "
        "moments fit one number of workers",
        "set optimizer: adamw, or sharding: none",
    ),
    _fsdp_rule(
        "gradient_checkpointing",
        lambda config: config.gradient_checkpointing == "offload",
        "gradient_checkpointing: offload is not supported with sharding: fsdp",
        "set gradient_checkpointing: true, or sharding: zero_2 or none",
    ),
    _fsdp_rule(
        "torch_compile",
        lambda config: bool(config.torch_compile),
        "torch_compile does not work with sharding: fsdp, which replaces the weights of every layer as it runs",
        "remove it, or set sharding: zero_2 or none",
    ),
    # Tiles
    Rule(
        ("tiled_mlp", "deepspeed"),
        lambda config, zero: config.tiled_mlp and zero.stage == 3,
        "tiled_mlp does not work with ZeRO-3, whose workers would gather weights for different numbers of tiles",
        "set sharding: fsdp or zero_2, or remove tiled_mlp",
    ),
    Rule(
        ("tiled_mlp", "torch_compile"),
        lambda config, zero: config.tiled_mlp and bool(config.torch_compile),
        "tiled_mlp does not work with torch_compile, which would compile each number of tiles",
        "remove one of them",
    ),
    Rule(
        ("tiled_mlp", "gradient_checkpointing"),
        lambda config, zero: config.tiled_mlp and config.gradient_checkpointing == "selective",
        "gradient_checkpointing: selective keeps the products that tiled_mlp computes again",
        "set gradient_checkpointing: true, or remove tiled_mlp",
    ),
    # float16
    Rule(
        ("dtype", "deepspeed"),
        lambda config, zero: config.dtype == "float16" and config.deepspeed is not None,
        "dtype: float16 does not work with DeepSpeed: its loss scale is adapted in plain and DDP training only",
        "set deepspeed: none, or dtype: bfloat16 or float32",
    ),
    _fsdp_rule(
        "dtype",
        lambda config: config.dtype == "float16",
        "dtype: float16 does not work with sharding: fsdp: its loss scale is adapted in plain and DDP training only",
        "set sharding: none, or dtype: bfloat16 or float32",
    ),
    Rule(
        ("dtype", "optimizer"),
        lambda config, zero: config.dtype == "float16" and config.optimizer != "adamw",
        "only optimizer: adamw works with dtype: float16: the others cannot skip a step whose gradients overflow",
        "set optimizer: adamw, or dtype: bfloat16 or float32",
    ),
    # Sequence parallelism
    _sequence_rule(
        "num_devices",
        lambda config: config.num_devices % config.sequence_parallel > 0 or config.num_devices == 0,
        "divides num_devices into groups of as many workers",
        "set num_devices to a multiple of it",
    ),
    _sequence_rule(
        "deepspeed",
        lambda config: config.deepspeed is not None,
        "does not work with DeepSpeed, which counts examples per worker",
        "set sharding: fsdp or none, or sequence_parallel: 1",
    ),
    _sequence_rule(
        "min_devices",
        lambda config: config.min_devices is not None,
        "does not work with min_devices: a group that loses a worker cannot continue",
        "remove min_devices, or set sequence_parallel: 1",
    ),
    _sequence_rule(
        "task",
        lambda config: (
            config.task not in ("causal_lm", "instruction_tuning", None)
            or any(getattr(config, block) is not None for block in TASK_OF_BLOCK)
        ),
        "works with losses of single tokens of a text, and those of pairs, labels and images need whole examples",
    ),
    _sequence_rule(
        "attention",
        lambda config: config.attention in ("eager", "flex"),
        "exchanges positions for heads around sdpa, varlen or a flash attention",
        "set attention: auto",
    ),
    # DeepSpeed
    Rule(
        ("quantization", "deepspeed"),
        lambda config, zero: config.quantization is not None and zero.stage == 3,
        "quantization does not work with ZeRO-3, which cannot partition bitsandbytes' packed weights",
        _WITHOUT_ZERO_3,
    ),
    Rule(
        ("classifier_config", "lora_config", "deepspeed"),
        lambda config, zero: config.is_lora and config.classifier_config is not None and zero.stage == 3,
        "classification with LoRA trains single rows of the embedding matrix, which PEFT cannot do under ZeRO-3",
        _WITHOUT_ZERO_3,
    ),
    Rule(
        ("lora_config", "deepspeed"),
        lambda config, zero: _is_pissa(config.lora_config) and zero.stage == 3,
        "init_lora_weights: pissa does not work with ZeRO-3, which partitions the initial weights its checkpoints need",
        _WITHOUT_ZERO_3,
    ),
    Rule(
        ("optimizer", "deepspeed"),
        lambda config, zero: config.optimizer.endswith("_8bit") and zero.offload_optimizer,
        "optimizer: adamw_8bit does not work with an offloaded optimizer, which is DeepSpeed's own AdamW on the CPU",
        "set optimizer: adamw, or use a DeepSpeed file without offload_optimizer",
    ),
    Rule(
        ("optimizer", "deepspeed"),
        lambda config, zero: config.optimizer in ("muon", "adafactor") and config.deepspeed is not None,
        "optimizer: muon and adafactor do not work with DeepSpeed, which shards the matrices that they need whole",
        "set deepspeed: none, or optimizer: adamw",
    ),
    Rule(
        ("optimizer", "lora_config"),
        lambda config, zero: config.optimizer == "muon" and config.is_lora,
        "optimizer: muon is for full fine-tuning: an adapter's matrices are factors of the one that it updates",
        "remove lora_config, or set optimizer: adamw",
    ),
    # Options of the run
    Rule(
        ("early_stopping", "valid_path"),
        lambda config, zero: config.early_stopping is not None and config.valid_path is None,
        "early_stopping compares evaluation losses and needs valid_path",
        "set valid_path, such as {split: 0.05}",
    ),
    Rule(
        ("eval_generation", "valid_path"),
        lambda config, zero: config.eval_generation is not None and config.valid_path is None,
        "eval_generation answers validation prompts and needs valid_path",
        "set valid_path, such as {split: 0.05}",
    ),
    Rule(
        ("eval_generation", "task"),
        lambda config, zero: (
            config.eval_generation is not None
            and config.task not in ("instruction_tuning", "preference_tuning", "vision_language")
        ),
        "eval_generation needs examples with answers",
        "set task: instruction_tuning, or remove eval_generation",
    ),
    Rule(
        ("metrics", "eval_generation"),
        lambda config, zero: bool(config.metrics) and config.eval_generation is None,
        "metrics are of generated answers and need eval_generation",
        "set eval_generation, such as {prompts: 50}",
    ),
    Rule(
        ("best_metric", "metrics"),
        lambda config, zero: config.best_metric not in ("eval_loss", *config.metrics),
        "best_metric is not among metrics",
        "add it to metrics",
    ),
    Rule(
        ("best_metric", "eval_generation"),
        lambda config, zero: (
            config.best_metric != "eval_loss" and (block := config.eval_generation) is not None and block.every > 1
        ),
        "best_metric compares all checkpoints, and eval_generation.every leaves some without a metric",
        "set every: 1",
    ),
    Rule(
        ("loraplus_lr_ratio", "lora_config"),
        lambda config, zero: config.loraplus_lr_ratio is not None and not config.is_lora,
        "loraplus_lr_ratio is of the matrices of an adapter and needs lora_config",
        "add lora_config, or remove it",
    ),
)


@cache
def auto_keys() -> tuple[str, ...]:
    """List the dotted keys that --default may choose."""
    return tuple(marked_keys(FinetuneConfig, Mark.AUTO))


def open_keys(config: FinetuneConfig) -> set[str]:
    """List the keys that --default may choose because neither the file nor an override sets them."""
    return {key for key in auto_keys() if key.split(".")[0] not in config.explicit_keys}


def broken_rules(config: FinetuneConfig, undecided: Collection[str] = ()) -> list[Rule]:
    """List the rules that a config breaks, except those with a key that is still to be chosen.

    Raises ConfigError if the DeepSpeed file cannot be read.
    """
    zero = zero_of(read_deepspeed_config(config.deepspeed, config.source))
    return [rule for rule in RULES if rule.is_broken(config, zero) and set(undecided).isdisjoint(rule.keys)]


def check_rules(config: FinetuneConfig, undecided: Collection[str] = ()) -> None:
    """Raise ConfigError if the config breaks a rule; it names them all, each with the fix."""
    broken = broken_rules(config, undecided)
    if broken:
        raise ConfigError("\n".join(map(str, broken)))
