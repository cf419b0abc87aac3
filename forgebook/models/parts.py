"""Weights read in parts: each rank reads its rows of every weight from the files, and none holds the whole model.

model_class = read_in_parts(model_class, rows, tokens=len(tokenizer))
model = model_class.from_pretrained(...)         weights are DTensors on the CPU, divided by rows as FSDP2 divides them

transformers reads the part of a weight that its model holds as a DTensor on the meta device, experts' stacked weights
included; it reads a weight whole that is none.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

__all__ = ["read_in_parts"]


def read_in_parts(model_class: Any, rows: DeviceMesh, tokens: float) -> Any:
    """Derive a class whose `from_pretrained` reads this rank's rows of every weight alone, where it can.

    rows: a mesh of all ranks' CPUs. tokens: how many the vocabulary has to hold; embeddings that are to be enlarged are
    read whole.
    """

    class InParts(model_class):
        def __init__(self, config: Any, *arguments: Any, **settings: Any) -> None:
            super().__init__(config, *arguments, **settings)
            if _divides_rows(self, rows.size()):
                _divide(self, rows, tokens)
            self.__class__ = model_class

    InParts.__name__, InParts.__module__ = model_class.__name__, model_class.__module__
    return InParts


def _divides_rows(model: Any, workers: int) -> bool:
    """Report whether rows of the files' weights are rows of the model's, after what transformers converts."""
    converters = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightConverter)]
    has_experts = all(p.shape[0] >= workers for p in model.parameters() if p.dim() == 3)
    return has_experts and all(_keeps_rows(operation) for one in converters for operation in one.operations)


def _keeps_rows(operation: Any) -> bool:
    if isinstance(operation, MergeModulelist):  # of which transformers takes the experts of this rank
        return operation.dim == 0
    if isinstance(operation, Transpose):
        return 0 not in (operation.dim0, operation.dim1)
    return isinstance(operation, Chunk | Concatenate | Interleave) and operation.dim > 0


def _divide(model: Any, rows: DeviceMesh, tokens: float) -> None:
    tables = {
        id(one.weight) for one in (model.get_input_embeddings(), model.get_output_embeddings()) if one is not None
    }
    is_enlarged = tokens > model.get_input_embeddings().num_embeddings
    divided: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None or p.dim() == 0 or (is_enlarged and id(p) in tables):
                continue
            if id(p) not in divided:
                size, _ = Shard.local_shard_size_and_offset(len(p), rows.size(), rows.get_local_rank())
                part = p.detach().new_empty(size, *p.shape[1:])
                whole = DTensor.from_local(part, rows, [Shard(0)], run_check=False, shape=p.shape, stride=p.stride())
                divided[id(p)] = nn.Parameter(whole, requires_grad=p.requires_grad)
            module._parameters[name] = divided[id(p)]
