"""Serving with vLLM: whether it can, and the command that does."""

from __future__ import annotations

import json
from pathlib import Path

from forgebook.data.prompt_formats import as_chat_template, read_prompt_format
from forgebook.inference.loading import run_config
from forgebook.models import adapters
from forgebook.models.tokenizer import copy_of, load_tokenizer
from forgebook.models.vllm_support import vllm_ignores, vllm_max_rank, vllm_serves_saved
from forgebook.runs.checksums import check_files

__all__ = ["obstacle_for_vllm", "trained_on_images", "vllm_command"]


def trained_on_images(folder: Path) -> bool:
    """Report whether a checkpoint is of a run that trained on images, or a model with a processor of them."""
    config = run_config(folder)
    if config is not None:
        return config.vision_language_config is not None
    return (folder / "preprocessor_config.json").exists()


def obstacle_for_vllm(folders: dict[str, Path]) -> str | None:
    """Return why one vLLM process cannot serve these checkpoints; None if it can."""
    bases, templates = set(), set()
    for name, folder in folders.items():
        check_files(folder)
        template = load_tokenizer(str(folder)).chat_template
        templates.add(template)
        prompt_format = read_prompt_format(folder)
        if prompt_format is not None and template != as_chat_template(prompt_format):
            return f"{name} has a prompt format, and vLLM takes chat templates only; merge it first: that writes one"
        if ignored := vllm_ignores(folder, is_server=True):
            return f"{name}: {ignored}"
        lora_config = adapters.read_lora_config(folder)
        if lora_config is None:
            bases.add((str(folder), "{}"))
            continue
        verdict = vllm_serves_saved(folder)
        if verdict != "yes":
            return f"{name}: {verdict.removeprefix('no: ')}; merge it first"
        overrides = adapters.read_overrides(folder)
        bases.add((lora_config["base_model_name_or_path"], json.dumps(overrides, sort_keys=True)))
    if len(bases) > 1:
        return "one vLLM process holds one base, and these have several"
    return "their chat templates differ, and vLLM takes one" if len(templates) > 1 else None


def vllm_command(folders: dict[str, Path], *, host: str, port: int, dtype: str | None = None) -> list[str]:
    """Return the command that serves checkpoints over one base with vLLM; clients' key goes in VLLM_API_KEY.

    dtype: None takes that of the run to which the first checkpoint belongs, else leaves it to vLLM.
    """
    first = next(iter(folders.values()))
    command = ["vllm", "serve"]
    lora_configs = [one for one in map(adapters.read_lora_config, folders.values()) if one is not None]
    if lora_configs:
        overrides = adapters.read_overrides(first)
        base, rank = copy_of(lora_configs[0]["base_model_name_or_path"]), vllm_max_rank(lora_configs)
        command += [base, "--tokenizer", str(first), "--enable-lora", "--max-lora-rank", str(rank)]
        command += ["--max-loras", str(len(folders)), "--lora-modules"]
        command += [f"{name}={folder}" for name, folder in folders.items()]
        if (first / "generation_config.json").exists():  # with the ends of training; the base's may lack them
            command += ["--generation-config", str(first)]
        if overrides.get("rope_scaling"):
            from transformers import AutoConfig

            own = (
                AutoConfig.from_pretrained(base, trust_remote_code=False).rope_parameters or {}
            )  # joined as load_model joins them
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
    if trained_on_images(first):  # those of videos would take memory for nothing
        command += ["--limit-mm-per-prompt", json.dumps({"video": 0})]
    config = run_config(first)
    if dtype := dtype or (config.dtype if config else None):
        command += ["--dtype", dtype]
    return [*command, "--host", host, "--port", str(port)]
