"""Whether a run fits the memory of a GPU or CPU, the cheapest change that makes it fit, the fastest settings that fit.

work = work_of(config, data)                                steps, tokens and positions of the run
changes, need = cheapest_change(config, shape, 8, 512, gpu)
config = fit(config, shape, (8, gpu), data)
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from forgebook.catalog import Gpu
from forgebook.config.rules import broken_rules
from forgebook.data.batching import group_size
from forgebook.data.truncation import fit_length
from forgebook.errors import ConfigError
from forgebook.models.attention import SEGMENTED
from forgebook.models.varlen_attention import LARGEST_HEAD
from forgebook.planning import schedule
from forgebook.planning.hardware import Cpu
from forgebook.planning.memory import Memory, memory_of
from forgebook.planning.sharding import sharding_of
from forgebook.planning.token_count import Statistics

if TYPE_CHECKING:
    from forgebook.catalog import Shape
    from forgebook.config.schema import FinetuneConfig, ResolvedConfig
    from forgebook.data.truncation import Truncation

__all__ = [
    "Work",
    "capacity",
    "cheapest_change",
    "comfortable",
    "device_of",
    "fit",
    "fits",
    "has_padding",
    "longest_first",
    "longest_sequence",
    "micro_batch_for",
    "settle_checkpointing",
    "unpadded_lengths",
    "without_gaps",
    "work_of",
]

# Examples per device and forward pass where the config leaves them open, by context length: what fits a 24 GB GPU
# with a LoRA of a 7B model.
MICRO_BATCHES = {512: 16, 1024: 8, 2048: 4, 4096: 2}
# The share of a GPU's memory that fragmentation keeps the allocator from using.
FRAGMENTED = 0.05
MOST_GPUS = 64
LARGEST_BATCH = 4096  # examples of a device, pairs counted twice
ADVISED_LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}

# A change of the config as it is printed, and its values by key.
Change: TypeAlias = "tuple[str, dict[str, Any]]"


@dataclass(frozen=True)
class Work:
    """What a whole run processes. positions: tokens and padding; longest: tokens of the longest sequence.

    mean: tokens of the example that the mean token is part of, which the work of attention depends on. lengths: of
    examples, the longest first, where batches have no padding.
    """

    steps: int
    tokens: int
    positions: int
    longest: int
    mean: float
    lengths: tuple[int, ...] = ()


def work_of(config: ResolvedConfig, data: Statistics, *, padded: bool = True) -> Work:
    """Count what a run processes; padded: as `has_padding` says. Raises ConfigError if truncation leaves no example."""
    context, lengths = config.context_length, _cut_lengths(config.context_length, config.truncation, data)
    tokens = sum(lengths)
    longest = max(lengths) if config.padding == "longest" else context
    if config.padding == "packed" or not padded:
        positions = tokens
    elif config.padding == "max_length":
        positions = context * len(lengths)
    else:
        size = config.train_batch_size_per_device * group_size(config.task)
        batches = [lengths[k : k + size] for k in range(0, len(lengths), size)]
        positions = sum(max(batch) * len(batch) for batch in batches)
    epoch_steps = _epoch_steps(config, context, data)
    steps = schedule.total_steps(config.num_epochs, epoch_steps, config.max_steps)
    share = data.scale * steps / epoch_steps
    mean = sum(length * length for length in lengths) / tokens
    unpadded = () if padded else longest_first(lengths)
    return Work(steps, round(tokens * share), round(positions * share), longest, mean, unpadded)


def has_padding(config: FinetuneConfig, shape: Shape, device: Gpu | Cpu | None) -> bool:
    """Return whether batches are padded, as far as can be known before the model is loaded.

    They are not where the attention kernel keeps the examples of one line apart by their lengths (models/attention.py),
    which `attention: auto` chooses on a GPU of compute capability 8.0 or later, for models that it can compute.
    """
    if config.padding != "longest" or config.sequence_parallel > 1 or config.task == "vision_language":
        return True
    if config.attention in SEGMENTED:
        return False
    is_able = isinstance(device, Gpu) and device.bfloat16 and config.dtype != "float32"
    # Of families that are counted on their own class, it is not known; capped logits are a tanh that it lacks.
    is_known = shape.counted is None and not shape.softcap
    has_heads = shape.head_dim <= LARGEST_HEAD and shape.head_dim % 8 == 0
    return not (config.attention == "auto" and is_able and is_known and has_heads)


def unpadded_lengths(
    config: FinetuneConfig, shape: Shape, data: Statistics | None, device: Gpu | Cpu | None
) -> tuple[int, ...]:
    """List the tokens of examples, the longest first, where batches have no padding; nothing where they do.

    config: with its context length chosen.
    """
    if data is None or has_padding(config, shape, device):
        return ()
    return longest_first(_cut_lengths(config.context_length or 0, config.truncation, data))


def longest_first(lengths: Iterable[int]) -> tuple[int, ...]:
    """Sort lengths, and take as many as a batch may hold."""
    return tuple(heapq.nlargest(LARGEST_BATCH, lengths))


def _epoch_steps(config: FinetuneConfig, context: int, data: Statistics) -> int:
    """Count the optimizer steps of an epoch. config: with its batch size chosen."""
    lengths = _cut_lengths(context, config.truncation, data)
    is_packed = config.padding == "packed"
    sequences = math.ceil(sum(lengths) / context) if is_packed else len(lengths) / group_size(config.task)
    return schedule.steps_per_epoch(sequences * data.scale, config.global_batch_size)


def longest_sequence(config: FinetuneConfig, data: Statistics | None) -> int:
    """Count the tokens of the longest sequence in a batch. config: with its context length chosen."""
    context = config.context_length or 0
    if data is None or config.padding != "longest":
        return context
    return max(_cut_lengths(context, config.truncation, data))


def _cut_lengths(context: int, truncation: Truncation, data: Statistics) -> list[int]:
    """Cut the lengths of the examples, or leave examples out, according to `truncation`."""
    parts = (fit_length(length, context, truncation) for length in data.lengths)
    lengths = [part.stop - part.start for part in parts if part is not None]
    if not lengths:
        raise ConfigError(f"context_length: {context} is shorter than every example, and truncation: drop leaves none")
    return lengths


def without_gaps(config: FinetuneConfig, shape: Shape, data: Statistics | None) -> ResolvedConfig:
    """Choose what the config leaves open, as the run will: context length, batch sizes, epochs.

    If the data is not counted, num_epochs may be 1 as a placeholder: no figure of a plan depends on it.
    """
    sizes = _open_sizes(config.context_length, config.train_batch_size_per_device, shape.context, data)
    sized = config.resolve(**sizes)
    epochs = config.num_epochs
    if epochs is None and data is not None:
        epochs = schedule.epochs_for(config.min_update_steps, _epoch_steps(sized, sizes["context_length"], data))
    return sized.resolved(
        eval_batch_size_per_device=config.eval_batch_size_per_device or sizes["train_batch_size_per_device"],
        num_epochs=epochs or 1,
        run_name=config.run_name or "run",
    )


def _open_sizes(context: int | None, micro: int | None, longest: int | None, data: Statistics | None) -> dict[str, int]:
    """Choose the context length, then the batch size, where they are None; longest: context of the model."""
    context = context or max(data.p95 if data else 0, longest or 0)
    if not context:
        raise ConfigError(
            "context_length: the model states no context length, and the data is not counted: set context_length"
        )
    return {"context_length": context, "train_batch_size_per_device": micro or micro_batch_for(context)}


def micro_batch_for(context: int) -> int:
    """Choose the examples per device and forward pass for a context length in tokens."""
    return next((batch for length, batch in MICRO_BATCHES.items() if context <= length), 1)


def capacity(device: Gpu | Cpu) -> int:
    """Return the bytes that tensors can take: on a GPU, less what fragmentation wastes."""
    return device.memory if isinstance(device, Cpu) else int(device.memory * (1 - FRAGMENTED))


def device_of(bytes_for_tensors: int, on_gpu: bool) -> Gpu | Cpu:
    """Make a device of which tensors can take so many bytes."""
    if not on_gpu:
        return Cpu("", bytes_for_tensors, bytes_for_tensors)
    return Gpu("", math.ceil(bytes_for_tensors / (1 - FRAGMENTED)), peak=None, price=None)


def fits(need: Memory, device: Gpu | Cpu) -> bool:
    """Check whether a device has the memory."""
    return need.total <= capacity(device)


def comfortable(device: Gpu | Cpu) -> int:
    """Return the bytes that a plan may fill where something else would take less.

    A plan may be wrong by a tenth; a worker without GPU shares its memory with whatever else the machine runs.
    """
    return int(capacity(device) * (0.5 if isinstance(device, Cpu) else 0.9))


def settle_checkpointing(
    config: ResolvedConfig,
    shape: Shape,
    workers: int,
    length: int,
    device: Gpu | Cpu | None,
    lengths: Sequence[int] = (),
) -> tuple[ResolvedConfig, list[str]]:
    """Choose `gradient_checkpointing: auto`: the least recomputation that fits, with a note why. Others stay.

    device: None where it is not known, or one of several. lengths: as for `memory_of`.
    """
    on_gpu = not isinstance(device, Cpu)
    if config.gradient_checkpointing != "auto":
        return config, []
    if device is None:
        return _settled(config, True, "the hardware is not known")
    choice: bool | str = True
    reason = "it does not fit with less"
    room = comfortable(device)
    # The products of experts are not kept, and what Llama 4's return is changed in place.
    choices: list[bool | str] = [False, True] if shape.experts > 1 else [False, "selective", True]
    choices += [] if isinstance(device, Cpu) else ["offload"]  # without a GPU, memory is the host's anyway
    for less in choices:
        attempt = config.resolve(gradient_checkpointing=less)
        if broken_rules(attempt):
            continue
        need = memory_of(attempt, shape, workers=workers, length=length, on_gpu=on_gpu, lengths=lengths).total
        if less is True and need <= capacity(device):  # moving inputs to the host takes time, too: only where it must
            break
        if less is not True and need <= room:
            choice, reason = less, f"the least that fits: {need / 1e9:,.1f} of {room / 1e9:,.1f} GB"
            break
    return _settled(config, choice, reason)


def _settled(config: ResolvedConfig, choice: bool | str, reason: str) -> tuple[ResolvedConfig, list[str]]:
    config = config.resolve(gradient_checkpointing=choice).explained({"gradient_checkpointing": reason})
    # Computing nothing twice costs nothing: the config of the run records the reason, nobody needs to read it.
    return config, [f"gradient_checkpointing: {str(choice).lower()} ({reason})"] if choice else []


def cheapest_change(
    config: FinetuneConfig, shape: Shape, workers: int, length: int, device: Gpu | Cpu, lengths: Sequence[int] = ()
) -> tuple[tuple[str, ...], Memory | None]:
    """Search the changes that make a run fit, cheapest first; return them as `key=value`, with the memory then.

    Each is tried on top of those before it, unless the result would break a rule of `config.rules`; those that turn
    out not to be needed are dropped again. config: with its context length and batch size chosen. lengths: as for
    `memory_of`.
    """
    on_gpu = not isinstance(device, Cpu)

    def applied(changes: Sequence[Change]) -> FinetuneConfig:
        changed = config
        for _, values in changes:
            changed = changed.resolve(**values)
        return changed

    def need(changes: Sequence[Change]) -> Memory:
        gpus = next((values["num_devices"] for _, values in reversed(changes) if "num_devices" in values), workers)
        return memory_of(applied(changes), shape, workers=gpus, length=length, on_gpu=on_gpu, lengths=lengths)

    chosen: list[Change] = []
    for change in _possible_changes(config, shape, workers, on_gpu):
        # A change of the same keys replaces the earlier one.
        attempt = [one for one in chosen if not set(one[1]) & set(change[1])] + [change]
        if broken_rules(applied(attempt)):
            continue
        chosen = attempt
        if fits(need(chosen), device):
            break
    else:
        return (), None
    for one in list(chosen):
        fewer = [other for other in chosen if other is not one]
        if fewer and not broken_rules(applied(fewer)) and fits(need(fewer), device):
            chosen = fewer
    return tuple(text for text, _ in chosen), need(chosen)


def _possible_changes(config: FinetuneConfig, shape: Shape, workers: int, on_gpu: bool) -> Iterator[Change]:
    """Yield changes from the cheapest to the most expensive; without GPUs, none that moves bytes to the host.

    Some of them may break a rule; of two that differ in the sharding alone, the first is the better one.
    """
    if config.gradient_checkpointing not in (True, "auto", "offload"):
        yield "gradient_checkpointing=true", {"gradient_checkpointing": True}
    micro, accumulation = config.train_batch_size_per_device or 1, config.gradient_accumulation_steps
    while micro % 2 == 0:
        micro, accumulation = micro // 2, accumulation * 2
        yield (
            f"train_batch_size_per_device={micro} gradient_accumulation_steps={accumulation}",
            {"train_batch_size_per_device": micro, "gradient_accumulation_steps": accumulation},
        )
    if on_gpu and config.gradient_checkpointing != "offload":
        yield "gradient_checkpointing=offload", {"gradient_checkpointing": "offload"}
    now = sharding_of(config, shape.hidden)
    names = [name for stage, name in ((1, "zero_1"), (2, "zero_2"), (3, "zero_3")) if stage > now.stage and workers > 1]
    if on_gpu and not now.offload_param:
        names += ["zero_3_offload_optim"] * (not now.offload_optimizer) + ["zero_3_offload_optim+param"]
    for name in names:
        yield f"deepspeed={name}", {"deepspeed": name}
        if name == "zero_3":  # for what ZeRO-3 does not work with, such as fewer workers for a while
            yield "sharding=fsdp", {"sharding": "fsdp"}
    if config.quantization is None:
        values: dict[str, Any] = {"quantization": "nf4", "lora_config": config.lora_config or ADVISED_LORA}
        lora = "" if config.is_lora else " lora_config.r=8 (LoRA, not full fine-tuning)"
        yield f"quantization=nf4 deepspeed=zero_2{lora}", values | {"deepspeed": "zero_2"}
        if config.deepspeed is None:
            yield f"quantization=nf4{lora}", values
    for count in (2**k for k in range(1, 7)):
        if on_gpu and workers < count <= MOST_GPUS:
            values = {"num_devices": count, "quantization": config.quantization, "lora_config": config.lora_config}
            for sharding in ("zero_3", "zero_2"):
                yield f"num_devices={count} deepspeed={sharding}", values | {"deepspeed": sharding}


def fit(
    config: FinetuneConfig,
    shape: Shape,
    hardware: tuple[int, Gpu | Cpu],
    data: Statistics | None = None,
    keep: Collection[str] = (),
) -> FinetuneConfig | None:
    """Search the fastest settings that fit and break no rule, with the same examples per optimizer step; None if none.

    keep: keys whose values stay as they are; fewer examples per step are tried only if the accumulation is kept.
    Speeds are not measured but ordered, the slowest first: offloading weights, optimizer states, activations;
    sharding the weights; recomputing activations; smaller micro batches.
    """
    workers, gpu = hardware
    if workers != max(1, config.num_devices):
        config = config.resolve(num_devices=workers)
    sizes = _open_sizes(config.context_length, config.train_batch_size_per_device, shape.context, data)
    config = config.resolve(**sizes)
    length, lengths = longest_sequence(config, data), unpadded_lengths(config, shape, data, gpu)
    on_gpu = not isinstance(gpu, Cpu)
    offloading = ["zero_3_offload_optim", "zero_3_offload_optim+param"]
    names = [None, "zero_1", "zero_2", "zero_3", *offloading] if workers > 1 else [None, *offloading]
    shardings: list[dict[str, Any]] = [{"deepspeed": name} for name in names]
    if workers > 1:
        shardings.insert(names.index("zero_3") + 1, {"sharding": "fsdp"})
    if "deepspeed" in keep:
        shardings = [{}]
    on_device = [sharding for sharding in shardings if sharding.get("deepspeed") not in offloading]
    stages: list[tuple[list[dict[str, Any]], list[Any]]] = [(on_device, [False, True])]
    stages += [(on_device, ["offload"])] * on_gpu  # without a GPU, activations are in the host's memory already
    stages += [([sharding for sharding in shardings if sharding not in on_device], [False, True])]
    if "gradient_checkpointing" in keep:
        stages = [(shardings, [config.gradient_checkpointing])]
    splits = _splits(config.train_batch_size_per_device or 1, config.gradient_accumulation_steps, keep)
    for some, checkpointings in stages:
        for sharding, checkpointing, (micro, accumulation) in itertools.product(some, checkpointings, splits):
            attempt = config.resolve(
                **sharding,
                gradient_checkpointing=checkpointing,
                train_batch_size_per_device=micro,
                gradient_accumulation_steps=accumulation,
            )
            if broken_rules(attempt):
                continue
            need = memory_of(attempt, shape, workers=workers, length=length, on_gpu=on_gpu, lengths=lengths)
            if fits(need, gpu):
                return attempt
    return None


def _splits(micro: int, accumulation: int, keep: Collection[str]) -> list[tuple[int, int]]:
    """List micro batches, the largest first, each with its accumulation, that together hold as many examples."""
    if "train_batch_size_per_device" in keep:
        return [(micro, accumulation)]
    if "gradient_accumulation_steps" in keep:
        return [(n, accumulation) for n in _divisors(micro)]
    examples = micro * accumulation
    return [(n, examples // n) for n in _divisors(examples)]


def _divisors(number: int) -> list[int]:
    """List the divisors of a number, the largest first."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)}, reverse=True)
