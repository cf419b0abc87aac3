"""Before the run: memory, steps, time and cost, and the cheapest change that makes a run fit. Needs no torch.

    planned = plan(config, shape, (8, gpu), count_data(config))     Plan

FLOPs are those of the model, by the usual convention: 6 per parameter and token in full fine-tuning (2 forward,
4 backward); with LoRA 4 per frozen parameter and 6 per adapter parameter. Look-up tables and idle experts are left out,
the products of causal attention are added. Recomputation (gradient checkpointing) is not counted: the assumed MFU
covers it. The MFU behind expected times counts padding as work; it is that of earlier runs on this machine where
similar ones are recorded (forgebook/planning/history.py). The measured MFU of a run counts tokens excluding padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forgebook.catalog import Catalog, Gpu, Shape, read_catalog
from forgebook.config.blocks import labels_of, needs_reference
from forgebook.models.lora_targets import EXPERT_LAYERS
from forgebook.models.vllm_support import vllm_serves
from forgebook.planning.feasibility import (
    Work,
    capacity,
    cheapest_change,
    fits,
    has_padding,
    settle_checkpointing,
    without_gaps,
    work_of,
)
from forgebook.planning.hardware import Cpu
from forgebook.planning.history import RunKind, Throughput, method_name, typical_throughput
from forgebook.planning.memory import WIDTHS, Memory, memory_of
from forgebook.planning.resharding import settle_resharding
from forgebook.planning.sharding import sharding_of
from forgebook.planning.token_count import Statistics
from forgebook.planning.trainable import trained_parameters, with_label_rows

if TYPE_CHECKING:
    from forgebook.config.schema import FinetuneConfig, ResolvedConfig
    from forgebook.layer_counts import ImageLoad

__all__ = [
    "MFU",
    "Plan",
    "cost_per_million_tokens",
    "disk_of",
    "flops_per_token",
    "plan",
    "run_kind",
    "running_figures",
    "utilization",
]

# The share of the peak that training is assumed to reach. LLMForge published 0.40 to 0.63 on A100s.
MFU = 0.4


@dataclass(frozen=True)
class GpuCost:
    """The run on one kind of GPU. Costs in USD, time in seconds; None where the data or the price is unknown."""

    gpu: str
    fits: bool
    seconds: float | None
    cost: float | None
    cost_per_million_tokens: float | None


@dataclass(frozen=True)
class Plan:
    """What a run takes. Bytes, seconds, USD; tokens and FLOPs of the whole run; None where unknown.

    gpu, cpu: what it is planned for, if anything; capacity: bytes of memory that each worker can use there.
    seconds: of optimizer steps alone; assumption: the speed behind them. positions: tokens including padding.
    changes: `key=value` of the config, the cheapest that make it fit; empty if it fits or nothing helps.
    """

    model_id: str
    workers: int
    gpu: str | None
    cpu: str | None
    context_length: int
    micro_batch: int
    longest_sequence: int
    parameters: int
    trainable_parameters: int
    memory: Memory
    capacity: int | None
    fits: bool | None
    changes: tuple[str, ...]
    changed_memory: Memory | None
    steps: int | None
    tokens: int | None
    positions: int | None
    flops_per_token: float
    flops: float | None
    mfu: float | None
    assumption: str
    seconds: float | None
    cost: float | None
    costs: tuple[GpuCost, ...]
    checkpoint_bytes: int
    disk_bytes: int
    vllm: str
    priced: str
    notes: tuple[str, ...]


# Time and cost ----------------------------------------------------------------------------------------


def flops_per_token(shape: Shape, length: float, adapter: int | None = None, has_reference: bool = False) -> float:
    """Count the FLOPs of training on one token.

    length: tokens of its sequence, of which attention sees half. adapter: its parameters; None in full fine-tuning.
    has_reference: whether the loss compares the model with a reference model, which runs forward alone.
    """
    active = shape.active_parameters
    attention = 6 * shape.layers * shape.heads * shape.head_dim * length
    reference = 2 * active if has_reference else 0
    weights = 6.0 * active if adapter is None else 4.0 * active + 6 * adapter
    return weights + attention + reference + (shape.images.flops_per_token if shape.images else 0)


def utilization(tokens_per_second: float, flops_of_token: float, gpus: int, peak: float) -> float:
    """Compute the MFU: the FLOP/s that the model needs over those that the GPUs could do."""
    return tokens_per_second * flops_of_token / (gpus * peak)


def cost_per_million_tokens(price_per_hour: float, tokens_per_second: float) -> float:
    """Compute USD per million tokens, for machines of a price per hour."""
    return price_per_hour / 3600 / tokens_per_second * 1e6


def running_figures(
    gpu: Gpu | None, workers: int, flops_of_token: float | None, tokens_per_second: float, seconds: float
) -> dict[str, float]:
    """Compute a run's MFU and cost so far; what is unknown, such as a CPU's peak and price, is left out."""
    figures = {}
    if gpu is not None and gpu.peak and flops_of_token:
        figures["mfu"] = round(utilization(tokens_per_second, flops_of_token, workers, gpu.peak), 4)
    if gpu is not None and gpu.price:
        figures["cost_usd"] = round(workers * gpu.price * seconds / 3600, 4)
    return figures


# The plan ---------------------------------------------------------------------------------------------


def plan(
    config: FinetuneConfig,
    shape: Shape,
    hardware: tuple[int, Gpu | Cpu] | None = None,
    data: Statistics | None = None,
    *,
    work: Work | None = None,
    mfu: float | None = None,
    throughputs: Sequence[Throughput] = (),
    catalog: Catalog | None = None,
) -> Plan:
    """Plan a run: memory, whether it fits, steps, time, cost, disk.

    hardware: how many GPUs of which kind, or workers on a CPU; None: the config's num_devices, on every kind of GPU
    in turn. work: what the run processes, where it is known better than from `data`. mfu: the share of a GPU's peak
    to assume; None: what `throughputs` of earlier runs show, else MFU.

    Raises ConfigError if the context length is neither set nor known, or no example is within it.
    """
    catalog = catalog or read_catalog()
    workers = hardware[0] if hardware else max(1, config.num_devices)
    requested = config.num_devices
    if workers != max(1, requested):
        config = config.resolve(num_devices=workers)
    resolved = without_gaps(config, shape, data)
    device = hardware[1] if hardware else None
    if work is None and data is not None:
        work = work_of(resolved, data, padded=has_padding(resolved, shape, device))
    longest, lengths = (work.longest, work.lengths) if work else (resolved.context_length, ())
    resolved, checkpointing = settle_checkpointing(resolved, shape, workers, longest, device, lengths)
    resolved = settle_resharding(resolved, shape, workers, longest, device, lengths)
    trained = trained_parameters(resolved, shape)
    flops_of_token = flops_per_token(
        shape, work.mean if work else resolved.context_length, trained if resolved.is_lora else None,
        needs_reference(resolved.preference_tuning_config),
    )  # fmt: skip

    gpu = device if isinstance(device, Gpu) else None
    on_gpu = not isinstance(device, Cpu)
    need = memory_of(resolved, shape, workers=workers, length=longest, on_gpu=on_gpu, lengths=lengths)
    does_fit = fits(need, device) if device else None
    changes: tuple[str, ...] = ()
    changed: Memory | None = None
    if device is not None and not does_fit:
        changes, changed = cheapest_change(resolved, shape, workers, longest, device, lengths)
    kind = run_kind(resolved, shape.parameters)
    speed = _speed_of(device, kind, mfu, throughputs)
    seconds = None
    if work is not None and speed.flops_per_second:
        seconds = work.positions * flops_of_token / (workers * speed.flops_per_second)
    on_gpus = memory_of(resolved, shape, workers=workers, length=longest) if isinstance(device, Cpu) else need
    costs = []
    for one in catalog.gpus.values():
        flops_per_second = _speed_of(one, kind, mfu, throughputs).flops_per_second
        per_second = workers * flops_per_second / flops_of_token if flops_per_second else None
        costs.append(_cost_on(one, workers, per_second, on_gpus, work))
    checkpoint, disk = disk_of(resolved, shape)
    return Plan(
        model_id=resolved.model_id,
        workers=workers,
        gpu=gpu.name if gpu else None,
        cpu=device.name if isinstance(device, Cpu) else None,
        context_length=resolved.context_length,
        micro_batch=resolved.train_batch_size_per_device,
        longest_sequence=longest,
        parameters=shape.parameters,
        trainable_parameters=trained,
        memory=need,
        capacity=capacity(device) if device else None,
        fits=does_fit,
        changes=changes,
        changed_memory=changed,
        steps=work.steps if work else None,
        tokens=work.tokens if work else None,
        positions=work.positions if work else None,
        flops_per_token=flops_of_token,
        flops=flops_of_token * work.positions if work else None,
        mfu=speed.mfu,
        assumption=speed.how,
        seconds=seconds,
        cost=seconds / 3600 * workers * gpu.price if seconds is not None and gpu is not None and gpu.price else None,
        costs=tuple(costs),
        checkpoint_bytes=checkpoint,
        disk_bytes=disk,
        vllm=_vllm_verdict(resolved.lora_config, shape, len(labels_of(resolved.classifier_config))),
        priced=catalog.priced,
        notes=(*checkpointing, *_notes(resolved, shape, requested, workers, gpu, need, work, data)),
    )


def _about_images(load: ImageLoad) -> str:
    """Describe what of a vision tower trains."""
    if not load.trained:
        return f"{load.parameters:,} parameters of the vision encoder and its projector are frozen"
    return f"{load.trained:,} of the {load.parameters:,} parameters of the vision encoder and its projector train"


@dataclass(frozen=True)
class _Speed:
    """What one worker is assumed to reach, None where unknown, and where the assumption comes from."""

    mfu: float | None
    flops_per_second: float | None
    how: str


def run_kind(config: FinetuneConfig, parameters: int) -> RunKind:
    """Describe a run by what its throughput depends on."""
    return RunKind(
        config.model_id, parameters, method_name(config.is_lora, config.quantization), config.dtype,
        max(1, config.num_devices), config.gradient_checkpointing in (True, "auto", "offload"),
    )  # fmt: skip


def _speed_of(device: Gpu | Cpu | None, kind: RunKind, mfu: float | None, throughputs: Sequence[Throughput]) -> _Speed:
    typical = None
    if device is not None:
        typical = typical_throughput(throughputs, device.name, kind)
    earlier = f"based on {typical.runs} earlier run{'s' * (typical.runs > 1)} on this machine" if typical else ""
    if isinstance(device, Cpu):  # whose peak no catalog has
        if typical is None:
            return _Speed(None, None, "no similar earlier run on this machine")
        each = " per worker" if kind.workers > 1 else ""
        how = f"at {typical.flops_per_second / 1e9:,.0f} GFLOP/s{each}, {earlier}"
        return _Speed(None, typical.flops_per_second, how)
    peak = device.peak if device is not None else None
    if mfu is None and typical is not None and peak:
        measured = typical.flops_per_second / peak
        return _Speed(measured, typical.flops_per_second, f"at {measured:.0%} MFU, {earlier}")
    assumed = MFU if mfu is None else mfu
    how = f"at {assumed:.0%} MFU" + ", assumed" * (mfu is None)
    return _Speed(assumed, assumed * peak if peak else None, how)


def _cost_on(gpu: Gpu, workers: int, per_second: float | None, need: Memory, work: Work | None) -> GpuCost:
    """Compute time and cost on GPUs of one kind. per_second: tokens including padding, of all workers together."""
    if not per_second:
        return GpuCost(gpu.name, fits(need, gpu), None, None, None)
    seconds = work.positions / per_second if work is not None else None
    if gpu.price is None:
        return GpuCost(gpu.name, fits(need, gpu), seconds, None, None)
    per_million = cost_per_million_tokens(workers * gpu.price, per_second)
    if work is None or seconds is None:
        return GpuCost(gpu.name, fits(need, gpu), None, None, per_million)
    # Padding is computed and paid for, so a token that is not padding costs more.
    cost = seconds / 3600 * workers * gpu.price
    return GpuCost(gpu.name, fits(need, gpu), seconds, cost, per_million * work.positions / work.tokens)


def disk_of(config: ResolvedConfig, shape: Shape) -> tuple[int, int]:
    """Count the bytes of one checkpoint, and the most that a run stores at a time."""
    width = WIDTHS[config.dtype]
    trained = trained_parameters(config, shape)
    checkpoint = width * (trained if config.is_lora else shape.parameters)
    # The training state holds weights, float32 masters of 16-bit weights, and two float32 moments. A new one, like a
    # new checkpoint, is complete before the old one is deleted.
    state = trained * (width + 12 if width == 2 else width + 8)
    return checkpoint, checkpoint * (config.num_checkpoints_to_keep + 1) + 2 * state


def _vllm_verdict(lora_config: dict[str, Any] | None, shape: Shape, labels: int) -> str:
    """Judge whether vLLM can serve the result, without the model: a run compares the names of its layers, too."""
    if lora_config is None:
        return "yes"
    targets = lora_config.get("target_modules") or ()
    named = {targets} if isinstance(targets, str) else {name.rsplit(".", 1)[-1] for name in targets}
    is_named = shape.adapts_experts and named & {"all-linear", *EXPERT_LAYERS}
    if shape.experts > 1 and (is_named or lora_config.get("target_parameters")):
        return "no: its experts share one tensor, and each has its own in the published weights, where vLLM looks"
    return vllm_serves(with_label_rows(lora_config, labels))


def _notes(
    config: ResolvedConfig, shape: Shape, requested: int, workers: int, gpu: Gpu | None, need: Memory,
    work: Work | None, data: Statistics | None,
) -> list[str]:  # fmt: skip
    """List what a reader of the plan should know in addition to the figures."""
    notes = []
    if workers != max(1, requested):
        notes.append(f"num_devices is {requested} in the config; planned for {workers}")
    if shape.images is not None:
        notes.append(_about_images(shape.images))
    elif config.vision_language_config is not None:
        notes.append("what the encoder computes is not counted: the model's config is not on this machine")
    elif shape.towers:
        notes.append(f"{shape.towers:,} parameters of vision and audio towers are loaded and frozen: no text uses them")
    if shape.context is not None and config.context_length > shape.context and config.rope_scaling is None:
        notes.append(f"context_length {config.context_length:,} is beyond the model's {shape.context:,} positions")
    sharding = sharding_of(config, shape.hidden)
    if sharding.offload_optimizer or sharding.offload_param:
        notes.append(f"the hosts need {workers * need.host / 1e9:,.1f} GB over all workers, which is not checked")
    if gpu is not None and gpu.note:
        notes.append(f"{gpu.name}: {gpu.note}")
    if work is None:
        notes.append("the data is not counted (not on this machine): steps, time and cost per run are unknown")
    elif data is not None:
        notes.append(f"tokens: {data.how}")
    return notes
