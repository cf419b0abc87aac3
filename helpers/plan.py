"""Before the run: memory, steps, time and money, and the cheapest change that makes a run fit. Needs no torch.

data = count_data(config)                            Statistics, or None where the data cannot be read here
told = plan(config, shape, (8, gpu), data)           Plan
for line in plan_rows(told): ...

FLOPs are those of the model, by the usual convention: six per parameter and token if all are trained (2 forward,
4 backward), four per frozen one and six per adapter one with LoRA, look-up tables and idle experts left out, and
causal attention's products beside. Recomputing (gradient checkpointing) is not counted: the assumed MFU bears it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import rows, storage
from helpers.catalog import Catalog, Gpu, Shape, model_folder, read_catalog
from helpers.errors import ConfigError, DataError
from helpers.formats import Row, parse_row
from helpers.memory import Memory, memory_of, sharding_of, trainable_parameters
from helpers.vllm import vllm_serves

if TYPE_CHECKING:
    from helpers.config import FinetuneConfig

__all__ = [
    "MFU",
    "GpuCost",
    "Plan",
    "Statistics",
    "as_json",
    "cost_per_million_tokens",
    "count_data",
    "fit",
    "flops_per_token",
    "hardware_in",
    "micro_batch_for",
    "plan",
    "plan_rows",
    "price_rows",
    "utilisation",
    "verdict",
]

# The share of the peak that training is taken to reach. LLMForge published 0.40 to 0.63 on A100s.
MFU = 0.4
# Rows per device and step when the config names none: what fits a 24 GB GPU with a 7B LoRA, by context length.
MICRO_BATCHES = {512: 16, 1024: 8, 2048: 4, 4096: 2}
# Of a GPU's memory, the share that the allocator cannot use for lack of a piece that is large enough.
FRAGMENTED = 0.05
MOST_GPUS = 64
COUNTING_SECONDS = 2.0
CHARACTERS_PER_TOKEN = 4
# What a chat template adds to a message: the role, its marks, the end of the turn (five in Llama 3's).
TOKENS_PER_MESSAGE = 5
_WITH_REFERENCE = ("dpo", "ipo", "kto")


@dataclass(frozen=True)
class Statistics:
    """Tokens of the training rows, by row. scale: how many times as many rows there are. how: the way of counting."""

    lengths: tuple[int, ...]
    scale: float
    how: str

    @property
    def rows(self) -> int:
        """Count the rows of an epoch."""
        return round(len(self.lengths) * self.scale)

    @property
    def tokens(self) -> int:
        """Count the tokens of an epoch, none cut."""
        return round(sum(self.lengths) * self.scale)

    @property
    def p95(self) -> int:
        """Name the length that 95 % of the rows do not exceed."""
        return sorted(self.lengths)[math.ceil(0.95 * len(self.lengths)) - 1]

    @property
    def longest(self) -> int:
        """Name the length of the longest row."""
        return max(self.lengths)


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

    changes: `key=value` of the config, the cheapest that make it fit; empty if it does or nothing helps.
    """

    model_id: str
    workers: int
    gpu: str | None
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
    mfu: float
    costs: tuple[GpuCost, ...]
    checkpoint_bytes: int
    disk_bytes: int
    vllm: str
    priced: str
    notes: tuple[str, ...]


# Data -------------------------------------------------------------------------------------------------


def count_data(config: FinetuneConfig) -> Statistics | None:
    """Count the tokens of the training rows, within some seconds: of a part of them if they are many.

    With the tokenizer.json of a local model; else about four characters are taken for a token. Rows that
    cannot be used are left out. None if the data lies elsewhere (nothing is downloaded) or is not there.
    """
    paths = [config.train_path] if isinstance(config.train_path, str) else config.train_path
    named = [one if isinstance(one, str) else one.path for one in paths]
    if any(storage.is_remote(path) or path.startswith("hf://") for path in named):
        return None
    if any(not any(sign in path for sign in "*?[") and not Path(path).expanduser().is_file() for path in named):
        return None
    count, how = _counter(config)
    pieces = [
        (source.weight, piece) for source in rows.find_sources(config.train_path) for piece in rows.cut(source.uri)
    ]
    lengths: list[int] = []
    read = 0
    until = time.monotonic() + COUNTING_SECONDS
    for _, piece in pieces:
        if lengths and time.monotonic() > until:
            break
        lengths += [length for row in _good_rows(piece, config) for length in count(row)]
        read += 1
    if not lengths:
        return None
    part = "" if read == len(pieces) else f", from {read / len(pieces):.0%} of the data"
    return Statistics(tuple(lengths), sum(weight for weight, _ in pieces) / read, how + part)


