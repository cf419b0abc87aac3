"""Whether a server finds the layers of an adapter: it looks for them by the names of the base's published weights.

vLLM builds the class that config.json names. It ignores tensors of an adapter for layers that this class does not have,
and answers as the base without an error: so their names are compared when a run starts and after each save.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from pathlib import Path
from typing import TYPE_CHECKING

from forgebook.models.tokenizer import copy_of
from forgebook.runs.atomic import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["cached_file", "published_layers", "saved_names", "unserved_layers"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def unserved_layers(names: Iterable[str], source: str, base: PreTrainedModel | None = None) -> str | None:
    """Describe the layers of an adapter that the published weights of its base do not have; None if there are none.

    names: of the adapter's tensors, in a model or a file. source: the base's folder or hub id; without its weights
    nothing can be said. base: the model from there, if it is in memory; under ZeRO-3 no rank can make one by itself.
    """
    source = copy_of(source)
    published = published_layers(source)
    if published is None:
        return None
    matches = (re.match(r"(?:base_model\.model\.)?(.+?)(?:\.base_layer)*\.lora_", name) for name in names)
    unknown = sorted({match[1] for match in matches if match} - published)
    if unknown:
        # The published class may give its decoder another name than the file does, as Gemma 3: servers know both.
        own = _class_layers(base or _skeleton(source))
        inside = {_within_layer(name) for name in published}
        unknown = [name for name in unknown if name not in own or _within_layer(name) not in inside]
    if not unknown:
        return None
    more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    return f"the published weights of its base have no layer {unknown[0]}{more}, and vLLM answers as the base there"


def _skeleton(source: str) -> PreTrainedModel:
    from forgebook.models.load import load_skeleton

    return load_skeleton(source)


def _class_layers(base: PreTrainedModel) -> Set[str]:
    """List the layers of the class that a base is published as; none if transformers loads it as another one."""
    is_published = type(base).__name__ in (base.config.architectures or [])
    return {name for name, _ in base.named_modules()} if is_published else set()


def _within_layer(name: str) -> str:
    """Return a name from the number of its decoder layer on."""
    return re.sub(r"^.*?\.(?=\d+\.)", "", name)


def published_layers(source: str) -> Set[str] | None:
    """List the layers of a model by the names in its weight files; None if they are not on this machine."""
    folder = Path(source)
    paths = {name: folder / name if folder.is_dir() else cached_file(source, name) for name in (INDEX, SINGLE)}
    if (index := paths[INDEX]) is not None and index.exists():
        names = read_json(index)["weight_map"].keys()
    elif (single := paths[SINGLE]) is not None and single.exists():
        names = saved_names(single)
    else:
        return None
    return {name.rpartition(".")[0] for name in names}


def saved_names(file: Path) -> list[str]:
    """List the names of the tensors in a safetensors file."""
    from safetensors import safe_open

    with safe_open(file, framework="np") as tensors:
        return list(tensors.keys())


def cached_file(source: str, name: str) -> Path | None:
    """Return a file of a hub repository that was downloaded before; None if it was not."""
    from huggingface_hub import try_to_load_from_cache

    try:
        path = try_to_load_from_cache(source, name)
    except ValueError:  # a folder that is not here
        return None
    return Path(path) if isinstance(path, str) else None
