"""Safetensors of a sharded model, written tensor by tensor: no rank ever holds more than one whole.

error = write_streamed(parts, folder, dtype)        collective; rank 0 writes, and gets what went wrong

The format (github.com/huggingface/safetensors): the length of a JSON header in 8 bytes, the header with the place of
each tensor, then the tensors. It can be written before any tensor is there, as their shapes are known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from forgebook.training import distributed, fsdp

__all__ = ["write_streamed"]

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL"}
SHARD_BYTES = 50_000_000_000  # of one file, as save_pretrained has it


def write_streamed(parts: Mapping[str, torch.Tensor], folder: Path, dtype: torch.dtype) -> Exception | None:
    """Write tensors to model.safetensors, or to several files and their index; return rank 0's error. Collective.

    parts: of all ranks, in the same order. dtype: in which numbers with a fraction are written.

    An error is returned, not raised: the other ranks are in the middle of gathering.
    """
    # Meta tensors have a shape and no memory.
    shapes = {
        name: torch.empty(part.shape, dtype=dtype if part.is_floating_point() else part.dtype, device="meta")
        for name, part in parts.items()
    }
    split = split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_BYTES
    )
    error = None
    for file, names in split.filename_to_tensors.items():
        error = _write_file({name: parts[name] for name in names}, shapes, folder / file, error)
    if split.is_sharded and distributed.is_main() and error is None:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return error


def _write_file(
    parts: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Tensor], path: Path, error: Exception | None
) -> Exception | None:
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in parts:
        size = shapes[name].numel() * shapes[name].element_size()
        entry = {"dtype": NAMES[shapes[name].dtype], "shape": list(shapes[name].shape)}
        header[name] = entry | {"data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors are aligned
    file = None
    try:
        if distributed.is_main() and error is None:
            file = open(path, "wb")  # noqa: SIM115  (closed below)
            file.write(len(text).to_bytes(8, "little") + text)
    except OSError as failed:
        error = failed
    for name, part in parts.items():
        whole = fsdp.gathered(part.detach())
        if file is None or error is not None:
            continue
        try:
            tensor = whole.to(device="cpu", dtype=shapes[name].dtype).contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        except OSError as failed:
            error = failed
    if file is not None:
        try:
            file.close()
        except OSError as failed:
            error = error or failed
    return error