def _good_rows(piece: rows.Piece, config: FinetuneConfig) -> Iterator[Row]:
    labels = config.classifier_config.label_tokens if config.classifier_config else ()
    for where, raw in rows.read_piece(piece):
        if isinstance(raw, DataError):
            continue
        try:
            yield parse_row(raw, where, config.task, labels)[0]
        except DataError:
            continue


def _counter(config: FinetuneConfig):
    """Make a function from a row to the tokens of its one or two sequences, and say how it counts."""
    file = model_folder(config) / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        how = f"contents by the model's tokenizer, and {TOKENS_PER_MESSAGE} tokens per message for its template"

        def tokens(texts: list[str]) -> int:
            return sum(len(one.ids) for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    else:
        how = f"{CHARACTERS_PER_TOKEN} characters taken for a token, and {TOKENS_PER_MESSAGE} per message added"

        def tokens(texts: list[str]) -> int:
            return math.ceil(sum(map(len, texts)) / CHARACTERS_PER_TOKEN)

    def of_messages(messages: list[dict[str, Any]], extra: str) -> int:
        texts = [message.get("content") or "" for message in messages]
        texts += [
            str(message[key]) for message in messages for key in ("reasoning_content", "tool_calls") if message.get(key)
        ]
        return tokens([*texts, extra]) + TOKENS_PER_MESSAGE * len(messages)

    def count(row: Row) -> list[int]:
        if row.messages is None:
            return [tokens([row.text or ""]) + 1]
        extra = str(row.tools) if row.tools else ""
        return [of_messages(messages, extra) for messages in (row.messages, row.rejected) if messages is not None]

    return count, how


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


def _work(config: FinetuneConfig, data: Statistics, context: int) -> tuple[int, int, int, int]:
    """Count steps, real tokens and computed positions of the run, and the longest sequence."""
    lengths = [min(length, context) for length in data.lengths if config.truncation != "drop" or length <= context]
    if not lengths:
        raise ConfigError(f"context_length: {context} is shorter than every row, and truncation: drop leaves none")
    micro = config.train_batch_size_per_device
    pairs = 2 if config.task == "preference_tuning" else 1
    tokens = sum(lengths)
    if config.padding == "packed":
        sequences, positions, longest = math.ceil(tokens / context), tokens, context
    elif config.padding == "max_length":
        sequences, positions, longest = len(lengths) / pairs, context * len(lengths), context
    else:
        batches = [lengths[k : k + micro * pairs] for k in range(0, len(lengths), micro * pairs)]
        sequences, positions, longest = len(lengths) / pairs, sum(max(b) * len(b) for b in batches), max(lengths)
    steps = math.ceil(sequences * data.scale / config.global_batch_size)
    epochs = config.num_epochs or math.ceil(config.min_update_steps / steps)
    total = min(steps * epochs, config.max_steps or steps * epochs)
    share = data.scale * total / steps
    return total, round(tokens * share), round(positions * share), longest


def hardware_in(config: FinetuneConfig) -> tuple[int, Gpu] | None:
    """Read the hardware from `worker_resources: {accelerator_type:A10G: ...}`; None if none is named there."""
    named = [name.partition(":")[2] for name in config.worker_resources if name.startswith("accelerator_type:")]
    gpus = read_catalog().gpus
    found = next((gpus[name] for name in named if name in gpus), None)
    return (max(1, config.num_devices), found) if found else None


# The plan ---------------------------------------------------------------------------------------------


def plan(
    config: FinetuneConfig,
    shape: Shape,
    hardware: tuple[int, Gpu] | None = None,
    data: Statistics | None = None,
    *,
    mfu: float = MFU,
    catalog: Catalog | None = None,
) -> Plan:
    """Tell what a run takes: memory, whether it fits, steps, time, money, disk.

    hardware: how many GPUs of which kind; None: as many as the config's num_devices, of every kind in turn.
    mfu: the share of a GPU's peak that is taken to be reached.
    """
    catalog = catalog or read_catalog()
    notes = []
    workers = hardware[0] if hardware else max(1, config.num_devices)
    if workers != max(1, config.num_devices):
        notes.append(f"num_devices is {config.num_devices} in the config; planned for {workers}")
        config = config.resolve(num_devices=workers)
    config = _without_gaps(config, shape, data)
    context = config.context_length
    longest = context
    steps = tokens = positions = flops = None
    if data is not None:
        steps, tokens, positions, longest = _work(config, data, context)
    if shape.context is not None and context > shape.context and config.rope_scaling is None:
        notes.append(f"context_length {context:,} is beyond the model's {shape.context:,} positions")
    mean = sum(n * n for n in data.lengths) / sum(data.lengths) if data else context
    each = flops_per_token(config, shape, min(mean, context))
    if positions is not None:
        flops = each * positions

    need = memory_of(config, shape, workers=workers, length=longest)
    gpu = hardware[1] if hardware else None
    fits = _fits(need, gpu) if gpu else None
    changes, changed = _cheapest_change(config, shape, workers, longest, gpu) if fits is False else ((), None)
    costs = []
    for one in catalog.gpus.values():
        per_second = workers * one.peak * mfu / each
        seconds = positions / per_second if positions is not None else None
        costs.append(
            GpuCost(
                one.name, _fits(need, one), seconds,
                seconds / 3600 * workers * one.price if seconds is not None else None,
                cost_per_million_tokens(workers * one.price, per_second) * (positions / tokens if tokens else 1),
            )
        )  # fmt: skip
    width = 2 if config.dtype == "bfloat16" else 4
    trained = trainable_parameters(config, shape)
    checkpoint = width * (trained if config.is_lora else shape.parameters)
    # The state for continuing: weights, masters and two moments; old and new exist at once, as do checkpoints.
    state = trained * (width + 12 if width == 2 else width + 8)
    if sharding_of(config, shape).offload_optimizer or sharding_of(config, shape).offload_param:
        notes.append(f"the hosts must hold {_gb(workers * need.host)} over all workers, which is not checked")
    if gpu is not None and gpu.note:
        notes.append(f"{gpu.name}: {gpu.note}")
    if data is None:
        notes.append("the data is not counted (not on this machine): steps, time and cost per run are unknown")
    else:
        notes.append(f"tokens: {data.how}")
    return Plan(
        model_id=config.model_id, workers=workers, gpu=gpu.name if gpu else None, context_length=context,
        micro_batch=config.train_batch_size_per_device, longest_row=longest, parameters=shape.parameters,
        trainable_parameters=trained, memory=need, capacity=_capacity(gpu) if gpu else None, fits=fits,
        changes=changes, changed_memory=changed, steps=steps, tokens=tokens, positions=positions,
        flops_per_token=each, flops=flops, mfu=mfu, costs=tuple(costs), checkpoint_bytes=checkpoint,
        disk_bytes=checkpoint * (config.num_checkpoints_to_keep + 1) + 2 * state,
        vllm=vllm_serves(config.lora_config) if config.is_lora else "yes", priced=catalog.priced, notes=tuple(notes),
    )  # fmt: skip


def _without_gaps(config: FinetuneConfig, shape: Shape, data: Statistics | None) -> FinetuneConfig:
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


def _capacity(gpu: Gpu) -> int:
    return int(gpu.memory * (1 - FRAGMENTED))


def _fits(need: Memory, gpu: Gpu) -> bool:
    return need.total <= _capacity(gpu)


def _cheapest_change(
    config: FinetuneConfig, shape: Shape, workers: int, length: int, gpu: Gpu
) -> tuple[tuple[str, ...], Memory | None]:
    """Find the changes that make a run fit, cheapest first; return them as `key=value`, with the memory then.

    Each is tried on top of those before it; those that turn out not to be needed are taken back.
    """

    def applied(changes: Sequence[tuple[str, dict[str, Any]]]) -> tuple[FinetuneConfig, int, Memory]:
        changed, gpus = config, workers
        for _, values in changes:
            changed = changed.resolve(**values)
            gpus = values.get("num_devices", gpus)
        return changed, gpus, memory_of(changed, shape, workers=gpus, length=length)

    tried: list[tuple[str, dict[str, Any]]] = []
    for change in _possible_changes(config, shape, workers):
        # A change of the same keys replaces the earlier one.
        tried = [one for one in tried if not set(one[1]) & set(change[1])] + [change]
        if _fits(applied(tried)[2], gpu):
            break
    else:
        return (), None
    for one in list(tried):
        without = [other for other in tried if other is not one]
        if without and _fits(applied(without)[2], gpu):
            tried = without
    return tuple(text for text, _ in tried), applied(tried)[2]


def _possible_changes(config: FinetuneConfig, shape: Shape, workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """List changes from the cheapest to the dearest, as (text, values)."""
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
    elif not now.offload_param:
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
        if workers < count <= MOST_GPUS:
            values = {"num_devices": count, "quantization": config.quantization, "lora_config": config.lora_config}
            sharded = "zero_2" if config.quantization else "zero_3"
            yield f"num_devices={count} deepspeed={sharded}", {**values, "deepspeed": sharded}


def fit(config: FinetuneConfig, shape: Shape, hardware: tuple[int, Gpu], data: Statistics | None = None):
    """Find the fastest settings that fit, with the same rows per update; None if none do.

    Speeds are not measured but ordered: moving weights to the host is slower than moving optimizer states, that
    than sharing out the weights, that than recomputing activations, and that than smaller micro batches.
    """
    workers, gpu = hardware
    config = _without_gaps(config.resolve(num_devices=workers), shape, data)
    length = config.context_length if data is None else _work(config, data, config.context_length)[3]
    rows_per_device = config.train_batch_size_per_device * config.gradient_accumulation_steps
    micros = [n for n in range(rows_per_device, 0, -1) if rows_per_device % n == 0]
    shared = ["zero_3", "zero_3_offload_optim", "zero_3_offload_optim+param"] if config.quantization is None else []
    shardings = [None, "zero_1", "zero_2", *shared] if workers > 1 else [None, *shared[1:]]
    for sharding in shardings:
        for checkpointing in (False, True):
            for micro in micros:
                tried = config.resolve(
                    deepspeed=sharding, gradient_checkpointing=checkpointing, train_batch_size_per_device=micro,
                    gradient_accumulation_steps=rows_per_device // micro,
                )  # fmt: skip
                if _fits(memory_of(tried, shape, workers=workers, length=length), gpu):
                    return tried
    return None


# Telling ----------------------------------------------------------------------------------------------


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _dollars(amount: float) -> str:
    return f"${amount:,.2f}" if amount >= 0.1 else f"${amount:.2g}"


def plan_rows(told: Plan) -> list[list[str]]:
    """Lay a plan out as lines of a table: what, how much, and what of it."""
    need = told.memory
    share = told.trainable_parameters / told.parameters
    lines = [
        ["parameters", f"{told.parameters:,}", f"{told.trainable_parameters:,} trained ({share:.2%})"],
        ["batch", f"{told.micro_batch} x {told.longest_row:,} tokens", f"per device; context {told.context_length:,}"],
    ]
    for name, size in need.terms.items():
        lines.append([name, _gb(size), "the largest" if name == need.largest else ""])
    lines.append(["memory per GPU", _gb(need.total), f"of {_gb(told.capacity)} usable" if told.capacity else ""])
    lines.append(["memory per worker on the host", _gb(need.host), ""])
    if told.steps is not None:
        lines.append(["steps", f"{told.steps:,}", f"{told.tokens:,} tokens, {told.positions:,} with padding"])
        lines.append(["FLOPs", f"{told.flops:.3g}", f"{told.flops_per_token:.3g} per token, recomputing not counted"])
    lines.append(["disk", _gb(told.disk_bytes), f"{_gb(told.checkpoint_bytes)} per checkpoint"])
    lines.append(["vLLM can serve it", told.vllm.split(":")[0], told.vllm.partition(": ")[2]])
    return lines


def price_rows(told: Plan) -> list[list[str]]:
    """Lay time and cost out by GPU: name, whether it fits, time, cost of the run, cost per million tokens."""
    return [
        [
            f"{told.workers}x{one.gpu}", "yes" if one.fits else "no",
            "" if one.seconds is None else _duration(one.seconds), "" if one.cost is None else _dollars(one.cost),
            _dollars(one.cost_per_million_tokens),
        ]
        for one in told.costs
    ]  # fmt: skip


def verdict(told: Plan) -> str:
    """Say in one sentence whether the run fits, and what would make it."""
    need = told.memory
    if told.fits is None:
        fitting = [one.gpu for one in told.costs if one.fits]
        return f"it needs {_gb(need.total)} per GPU: it fits {', '.join(fitting) or 'no GPU of the catalog'}"
    where = f"{told.workers}x{told.gpu}"
    if told.fits:
        return f"it fits {where}: {_gb(need.total)} of {_gb(told.capacity)} usable per GPU"
    short = (
        f"it does not fit {where}: {_gb(need.total)} per GPU, {_gb(told.capacity)} usable, most of it {need.largest}"
    )
    if not told.changes:
        return f"{short}; nothing that this plan knows makes it fit"
    return f"{short}; the cheapest change: {' '.join(told.changes)} ({_gb(told.changed_memory.total)})"


def as_json(told: Plan) -> dict[str, Any]:
    """Turn a plan into JSON values; the totals of its memory beside the terms."""
    values = dataclasses.asdict(told)
    for name in ("memory", "changed_memory"):
        if getattr(told, name) is not None:
            values[name] |= {"total": getattr(told, name).total, "largest": getattr(told, name).largest}
    return values | {"verdict": verdict(told)}
