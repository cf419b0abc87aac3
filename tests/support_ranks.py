"""Two processes in a gloo group, as training workers are, for tests of what `training.distributed` promises.

results = run_two_ranks(scenario, tmp_path)     scenario(rank) -> JSON value, in each process; a list by rank
"""

import datetime
import json
import os
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp


def run_two_ranks(scenario, folder: Path, *arguments) -> list:
    """Call `scenario(rank, *arguments)`, a function of a module, in two processes of one group; return their results.

    A collective that one rank misses ends after a minute with an error, not never.
    """
    mp.spawn(_join, args=(scenario, str(folder), *arguments), nprocs=2)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def _join(rank: int, scenario, folder: str, *arguments) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(scenario(rank, *arguments)))
