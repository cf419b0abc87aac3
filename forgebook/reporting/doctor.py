"""What this machine has for a run, and what a config's model and data are: `python main.py doctor [CONFIG]`.

for finding in machine_findings(config):        versions, devices, attention kernels, disk, buckets, Ray
for finding in config_findings(config):         template, end of turn, examples, vocabulary
finding.problem                                 what to do about it; empty if nothing

Nothing is downloaded but the tokenizer of CONFIG, and nothing is written or started.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from forgebook.errors import ForgebookError
from forgebook.models.attention import AttentionFacts, attention_facts, attention_obstacles
from forgebook.models.shapes import find_shape
from forgebook.planning.feasibility import without_gaps
from forgebook.planning.hardware import cpu_share, has_gpu, this_gpu
from forgebook.planning.plan import disk_of
from forgebook.ray_cluster import REPOSITORY
from forgebook.runs import object_store
from forgebook.runs.download import cache_folder

if TYPE_CHECKING:
    from forgebook.config.schema import FinetuneConfig

__all__ = ["Finding", "config_findings", "machine_findings"]

NEEDED = ("torch", "transformers", "peft", "accelerate", "deepspeed", "ray", "datasets")
OPTIONAL = ("flash-attn", "liger-kernel", "bitsandbytes", "vllm", "wandb", "mlflow-skinny", "tensorboard", "openai")
LEAST_FREE = 10 * 10**9  # bytes, where no config says what is needed: an 8B model's adapter run with its state
ANSWER_SECONDS = 3


@dataclass(frozen=True)
class Finding:
    """One line of the report. problem: what to do about it; empty if nothing."""

    name: str
    text: str
    problem: str = ""


def machine_findings(config: FinetuneConfig | None = None) -> Iterator[Finding]:
    """Yield what this machine has, for a config's run if one is given."""
    yield from _versions()
    yield _devices()
    yield from _kernels()
    yield from _disks(config)
    yield _bucket(config.storage_path if config else "runs")
    yield _ray(config.address if config else None)


def _pins() -> dict[str, str]:
    """Read the versions that requirements.txt pins; none where the project is installed without it."""
    path = REPOSITORY / "requirements.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    pinned = (re.match(r"([\w-]+)(?:\[[^]]*\])?==(\S+)", line) for line in lines)
    return {match[1].lower(): match[2] for match in pinned if match}


def _versions() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    pins = _pins()
    for name in NEEDED:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "not installed", "pip install -r requirements.txt")
            continue
        pinned = pins.get(name, version)
        is_pinned = version.partition("+")[0] == pinned  # +cpu, +cu130: another build of the same version
        yield Finding(name, version, "" if is_pinned else f"tested with {pinned}: pip install -r requirements.txt")
    there = {}
    for name in OPTIONAL:
        try:
            there[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            there[name] = ""
    installed = ", ".join(f"{name} {version}" for name, version in there.items() if version) or "none"
    missing = ", ".join(name for name, version in there.items() if not version)
    yield Finding("optional packages", installed + (f"; not installed: {missing}" if missing else ""))


def _devices() -> Finding:
    gpu = this_gpu()
    if gpu is None:
        cpu = cpu_share(1)
        text = f"no GPU; {cpu.name}, {cpu.free / 1e9:.1f} of {cpu.memory / 1e9:.1f} GB of memory free"
        fix = "torch cannot use the GPU of this machine: install the torch build of its CUDA version" * has_gpu()
        return Finding("devices", text, fix)
    import torch

    devices = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
    free = min(torch.cuda.mem_get_info(k)[0] for k in range(len(devices)))
    major, minor = torch.cuda.get_device_capability()
    text = f"{len(devices)}x {gpu.name}, {free / 1e9:.1f} of {gpu.memory / 1e9:.1f} GB free, compute capability "
    text += f"{major}.{minor}, CUDA {torch.version.cuda}"
    return Finding("devices", text, "" if free > gpu.memory / 2 else "another process holds the memory: nvidia-smi")


def _kernels() -> Iterator[Finding]:
    # Without a GPU the facts are known, and torch's import would take most of the time of the report.
    facts = attention_facts("bfloat16") if has_gpu() else AttentionFacts("bfloat16", capability=None)
    obstacles = attention_obstacles(facts)
    runs = [kind for kind, obstacle in obstacles.items() if obstacle is None]
    others = [f"{kind} {obstacle}" for kind, obstacle in obstacles.items() if obstacle]
    yield Finding("attention kernels", ", ".join(runs) + (f" ({'; '.join(others)})" if others else ""))


def _disks(config: FinetuneConfig | None) -> Iterator[Finding]:
    storage_path = config.storage_path if config else "runs"
    needed = _needed_disk(config)
    places = {"cache": cache_folder()}
    if not object_store.is_remote(storage_path):
        places = {"storage_path": Path(storage_path)} | places
    for name, folder in places.items():
        folder = folder.expanduser().absolute()
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        least = needed[name] if needed else LEAST_FREE
        why = f"the run may take {least / 1e9:.1f} GB" if needed else f"less than {least / 1e9:.0f} GB are free"
        fix = f"{why}: make room, or set another {name}" * (free < least)
        if not os.access(existing, os.W_OK):
            fix = f"{existing} cannot be written to: set another {name}"
        yield Finding(f"disk of {name}", f"{free / 1e9:.1f} GB free at {existing}", fix)


def _needed_disk(config: FinetuneConfig | None) -> dict[str, int] | None:
    """Count the bytes that a run stores at most, as its plan does, and of a model that it copies from a bucket.

    None without a config, or where the model's shape is not known.
    """
    if config is None:
        return None
    try:
        shape = find_shape(config.model_id)
        _, stored = disk_of(without_gaps(config, shape, None), shape)
    except ForgebookError:  # the model's own line says what is wrong with it
        return None
    copied = 2 * shape.parameters if object_store.is_remote(str(config.model_id)) else 0  # weights of 16 bits
    return {"storage_path": stored, "cache": copied}


def _bucket(storage_path: str) -> Finding:
    if not object_store.is_bucket(storage_path):
        return Finding("object store", "none: storage_path is a folder of this machine")
    try:
        names = object_store.list_folders(storage_path)
    except ForgebookError as error:
        return Finding("object store", storage_path, str(error))
    return Finding("object store", f"{storage_path} can be listed, {len(names)} folders")


def _ray(address: str | None) -> Finding:
    address = os.environ.get("RAY_ADDRESS") or address
    if address in (None, "", "local"):
        return Finding("Ray", "a cluster of this machine is started for each run (RAY_ADDRESS is not set)")
    host, _, port = address.rpartition("://")[2].partition(":")
    if not port.isdigit():  # auto
        return Finding("Ray", f"RAY_ADDRESS={address}: the cluster that this machine is part of")
    try:
        with socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS):
            return Finding("Ray", f"{address} answers")
    except OSError as error:
        fix = f"{address} does not answer ({error}): is the head up (ray status), is the port open?"
        return Finding("Ray", address, fix)


