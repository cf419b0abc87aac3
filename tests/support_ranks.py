"""Processes in a gloo group, as training workers are, without Ray: they are forked off a process that imported torch.

results = run_two_ranks(scenario, tmp_path)     scenario(rank) -> JSON value, in each process; a list by rank
train_in_ranks(config, run)                     what `launch` does on Ray, for tests whose subject Ray is not

A worker of Ray's imports for ten seconds of processor time; these begin at once.
"""

import datetime
import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

multiprocessing.set_forkserver_preload(
    ["torch", "transformers", "peft", "deepspeed", "accelerate", "accelerate.utils", "forgebook.training.loop"]
)


def run_two_ranks(scenario, folder: Path, *arguments) -> list:
    """Call `scenario(rank, *arguments)`, a function of a module, in two processes of one group; return their results.

    A collective that one rank misses ends after a minute with an error, not never.
    """
    return _run_ranks(2, scenario, folder, *arguments)


def train_in_ranks(config, run, *_: Any) -> dict[str, Any]:
    """Train a resolved config in as many processes as it has devices; return what the first one returns."""
    with tempfile.TemporaryDirectory() as folder:
        return _run_ranks(config.num_devices, _train, Path(folder), config, str(run.folder))[0]


def _run_ranks(count: int, scenario, folder: Path, *arguments) -> list:
    # accelerate wants an address to be set, whatever the processes meet by.
    meeting = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    environment = dict(os.environ) | meeting
    mp.start_processes(
        _join, args=(environment, scenario, str(folder), *arguments), nprocs=count, start_method="forkserver"
    )
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(count)]


def _join(rank: int, environment: dict[str, str], scenario, folder: str, *arguments) -> None:
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)  # as Ray's workers have: sums of more threads round otherwise
    # They meet in a file: between asking for a free port and listening on it, another process may take the port.
    meet = f"file://{folder}/meeting"
    world, timeout = int(environment["WORLD_SIZE"]), datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world, timeout=timeout)
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(scenario(rank, *arguments)))


def _train(rank: int, config, folder: str) -> dict[str, Any]:
    from forgebook.runs.run import Run
    from forgebook.training.loop import train_loop

    return train_loop(config, Run(Path(folder)))
