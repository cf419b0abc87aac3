"""Bytes per GPU and host that a run needs, told from the config and the model's shape before anything is loaded.

need = memory_of(config, shape, workers=8, length=512)      Memory(weights, gradients, optimizer, ...)

What is taken for granted, and the sources:
- Weights and gradients are in the run's dtype; AdamW keeps float32 masters of bfloat16 weights and two moments
  (helpers/optimizers.py; DeepSpeed does the same on its partitions).
- ZeRO 1 shares out the optimizer, 2 the gradients too, 3 the weights too (arXiv 1910.02054); under ZeRO-3 the
  parameters in use at a time are gathered, up to stage3_max_live_parameters.
- Activations are counted tensor by tensor as autograd keeps them in transformers' decoders; with gradient
  checkpointing one input per layer and one layer in full. Attention kernels but `eager` keep no length^2 matrix.
- The loss is made in chunks of LOSS_CHUNK positions: the full logits never exist (helpers/losses.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from helpers.config import read_deepspeed_config

if TYPE_CHECKING:
    from helpers.catalog import Shape
    from helpers.config import FinetuneConfig

__all__ = ["LOSS_CHUNK", "Memory", "Sharding", "memory_of", "sharding_of", "trainable_parameters"]

# As helpers.losses.CHUNK, which cannot be imported without torch; a test holds them equal.
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
    """What DeepSpeed shares out and moves to the host; stage 0: plain data parallelism. Sizes in elements."""

    stage: int = 0
    offload_optimizer: bool = False
    offload_param: bool = False
    bucket: int = 0
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
    if stage < 3 and zero.get("overlap_comm", False):
        bucket *= 2  # one is filled while the other is on its way

    def elements(name: str) -> int:
        value = zero.get(name, 1_000_000_000)
        return 1_000_000_000 if value == "auto" else int(value)

    return Sharding(
        stage,
        _moves(zero.get("offload_optimizer")),
        _moves(zero.get("offload_param")) and stage == 3,
        bucket if zero.get("contiguous_gradients", True) and stage else 0,
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
    adapter = trained if config.is_lora else 0
    workers = max(1, workers)
    # Of what is shared out, this worker's part.
    of_weights, of_gradients, of_optimizer = (workers if sharding.stage >= stage else 1 for stage in (3, 2, 1))

    whole = _base_bytes(config, shape, width) + adapter * width
    weights = whole // of_weights
    if sharding.stage == 3 and (workers > 1 or sharding.offload_param):
        # The parameters in use are gathered beside this worker's part, at least the largest table.
        gathered = min(whole, max(shape.embedding_parameters, sharding.live) * width)
        weights = gathered + (0 if sharding.offload_param else weights)
    gradients = trained * width // of_gradients
    moments = 2 if config.optimizer == "adamw_8bit" else 8
    keeps_masters = width == 2 or sharding.stage > 0
    optimizer = trained * (moments + 4 * keeps_masters) // of_optimizer
    # The step makes float32 gradients of all masters at once; ZeRO-3 of a group of them.
    step = 4 * trained // of_optimizer if width == 2 else 0
    step = min(step, 4 * sharding.step) if sharding.stage == 3 else step
    mask = 1 if on_gpu else width  # of dropout: true or false on a GPU, a factor on a CPU
    kept, layer = _activations(config, shape, width, length, mask)
    kept += _loss(config, shape, width, length)
    trains_head = not config.is_lora or "lm_head" in (config.lora_config.get("modules_to_save") or [])
    head = shape.embedding_parameters * width * trains_head
    # The output layer's gradient beside the others: before a shared one is handed out, and where two are added up.
    extra = head * ((sharding.stage >= 2) + (shape.tied or config.gradient_accumulation_steps > 1))
    if sharding.stage == 0 and workers == 1 and config.gradient_accumulation_steps == 1:
        # Gradients come while activations go: the peak is at the start of the backward pass, or at its end.
        activations = max(max(kept + head, gradients + extra + layer) - gradients, step)
    else:
        activations = max(kept + extra, step)
    held = sharding.bucket if on_gpu else min(sharding.bucket, trained)
    buffers = held * width + (CONTEXT_BYTES if on_gpu else 0)

    host = PROCESS_BYTES
    if sharding.offload_param:
        host += whole // workers
    if sharding.offload_optimizer:
        host += optimizer + 4 * trained // of_optimizer
        gradients, optimizer = (0 if sharding.stage == 3 else gradients), 0
    if sharding.stage < 3 and config.quantization is None:
        host = max(host, PROCESS_BYTES + whole)  # loaded on the host first, whole
    return Memory(weights, gradients, optimizer, activations, buffers, host)


def _base_bytes(config: FinetuneConfig, shape: Shape, width: int) -> int:
    """Tell the bytes of the base model, quantised or not."""
    linear = shape.layers * sum(one.inputs * one.outputs for one in shape.linears.values())
    each = {"nf4": NF4_BYTES, "int8": INT8_BYTES, None: width}[config.quantization]
    return int(linear * each + (shape.parameters - linear) * width)


def _activations(config: FinetuneConfig, shape: Shape, width: int, length: int, mask: int) -> tuple[int, int]:
    """Tell the bytes kept for the backward pass and that pass's own, of the whole decoder; and of one layer."""
    rows = config.train_batch_size_per_device * (2 if config.task == "preference_tuning" else 1)
    tokens = rows * length
    layer = tokens * _kept_per_token(config, shape, width, mask)
    working = tokens * (3 * width * _active_width(shape) + 2 * width * shape.hidden + 8 * shape.hidden)
    if config.attention == "eager":
        square = rows * shape.heads * length * length
        # The softmax in float32, its copy in the run's dtype, and in the backward pass two gradients of that size.
        layer += square * (4 if width == 4 else 4 + width)
        working += square * 2 * 4
    if config.quantization is not None:  # one layer's weights at a time, unpacked
        working += max(one.inputs * one.outputs for one in shape.linears.values()) * width
    if config.gradient_checkpointing:
        kept = shape.layers * tokens * shape.hidden * width + layer
    else:
        kept = shape.layers * layer
    return kept + working, layer + working


