"""Serving with vLLM: whether it can, and the command that does."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import yaml

from forgebook.config.parse import PromptFormat
from forgebook.data.prompt_formats import as_chat_template
from forgebook.errors import ConfigError
from forgebook.models import adapters
from forgebook.models.tokenizer import load_tokenizer
from forgebook.models.vllm_support import vllm_serves
from forgebook.runs import atomic

__all__ = ["choose_engine", "vllm_command"]


def choose_engine(engine: str, folders: dict[str, Path]) -> str:
    """Choose what generates; raise ConfigError if the one that is asked for cannot."""
    if engine not in ("auto", "transformers", "vllm"):
        raise ConfigError(f"serve: engine must be auto, transformers or vllm, got {engine!r}")
    if engine == "transformers":
        return engine
    reason = None if importlib.util.find_spec("vllm") else "it is not installed (requirements-gpu.txt)"
    reason = reason or _unfit_for_vllm(folders)
    if reason and engine == "vllm":
        raise ConfigError(f"serve: vLLM cannot serve this: {reason}; engine=transformers can")
    return "transformers" if reason else "vllm"


def _unfit_for_vllm(folders: dict[str, Path]) -> str | None:
    """Say why one vLLM process cannot serve these; None if it can."""
    bases = set()
    for name, folder in folders.items():
        written = folder / "prompt_format.yaml"
        template = as_chat_template(PromptFormat(**yaml.safe_load(written.read_text()))) if written.exists() else None
        if template is not None and load_tokenizer(str(folder)).chat_template != template:
            return f"{name} has a prompt format, and vLLM knows chat templates only; merge it first: that writes one"
        if not (folder / "adapter_config.json").exists():
            bases.add((str(folder), "{}"))
            continue
        settings = atomic.read_json(folder / "adapter_config.json")
        if (told := vllm_serves(settings)) != "yes":
            return f"{name}: {told.removeprefix('no: ')}; merge it first"
        overrides = adapters.read_overrides(folder)
        bases.add((settings["base_model_name_or_path"], json.dumps(overrides, sort_keys=True)))
    templates = {load_tokenizer(str(folder)).chat_template for folder in folders.values()}
    if len(bases) > 1:
        return "one vLLM process holds one base, and these have several"
    return "their chat templates differ, and vLLM takes one" if len(templates) > 1 else None


def vllm_command(folders: dict[str, Path], *, host: str, port: int) -> list[str]:
    """Write the command that serves checkpoints over one base with vLLM; the key goes by VLLM_API_KEY."""
    first = next(iter(folders.values()))
    command = ["vllm", "serve"]
    if (first / "adapter_config.json").exists():
        settings = [atomic.read_json(folder / "adapter_config.json") for folder in folders.values()]
        overrides = adapters.read_overrides(first)
        base = settings[0]["base_model_name_or_path"]
        rank = max(max([one["r"], *(one.get("rank_pattern") or {}).values()]) for one in settings)
        allowed = next(size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank)
        command += [base, "--tokenizer", str(first), "--enable-lora", "--max-lora-rank", str(allowed)]
        command += ["--max-loras", str(len(folders)), "--lora-modules"]
        command += [f"{name}={folder}" for name, folder in folders.items()]
        if overrides.get("rope_scaling"):
            from transformers import AutoConfig

            own = AutoConfig.from_pretrained(base).rope_parameters or {}  # as models.load_model joins them
            command += ["--hf-overrides", json.dumps({"rope_parameters": {**own, **overrides["rope_scaling"]}})]
        if overrides.get("quantization"):
            command += ["--quantization", "bitsandbytes"]
    else:
        command += [str(first), "--served-model-name", next(iter(folders))]
    template = first / "chat_template.jinja"
    if template.exists():
        command += ["--chat-template", str(template)]
        if "<tool_call>" in template.read_text():
            command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    return [*command, "--host", host, "--port", str(port)]
