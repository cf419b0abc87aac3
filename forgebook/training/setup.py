"""One worker made ready: its place among the others, tokenizer, model, optimizer, DDP or DeepSpeed around them.

accelerator = make_accelerator(config)      first: under ZeRO-3, DeepSpeed's config must exist before the weights
worker = make_worker(config, accelerator)
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import socket
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

from forgebook.config.parse import FinetuneConfig, read_deepspeed_config
from forgebook.errors import TrainingError
from forgebook.models import adapters, load
from forgebook.models.tokenizer import locate, tokenizer_of
from forgebook.training import distributed, kernels, optimizers
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
    """What a step needs: `model` is the plain or PEFT model inside `wrapped`; `engine` is DeepSpeed's, or None."""

    config: FinetuneConfig
    accelerator: Accelerator
    tokenizer: Any
    model: Any
    wrapped: Any
    optimizer: Any
    engine: Any
    parameters: tuple[int, int]


def make_accelerator(config: FinetuneConfig) -> Accelerator:
    """Join the process group, with DeepSpeed's config filled in from ours where it says "auto"."""
    on_cpu = not torch.cuda.is_available()
    settings = read_deepspeed_config(config)
    if settings is None:
        # accelerate leaves this set by an earlier run of the same process.
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        buckets = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        return Accelerator(cpu=on_cpu, kwargs_handlers=[buckets])
    build_extensions(settings, on_cpu)
    # DeepSpeed wants to know its ranks even when there is one process.
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    is_bf16 = config.dtype == "bfloat16"
    known = {
        "train_micro_batch_size_per_gpu": config.train_batch_size_per_device,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "train_batch_size": config.global_batch_size,
        "gradient_clipping": config.max_grad_norm,
    }
    settings |= {name: value for name, value in known.items() if settings.get(name, "auto") == "auto"}
    settings["bf16"] = {**settings.get("bf16", {}), "enabled": is_bf16}
    # cpu=True would make accelerate ignore DeepSpeed without a word; the backend says the same and is heard.
    accelerator = Accelerator(
        mixed_precision="bf16" if is_bf16 else "no",
        gradient_accumulation_steps=settings["gradient_accumulation_steps"],
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu else [],
    )
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise TrainingError(f"DeepSpeed was asked for, but accelerate started {accelerator.distributed_type}")
    return accelerator


def _free_port() -> int:
    """Ask the system for a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_worker(config: FinetuneConfig, accelerator: Accelerator) -> Worker:
    """Load tokenizer and model, put LoRA on it if asked, make the optimizer, wrap for DDP or DeepSpeed."""
    with distributed.raised_everywhere():
        kernels.refuse_missing(config)
        tokenizer = tokenizer_of(config)
        model = load.load_model(
            locate(config.initial_base_model_ckpt_path or config.model_id),
            dtype=config.dtype,
            attention=config.attention,
            rope_scaling=config.rope_scaling,
            quantization=config.quantization,
            gradient_checkpointing=config.gradient_checkpointing,
        )
        new_rows = load.fit_vocabulary(model, tokenizer, config)
        if config.liger_kernel.enabled:
            kernels.use_liger(model, config.liger_kernel.kwargs)
        if config.initial_adapter_model_ckpt_path is not None:
            adapter = locate(config.initial_adapter_model_ckpt_path)
            model = adapters.continue_lora(model, adapter, config.lora_config, config.rope_scaling)
        elif config.is_lora:
            model = adapters.add_lora(model, config.lora_config | new_rows)
        if config.neftune_noise_alpha is not None:
            load.add_embedding_noise(model, config.neftune_noise_alpha)
        if config.torch_compile:
            kernels.compile_decoder(model, config.torch_compile)
        parameters = load.parameter_counts(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    hyperparameters = {
        "lr": config.learning_rate,
        "betas": config.adam_betas,
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    uses_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if uses_deepspeed:
        optimizer = optimizers.adamw(config.optimizer, trained, **hyperparameters)
    else:
        if config.quantization is None:  # quantised weights were loaded where they stay
            model.to(accelerator.device)
        optimizer = optimizers.AdamW(trained, bits=8 if config.optimizer == "adamw_8bit" else 32, **hyperparameters)
    model.train()
    if uses_deepspeed:
        wrapped, optimizer = accelerator.prepare(SupervisedLM(model), optimizer)
        return Worker(config, accelerator, tokenizer, model, wrapped, optimizer, wrapped, parameters)
    wrapped = accelerator.prepare(SupervisedLM(model))
    return Worker(config, accelerator, tokenizer, model, wrapped, optimizer, None, parameters)


def prompt_format_text(config: FinetuneConfig) -> str | None:
    """Write the prompt format as YAML, to be kept with the weights."""
    prompt_format = config.generation_config.prompt_format
    return yaml.safe_dump(prompt_format.model_dump(), sort_keys=False) if prompt_format else None


def base_overrides(config: FinetuneConfig) -> dict[str, Any] | None:
    """Say how the base of an adapter was made, where that is not in its own config.json."""
    made = {"rope_scaling": config.rope_scaling, "quantization": config.quantization}
    return {name: value for name, value in made.items() if value is not None} if config.is_lora else None


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
    from deepspeed.accelerator import get_accelerator

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
