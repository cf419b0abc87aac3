"""Bytes per GPU and host that a run needs, told from the config and the model's shape before anything is loaded.

need = memory_of(config, shape, workers=8, length=512)      Memory(weights, gradients, optimizer, ...)

What is taken for granted, and the sources:
- Weights and gradients are in the run's dtype; AdamW keeps float32 masters of bfloat16 weights and two moments
  (forgebook/training/optimizers.py; DeepSpeed does the same on its partitions).
- DDP's buckets are the gradients (gradient_as_bucket_view) and stay from step to step: torch's reducer.cpp.
- ZeRO 1 shares out the optimizer, 2 the gradients too, 3 the weights too (arXiv 1910.02054). What DeepSpeed holds
  beside that is read from the code of 0.19 (stage_1_and_2.py, stage3.py) and said where it is counted.
- Activations are counted tensor by tensor as autograd keeps them in transformers' decoders; with gradient
  checkpointing one input per layer and one layer in full. Attention kernels but `eager` keep no length^2 matrix.
- The loss is made in chunks of LOSS_CHUNK positions: the full logits never exist (forgebook/training/losses.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from forgebook.config.parse import read_deepspeed_config

if TYPE_CHECKING:
    from forgebook.catalog import Shape
    from forgebook.config.parse import FinetuneConfig

__all__ = ["LOSS_CHUNK", "Memory", "Sharding", "memory_of", "sharding_of", "trainable_parameters"]

# As forgebook.training.losses.CHUNK, which cannot be imported without torch; a test holds them equal.
LOSS_CHUNK = 256
# CUDA context, cuBLAS and NCCL workspaces; an allowance, not a measurement.
CONTEXT_BYTES = 2**30
# Python, torch and CUDA's libraries in a worker's host memory; an allowance, too.
PROCESS_BYTES = 2 * 2**30
# NF4 with double quantisation: half a byte, a byte of scale per 64 weights, four bytes per 256 of these.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
INT8_BYTES = 1.0


@dataclass(frozen=True)
class Memory:
    """Bytes at a step's peak, of one GPU; host: of one worker's host memory.

    activations: of the forward and backward pass, or what the optimizer's step holds at once if that is more.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    host: int

    @property
    def terms(self) -> dict[str, int]:
        """Name the terms that add up to the GPU's total."""
        names = ("weights", "gradients", "optimizer", "activations", "buffers")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        """Add the terms up, in bytes."""
        return sum(self.terms.values())

    @property
    def largest(self) -> str:
        """Name the largest term."""
        return max(self.terms, key=self.terms.__getitem__)


@dataclass(frozen=True)
class Sharding:
    """What DeepSpeed shares out and moves to the host; stage 0: plain data parallelism. Sizes in elements.

    bucket: of gradients that are reduced together; buckets: buffers of that size. live: parameters gathered at a
    time; step: masters updated at a time.
    """

    stage: int = 0
    offload_optimizer: bool = False
    offload_param: bool = False
    bucket: int = 0
    buckets: int = 0
    live: int = 0
    step: int = 0


def sharding_of(config: FinetuneConfig, shape: Shape) -> Sharding:
    """Read a config's DeepSpeed file; `auto` as accelerate fills it in."""
    settings = read_deepspeed_config(config)
    if settings is None:
        return Sharding()
    zero: dict[str, Any] = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    bucket = zero.get("reduce_bucket_size", 500_000_000)
    bucket = shape.hidden**2 if bucket == "auto" else int(bucket)
    # With overlap, one is filled while the other is on its way; ZeRO-3 has one.
    buckets = 2 if stage < 3 and zero.get("overlap_comm", False) else 1

    def elements(name: str) -> int:
        value = zero.get(name, 1_000_000_000)
        return 1_000_000_000 if value == "auto" else int(value)

    return Sharding(
        stage,
        _moves(zero.get("offload_optimizer")),
        _moves(zero.get("offload_param")) and stage == 3,
        bucket,
        buckets if zero.get("contiguous_gradients", True) and stage else 0,
        elements("stage3_max_live_parameters"),
        elements("sub_group_size"),
    )


def _moves(block: dict[str, Any] | None) -> bool:
    return bool(block) and block.get("device", "none") != "none"


# Parameters -------------------------------------------------------------------------------------------


