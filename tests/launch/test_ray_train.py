"""Ray Train workers: the same losses whatever shards the work, failures survived, impossible requests refused."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from conftest import LORA, REPOSITORY, TINY_MODEL, losses_of, uneven_rows
from forgebook.config.parse import load_config
from forgebook.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    ResourceError,
    StorageError,
    TrainingError,
)
from forgebook.launch import ray_train
from forgebook.launch.ray_train import fine_tune
from forgebook.planning.prepare import prepare
from forgebook.runs.atomic import read_json
from forgebook.runs.metrics import read_metrics
from forgebook.runs.run import Run, open_run
from support_ranks import train_in_ranks

SHARDINGS = ["none", "zero_1", "zero_2", "zero_3"]  # none first: the others are compared with it


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
    config = make_config(deepspeed=sharding, dtype="bfloat16", lora_config=method, learning_rate=3e-4, **settings)
    run = fine_tune(config)
    found = [*losses_of(run), read_json(run.summary)["eval_loss"]]
    expected = plain_ddp.setdefault("lora" if method else "full", found)
    assert len(found) == 4 and found == pytest.approx(expected, abs=0.02)
    # Alike because they are equal, not because DeepSpeed was never started.
    assert read_json(run.summary)["zero_stage"] == (None if sharding == "none" else int(sharding[-1]))
    assert read_json(run.summary)["stop_check"]["prompts"] == 3 and read_json(run.summary)["stop_check"]["note"] is None
    weights = load_file(next((run.folder / read_json(run.summary)["best_checkpoint"]).glob("*.safetensors")))
    assert all(tensor.numel() for tensor in weights.values())


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "zero_3"])
def test_a_killed_worker_changes_nothing(ray_session, make_config, write_rows, sharding):
    """SIGKILL in the middle of an epoch: Ray restarts the workers, which end with the losses of plain processes.

    And (2 workers x 2 examples) = (1 x 4), with examples of very different lengths: equal to float32 rounding.
    """
    settings = {
        "train_path": write_rows(uneven_rows(80), "many.jsonl"),
        "num_devices": 2,
        "train_batch_size_per_device": 2,
        "num_epochs": 2,
        "deepspeed": sharding,
        "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 15},
    }
    one_process = settings | {"num_devices": 0, "train_batch_size_per_device": 4, "deepspeed": None}
    alone = losses_of(fine_tune(make_config(run_name="alone", **one_process)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_train, "_run_on_ray", train_in_ranks)
        undisturbed = losses_of(fine_tune(make_config(run_name="undisturbed", **settings)))
    config = make_config(run_name="disturbed", **settings)
    run = Run(Path(config.storage_path) / "disturbed")
    killed = []
    killer = threading.Thread(target=_kill_a_worker_at, args=(run, 17, killed))
    killer.start()
    fine_tune(config)
    killer.join()
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
def test_workers_that_cannot_be_kept_alive_end_the_run_with_their_last_words(ray_session, make_config, write_rows):
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
    told = str(failed.value)
    assert "--- worker-0.log, last lines ---" in told and "the same command resumes" in told
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
def test_a_users_mistake_on_the_workers_is_told_once_and_not_retried(ray_session, make_config, tmp_path):
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


def test_fewer_devices_with_shards(make_config):
    config = make_config(num_devices={"min": 1, "max": 2}).resolve(deepspeed="zero_1")
    with pytest.raises(ConfigError, match=r"min_devices does not work with DeepSpeed.* set deepspeed: none"):
        fine_tune(config)
    assert not (Path(config.storage_path) / "run").exists()


def test_more_devices_than_this_machine_has(make_config, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = make_config(num_devices=(os.cpu_count() or 1) + 1)
    with pytest.raises(ResourceError, match=r"num_devices is \d+, this machine has \d+ .*set num_devices to at most"):
        fine_tune(config)
    assert not Path(config.storage_path).exists()


def test_deepspeed_on_a_cpu_without_a_compiler(make_config, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(ray_train.shutil, "which", lambda name: None)
    with pytest.raises(ResourceError, match=r"finds no g\+\+: install g\+\+, or set deepspeed: none"):
        fine_tune(make_config(deepspeed="zero_2"))


# Run folders ------------------------------------------------------------------------------------------


def test_the_same_command_again_does_nothing_more(make_config, capsys):
    run = fine_tune(make_config())
    before = run.metrics.read_bytes()
    fine_tune(make_config())
    assert "is complete already" in capsys.readouterr().out
    assert run.metrics.read_bytes() == before


def test_another_config_in_the_same_folder_is_refused(make_config):
    fine_tune(make_config())
    with pytest.raises(StorageError, match=r"another config \(learning_rate\).*on_existing=overwrite"):
        fine_tune(make_config(learning_rate=2e-3))


def test_other_data_in_the_same_folder_is_refused(make_config, write_rows):
    config = make_config()
    fine_tune(config)
    write_rows(uneven_rows(23), "train.jsonl")
    with pytest.raises(StorageError, match=r"train\.jsonl is not what .* was started with"):
        fine_tune(config)


def test_overwriting_and_failing_are_choices(make_config):
    run = fine_tune(make_config())
    with pytest.raises(StorageError, match="exists: choose another run_name"):
        fine_tune(make_config(on_existing="fail"))
    fine_tune(make_config(on_existing="overwrite", learning_rate=2e-3))
    assert "learning_rate: 0.002" in run.config.read_text()


@pytest.mark.parametrize("on_existing", ["resume", "overwrite", "fail"])
def test_a_folder_of_something_else_is_left_alone(make_config, tmp_path, on_existing):
    (tmp_path / "runs/run").mkdir(parents=True)
    (tmp_path / "runs/run/thesis.txt").write_text("x")
    with pytest.raises(StorageError, match="is not a run folder"):
        fine_tune(make_config(on_existing=on_existing))
    assert [path.name for path in (tmp_path / "runs/run").iterdir()] == ["thesis.txt"]


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 48 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_that_fills_up_during_a_run(small_disk, make_config, write_rows):
    """What is complete stays; once there is room, the same command ends with the same losses."""
    settings = {
        "train_path": write_rows(uneven_rows(48), "many.jsonl"), "num_epochs": 2, "lora_config": LORA,
        "train_batch_size_per_device": 4, "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 6},
    }  # fmt: skip
    undisturbed = losses_of(fine_tune(make_config(run_name="undisturbed", **settings)))
    config = make_config(run_name="disturbed", storage_path=str(small_disk), **settings)
    run = Run(small_disk / "disturbed")
    filler = threading.Thread(target=_fill_at, args=(run, 8, small_disk / "filler"))
    filler.start()
    with pytest.raises((CheckpointError, TrainingError), match=r"is full: make room|No space left") as failed:
        fine_tune(config)
    filler.join()
    assert re.search("the same command (continues|resumes)", str(failed.value)) and failed.value.exit_code == 1
    assert not list(run.checkpoints.glob(".*")) and not list(run.resume.glob(".*"))
    (small_disk / "filler").unlink()
    fine_tune(config)
    assert '"start": 6' in (run.logs / "progress.jsonl").read_text()
    assert len(undisturbed) == 24 and losses_of(run) == undisturbed


def _fill_at(run: Run, step: int, filler: Path) -> None:
    """Wait until a run reports `step`, then fill its disk."""
    while not (run.metrics.exists() and len(read_metrics(run.metrics)) > step):
        time.sleep(0.005)
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"train_path": "none.jsonl"}, StorageError),
        ({"context_length": 8}, DataError),
        ({"model_id": "./none"}, StorageError),
        ({"model_id": "no-such-owner/no-such-model"}, ModelError),
        ({"attention": "flash_attention_2"}, ResourceError),
    ],
)
def test_mistakes_leave_no_run_folder(make_config, values, error):
    config = make_config(**values)
    with pytest.raises(error) as refused:
        fine_tune(config)
    assert len(str(refused.value)) < 400
    left = {path.name for path in Path(config.storage_path).glob("run/*")}
    assert left <= {"data_report.json"}


@pytest.mark.slow
def test_a_checkpoint_is_saved_while_zero_3_fetches_ahead(without_ray, tmp_path, monkeypatch):
    """Evaluation leaves the next batch's first weights on their way; saving has to wait for them."""
    monkeypatch.chdir(REPOSITORY)
    overrides = ["deepspeed=zero_3", "num_devices=1", "eval_first=true", "max_steps=5", f"storage_path={tmp_path}"]
    run = fine_tune(load_config(REPOSITORY / "training_configs/tiny/quickstart.yaml", overrides))
    assert run.is_complete


