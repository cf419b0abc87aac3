"""Bytes per GPU and host that a run needs, computed from the config and the model's shape before anything is loaded.

    need = memory_of(config, shape, workers=8, length=512)      Memory(weights, gradients, optimizer, ...)

Assumptions, and their sources:
- Weights and gradients are in the run's dtype; AdamW keeps float32 masters of 16-bit weights and two moments
  (forgebook/training/optimizers.py; DeepSpeed does the same on its partitions).
- DDP's buckets are the gradients (gradient_as_bucket_view) and stay from step to step: torch's reducer.cpp.
- ZeRO 1 shards the optimizer, 2 the gradients too, 3 the weights too (arXiv 1910.02054). What DeepSpeed holds in
  addition was read from the code of 0.19 (stage_1_and_2.py, stage3.py) and is named where it is counted.
- Activations are counted tensor by tensor as autograd keeps them in transformers' decoders; with gradient
  checkpointing one input per layer and one layer in full. Attention kernels except `eager` keep no length^2 matrix.
- The loss is computed in chunks of `loss_chunk` positions: the full logits never exist (forgebook/training/losses.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from forgebook.config.blocks import labels_of
from forgebook.data.batching import group_size
from forgebook.models.adapters import needs_whole_base
from forgebook.planning.image_memory import at_tower, with_tower
from forgebook.planning.loss_chunk import loss_chunk
from forgebook.planning.mlp_memory import mlp_bytes
from forgebook.planning.sharding import Sharding, sharding_of
from forgebook.planning.trainable import adapted_layers, trained_parameters, trains_label_rows

if TYPE_CHECKING:
    from forgebook.catalog import Shape
    from forgebook.config.schema import FinetuneConfig
    from forgebook.layer_counts import LayerKind

__all__ = ["WIDTHS", "Memory", "memory_of"]

# CUDA context, cuBLAS and NCCL workspaces; an allowance, not a measurement.
CONTEXT_BYTES = 2**30
# Python, torch and CUDA's libraries in a worker's host memory; an allowance, too.
PROCESS_BYTES = 2 * 2**30
# Without a GPU: those libraries, as measured, and the bytes that malloc keeps per byte of activations: glibc (2.36)
# does not give a freed block to the next aligned request of its size. Measured on SmolLM2, within 5% of the process.
CPU_PROCESS_BYTES = 700_000_000
CPU_HELD = 0.8
# NF4 with double quantization: half a byte, a byte of scale per 64 weights, four bytes per 256 of these.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
INT8_BYTES = 1.0
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the peak of an optimizer step; host: of one worker's host memory.

    activations: of the forward and backward pass, or what the optimizer holds while it steps if that is more. overhead:
    what no tensor holds: CUDA's context; of a worker without GPU its libraries and the pages that malloc keeps.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    overhead: int
    host: int

    @property
    def terms(self) -> dict[str, int]:
        """Return the terms that add up to the GPU's total, by name."""
        names = ("weights", "gradients", "optimizer", "activations", "buffers", "overhead")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        """Sum the terms, in bytes."""
        return sum(self.terms.values())

    @property
    def tensors(self) -> int:
        """Sum the terms of tensors alone, in bytes."""
        return self.total - self.overhead

    @property
    def largest(self) -> str:
        """Name the largest term."""
        return max(self.terms, key=self.terms.__getitem__)