def trainable_parameters(config: FinetuneConfig, shape: Shape) -> int:
    """Count the parameters that are trained: all, or those of the adapter."""
    lora = config.lora_config
    if lora is None:
        return shape.parameters
    count = sum(_adapter_size(rank, inputs, outputs, lora) for _, rank, inputs, outputs in _targets(lora, shape))
    count += _expert_adapters(lora, shape)
    saved = lora.get("modules_to_save") or []
    tables = [name for name in ("embed_tokens", "lm_head") if name in saved]
    count += shape.embedding_parameters * len(tables)
    if config.classifier_config is not None and not tables and "trainable_token_indices" not in lora:
        # One row per label, in the embeddings and, if it is a layer of its own, in the output layer.
        count += len(config.classifier_config.label_tokens) * shape.hidden * (1 if shape.tied else 2)
    return count


def _adapter_size(rank: int, inputs: int, outputs: int, lora: dict[str, Any]) -> int:
    extras = (outputs if lora.get("use_dora") else 0) + (outputs if lora.get("lora_bias") else 0)
    return rank * (inputs + outputs) + extras


def _targets(lora: dict[str, Any], shape: Shape) -> list[tuple[str, int, int, int]]:
    """List what gets an adapter, as (full name, rank, inputs, outputs)."""
    wanted = lora.get("target_modules") or ["q_proj", "v_proj"]
    layers = lora.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    found = []
    for layer in range(shape.layers):
        for name, one in shape.linears.items():
            holder = "self_attn" if one.holder == "attention" else "mlp"
            full = f"model.layers.{layer}.{holder}.{name}"
            if (layers is None or layer in layers) and _is_target(full, wanted):
                found.append((full, _rank_of(full, lora), one.inputs, one.outputs))
    for full, inputs, outputs in (
        ("model.embed_tokens", shape.vocab, shape.hidden),
        ("lm_head", shape.hidden, shape.vocab),
    ):
        if wanted != "all-linear" and layers is None and _is_target(full, wanted):
            found.append((full, _rank_of(full, lora), inputs, outputs))
    excluded = lora.get("exclude_modules") or []
    return [one for one in found if not _is_target(one[0], excluded)]


def _is_target(full: str, wanted: str | list[str]) -> bool:
    """Tell, as PEFT does, whether a module is named: a pattern is of the whole name, a list of its ends."""
    if isinstance(wanted, str):
        return wanted == "all-linear" or re.fullmatch(wanted, full) is not None
    return any(full == name or full.endswith(f".{name}") for name in wanted)


