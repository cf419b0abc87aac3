"""Set up one worker: its process group, tokenizer, model, optimizer, and DDP, FSDP2 or DeepSpeed around them.

accelerator = make_accelerator(config)      first: under ZeRO-3, DeepSpeed's config must exist before the weights
worker = make_worker(config, accelerator, steps)
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
)
from torch.distributed.device_mesh import DeviceMesh
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from forgebook.config.blocks import LigerKernel, PromptFormat, VisionLanguageConfig, labels_of
from forgebook.config.deepspeed_file import read_deepspeed_config
from forgebook.config.schema import ResolvedConfig
from forgebook.data import masking
from forgebook.errors import ModelError, TrainingError
from forgebook.models import adapters, load, parts, saved_adapters, sequence_parallel, tiled_mlp
from forgebook.models.attention import SEGMENTED
from forgebook.models.families import freeze_towers, projector_modules
from forgebook.models.processor import processor_of
from forgebook.models.sequence_parallel import SequenceGroup
from forgebook.models.tokenizer import label_pieces, locate, tokenizer_of
from forgebook.models.unused_packages import without_unused
from forgebook.training import classification, distributed, fsdp, kernels, liger, optimizers, sharded_state
from forgebook.training.losses import SupervisedLM

__all__ = [
    "Worker",
    "base_overrides",
    "build_extensions",
    "extensions_folder",
    "make_accelerator",
    "make_worker",
    "prompt_format_text",
]

# A process that holds our build lock holds torch's own for at most this many seconds: nothing is compiled meanwhile.
STALE_LOCK_SECONDS = 60


@dataclass(frozen=True)
class Worker:
    """What a step needs.

    model: the plain or PEFT model inside `wrapped`, whose forward pass returns the loss. deepspeed_engine: `wrapped`
    again under DeepSpeed, else None. parameters: how many the model has, and how many of them are trained. processor:
    of a run with images. notes: what a reader should know of how it runs. sequence_parallel: how many workers share
    each line.
    """

    accelerator: Accelerator
    tokenizer: Any
    model: Any
    wrapped: Any
    optimizer: Any
    deepspeed_engine: Any
    parameters: tuple[int, int]
    notes: list[str]
    processor: Any = None
    sequence_parallel: int = 1

    @property
    def is_fsdp(self) -> bool:
        """Return whether FSDP2 divides the weights."""
        return fsdp.is_sharded(self.wrapped)

    @property
    def data_share(self) -> tuple[int, int]:
        """Return among how many a batch is divided, and this worker's number: a group that shares lines is one."""
        size = self.sequence_parallel
        return self.accelerator.num_processes // size, self.accelerator.process_index // size

    @property
    def takes_segments(self) -> bool:
        """Return whether the attention kernel keeps examples apart by their lengths, so that they can share a line."""
        return self.model.config.get_text_config()._attn_implementation in SEGMENTED


def make_accelerator(config: ResolvedConfig) -> Accelerator:
    """Join the process group, with DeepSpeed's config filled in from ours where it says "auto".

    Call it before the model is loaded: under ZeRO-3, transformers partitions the weights while it loads them if it
    knows DeepSpeed's config by then. Raises TrainingError if accelerate does not start DeepSpeed.
    """
    on_cpu = not torch.cuda.is_available()
    # By its older name: once the newer one is set, libraries that read this one fail.
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    settings = read_deepspeed_config(config.deepspeed, config.source)
    if settings is None:
        # An earlier run of the same process leaves this set, and accelerate would start DeepSpeed again.
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        # Gradients live in DDP's communication buckets: otherwise each exists twice.
        buckets = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        return Accelerator(cpu=on_cpu, kwargs_handlers=[buckets])
    with without_unused("mlflow"):  # its tuner, which nobody asks for, would import it: a second
        build_extensions(settings, on_cpu)
    # DeepSpeed reads its rank from the environment even if there is one process.
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, str(value))
    if "MASTER_PORT" not in os.environ and not torch.distributed.is_initialized():
        _join_alone()
    is_bf16 = config.dtype == "bfloat16"
    known = {
        "train_micro_batch_size_per_gpu": config.train_batch_size_per_device,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "train_batch_size": config.global_batch_size,
        "gradient_clipping": config.max_grad_norm,
    }
    settings |= {name: value for name, value in known.items() if settings.get(name, "auto") == "auto"}
    settings["bf16"] = {**settings.get("bf16", {}), "enabled": is_bf16}
    # With cpu=True accelerate silently ignores DeepSpeed; the gloo backend selects the CPU and keeps it.
    accelerator = Accelerator(
        mixed_precision="bf16" if is_bf16 else "no",
        gradient_accumulation_steps=settings["gradient_accumulation_steps"],
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu else [],
    )
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise TrainingError(f"deepspeed is set, but accelerate started {accelerator.distributed_type}")
    return accelerator


