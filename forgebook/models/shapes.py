"""The shape of any model that transformers knows: from the catalog, or counted on the model's own class.

shape = find_shape(model_id)        the catalog, a local folder, the hub; what was counted once needs no torch again
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgebook.catalog import Catalog, Shape, shape_from, shape_of
from forgebook.errors import ModelError, StorageError
from forgebook.layer_counts import CountedDecoder, LayerKind
from forgebook.models.adapters import expert_tensors_of, layers_of
from forgebook.models.attention import lacking_kernels
from forgebook.models.families import freeze_towers
from forgebook.models.tokenizer import locate
from forgebook.runs.atomic import read_json, write_json
from forgebook.runs.download import cache_folder

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["count_shape", "find_shape"]

# What configs call the number of experts that work on a token.
ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k")


def find_shape(model_id: str, catalog: Catalog | None = None) -> Shape:
    """Find the shape of a model: in the catalog, by a rule for its family, or counted on its class, once.

    Raises ModelError if there is no config.json, or transformers does not know its architecture.
    """
    try:
        return shape_of(model_id, catalog)
    except ModelError as error:
        folder = _config_folder(model_id)
        if folder is None:
            raise
        try:
            return shape_of(str(folder), catalog)
        except ModelError:
            return _counted(folder, error)


def _config_folder(model_id: str) -> Path | None:
    """Find the folder with a model's config.json, on this machine or the hub; None if there is none."""
    folder = Path(locate(model_id))
    if not folder.is_dir():
        from transformers.utils import cached_file

        # None: there is no such file, or it cannot be read.
        kinds = ("missing_entries", "connection_errors", "gated_repo")
        file = cached_file(str(folder), "config.json", **{f"_raise_exceptions_for_{kind}": False for kind in kinds})
        folder = Path(file).parent if file else folder
    return folder if (folder / "config.json").is_file() else None


def _counted(folder: Path, error: ModelError) -> Shape:
    """Count a shape, or read what was counted from the same config.json with the same transformers."""
    version = metadata.version("transformers")
    key = hashlib.sha256(version.encode() + (folder / "config.json").read_bytes()).hexdigest()[:32]
    path = cache_folder() / "shapes" / f"{key}.json"
    with contextlib.suppress(StorageError, TypeError, KeyError):  # not counted yet, or by an earlier version
        return shape_from(read_json(path))
    from forgebook.models.load import load_skeleton

    shape = count_shape(load_skeleton(str(folder)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dataclasses.asdict(shape))
    return shape


def count_shape(model: PreTrainedModel) -> Shape:
    """Count the layers and parameters of a model, which needs no weights.

    Raises ModelError if it has no list of decoder layers.
    """
    from torch import nn

    model.tie_weights()
    freeze_towers(model)
    text = model.config.get_text_config()
    layers = layers_of(model)
    lists = (name for name in layers.names if isinstance(model.get_submodule(name), nn.ModuleList))
    name = next((one for one in lists if len(model.get_submodule(one)) == text.num_hidden_layers), None)
    if name is None:
        raise ModelError(
            f"no list of {text.num_hidden_layers} decoder layers in {type(model).__name__}: its shape is unknown"
        )
    alike: dict[LayerKind, list[int]] = defaultdict(list)
    for number in range(text.num_hidden_layers):
        alike[_layer_kind(model, f"{name}.{number}", layers.linears, text.hidden_size)].append(number)
    kinds = tuple(dataclasses.replace(kind, layers=tuple(numbers)) for kind, numbers in alike.items())
    outside = [one for one in layers.names if not re.match(rf"{re.escape(name)}\.\d", one)]
    head = model.get_output_embeddings()
    others = [one for one in layers.linears if one in outside and model.get_submodule(one) is not head]
    tables = {id(one.weight): one.weight for one in map(model.get_submodule, outside) if isinstance(one, nn.Embedding)}
    total, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or not only) for only in (0, 1))
    experts = max((count for kind in kinds for _, count, _, _ in kind.experts), default=1)
    heads = _fact(text, "num_attention_heads") or 0
    return Shape(
        model_type=text.model_type,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=_fact(text, "intermediate_size") or 0,
        heads=heads,
        kv_heads=_fact(text, "num_key_value_heads") or heads,
        head_dim=_fact(text, "head_dim") or (text.hidden_size // heads if heads else 0),
        vocab=model.get_input_embeddings().num_embeddings,
        context=_fact(text, "max_position_embeddings"),
        tied=head is not None and head.weight is model.get_input_embeddings().weight,
        experts=experts,
        active_experts=next(filter(None, (_fact(text, key) for key in ACTIVE)), experts),
        towers=total - trained,
        counted=CountedDecoder(
            layers=name,
            kinds=kinds,
            others=tuple((one, *_sizes(model.get_submodule(one))) for one in others),
            modules=tuple(outside),
            parameters=trained,
            embeddings=sum(table.numel() for table in tables.values()),
            softcap=getattr(text, "final_logit_softcapping", None) is not None,
            eager={"sdpa", "flash_attention_2"} <= lacking_kernels(type(model)),
            adapts_experts=experts > 1 and any(map(layers.is_expert, ("gate_proj", "w1"))),
        ),
    )


def _layer_kind(model: PreTrainedModel, name: str, linears: Sequence[str], hidden: int) -> LayerKind:
    layer = model.get_submodule(name)
    experts = []
    for whole, tensor in expert_tensors_of(layer).items():
        count, first, second = tensor.shape  # families differ in which of the two is the input
        inner = second if first == hidden else first
        experts.append((whole, count, *((inner, hidden) if "down" in whole else (hidden, inner))))
    own = [one for one in linears if one.startswith(f"{name}.")]
    return LayerKind(
        layers=(),
        parameters=sum(p.numel() for p in layer.parameters()),
        norms=sum("norm" in type(one).__name__.lower() and _width(one) == hidden for one in layer.modules()),
        linears=tuple((one[len(name) + 1 :], *_sizes(model.get_submodule(one))) for one in own),
        experts=tuple(experts),
        modules=tuple(one for one, _ in layer.named_modules() if one),
    )


def _fact(config: PretrainedConfig, key: str) -> Any:
    """Read a figure of a config, None if it has none; where it differs by layer, the largest."""
    try:
        return getattr(config, key, None)
    except RuntimeError:  # it differs by layer, as in Gemma 4
        return max(getattr(one, key, None) or 0 for one in config.per_layer_config)


def _width(norm: nn.Module) -> int | None:
    weight = getattr(norm, "weight", None)
    return None if weight is None else weight.numel()


def _sizes(linear: nn.Module) -> tuple[int, int]:
    """Return the inputs and outputs of a linear layer; GPT-2's keeps its weight the other way round."""
    first, second = linear.weight.shape
    return (second, first) if hasattr(linear, "in_features") else (first, second)
