"""A training worker in a process of its own, without a Ray cluster, by Ray Train's local mode under torchrun.

    PYTHONPATH=.:tests python tests/support_worker.py JOB.pkl RESULT.json

`start_workers` starts one process for each worker; each counts as the first one of a machine of its own.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY, free_port


def start_workers(job, folder: Path, caches: list[Path], **environment: str) -> list[subprocess.Popen]:
    """Start one worker per cache folder; worker k writes what it returns and reports to `folder/k.json`."""
    (folder / "job.pkl").write_bytes(pickle.dumps(job))
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(folder / "job.pkl"), str(folder / f"{k}.json")],
            env={
                **os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "FORGEBOOK_CACHE": str(cache),
                "RANK": str(k), "WORLD_SIZE": str(len(caches)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment,
            },
        )
        for k, cache in enumerate(caches)
    ]  # fmt: skip


def main() -> None:
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    from forgebook.launch.ray_worker import train_worker

    job = pickle.loads(Path(sys.argv[1]).read_bytes())
    result = TorchTrainer(
        train_worker, train_loop_config={"job": job}, scaling_config=ScalingConfig(num_workers=0)
    ).fit()
    error = str(result.return_value) if isinstance(result.return_value, Exception) else None
    checkpoint = result.checkpoint and result.checkpoint.path
    Path(sys.argv[2]).write_text(json.dumps({"error": error, "metrics": result.metrics, "checkpoint": checkpoint}))


if __name__ == "__main__":
    main()