def _active_width(shape: Shape) -> int:
    return shape.intermediate * shape.active_experts


def _kept_per_token(config: FinetuneConfig, shape: Shape, width: int, mask: int) -> int:
    """Tell the bytes that one decoder layer keeps per token, but for length^2 matrices. mask: bytes per element."""
    hidden, inner = shape.hidden, _active_width(shape)
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 4 if shape.model_type in ("gemma2", "gemma3_text") else 2
    # A norm keeps its input in float32, and what its own weight is multiplied with if that is trained.
    kept = norms * hidden * (4 if config.is_lora else 4 + width)
    kept += width * (2 * q + 2 * kv)  # queries, keys, values and what attention made of them
    kept += 3 * width * inner  # gate, its activation, up
    lora = config.lora_config
    if lora is None:
        return kept + width * (2 * hidden + inner)  # what goes into q, k, v; into gate and up; into down
    layer = [(name, rank, inputs) for name, rank, inputs, _ in _targets(lora, shape) if ".layers.0." in name]
    if lora.get("lora_dropout", 0):  # each adapter keeps its own thinned input, and which elements were left
        kept += sum(inputs * (width + mask) for _, _, inputs in layer)
    else:
        shared = {name.rsplit(".", 1)[-1] for name, _, _ in layer}
        kept += width * hidden * bool(shared & {"q_proj", "k_proj", "v_proj", "qkv_proj"})
        kept += width * hidden * bool(shared & {"gate_proj", "up_proj", "gate_up_proj"})
        kept += width * inner * ("down_proj" in shared)
    return kept + sum(width * rank for _, rank, _ in layer)


def _loss(config: FinetuneConfig, shape: Shape, width: int, length: int) -> int:
    """Tell the bytes of the last norm and of the chunk of logits."""
    rows = config.train_batch_size_per_device * (2 if config.task == "preference_tuning" else 1)
    tokens = rows * length
    is_plain = shape.model_type != "gemma2"  # a softcap goes by autograd, which keeps more of a chunk
    chunk = min(LOSS_CHUNK, tokens) * shape.vocab * (width + (4 if is_plain else 16))
    hidden = tokens * shape.hidden * (4 + 3 * width)
    return chunk + hidden