# What the config leaves open --------------------------------------------------------------------------


def test_gaps_are_filled_from_the_data_and_recorded(make_config):
    config = make_config(
        train_batch_size_per_device=None, eval_batch_size_per_device=None, num_epochs=None, min_update_steps=7
    )
    filled = prepare(config, open_run(config)).config
    assert filled.context_length == 1024  # the base model's, which is above the 95th percentile
    assert filled.train_batch_size_per_device == filled.eval_batch_size_per_device == 8
    assert filled.num_epochs == 3  # 3 steps per epoch, 7 wanted
    assert filled.origins["num_epochs"] == filled.origins["context_length"] == "auto"


def test_the_resolved_config_tells_where_each_value_came_from(make_config):
    text = fine_tune(make_config()).config.read_text()
    assert re.search(r"^learning_rate: 0\.001\s+# file", text, flags=re.MULTILINE)
    assert re.search(r"^context_length: 1024\s+# auto", text, flags=re.MULTILINE)
    assert re.search(r"^seed: 42\s+# default", text, flags=re.MULTILINE)


def test_the_data_report(make_config):
    report = read_json(fine_tune(make_config()).data_report)
    assert report["train"]["rows"] == 24 and report["valid"]["rows"] == 6
    assert 0 < report["train"]["supervised_share"] < 1
    assert report["train"]["rows_dropped"] == 0
