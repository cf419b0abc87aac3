"""Ray Train workers: the same losses whatever shards the work, failures survived, impossible requests refused."""

import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import ray
from safetensors.torch import load_file

from conftest import LORA, REPOSITORY, TINY_MODEL, losses_of, uneven_rows
from forgebook.config.parse import load_config
from forgebook.errors import (
    ModelError,
    ResourceError,
    TrainingError,
)
from forgebook.launch import ray_train
from forgebook.launch.fine_tune import fine_tune
from forgebook.runs.atomic import read_json
from forgebook.runs.metrics import read_metrics
from forgebook.runs.run import Run
from support_ranks import train_in_ranks

SHARDINGS = ["none", "zero_1", "zero_2", "zero_3", "fsdp"]  # none first: the others are compared with it


def sharded(name: str) -> dict:
    return {"deepspeed": None if name in ("none", "fsdp") else name, "sharding": name}


@pytest.fixture(scope="module")
def plain_ddp():
    """Losses of two workers without DeepSpeed, by method; the first test of each makes them."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("method", [None, LORA], ids=["full", "lora"])
def test_every_sharding_trains_alike(without_ray, make_config, plain_ddp, sharding, method):
    """Plain DDP, ZeRO-1, -2 and -3 give the same losses within bfloat16 rounding, and save whole weights."""
    settings = {"num_devices": 2, "train_batch_size_per_device": 2, "gradient_accumulation_steps": 2}
    config = make_config(**sharded(sharding), dtype="bfloat16", lora_config=method, learning_rate=3e-4, **settings)
    run = fine_tune(config)
    found = [*losses_of(run), read_json(run.summary)["eval_loss"]]
    expected = plain_ddp.setdefault("lora" if method else "full", found)
    assert len(found) == 4 and found == pytest.approx(expected, abs=0.02)
    # Alike because they are equal, not because DeepSpeed was never started.
    assert read_json(run.summary)["zero_stage"] == (int(sharding[-1]) if sharding[-1].isdigit() else None)
    assert read_json(run.summary)["stop_check"]["prompts"] == 3 and read_json(run.summary)["stop_check"]["note"] is None
    weights = load_file(next((run.folder / read_json(run.summary)["best_checkpoint"]).glob("*.safetensors")))
    assert all(tensor.numel() for tensor in weights.values())


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["zero_3", "fsdp"])
def test_a_killed_worker_changes_nothing(ray_session, make_config, write_rows, sharding):
    """SIGKILL in the middle of an epoch: Ray restarts the workers, which end with the losses of plain processes.

    And (2 workers x 2 examples) = (1 x 4), with examples of very different lengths: equal to float32 rounding.
    """
    settings = {
        "train_path": write_rows(uneven_rows(80), "many.jsonl"),
        "num_devices": 2,
        "train_batch_size_per_device": 2,
        "num_epochs": 2,
        **sharded(sharding),
        "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 15},
    }
    one_process = settings | {"num_devices": 0, "train_batch_size_per_device": 4, **sharded("none")}
    alone = losses_of(fine_tune(make_config(run_name="alone", **one_process)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_train, "run_on_ray", train_in_ranks)
        undisturbed = losses_of(fine_tune(make_config(run_name="undisturbed", **settings)))
    config = make_config(run_name="disturbed", **settings)
    run = Run(Path(config.storage_path) / "disturbed")
    killed = []
    killer = threading.Thread(target=_kill_a_worker_at, args=(run, 17, killed))
    killer.start()
    fine_tune(config)
    killer.join()
    started = {actor["ActorClassName"] for actor in ray._private.state.actors().values()}
    assert "TrainController" in started and not started & {"DatasetManager", "PlacementGroupCleaner"}
    assert killed, "the worker had ended before it could be killed"
    progress = (run.logs / "progress.jsonl").read_text()
    assert progress.count('"training"') == 2 and '"start": 15,' in progress
    assert len(undisturbed) == 40 and losses_of(run) == undisturbed
    assert undisturbed[:6] == pytest.approx(alone[:6], abs=1e-4)
    summary = read_json(run.summary)
    assert summary["workers"] == 2 and len(summary["peak_memory_bytes_per_worker"]) == 2
    steps = [row["step"] for row in read_metrics(run.metrics) if "train_loss_batch" in row]
    assert steps == list(range(1, 41))


@pytest.mark.slow
def test_workers_that_cannot_be_kept_alive_end_the_run_with_the_end_of_their_logs(ray_session, make_config, write_rows):
    config = make_config(
        train_path=write_rows(uneven_rows(160), "many.jsonl"),
        num_devices=1,
        train_batch_size_per_device=4,
        num_epochs=3,
        max_failures=0,
    )
    run = Run(Path(config.storage_path) / "run")
    killed = []
    killer = threading.Thread(target=_kill_a_worker_at, args=(run, 10, killed, 0))
    killer.start()
    with pytest.raises(TrainingError) as failed:
        fine_tune(config)
    killer.join()
    assert killed and failed.value.exit_code == 1
    message = str(failed.value)
    assert "--- worker-0.log, last lines ---" in message and "the same command resumes" in message
    assert not run.is_complete and not list(run.checkpoints.iterdir())


def _kill_a_worker_at(run: Run, step: int, killed: list, rank: int = 1) -> None:
    """Wait until a run reports `step`, then kill one of its workers."""
    for _ in range(6000):
        if run.metrics.exists() and any(row["step"] >= step for row in read_metrics(run.metrics)):
            pid = int(re.findall(r"process (\d+)", (run.logs / f"worker-{rank}.log").read_text())[-1])
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
            return
        time.sleep(0.1)


@pytest.mark.slow
def test_a_users_mistake_on_the_workers_is_reported_once_and_not_retried(ray_session, make_config, tmp_path):
    """Weights that were copied in part: the workers are the first to read them."""
    model = Path(shutil.copytree(TINY_MODEL, tmp_path / "model"))
    os.truncate(model / "model.safetensors", 4_000_000)
    config = make_config(model_id=str(model), num_devices=1)
    with pytest.raises(ModelError, match=r"no model could be loaded from .*metadata"):
        fine_tune(config)
    log = (Path(config.storage_path) / "run/logs/worker-0.log").read_text()
    assert log.count("worker 0: process") == 1


@pytest.mark.slow
def test_resources_that_the_cluster_lacks_are_named(ray_session, make_config):
    config = make_config(num_devices=2, worker_resources={"accelerator_type:A10G": 0.001})
    with pytest.raises(ResourceError, match=r"need 0\.002 accelerator_type:A10G; the cluster has 0 of 0 .* free"):
        fine_tune(config)


@pytest.mark.slow
def test_a_checkpoint_is_saved_while_zero_3_fetches_ahead(without_ray, tmp_path, monkeypatch):
    """Evaluation leaves the next batch's first weights on their way; saving has to wait for them."""
    monkeypatch.chdir(REPOSITORY)
    overrides = ["deepspeed=zero_3", "num_devices=1", "eval_first=true", "max_steps=5", f"storage_path={tmp_path}"]
    run = fine_tune(load_config(REPOSITORY / "training_configs/tiny/quickstart.yaml", overrides))
    assert run.is_complete