def _join_alone() -> None:
    """Join a process group of this process alone: it needs no port, which another process could take meanwhile."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)


def make_worker(config: ResolvedConfig, accelerator: Accelerator, steps: int = 1) -> Worker:
    """Load tokenizer and model, add LoRA if configured, create the optimizer, wrap for DDP, FSDP2 or DeepSpeed.

    steps: of the whole run, on which the learning rate of a classifier's labels depends.
    Collective. Raises ModelError, ResourceError or ConfigError if it cannot; except while ZeRO-3 loads, on all ranks.
    """
    with distributed.raised_everywhere():
        # What can fail on one machine alone, as a download can, comes first: under ZeRO-3 loading is a collective.
        kernels.refuse_missing(config)
        tokenizer = tokenizer_of(config)
        processor = processor_of(config, tokenizer)
        base = locate(config.initial_base_model_ckpt_path or config.model_id)
        adapter_source = config.initial_adapter_model_ckpt_path
        adapter = locate(adapter_source) if adapter_source is not None else None
        kernel_block = config.liger_kernel if processor is None else LigerKernel(enabled=False)
        fused = liger.choose_liger(kernel_block, base, accelerator.device)
    # Under ZeRO-3 the ranks wait for each other while they load: one that fails cannot meet the others at the end of a
    # block. It raises, and whoever started the workers ends them.
    with contextlib.nullcontext() if is_deepspeed_zero3_enabled() else distributed.raised_everywhere():
        model, whole_note = _load_model(config, tokenizer, base, adapter, uses_liger=fused.is_used)
        parameters = load.parameter_counts(model)
    padding = load.padding_note(model, config.attention, config.dtype)
    notes = [note for note in (padding, fused.note, whole_note) if note is not None]
    _stop_at(masking.end_of_turn(tokenizer, config.generation_config.prompt_format)[1], model.generation_config)
    label_scale = 1.0
    if config.classifier_config is not None:
        width = model.config.get_text_config().hidden_size
        label_scale = classification.label_rate(config.learning_rate, width, steps) / config.learning_rate
    group = _sequence_group(model, config.sequence_parallel)
    wrapped: Any = SupervisedLM(model, reads_images=processor is not None, sequence_group=group)
    if config.sharding == "fsdp":
        fsdp.shard(
            wrapped, getattr(torch, config.dtype), accelerator.device,
            reshards=config.fsdp.reshard_after_forward is not False, offloads=config.fsdp.cpu_offload,
        )  # fmt: skip
    # One group where nothing decays, as runs of earlier versions saved it.
    is_uniform = config.weight_decay == 0 or config.decay_norms_and_biases
    undecayed = set() if is_uniform else optimizers.undecayed_names(model)
    muon = optimizers.matrix_names(model) if config.optimizer == "muon" else set()
    groups = optimizers.rate_groups(model.named_parameters(), label_scale, config.loraplus_lr_ratio, undecayed, muon)
    hyperparameters = {
        "lr": config.learning_rate,
        "betas": config.adam_betas,
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        model.train()
        optimizer = optimizers.deepspeed_adamw(config.optimizer, groups, **hyperparameters)
        # accelerate would import bitsandbytes, which is slow, to see whether the optimizer is one of its.
        with without_unused("bitsandbytes"):
            deepspeed_engine, optimizer = accelerator.prepare(wrapped, optimizer)
        engine = deepspeed_engine
        return Worker(accelerator, tokenizer, model, engine, optimizer, engine, parameters, notes, processor)
    if config.sharding != "fsdp" and config.quantization is None:  # quantized weights were loaded where they stay
        model.to(accelerator.device)
    model.train()
    optimizer = optimizers.AdamW(groups, kind=config.optimizer, **hyperparameters)
    if config.sharding != "fsdp":
        wrapped = accelerator.prepare(wrapped)
    return Worker(
        accelerator, tokenizer, model, wrapped, optimizer, None, parameters, notes, processor, config.sequence_parallel
    )  # fmt: skip


def _sequence_group(model: Any, size: int) -> SequenceGroup | None:
    """Let `size` workers share each line of a batch; None if each has its own. Collective. Raises ModelError."""
    if size == 1:
        return None
    kernel = model.config.get_text_config()._attn_implementation
    if kernel not in sequence_parallel.KERNELS:
        raise ModelError(f"sequence_parallel needs another kernel than attention: {kernel}, which this model has alone")
    sequence_parallel.register()
    return SequenceGroup.of(size)


def _stop_at(ends: list[int], generation_config: Any) -> None:
    """Add the tokens that end an answer in training to those at which generation stops; checkpoints save them."""
    own = generation_config.eos_token_id
    known = own if isinstance(own, list) else [own] if own is not None else []
    if set(ends) - set(known):
        generation_config.eos_token_id = list(dict.fromkeys([*known, *ends]))


def _load_model(
    config: ResolvedConfig, tokenizer: Any, base: str, adapter: str | None, *, uses_liger: bool
) -> tuple[Any, str | None]:
    """Load the model to train: the base, with its kernels, adapter, noise and compilation.

    Return it with a note if each worker has loaded it whole although FSDP2 is to divide it.
    """
    labels = labels_of(config.classifier_config)
    in_parts, reason = None, None
    if config.sharding == "fsdp":
        settings = adapters.read_lora_config(adapter) if adapter is not None else config.lora_config or {}
        # An adapter of the hub is read when it is loaded.
        reason = "the adapter" if settings is None else adapters.needs_whole_base(settings, adapter is not None)
        # Rows of new tokens start from those of others, and copies of embeddings are made of whole ones.
        is_copied = settings is None or bool(labels) or bool(settings.get("modules_to_save"))
        rows = DeviceMesh.from_group(sharded_state.background_group(), "cpu")
        in_parts = functools.partial(parts.read_in_parts, rows=rows, tokens=math.inf if is_copied else len(tokenizer))
    model: Any = load.load_model(
        base,
        dtype=config.dtype,
        attention=config.attention,
        rope_scaling=config.rope_scaling,
        quantization=config.quantization,
        gradient_checkpointing=config.gradient_checkpointing,
        in_parts=None if reason is not None else in_parts,
        reads_images=config.vision_language_config is not None,
    )
    note = None
    if in_parts is not None and not fsdp.has_shards(model):
        reason = reason or "the conversion of its weights"
        note = f"each worker loads the whole model before FSDP2 divides it: {reason} needs whole weights"
    new_token_settings = load.fit_vocabulary(model, tokenizer, labels, config.lora_config)
    load.start_labels(model, label_pieces(tokenizer, labels))
    if uses_liger:
        liger.use_liger(model, {str(name): on for name, on in config.liger_kernel.kwargs.items()})
    if adapter is not None:
        model = saved_adapters.continue_lora(model, adapter, config.lora_config or {}, config.rope_scaling)
    elif config.lora_config is not None:
        # Rows of new tokens may have been drawn by now, more or fewer by dtype: the adapter starts from the seed alone.
        torch.manual_seed(config.seed)
        model = adapters.add_lora(model, config.lora_config | new_token_settings | _projector_settings(config, model))
    else:
        _freeze(model, config.vision_language_config)
    if config.tiled_mlp:
        tiled_mlp.tile_mlps(model)
    if config.neftune_noise_alpha is not None:
        from transformers.integrations.neftune import activate_neftune  # which imports the Trainer and PEFT

        # Its noise comes from torch's random numbers, which a run seeds and saves with its training state.
        activate_neftune(model, config.neftune_noise_alpha)
    if config.torch_compile:
        kernels.compile_decoder(model, config.torch_compile)
    return model, note


def _projector_settings(config: ResolvedConfig, model: Any) -> dict[str, Any]:
    """Make the additions to `lora_config` that train a whole copy of the projector."""
    if config.vision_language_config is None or not config.vision_language_config.train_projector:
        return {}
    others = (config.lora_config or {}).get("modules_to_save") or []
    return {"modules_to_save": [*others, *projector_modules(model)]}


def _freeze(model: Any, images: VisionLanguageConfig | None) -> None:
    """Freeze what no batch reaches, or what the config leaves as it is; images: of a run with images."""
    if images is not None and not images.freeze_vision_encoder:
        return
    freeze_towers(model)
    for name in projector_modules(model) if images is not None and images.train_projector else ():
        model.get_submodule(name).requires_grad_(True)


def prompt_format_text(prompt_format: PromptFormat | None) -> str | None:
    """Return a prompt format as the YAML that is saved with the weights."""
    return yaml.safe_dump(prompt_format.model_dump(), sort_keys=False) if prompt_format else None


def base_overrides(rope_scaling: dict[str, Any] | None, quantization: str | None) -> dict[str, Any]:
    """Return how the base model of an adapter was loaded, where that is not in the base's own config.json."""
    overrides = {"rope_scaling": rope_scaling, "quantization": quantization}
    return {name: value for name, value in overrides.items() if value is not None}


