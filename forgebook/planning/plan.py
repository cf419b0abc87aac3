"""Before the run: memory, steps, time and money, and the cheapest change that makes a run fit. Needs no torch.

told = plan(config, shape, (8, gpu), count_data(config))     Plan

FLOPs are those of the model, by the usual convention: six per parameter and token if all are trained (2 forward,
4 backward), four per frozen one and six per adapter one with LoRA, look-up tables and idle experts left out, and
causal attention's products beside. Recomputing (gradient checkpointing) is not counted: the assumed MFU bears it.
The MFU that times are told from counts padding as work; it is that of this machine's own past runs, where there are
runs like this one (forgebook/planning/history.py). A run's own figures are of its real tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forgebook.catalog import Catalog, Gpu, Shape, read_catalog
from forgebook.models.vllm_support import vllm_serves
from forgebook.planning.feasibility import Work, capacity, cheapest_change, fits, without_gaps, work_of
from forgebook.planning.hardware import Cpu
from forgebook.planning.history import Pace, usual_pace
from forgebook.planning.memory import Memory, memory_of, sharding_of, trainable_parameters
from forgebook.planning.token_count import Statistics

if TYPE_CHECKING:
    from forgebook.config.parse import FinetuneConfig

__all__ = [
    "MFU",
    "GpuCost",
    "Plan",
    "cost_per_million_tokens",
    "flops_per_token",
    "plan",
    "running_figures",
    "utilisation",
]

# The share of the peak that training is taken to reach. LLMForge published 0.40 to 0.63 on A100s.
MFU = 0.4
_WITH_REFERENCE = ("dpo", "ipo", "kto")


@dataclass(frozen=True)
class GpuCost:
    """One kind of GPU, as many as the run has. Costs in USD, time in seconds; None where the data is unknown."""

    gpu: str
    fits: bool
    seconds: float | None
    cost: float | None
    cost_per_million_tokens: float


@dataclass(frozen=True)
class Plan:
    """What a run would take. Bytes, seconds, USD; tokens and FLOPs of the whole run; None where unknown.

    gpu, cpu: what it is planned for, if anything; capacity: what each worker can use of its memory; seconds (of
    optimizer steps alone) and cost: there; pace: what they were told from.
    changes: `key=value` of the config, the cheapest that make it fit; empty if it does or nothing helps.
    """

    model_id: str
    workers: int
    gpu: str | None
    cpu: str | None
    context_length: int
    micro_batch: int
    longest_row: int
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
    pace: str
    seconds: float | None
    cost: float | None
    costs: tuple[GpuCost, ...]
    checkpoint_bytes: int
    disk_bytes: int
    vllm: str
    priced: str
    notes: tuple[str, ...]


# Time and money ---------------------------------------------------------------------------------------


def flops_per_token(config: FinetuneConfig, shape: Shape, length: float) -> float:
    """Tell the FLOPs of one trained token. length: of the sequences, whose causal half attention works on."""
    active = shape.active_parameters
    attention = 6 * shape.layers * shape.heads * shape.head_dim * length
    preference = config.preference_tuning_config
    reference = 2 * active if preference is not None and preference.loss in _WITH_REFERENCE else 0
    if not config.is_lora:
        return 6.0 * active + attention + reference
    return 4.0 * active + 6 * trainable_parameters(config, shape) + attention + reference


def utilisation(tokens_per_second: float, flops_of_token: float, gpus: int, peak: float) -> float:
    """Tell the MFU: the FLOPs that the model needs per second, over those that the GPUs could do."""
    return tokens_per_second * flops_of_token / (gpus * peak)


def cost_per_million_tokens(price_per_hour: float, tokens_per_second: float) -> float:
    """Tell USD per million tokens, for machines of a price per hour."""
    return price_per_hour / 3600 / tokens_per_second * 1e6


def running_figures(
    gpu: Gpu | None, workers: int, flops_of_token: float | None, tokens_per_second: float, seconds: float
) -> dict[str, float]:
    """Tell a running run's MFU and the money so far; what is unknown, such as a CPU's peak and price, is left out."""
    found = {}
    if gpu is not None and gpu.peak and flops_of_token:
        found["mfu"] = round(utilisation(tokens_per_second, flops_of_token, workers, gpu.peak), 4)
    if gpu is not None and gpu.price:
        found["cost_usd"] = round(workers * gpu.price * seconds / 3600, 4)
    return found


# The plan ---------------------------------------------------------------------------------------------


def plan(
    config: FinetuneConfig,
    shape: Shape,
    hardware: tuple[int, Gpu | Cpu] | None = None,
    data: Statistics | None = None,
    *,
    work: Work | None = None,
    mfu: float | None = None,
    paces: Sequence[Pace] = (),
    catalog: Catalog | None = None,
) -> Plan:
    """Tell what a run takes: memory, whether it fits, steps, time, money, disk.

    hardware: how many GPUs of which kind, or workers on a CPU; None: as many as the config's num_devices, of every
    kind of GPU in turn. work: what the run goes through, where it is known better than `data` tells.
    mfu: the share of a GPU's peak that is taken to be reached; None: what `paces`, of past runs, show, else MFU.
    """
    catalog = catalog or read_catalog()
    notes = []
    workers = hardware[0] if hardware else max(1, config.num_devices)
    if workers != max(1, config.num_devices):
        notes.append(f"num_devices is {config.num_devices} in the config; planned for {workers}")
        config = config.resolve(num_devices=workers)
    config = without_gaps(config, shape, data)
    context = config.context_length
    if work is None and data is not None:
        work = work_of(config, data)
    longest = work.longest if work else context
    if shape.context is not None and context > shape.context and config.rope_scaling is None:
        notes.append(f"context_length {context:,} is beyond the model's {shape.context:,} positions")
    each = flops_per_token(config, shape, work.mean if work else context)

    device = hardware[1] if hardware else None
    gpu = device if isinstance(device, Gpu) else None
    on_gpu = not isinstance(device, Cpu)
    need = memory_of(config, shape, workers=workers, length=longest, on_gpu=on_gpu)
    does_fit = fits(need, device) if device else None
    changes, changed = cheapest_change(config, shape, workers, longest, device) if does_fit is False else ((), None)
    on_gpus = need if on_gpu else memory_of(config, shape, workers=workers, length=longest)
    costs = tuple(
        _cost(one, workers, workers * _pace(one, config, shape, mfu, paces)[1] / each, on_gpus, work)
        for one in catalog.gpus.values()
    )
    mfu, per_worker, pace = _pace(device, config, shape, mfu, paces)
    seconds = work.positions * each / (workers * per_worker) if work is not None and per_worker else None
    cost = seconds / 3600 * workers * gpu.price if seconds is not None and gpu is not None and gpu.price else None
    width = 2 if config.dtype == "bfloat16" else 4
    trained = trainable_parameters(config, shape)
    checkpoint = width * (trained if config.is_lora else shape.parameters)
    # The state for continuing: weights, masters and two moments; old and new exist at once, as do checkpoints.
    state = trained * (width + 12 if width == 2 else width + 8)
    if sharding_of(config, shape).offload_optimizer or sharding_of(config, shape).offload_param:
        notes.append(f"the hosts must hold {workers * need.host / 1e9:,.1f} GB over all workers, which is not checked")
    if gpu is not None and gpu.note:
        notes.append(f"{gpu.name}: {gpu.note}")
    if work is None:
        notes.append("the data is not counted (not on this machine): steps, time and cost per run are unknown")
    elif data is not None:
        notes.append(f"tokens: {data.how}")
    return Plan(
        model_id=config.model_id, workers=workers, gpu=gpu.name if gpu else None,
        cpu=None if on_gpu else device.name, context_length=context,
        micro_batch=config.train_batch_size_per_device, longest_row=longest, parameters=shape.parameters,
        trainable_parameters=trained, memory=need, capacity=capacity(device) if device else None, fits=does_fit,
        changes=changes, changed_memory=changed, steps=work and work.steps, tokens=work and work.tokens,
        positions=work and work.positions, flops_per_token=each, flops=work and each * work.positions, mfu=mfu,
        pace=pace, seconds=seconds, cost=cost, costs=costs, checkpoint_bytes=checkpoint,
        disk_bytes=checkpoint * (config.num_checkpoints_to_keep + 1) + 2 * state,
        vllm=vllm_serves(config.lora_config) if config.is_lora else "yes", priced=catalog.priced, notes=tuple(notes),
    )  # fmt: skip


def _pace(
    device: Gpu | Cpu | None, config: FinetuneConfig, shape: Shape, given: float | None, paces: Sequence[Pace]
) -> tuple[float | None, float | None, str]:
    """Choose the MFU and the FLOP/s of one worker to reckon with, and say where they are from; None where unknown."""
    usual = usual_pace(paces, device.name, config, shape.parameters) if device is not None else None
    if isinstance(device, Cpu):  # no catalog has its peak
        if usual is None:
            return None, None, "no run like it was made here yet"
        each = " per worker" if config.num_devices > 1 else ""
        told = f"at {usual.flops_per_second / 1e9:,.0f} GFLOP/s{each}, as in {_runs(usual.runs)}"
        return None, usual.flops_per_second, told
    peak = device.peak if device is not None else None
    if given is None and usual is not None and peak:
        mfu = usual.flops_per_second / peak
        return mfu, usual.flops_per_second, f"at {mfu:.0%} MFU, as in {_runs(usual.runs)}"
    mfu = MFU if given is None else given
    return mfu, mfu * peak if peak else None, f"at {mfu:.0%} MFU" + ", assumed" * (given is None)


def _runs(count: int) -> str:
    return f"{count} run{'s' * (count > 1)} here"


def _cost(gpu: Gpu, workers: int, per_second: float, need: Memory, work: Work | None) -> GpuCost:
    """Tell time and cost on GPUs of one kind. per_second: tokens that all of them work on, padding counted."""
    per_million = cost_per_million_tokens(workers * gpu.price, per_second)
    if work is None:
        return GpuCost(gpu.name, fits(need, gpu), None, None, per_million)
    seconds = work.positions / per_second
    # What is paid for is computed positions; padding makes real tokens dearer.
    cost = seconds / 3600 * workers * gpu.price
    return GpuCost(gpu.name, fits(need, gpu), seconds, cost, per_million * work.positions / work.tokens)
