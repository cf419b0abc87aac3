"""What belongs to a run: the marker that makes a folder a run's, and the files that this program writes into it.

is_run_folder(has, read)    whether a folder, local or in a bucket, is a run's
is_run_file(name)           whether a file in it was written by this program; anything else is the user's
write_marker(folder)        makes a folder a run's
delete_run_files(folder)    deletes the run, keeps and names the user's files
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from forgebook.config.parse import CONFIG_HEADER
from forgebook.runs.atomic import write_json

__all__ = ["LOCK", "MARKER", "delete_run_files", "is_run_file", "is_run_folder", "write_marker"]

MARKER = "forgebook-run.json"
LOCK = ".lock"  # see `run_lock`
PROGRAM = {"program": "forgebook", "format": 1}

# A run that was started before there was a marker: one of these is next to a config with CONFIG_HEADER.
TRACES = ("data_report.json", "metrics.jsonl", "summary.json", "tokens/train.npz")

# What this program writes; a pattern that ends with * also names what is deeper. Of a checkpoint's files transformers
# and PEFT choose most of the names, of a training state's DeepSpeed all; the next save deletes it whole.
_CHECKPOINT = """
    adapter*.safetensors model*.safetensors *.safetensors.index.json adapter_config.json config.json
    generation_config.json config_overrides.json checksums.json manifest.json prompt_format.yaml README.md
    chat_template.jinja additional_chat_templates/*.jinja tokenizer*.json tokenizer.model special_tokens_map.json
    *processor_config.json added_tokens.json vocab.json vocab.txt merges.txt *.tiktoken spiece.model
    sentencepiece.bpe.model
"""
_RUN = f"""
    {MARKER} config.yaml data_report.json rejected_rows.json held_out.jsonl changes.jsonl plan.json
    metrics.jsonl summary.json loss.png adapter_start.safetensors evaluation.json evaluation/*.json evaluation/*.jsonl
    tokens/*.npz tokens/reference* tokens/shards/* logs/*.log logs/*.jsonl logs/*.id
    profile/trace.json.gz tensorboard/events.out.tfevents.* checkpoint_manager_snapshot.json
    checkpoints/.writing-* checkpoints/.removing-* checkpoints/.test-save/* resume/*
    {LOCK} .mark .stop .validate_storage_marker .uploading/* .workers/* .tokens/*
"""
_PATTERNS = (
    *_RUN.split(),
    *(f"checkpoints/*/{name}" for name in _CHECKPOINT.split()),
)
_TEMPORARY = re.compile(r"(?:^|(?<=/))\.([^/]+)\.\d+$")  # of `atomic_file`


def is_run_folder(has: Callable[[str], bool], read: Callable[[str], str]) -> bool:
    """Check whether a folder is a run's. has: whether it has a file of that name; read: that file's text."""
    if has(MARKER):
        with contextlib.suppress(ValueError):
            marker = json.loads(read(MARKER))
            return isinstance(marker, dict) and marker.get("program") == PROGRAM["program"]
    return has("config.yaml") and any(map(has, TRACES)) and read("config.yaml").startswith(CONFIG_HEADER)


def is_run_file(name: str) -> bool:
    """Check whether a file, by its name below the run's folder, is one that this program writes there."""
    name = _TEMPORARY.sub(r"\1", name)
    return any(
        fnmatch.fnmatchcase(name, pattern) and (pattern.endswith("*") or name.count("/") == pattern.count("/"))
        for pattern in _PATTERNS
    )


def write_marker(folder: Path) -> None:
    """Make a folder a run's."""
    write_json(folder / MARKER, PROGRAM)


def delete_run_files(folder: Path, keep: frozenset[str] = frozenset()) -> list[str]:
    """Delete what this program wrote into a run's folder, and the folder if it is empty then.

    keep: names that stay. The marker goes last: what was interrupted can be repeated.

    Returns the names of the files that stay because this program did not write them.
    """
    names = [
        Path(parent, file).relative_to(folder).as_posix()
        for parent, folders, files in os.walk(folder)
        for file in (*files, *(name for name in folders if Path(parent, name).is_symlink()))
    ]
    own = [name for name in names if is_run_file(name) and name not in keep]
    for name in sorted(own, key=lambda name: (name == MARKER, name == "config.yaml", name != "summary.json")):
        (folder / name).unlink(missing_ok=True)
    for parent, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):  # it is not empty
            os.rmdir(parent)
    return sorted(set(names) - set(own) - keep)