# -- the model and the data of a config


def config_findings(config: FinetuneConfig) -> Iterator[Finding]:
    """Yield what the tokenizer, the template and the first examples of a config are."""
    from forgebook.data.masking import end_of_turn
    from forgebook.models.tokenizer import tokenizer_of

    try:
        tokenizer = tokenizer_of(config)
    except ForgebookError as error:
        yield Finding("model", config.model_id, str(error))
        return
    yield Finding("model", f"{config.model_id}, vocabulary of {len(tokenizer):,} tokens")
    prompt_format = config.generation_config.prompt_format
    if config.task == "causal_lm":
        yield Finding("template", "not used: task: causal_lm trains on plain text")
    else:
        kind = "prompt_format of the config" if prompt_format else "the tokenizer's chat template"
        if not prompt_format and not tokenizer.chat_template:
            fix = f"{config.model_id} has no chat template: set generation_config.prompt_format"
            yield Finding("template", "none", fix)
        else:
            yield Finding("template", kind)
            yield _end_finding(tokenizer, *end_of_turn(tokenizer, prompt_format))
    yield _example_finding(config, tokenizer)


def _end_finding(tokenizer, text: str, ids: list[int]) -> Finding:
    """Describe what ends an answer in training, and whether generation elsewhere would stop there."""
    eos = tokenizer.eos_token
    names = [tokenizer.convert_ids_to_tokens(number) for number in ids]
    if not names and not text:
        return Finding("end of turn", "none", "answers have no end in training: the template must print one after them")
    shown = ", ".join(map(repr, names)) or repr(text)
    if eos in names:
        return Finding("end of turn", f"{shown}, the tokenizer's EOS")
    how = "is saved with the checkpoint, and generation stops there" if names else "is a text that serving stops at"
    return Finding("end of turn", f"{shown} {how}; the tokenizer's EOS is {eos!r}")


def _example_finding(config: FinetuneConfig, tokenizer) -> Finding:
    """Encode the first example: its tokens, how many are in the loss, how it begins."""
    from forgebook.data.preview import preview_examples

    try:
        examples = preview_examples(config, 1)
    except ForgebookError as error:
        return Finding("first example", "cannot be used", str(error))
    if not examples:
        return Finding("first example", "none", "the first rows are dropped: python main.py preview shows why")
    ids, mask = examples[0].encoded.input_ids, examples[0].encoded.loss_mask
    text = f"{len(ids):,} tokens, {sum(mask):,} in the loss"
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        fix = f"begins with {tokenizer.bos_token!r} twice: the template or prompt_format prints it, too"
        return Finding("first example", text, fix)
    return Finding("first example", text, "" if any(mask) else "nothing of it is in the loss")
