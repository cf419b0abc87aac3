"""Which weights a name means now: a folder may hold others tomorrow, and an adapter is nothing without its base."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from forgebook.models.adapter_names import cached_file
from forgebook.models.adapters import read_lora_config
from forgebook.models.tokenizer import copy_of
from forgebook.runs.checksums import CHECKSUMS

__all__ = ["model_identity"]

LENGTH = 32


def model_identity(source: str) -> str:
    """Return a text that differs for other weights, those of an adapter's base included.

    Folders that this project saved have checksums; of others it takes the files' sizes and times, of a model from the
    hub the commit that was downloaded.
    """
    states = [_state(source)]
    if lora_config := read_lora_config(source):
        states.append(_state(copy_of(lora_config["base_model_name_or_path"])))
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:LENGTH]


def _state(source: str) -> Any:
    folder = Path(source)
    if (folder / CHECKSUMS).is_file():
        return (folder / CHECKSUMS).read_text()
    if not folder.is_dir():
        return [source, str(cached_file(source, "config.json"))]
    files = [path for path in sorted(folder.glob("*")) if path.suffix in (".safetensors", ".json", ".jinja")]
    return [source, [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]]