@dataclass(frozen=True)
class _Run:
    """What the terms are computed from.

    width: bytes of a weight; trained: parameters; labels: of a classifier; micro_batch: examples. lengths: of the
    examples, the longest first, where a batch has no padding.
    """

    config: FinetuneConfig
    shape: Shape
    sharding: Sharding
    workers: int
    width: int
    trained: int
    labels: int
    micro_batch: int
    length: int
    on_gpu: bool
    lengths: Sequence[int]

    def shard(self, size: int, stage: int) -> int:
        """Return this worker's part of what ZeRO shards from a stage on."""
        return size // self.workers if self.sharding.stage >= stage else size

    @property
    def accumulates(self) -> bool:
        return self.config.gradient_accumulation_steps > 1

    @property
    def is_fused(self) -> bool:
        """Return whether Liger's kernels run; with auto that is known only where the run starts."""
        return self.config.liger_kernel.enabled is True

    @property
    def sequences(self) -> int:
        """Count the sequences of a micro batch: a preference pair is two."""
        return self.micro_batch * group_size(self.config.task)

    @property
    def tokens(self) -> int:
        """Count the positions of a micro batch whose activations this worker holds."""
        if self.lengths:  # batches are grouped by length: one holds the longest examples
            return sum(self.lengths[: self.sequences])
        return self.sequences * -(-self.length // self.config.sequence_parallel)

    @property
    def fuses_lora(self) -> bool:
        """Return whether adapters run as one product (models/fused_lora.py), which keeps nothing of rank r."""
        others = [(self.config.lora_config or {}).get(key) for key in ("lora_dropout", "use_dora")]
        return not any(others) and self.config.quantization is None and self.sharding.stage < 3


def memory_of(
    config: FinetuneConfig, shape: Shape, *, workers: int, length: int, on_gpu: bool = True, lengths: Sequence[int] = ()
) -> Memory:
    """Compute the bytes of one GPU, and of one worker's host, at the peak of an optimizer step.

    config: with its batch size chosen. length: tokens of the longest sequence of a batch. on_gpu: false for a worker
    without one, whose memory is the host's own and where a buffer counts only as far as it is written to. lengths: of
    the examples, the longest first, where batches have no padding (`feasibility.unpadded_lengths`).

    Raises ValueError if the batch size is not chosen.
    """
    if config.train_batch_size_per_device is None:
        raise ValueError("train_batch_size_per_device is not chosen yet: plan a config without gaps")
    sharding = sharding_of(config, shape.hidden)
    if not on_gpu:  # the worker's memory is the host's: offloading has nowhere to move anything to
        sharding = replace(sharding, offload_optimizer=False, offload_param=False)
    width, labels = WIDTHS[config.dtype], len(labels_of(config.classifier_config))
    trained = trained_parameters(config, shape)
    run = _Run(
        config, shape, sharding, max(1, workers), width, trained, labels, config.train_batch_size_per_device, length,
        on_gpu, lengths,
    )  # fmt: skip

    if sharding.is_fsdp:
        need = _fsdp_memory(run)
        return need if on_gpu else replace(need, host=need.total)
    whole = _base_bytes(shape, config.quantization, width) + (trained * width if config.is_lora else 0)
    weights = 0 if sharding.offload_param else run.shard(whole, 3)
    gathered = 0
    if sharding.stage == 3 and (workers > 1 or sharding.offload_param):
        # The parameters in use are gathered in addition to this worker's part, at least the largest table.
        gathered = min(whole, max(shape.embedding_parameters, sharding.live) * width)
    # ZeRO-1 moves each gradient into a bucket as it comes and keeps its part of the sum, as ZeRO-2 does; but micro
    # batches before the last one leave it whole gradients.
    gradients = run.shard(trained * width, 2 if run.accumulates else 1)
    optimizer = _optimizer_bytes(run)
    buffers = _buffers(run)
    held = gathered + gradients + buffers
    # The peak is in the backward pass or in the optimizer; what is counted under other names is taken off again.
    activations = max(gathered + _backward(run, gradients, buffers), _step(run), held) - held

    host = PROCESS_BYTES
    if sharding.offload_param:
        host += whole // run.workers
    if sharding.offload_optimizer:
        host += optimizer + run.shard(4 * trained, 1)  # DeepSpeed adds up float32 gradients on the host
        optimizer = 0
    if sharding.stage < 3 and config.quantization is None:
        host = max(host, PROCESS_BYTES + whole)  # loaded on the host first, whole
    if config.gradient_checkpointing == "offload":
        host += shape.layers * run.tokens * shape.hidden * width
    gradients = 0 if sharding.offload_optimizer and sharding.stage == 3 else gradients
    # Gradients and the optimizer's state, which come after the first activations, take pages that those have left.
    pages = max(0, int(CPU_HELD * activations) - gradients - optimizer)
    overhead = CONTEXT_BYTES if on_gpu else CPU_PROCESS_BYTES + pages
    need = Memory(weights + gathered, gradients, optimizer, activations, buffers, overhead, host)
    return need if on_gpu else replace(need, host=need.total)


def _fsdp_memory(run: _Run) -> Memory:
    """Count what FSDP2 takes, read from the code of torch 2.13 (_fsdp_param_group.py, _fsdp_collectives.py).

    Masters, gradients and moments are float32, this worker's part. Gathered, in the run's dtype: embeddings and output
    layer for the whole pass; a layer while it computes, or all until their backward passes; a copy in the collective's
    buffer. Gradients are copied into a float32 buffer to be reduced, layer by layer, the embeddings' last.
    """
    shape, width, workers = run.shape, run.width, run.workers
    is_full = not run.config.is_lora
    tables = shape.embedding_parameters * (1 if shape.tied else 2)
    layer = (shape.parameters - tables) // shape.layers
    layer_trained = layer if is_full else run.trained // shape.layers
    layer_whole = layer + (0 if is_full else layer_trained)
    weights = (shape.parameters * width * (not is_full) + run.trained * 4) // workers
    gathered = (tables + (1 + (shape.layers if run.sharding.keeps_gathered else 1)) * layer_whole) * width
    gradients = run.trained * 4 if run.accumulates else run.trained * 4 // workers
    optimizer = 8 * run.trained // workers
    lora = run.config.lora_config or {}
    trains_tables = is_full or "lm_head" in (lora.get("modules_to_save") or [])
    table = shape.embedding_parameters * width * (trains_tables or trains_label_rows(lora or None, run.labels))
    saved, working, one_layer = with_tower(_activations(run), run)
    part, earlier = run.trained * 4 // workers, run.trained * 4 * run.accumulates
    first = gathered + earlier + saved + max(_chunk(run), working) + table
    # At the end: the gradient of a shared table is the sum of two, and is then copied into its float32 buffer.
    root = (tables * trains_tables + layer_trained * (not is_full)) * 4
    copies = max(one_layer + table * (1 + shape.tied), table + root)
    last = tables * width + part + root * run.accumulates + copies
    held = gathered + gradients
    activations = max(first, last, held) - held
    pages = max(0, int(CPU_HELD * activations) - gradients - optimizer)
    overhead = CONTEXT_BYTES if run.on_gpu else CPU_PROCESS_BYTES + pages
    host = PROCESS_BYTES + shape.parameters * width // (1 if needs_whole_base(lora) else workers)  # while it is loaded
    if run.sharding.offload_param:  # whole gradients of earlier micro batches wait on the GPU for the last one
        host = max(host, PROCESS_BYTES + weights + part + optimizer)
        weights, optimizer, gradients = 0, 0, earlier
    return Memory(weights + gathered, gradients, optimizer, activations, 0, overhead, host)


def _optimizer_bytes(run: _Run) -> int:
    """Count the bytes of the optimizer's state: its moments, and float32 masters of 16-bit weights."""
    # Muon's matrices are all but the embeddings, and vectors that do not count.
    tables = run.shape.embedding_parameters * (1 if run.shape.tied else 2)
    matrices = max(0.0, 1 - tables / run.shape.parameters)
    # Adafactor's row and column: of an adapter's matrices one side is the rank.
    lora = run.config.lora_config
    shorter_side = int(lora.get("r", 8)) if lora else run.shape.hidden
    moments = {"adamw": 8.0, "muon": 8 - 4 * matrices, "adafactor": 8 / shorter_side}.get(run.config.optimizer, 2.0)
    # DeepSpeed clones masters out of float32 weights, too (ZeRO-3 would not, but compares a device with its name).
    has_masters = run.width == 2 or run.sharding.stage > 0
    return run.shard(int(run.trained * (moments + 4 * has_masters)), 1)


def _buffers(run: _Run) -> int:
    """Count the bytes of the buckets in which DeepSpeed reduces gradients; empty pages take nothing on a CPU."""
    size = run.sharding.bucket * run.sharding.buckets
    return run.width * (size if run.on_gpu else min(size, run.trained))


def _backward(run: _Run, gradients: int, buffers: int) -> int:
    """Count the bytes at the peak of the backward pass, with gradients and buffers.

    It begins with all activations and the output layer's gradient, which the loss computes chunk by chunk. It ends with
    the first layer's activations, then the embeddings' gradient; that of a shared table is the sum of two.
    """
    sharding = run.sharding
    lora = run.config.lora_config or {}
    head = run.shape.embedding_parameters * run.width
    head *= not run.config.is_lora or "lm_head" in (lora.get("modules_to_save") or [])
    shared = head * run.shape.tied  # waits for the other half of its sum
    saved, working, layer = with_tower(_activations(run), run)
    # PEFT trains a label's row in a copy of the whole table, whose gradient is a table, too.
    table = run.shape.embedding_parameters * run.width * trains_label_rows(run.config.lora_config, run.labels)
    first = saved + max(_chunk(run), working) + head + 2 * table
    last = max(layer, head, table) + shared
    if sharding.stage == 0:
        if run.workers == 1 and not run.accumulates:  # gradients come while activations go, and stay where they are
            return max(first, gradients + last - head, at_tower(run))
        return gradients + max(first, last)
    # In a bucket, gradients of several workers' parts are interleaved: DeepSpeed sorts them into a copy.
    bucket = min(sharding.bucket, run.trained)
    copy = bucket * run.width * (run.workers > 1)
    if sharding.stage == 3:
        return gradients + buffers + first + copy
    part = run.shard(run.trained * run.width, 1)
    earlier = gradients if run.accumulates else 0  # from earlier micro batches; ZeRO-1 moves it into buckets
    later = earlier if sharding.stage == 2 else 0
    begins = earlier + first + (buffers if run.on_gpu else 0)
    if bucket == run.trained:  # all are reduced together, when the backward pass is over
        return max(begins, later + buffers + max(last, copy, part))
    # The first bucket is reduced when its share of the gradients has come and of the activations has gone.
    filled = buffers if run.on_gpu else bucket * run.width
    reduces = earlier + filled + copy + part + first * (run.trained - bucket) // run.trained
    return max(begins, reduces, later + buffers + part + last)


def _step(run: _Run) -> int:
    """Count the bytes at the peak of the optimizer's own step, with gradients, without buffers."""
    sharding = run.sharding
    gradients, masters = run.shard(run.trained * run.width, 1), run.shard(run.trained, 1)
    if sharding.offload_optimizer:
        return gradients
    if sharding.stage == 0:  # fused; float32 gradients of all masters at once
        # Adafactor updates one tensor at a time, of which it makes two copies.
        largest = 0 if run.config.is_lora else run.shape.embedding_parameters
        copies = 2 * 4 * largest * (run.config.optimizer == "adafactor")
        return gradients + 4 * masters * (run.width == 2) + copies
    # DeepSpeed computes the norm of one gradient after the other, in float64: the largest tensor decides.
    table = 0 if run.config.is_lora else run.shard(run.shape.embedding_parameters, 3)
    norm = gradients + 8 * min(table, masters)
    # Gradients are flattened into a copy, which is then cast to float32. torch's AdamW allocates the root of the second
    # moment, and on a CPU a quotient as well; by then ZeRO-1 and 2 have freed what they copied.
    group = min(masters, sharding.step) if sharding.stage == 3 else masters
    copies = gradients + group * (4 + 2 * (run.width == 2))
    roots = (1 if run.on_gpu else 2) * (run.config.optimizer == "adamw")
    update = 4 * group * (1 + roots) + (gradients if sharding.stage == 3 else 0)
    return max(norm, copies, update)


def _base_bytes(shape: Shape, quantization: str | None, width: int) -> int:
    """Count the bytes of the base model, quantized or not: embeddings, norms and experts stay in the run's dtype."""
    linear = sum(len(kind.layers) * inputs * outputs for kind in shape.kinds for _, inputs, outputs in kind.linears)
    each = {"nf4": NF4_BYTES, "int8": INT8_BYTES, None: width}[quantization]
    return int(linear * each + (shape.parameters - linear) * width)


def _activations(run: _Run) -> tuple[int, int, int]:
    """Count the bytes saved for the backward pass, what that pass allocates in addition, and one layer's of both."""
    config, shape, width = run.config, run.shape, run.width
    mlps = [mlp_bytes(config.lora_config, shape, kind, width, run.is_fused) for kind in shape.kinds]
    tiled = [mlp * config.tiled_mlp for mlp, _ in mlps]
    layers = [run.tokens * (_saved_per_token(run, kind) - mlp) for kind, mlp in zip(shape.kinds, tiled, strict=True)]
    layer = max(layers)
    all_layers = sum(len(kind.layers) * saved for kind, saved in zip(shape.kinds, layers, strict=True))
    # The backward pass of the MLP holds three gradients of its inner width, that of a norm works in float32. Liger
    # writes those of the MLP over what was saved, and keeps float32 in registers.
    mlp, of_mlp = max(mlps)
    of_mlp = min(run.tokens, shape.hidden) * (mlp + of_mlp) if config.tiled_mlp else run.tokens * of_mlp
    working = of_mlp + run.tokens * (2 * width + 8 * (not run.is_fused)) * shape.hidden
    has_no_kernel = shape.counted is not None and shape.counted.eager
    if config.attention == "eager" or (config.attention == "auto" and has_no_kernel):
        square = run.sequences * shape.heads * run.length**2
        # Saved: the softmax in float32 and its copy in the run's dtype; the backward pass: two gradients of that size.
        layer += square * (4 if width == 4 else 4 + width)
        all_layers += shape.layers * square * (4 if width == 4 else 4 + width)
        working += square * 2 * 4
    if config.quantization is not None:  # bitsandbytes unpacks the weights of one layer at a time
        working += max(inputs * outputs for kind in shape.kinds for _, inputs, outputs in kind.linears) * width
    last_norm = run.tokens * shape.hidden * (4 + 3 * width)
    if config.gradient_checkpointing == "selective":  # saved: each layer's input and what its products return
        returned = [shape.heads * shape.head_dim + sum(outputs for *_, outputs in kind.linears) for kind in shape.kinds]
        kept = [run.tokens * width * (shape.hidden + each) for each in returned]
        all_kept = sum(len(kind.layers) * saved for kind, saved in zip(shape.kinds, kept, strict=True))
        # One layer is complete at a time; what it keeps is counted.
        again = max(0, *(whole - part for whole, part in zip(layers, kept, strict=True))) + working
        return all_kept + last_norm, again, again + max(kept)
    if config.gradient_checkpointing == "offload" and run.on_gpu:  # one layer's input returns while another is used
        return 2 * run.tokens * shape.hidden * width + last_norm, layer + working, layer + working
    if config.gradient_checkpointing:  # saved: each layer's input alone; layers are recomputed one at a time
        return shape.layers * run.tokens * shape.hidden * width + last_norm, layer + working, layer + working
    return all_layers + last_norm, working, layer + working


def _saved_per_token(run: _Run, kind: LayerKind) -> int:
    """Count the bytes that one decoder layer saves per token, except for length^2 matrices."""
    config, shape, width = run.config, run.shape, run.width
    hidden, inner = shape.hidden, shape.inner
    # A norm saves its input in float32, and the normalized input if its own weight is trained. Liger's saves its input
    # as it is, and its gated MLP recomputes the activation of the gate.
    saved = kind.norms * hidden * (width if run.is_fused else 4 if config.is_lora else 4 + width)
    if shape.counted:  # whatever the layers do: what enters a product other than hidden states, and all that leaves one
        products = [(inputs, outputs) for _, inputs, outputs in kind.linears]
        products += [(inputs, outputs) for *_, inputs, outputs in kind.experts] * shape.active_experts
        saved += width * sum(outputs + inputs * (inputs != hidden) for inputs, outputs in products)
    else:
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        saved += width * (2 * q + 2 * kv)  # queries, keys, values and the output of attention
        saved += (2 if run.is_fused else 3) * width * inner  # gate, its activation, up
    lora = config.lora_config
    if lora is None:
        # A trained weight needs its input: that of q, k and v; of gate and up; of down.
        return saved + width * (2 * hidden + inner)
    first = f"{shape.layers_name}.{kind.layers[0]}."
    layer = [(name, rank, inputs) for name, rank, inputs, _ in adapted_layers(lora, shape) if name.startswith(first)]
    if lora.get("lora_dropout", 0):  # each adapter saves its own input after dropout, and the mask
        mask = 1 if run.on_gpu else width  # booleans on a GPU, factors on a CPU
        saved += sum(inputs * (width + mask) for _, _, inputs in layer)
    else:  # adapters of one input share it; that of o is saved as the output of attention
        own = [(name.rpartition("."), inputs) for name, _, inputs in layer]
        shared = {(holder, inputs) for (holder, _, name), inputs in own if name != "o_proj"}
        saved += width * sum(inputs for _, inputs in shared)
    return saved + (0 if run.fuses_lora else sum(width * rank for _, rank, _ in layer))


def _chunk(run: _Run) -> int:
    """Count the bytes of a chunk of logits: in the weights' dtype and in float32."""
    # The loss has a gradient of its own, computed in place; a softcap leaves it to autograd, which saves more.
    float32_copies = 4 if run.shape.softcap else 1
    positions = run.sequences if run.config.task == "classification" else run.tokens  # the label's alone
    each = run.shape.vocab * (run.width + 4 * float32_copies)
    return min(loss_chunk(run.on_gpu, each), positions) * each