def _rank_of(full: str, lora: dict[str, Any]) -> int:
    for pattern, rank in (lora.get("rank_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", full):
            return rank
    return lora.get("r", 8)


def _expert_adapters(lora: dict[str, Any], shape: Shape) -> int:
    """Count the adapters of a mixture's experts and router, which PEFT adds for all-linear."""
    if shape.experts == 1 or lora.get("target_modules") != "all-linear":
        return 0
    rank = lora.get("r", 8)
    # Gate and up are one tensor, whose adapter has twice the rank; each expert has its own.
    gate_up = 2 * rank * (shape.hidden + 2 * shape.intermediate)
    down = rank * (shape.intermediate + shape.hidden)
    router = rank * (shape.hidden + shape.experts)
    return shape.layers * (shape.experts * (gate_up + down) + router)


# Bytes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """What the terms are told from. width: bytes of a weight; trained: parameters."""

    config: FinetuneConfig
    shape: Shape
    sharding: Sharding
    workers: int
    width: int
    trained: int
    length: int
    on_gpu: bool

    def shared(self, size: int, stage: int) -> int:
        """Tell this worker's part of what is shared out from a stage of ZeRO on."""
        return size // self.workers if self.sharding.stage >= stage else size

    @property
    def accumulates(self) -> bool:
        return self.config.gradient_accumulation_steps > 1

    @property
    def rows(self) -> int:
        return self.config.train_batch_size_per_device * (2 if self.config.task == "preference_tuning" else 1)

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def memory_of(config: FinetuneConfig, shape: Shape, *, workers: int, length: int, on_gpu: bool = True) -> Memory:
    """Tell the bytes of one GPU, and of one worker's host, at the peak of a step.

    config: with its batch size chosen. length: tokens of the longest row of a batch. on_gpu: false for a worker
    without one, whose memory is the host's own and where buffers count as far as they are written to.
    """
    sharding = sharding_of(config, shape)
    if not on_gpu:  # there is nowhere to move anything to
        sharding = replace(sharding, offload_optimizer=False, offload_param=False)
    width = 2 if config.dtype == "bfloat16" else 4
    trained = trainable_parameters(config, shape)
    run = _Run(config, shape, sharding, max(1, workers), width, trained, length, on_gpu)

    whole = _base_bytes(config, shape, width) + (trained * width if config.is_lora else 0)
    weights = 0 if sharding.offload_param else run.shared(whole, 3)
    gathered = 0
    if sharding.stage == 3 and (workers > 1 or sharding.offload_param):
        # The parameters in use are gathered beside this worker's part, at least the largest table.
        gathered = min(whole, max(shape.embedding_parameters, sharding.live) * width)
    # ZeRO-1 moves each gradient into a bucket as it comes and keeps its part of the sum, as ZeRO-2 does; but micro
    # batches before the last one leave it whole gradients.
    gradients = run.shared(trained * width, 2 if run.accumulates else 1)
    moments = 2 if config.optimizer == "adamw_8bit" else 8
    # DeepSpeed clones masters out of float32 weights, too (ZeRO-3 would not, but compares a device with its name).
    has_masters = width == 2 or sharding.stage > 0
    optimizer = run.shared(trained * (moments + 4 * has_masters), 1)
    buffers = _buffers(run)
    held = gathered + gradients + buffers
    activations = max(gathered + _backward(run, gradients, buffers), _step(run), held) - held

    host = PROCESS_BYTES
    if sharding.offload_param:
        host += whole // run.workers
    if sharding.offload_optimizer:
        host += optimizer + run.shared(4 * trained, 1)
        optimizer = 0
    if sharding.stage < 3 and config.quantization is None:
        host = max(host, PROCESS_BYTES + whole)  # loaded on the host first, whole
    if sharding.offload_optimizer and sharding.stage == 3:
        gradients = 0
    buffers += CONTEXT_BYTES if on_gpu else 0
    return Memory(weights + gathered, gradients, optimizer, activations, buffers, host)


def _buffers(run: _Run) -> int:
    """Tell the bytes of the buckets in which DeepSpeed reduces gradients; empty ones take nothing on a CPU."""
    size = run.sharding.bucket * run.sharding.buckets
    return run.width * (size if run.on_gpu else min(size, run.trained))


def _backward(run: _Run, gradients: int, buffers: int) -> int:
    """Tell the bytes of the backward pass at its fullest, with gradients and buffers.

    It begins with all activations and the output layer's gradient, made by the loss chunk by chunk. It ends with the
    first layer's, then the embeddings' gradient on its way to the others; a shared table's is the sum of two.
    """
    sharding, bytes_of_all = run.sharding, run.trained * run.width
    lora = run.config.lora_config or {}
    head = run.shape.embedding_parameters * run.width
    head *= not run.config.is_lora or "lm_head" in (lora.get("modules_to_save") or [])
    shared = head * run.shape.tied  # waits for its other half
    kept, beside, layer = _activations(run)
    first = kept + max(_chunk(run), beside) + head
    last = max(layer, head) + shared
    if sharding.stage == 0:
        if run.workers == 1 and not run.accumulates:  # gradients come while activations go, and are not moved
            return max(first, gradients + last - head)
        return gradients + max(first, last)
    # Gradients of several workers' parts lie between each other in a bucket: they are sorted into a copy.
    bucket = min(sharding.bucket, run.trained)
    copy = bucket * run.width * (run.workers > 1)
    if sharding.stage == 3:
        return gradients + buffers + first + copy
    part = run.shared(bytes_of_all, 1)
    earlier = gradients if run.accumulates else 0  # what earlier micro batches left; ZeRO-1 moves it into buckets
    later = earlier if sharding.stage == 2 else 0
    begins = earlier + first + (buffers if run.on_gpu else 0)
    if bucket == run.trained:  # all are reduced together, when the backward pass is over
        return max(begins, later + buffers + max(last, copy, part))
    # The first bucket is reduced when its share of the gradients has come and of the activations has gone.
    filled = buffers if run.on_gpu else bucket * run.width
    reduces = earlier + filled + copy + part + first * (run.trained - bucket) // run.trained
    return max(begins, reduces, later + buffers + part + last)


def _step(run: _Run) -> int:
    """Tell the bytes of the optimizer's step at its fullest, with gradients, without buffers."""
    sharding = run.sharding
    gradients, masters = run.shared(run.trained * run.width, 1), run.shared(run.trained, 1)
    if sharding.offload_optimizer:
        return gradients
    if sharding.stage == 0:  # fused; float32 gradients of all masters at once
        return gradients + 4 * masters * (run.width == 2)
    table = 0 if run.config.is_lora else run.shared(run.shape.embedding_parameters, 3)
    norm = gradients + 8 * min(table, masters)  # of one gradient after the other, in float64
    # Gradients are laid side by side in a copy, which is then made float32. torch's AdamW makes the root of the second
    # moment, and on a CPU a quotient beside it; by then ZeRO-1 and 2 have let go of what they copied.
    group = min(masters, sharding.step) if sharding.stage == 3 else masters
    copies = gradients + group * (4 + 2 * (run.width == 2))
    roots = (1 if run.on_gpu else 2) * (run.config.optimizer == "adamw")
    update = 4 * group * (1 + roots) + (gradients if sharding.stage == 3 else 0)
    return max(norm, copies, update)


def _base_bytes(config: FinetuneConfig, shape: Shape, width: int) -> int:
    """Tell the bytes of the base model, quantised or not."""
    linear = shape.layers * sum(one.inputs * one.outputs for one in shape.linears.values())
    each = {"nf4": NF4_BYTES, "int8": INT8_BYTES, None: width}[config.quantization]
    return int(linear * each + (shape.parameters - linear) * width)


def _activations(run: _Run) -> tuple[int, int, int]:
    """Tell the bytes kept for the backward pass, what that pass makes beside them, and one layer's of both."""
    config, shape, width = run.config, run.shape, run.width
    layer = run.tokens * _kept_per_token(run)
    working = run.tokens * (3 * width * _active_width(shape) + 2 * width * shape.hidden + 8 * shape.hidden)
    if config.attention == "eager":
        square = run.rows * shape.heads * run.length**2
        # The softmax in float32, its copy in the run's dtype, and in the backward pass two gradients of that size.
        layer += square * (4 if width == 4 else 4 + width)
        working += square * 2 * 4
    if config.quantization is not None:  # one layer's weights at a time, unpacked
        working += max(one.inputs * one.outputs for one in shape.linears.values()) * width
    last_norm = run.tokens * shape.hidden * (4 + 3 * width)
    if config.gradient_checkpointing:  # layers are made anew one at a time
        return shape.layers * run.tokens * shape.hidden * width + last_norm, layer + working, layer + working
    return shape.layers * layer + last_norm, working, layer + working


def _active_width(shape: Shape) -> int:
    return shape.intermediate * shape.active_experts


def _kept_per_token(run: _Run) -> int:
    """Tell the bytes that one decoder layer keeps per token, but for length^2 matrices."""
    config, shape, width = run.config, run.shape, run.width
    hidden, inner = shape.hidden, _active_width(shape)
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = shape.family.norms
    # A norm keeps its input in float32, and what its own weight is multiplied with if that is trained.
    kept = norms * hidden * (4 if config.is_lora else 4 + width)
    kept += width * (2 * q + 2 * kv)  # queries, keys, values and what attention made of them
    kept += 3 * width * inner  # gate, its activation, up
    lora = config.lora_config
    if lora is None:
        return kept + width * (2 * hidden + inner)  # what goes into q, k, v; into gate and up; into down
    layer = [(name, rank, inputs) for name, rank, inputs, _ in _targets(lora, shape) if ".layers.0." in name]
    if lora.get("lora_dropout", 0):  # each adapter keeps its own thinned input, and which elements were left
        mask = 1 if run.on_gpu else width  # true or false on a GPU, a factor on a CPU
        kept += sum(inputs * (width + mask) for _, _, inputs in layer)
    else:
        shared = {name.rsplit(".", 1)[-1] for name, _, _ in layer}
        kept += width * hidden * bool(shared & {"q_proj", "k_proj", "v_proj", "qkv_proj"})
        kept += width * hidden * bool(shared & {"gate_proj", "up_proj", "gate_up_proj"})
        kept += width * inner * ("down_proj" in shared)
    return kept + sum(width * rank for _, rank, _ in layer)


def _chunk(run: _Run) -> int:
    """Tell the bytes of a chunk of logits: in the weights' type and in float32."""
    is_plain = not run.shape.family.softcap  # a softcap goes by autograd, which keeps more of a chunk
    return min(LOSS_CHUNK, run.tokens) * run.shape.vocab * (run.width + (4 if is_plain else 16))
