"""What makes a step faster or smaller, where the machine has it: Liger kernels, torch.compile, bitsandbytes.

refuse_missing(config)             before a run and in every worker: all that the config requests must be installed
compile_decoder(model, options)    compiles a model in place
"""

from __future__ import annotations

import importlib.util
import shutil
from typing import TYPE_CHECKING, Any

from forgebook.errors import ConfigError, ResourceError, first_line
from forgebook.models.attention import attention_facts, choose_attention
from forgebook.models.families import decoder_of

if TYPE_CHECKING:
    from forgebook.config.schema import FinetuneConfig

__all__ = ["compile_decoder", "is_installed", "refuse_missing"]


def refuse_missing(config: FinetuneConfig) -> None:
    """Raise ResourceError if this machine lacks a package, a compiler or a GPU that the config requests."""
    import torch

    has_gpu = torch.cuda.is_available()
    for key, is_requested in {
        f"quantization: {config.quantization}": config.quantization is not None,
        f"optimizer: {config.optimizer}": config.optimizer.endswith("_8bit"),
    }.items():
        if is_requested and not is_installed("bitsandbytes"):
            raise ResourceError(f"{key} needs the package bitsandbytes: install it from requirements-gpu.txt")
    if config.optimizer == "paged_adamw_8bit" and not has_gpu:
        raise ResourceError(
            "optimizer: paged_adamw_8bit moves its state between a GPU and its host, and this machine has no GPU: set "
            "adamw_8bit"
        )
    if config.liger_kernel.enabled is True and not has_gpu:
        raise ResourceError(
            "liger_kernel.enabled: its kernels run on a GPU, and this machine has none: set it to false"
        )
    if config.liger_kernel.enabled is True and not is_installed("liger_kernel"):
        raise ResourceError("liger_kernel.enabled needs the package liger-kernel: install it from requirements-gpu.txt")
    if config.tf32 and (not has_gpu or torch.cuda.get_device_capability() < (8, 0)):
        raise ResourceError("tf32: needs an Ampere GPU or later (compute capability 8.0): set it to false")
    if config.attention == "flex" and not has_gpu:
        raise ResourceError(
            "attention: flex has no backward pass on a CPU, and this machine has no GPU: set attention: sdpa"
        )
    choose_attention(config.attention, attention_facts(config.dtype))
    if config.torch_compile and not has_gpu and not shutil.which("g++"):
        raise ResourceError("torch_compile on a CPU needs a C++ compiler: install g++, or set torch_compile: false")


def is_installed(package: str) -> bool:
    """Report whether a package can be imported, without doing so: these packages load CUDA."""
    return importlib.util.find_spec(package) is not None


def compile_decoder(model: Any, options: bool | dict[str, Any]) -> None:
    """Compile the layers of a causal language model, plain or inside a PeftModel, when they are first called.

    Layer by layer: layers of one kind share what is compiled, which takes as long for two of them as for eighty. torch
    keeps it on this machine for later runs.

    options: True, or keyword arguments of torch.compile. Raises ConfigError for one that it does not take.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = [layer for layer in decoder_of(causal).modules() if isinstance(layer, GradientCheckpointingLayer)]
    try:
        for layer in layers:
            # In place: the names of parameters, and with them the checkpoints, stay the same.
            layer.compile(**(options if isinstance(options, dict) else {}))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"torch_compile: {first_line(error)}") from None
