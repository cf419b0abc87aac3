"""Safetensors written tensor by tensor, by two ranks of which each holds a part."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support_ranks import run_two_ranks


def write_parts(rank: int, folder: str) -> dict:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from forgebook.training import streamed_weights

    mesh, outcomes = init_device_mesh("cpu", (2,)), {}
    torch.manual_seed(0)
    whole = {"b": torch.randn(5, 3), "a": torch.randn(3), "count": torch.tensor(7)}
    parts = {name: distribute_tensor(w, mesh, [Shard(0)]) if w.ndim else w for name, w in whole.items()}
    # A full disk on rank 0 does not leave rank 1 waiting.
    outcomes["unwritable"] = [
        type(streamed_weights.write_streamed(parts, Path(folder, "no", "such"), torch.float32)).__name__,
    ]
    streamed_weights.SHARD_BYTES = 32
    error = streamed_weights.write_streamed(parts, Path(folder), torch.bfloat16)
    outcomes["written"] = error is None
    torch.distributed.barrier()
    files = sorted(Path(folder).glob("*.safetensors"))
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = {name: w.bfloat16() if w.is_floating_point() else w for name, w in whole.items()}
    outcomes["streamed"] = [len(files), saved.keys() == expected.keys()]
    outcomes["streamed"] += [bool(torch.equal(saved[name], w)) for name, w in expected.items()]
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return run_two_ranks(write_parts, folder, str(folder))


def test_weights_are_written_tensor_by_tensor_in_several_files(outcomes):
    assert [each["written"] for each in outcomes] == [True, True]
    assert all(each["streamed"][0] > 1 and all(each["streamed"][1:]) for each in outcomes)
    assert [each["unwritable"] for each in outcomes] == [["FileNotFoundError"], ["NoneType"]]
