"""Whether a run fits a GPU or a CPU's memory, the cheapest change that makes it fit, the fastest settings that do.

work = work_of(config, data)                                steps, tokens and positions of the run
changes, need = cheapest_change(config, shape, 8, 512, gpu)
config = fit(config, shape, (8, gpu), data)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forgebook.data.batching import group_size
from forgebook.data.token_store import fit_length
from forgebook.errors import ConfigError
from forgebook.planning import schedule
from forgebook.planning.hardware import Cpu
from forgebook.planning.memory import Memory, memory_of, sharding_of
from forgebook.planning.token_count import Statistics

if TYPE_CHECKING:
    from forgebook.catalog import Gpu, Shape
    from forgebook.config.parse import FinetuneConfig

__all__ = ["Work", "capacity", "cheapest_change", "fit", "fits", "micro_batch_for", "without_gaps", "work_of"]

# Rows per device and step when the config names none: what fits a 24 GB GPU with a 7B LoRA, by context length.
MICRO_BATCHES = {512: 16, 1024: 8, 2048: 4, 4096: 2}
# Of a GPU's memory, the share that the allocator cannot use for lack of a piece that is large enough.
FRAGMENTED = 0.05
MOST_GPUS = 64


@dataclass(frozen=True)
class Work:
    """What a whole run goes through. positions: tokens and padding; longest: tokens of the longest sequence.

    mean: how long a row the mean token stands in, which is what attention's work goes by.
    """

    steps: int
    tokens: int
    positions: int
    longest: int
    mean: float


def work_of(config: FinetuneConfig, data: Statistics) -> Work:
    """Count what a run goes through. config: with its context length and batch size chosen."""
    context = config.context_length
    parts = [fit_length(length, context, config.truncation) for length in data.lengths]
    lengths = [part.stop - part.start for part in parts if part is not None]
    if not lengths:
        raise ConfigError(f"context_length: {context} is shorter than every row, and truncation: drop leaves none")
    micro = config.train_batch_size_per_device
    pairs = group_size(config.task)
    tokens = sum(lengths)
    if config.padding == "packed":
        sequences, positions, longest = math.ceil(tokens / context), tokens, context
    elif config.padding == "max_length":
        sequences, positions, longest = len(lengths) / pairs, context * len(lengths), context
    else:
        batches = [lengths[k : k + micro * pairs] for k in range(0, len(lengths), micro * pairs)]
        sequences, positions, longest = len(lengths) / pairs, sum(max(b) * len(b) for b in batches), max(lengths)
    epoch_steps = schedule.steps_per_epoch(sequences * data.scale, config.global_batch_size)
    epochs = config.num_epochs or schedule.epochs_for(config.min_update_steps, epoch_steps)
    total = schedule.total_steps(epochs, epoch_steps, config.max_steps)
    share = data.scale * total / epoch_steps
    mean = sum(length * length for length in lengths) / tokens
    return Work(total, round(tokens * share), round(positions * share), longest, mean)


def without_gaps(config: FinetuneConfig, shape: Shape, data: Statistics | None) -> FinetuneConfig:
    """Choose what the config leaves open, as the run will: the context length, then the batch size."""
    context = config.context_length
    if context is None:
        context = max(data.p95 if data else 0, shape.context or 0)
        if not context:
            raise ConfigError("context_length: the model names no longest context, and the data is not counted: set it")
    chosen = {"context_length": context}
    if config.train_batch_size_per_device is None:
        chosen["train_batch_size_per_device"] = micro_batch_for(context)
    return config.resolve(**chosen)


def micro_batch_for(context: int) -> int:
    """Choose the rows per device and forward pass for a context length in tokens."""
    return next((batch for length, batch in MICRO_BATCHES.items() if context <= length), 1)


def capacity(device: Gpu | Cpu) -> int:
    """Tell the bytes that tensors can take: of a GPU less what its allocator cannot use."""
    return device.memory if isinstance(device, Cpu) else int(device.memory * (1 - FRAGMENTED))


def fits(need: Memory, device: Gpu | Cpu) -> bool:
    """Tell whether a device can hold it."""
    return need.total <= capacity(device)


def cheapest_change(
    config: FinetuneConfig, shape: Shape, workers: int, length: int, device: Gpu | Cpu
) -> tuple[tuple[str, ...], Memory | None]:
    """Find the changes that make a run fit, cheapest first; return them as `key=value`, with the memory then.

    Each is tried on top of those before it; those that turn out not to be needed are taken back.
    """

    on_gpu = not isinstance(device, Cpu)

    def applied(changes: Sequence[tuple[str, dict[str, Any]]]) -> tuple[FinetuneConfig, int, Memory]:
        changed, gpus = config, workers
        for _, values in changes:
            changed = changed.resolve(**values)
            gpus = values.get("num_devices", gpus)
        return changed, gpus, memory_of(changed, shape, workers=gpus, length=length, on_gpu=on_gpu)

    tried: list[tuple[str, dict[str, Any]]] = []
    for change in _possible_changes(config, shape, workers, on_gpu):
        # A change of the same keys replaces the earlier one.
        tried = [one for one in tried if not set(one[1]) & set(change[1])] + [change]
        if fits(applied(tried)[2], device):
            break
    else:
        return (), None
    for one in list(tried):
        without = [other for other in tried if other is not one]
        if without and fits(applied(without)[2], device):
            tried = without
    return tuple(text for text, _ in tried), applied(tried)[2]


def _possible_changes(
    config: FinetuneConfig, shape: Shape, workers: int, on_gpu: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """List changes from the cheapest to the dearest, as (text, values). Without GPUs none moves bytes to the host."""
    if not config.gradient_checkpointing:
        yield "gradient_checkpointing=true", {"gradient_checkpointing": True}
    micro, accumulation = config.train_batch_size_per_device, config.gradient_accumulation_steps
    while micro % 2 == 0:
        micro, accumulation = micro // 2, accumulation * 2
        yield (
            f"train_batch_size_per_device={micro} gradient_accumulation_steps={accumulation}",
            {"train_batch_size_per_device": micro, "gradient_accumulation_steps": accumulation},
        )
    now = sharding_of(config, shape)
    names = [name for stage, name in ((1, "zero_1"), (2, "zero_2"), (3, "zero_3")) if stage > now.stage and workers > 1]
    if config.quantization is not None:  # not with ZeRO-3
        names = [name for name in names if name != "zero_3"]
    elif on_gpu and not now.offload_param:
        names += ["zero_3_offload_optim"] * (not now.offload_optimizer) + ["zero_3_offload_optim+param"]
    for name in names:
        yield f"deepspeed={name}", {"deepspeed": name}
    if config.quantization is None:
        lora = config.lora_config or {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
        text = "quantization=nf4 deepspeed=zero_2" + (
            "" if config.is_lora else " lora_config.r=8 (LoRA, not all weights)"
        )
        yield text, {"quantization": "nf4", "lora_config": lora, "deepspeed": "zero_2"}
    for count in (2**k for k in range(1, 7)):
        if on_gpu and workers < count <= MOST_GPUS:
            values = {"num_devices": count, "quantization": config.quantization, "lora_config": config.lora_config}
            sharded = "zero_2" if config.quantization else "zero_3"
            yield f"num_devices={count} deepspeed={sharded}", {**values, "deepspeed": sharded}


def fit(
    config: FinetuneConfig, shape: Shape, hardware: tuple[int, Gpu], data: Statistics | None = None,
    keep: Collection[str] = (),
) -> FinetuneConfig | None:  # fmt: skip
    """Find the fastest settings that fit, with the same rows per update; None if none do.

    keep: keys whose values stay as they are; fewer rows per update are taken only if the accumulation is kept.
    Speeds are not measured but ordered: moving weights to the host is slower than moving optimizer states, that
    than sharing out the weights, that than recomputing activations, and that than smaller micro batches.
    """
    workers, gpu = hardware
    if workers != max(1, config.num_devices):
        config = config.resolve(num_devices=workers)
    config = without_gaps(config, shape, data)
    length = config.context_length if data is None else work_of(config, data).longest
    shared = ["zero_3", "zero_3_offload_optim", "zero_3_offload_optim+param"] if _zero_3_can(config) else []
    shardings = [None, "zero_1", "zero_2", *shared] if workers > 1 else [None, *shared[1:]]
    checkpointings = [False, True]
    if "deepspeed" in keep:
        shardings = [config.deepspeed and config.deepspeed.model_dump()]
    if "gradient_checkpointing" in keep:
        checkpointings = [config.gradient_checkpointing]
    for sharding in shardings:
        for checkpointing in checkpointings:
            for micro, accumulation in _splits(config, keep):
                tried = config.resolve(
                    deepspeed=sharding, gradient_checkpointing=checkpointing, train_batch_size_per_device=micro,
                    gradient_accumulation_steps=accumulation,
                )  # fmt: skip
                if fits(memory_of(tried, shape, workers=workers, length=length), gpu):
                    return tried
    return None


def _zero_3_can(config: FinetuneConfig) -> bool:
    """Tell whether ZeRO-3 can train this; forgebook.launch.ray_train says why not."""
    lora = config.lora_config or {}
    trains_rows = config.is_lora and config.classifier_config is not None
    is_pissa = str(lora.get("init_lora_weights")).startswith("pissa")
    return config.quantization is None and not trains_rows and not is_pissa


def _splits(config: FinetuneConfig, keep: Collection[str]) -> list[tuple[int, int]]:
    """List micro batches, the largest first, each with its accumulation."""
    micro, accumulation = config.train_batch_size_per_device, config.gradient_accumulation_steps
    if "train_batch_size_per_device" in keep:
        return [(micro, accumulation)]
    if "gradient_accumulation_steps" in keep:
        return [(n, accumulation) for n in range(micro, 0, -1) if micro % n == 0]
    rows = micro * accumulation
    return [(n, rows // n) for n in range(rows, 0, -1) if rows % n == 0]