# DeepSpeed's C++ extensions -----------------------------------------------------------------------------


def extensions_folder() -> Path:
    """Return the folder of compiled extensions: $TORCH_EXTENSIONS_DIR, or one for this Python environment alone.

    Two environments that shared a folder would each recompile what the other compiled.
    """
    from torch.utils.cpp_extension import get_default_build_root

    environment = hashlib.sha256(f"{sys.prefix} {sys.version} {torch.__version__}".encode()).hexdigest()[:12]
    default = Path(get_default_build_root()) / f"forgebook-{environment}"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default)


def build_extensions(settings: dict[str, Any], on_cpu: bool) -> None:
    """Compile the extensions that DeepSpeed will load under these settings, one process at a time.

    settings: DeepSpeed's config. The first time takes a minute and needs a C++ compiler; later calls return at once.

    torch guards a build by a lock file, which a killed process leaves behind: every later process would wait for it
    forever. So the build runs under a lock of the operating system, which is released when its process ends, and
    stale lock files of torch are deleted first.
    """
    zero = settings.get("zero_optimization", {})
    offloads = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    needed = ["ShareMemCommBuilder"] * on_cpu + ["CPUAdamBuilder"] * offloads
    if not needed:
        return
    folder = extensions_folder()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    import cpuinfo  # type: ignore[import-untyped]
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed asks it two or three times for the same processor, and each answer takes a second.
    if not hasattr(cpuinfo.get_cpu_info, "cache_info"):
        cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for torch_lock in folder.glob("*/lock"):
            with contextlib.suppress(FileNotFoundError):  # its holder has just released it
                if time.time() - torch_lock.stat().st_mtime > STALE_LOCK_SECONDS:
                    torch_lock.unlink()
        for name in needed:
            builder = get_accelerator().create_op_builder(name)
            if builder.is_compatible():
                builder.load(verbose=False)
