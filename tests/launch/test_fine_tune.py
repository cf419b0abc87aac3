"""What fine_tune refuses, the run folder it writes or resumes, and what it fills in; the workers: test_ray_train.py."""

import contextlib
import json
import os
import re
import subprocess
import threading
import time
from pathlib import Path

import pytest

from conftest import LORA, REPOSITORY, losses_of, uneven_rows
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
from forgebook.launch.fine_tune import fine_tune
from forgebook.launch.ray_train import run_on_ray
from forgebook.planning.prepare import prepare
from forgebook.runs.atomic import read_json
from forgebook.runs.metrics import read_metrics
from forgebook.runs.run import Run, open_run


def test_fewer_devices_with_shards(make_config):
    config = make_config(num_devices={"min": 1, "max": 2}).resolve(deepspeed="zero_1")
    with pytest.raises(ConfigError, match=r"min_devices does not work with DeepSpeed.* set sharding: fsdp or none"):
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
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ResourceError, match=r"finds no g\+\+: install g\+\+, or set deepspeed: none"):
        fine_tune(make_config(deepspeed="zero_2"))


# Run folders ------------------------------------------------------------------------------------------


def test_the_same_command_again_changes_nothing(make_config, capsys):
    run = fine_tune(make_config())
    before = run.metrics.read_bytes()
    fine_tune(make_config())
    assert "is complete already" in capsys.readouterr().out
    assert run.metrics.read_bytes() == before


def test_another_config_in_the_same_folder_is_refused(make_config):
    fine_tune(make_config())
    with pytest.raises(StorageError, match=r"another config \(seed\).*on_existing=overwrite"):
        fine_tune(make_config(seed=7))


def test_other_data_in_the_same_folder_is_refused(make_config, write_rows):
    config = make_config()
    fine_tune(config)
    write_rows(uneven_rows(23), "train.jsonl")
    with pytest.raises(StorageError, match=r"train\.jsonl \(it was .*\) is not what .* was started with"):
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


@pytest.mark.parametrize(
    "devices",
    [
        {"train_batch_size_per_device": 4},
        pytest.param({"train_batch_size_per_device": 2, "num_devices": 2, "sharding": "fsdp"}, marks=pytest.mark.slow),
    ],
    ids=["here", "two workers, FSDP2"],
)
def test_a_disk_that_fills_up_during_a_run(small_disk, make_config, write_rows, devices, without_ray, monkeypatch):
    """What is complete stays; once there is room, the same command ends with the same losses.

    Of the three runs, the one that fails is on Ray, where the workers' error has to reach the user.
    """
    settings = {
        "train_path": write_rows(uneven_rows(48), "many.jsonl"), "num_epochs": 2, "lora_config": LORA,
        "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 6}, **devices,
    }  # fmt: skip
    undisturbed = losses_of(fine_tune(make_config(run_name="undisturbed", **settings)))
    config = make_config(run_name="disturbed", storage_path=str(small_disk), **settings)
    run = Run(small_disk / "disturbed")
    filler = threading.Thread(target=_fill_at, args=(run, 8, small_disk / "filler"))
    filler.start()
    with (
        pytest.raises((CheckpointError, TrainingError), match=r"is full: make room|No space left") as failed,
        monkeypatch.context() as patch,
    ):
        patch.setattr(ray_train, "run_on_ray", run_on_ray)
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


# What the config leaves open --------------------------------------------------------------------------


def test_a_run_that_diverges_says_so_while_it_trains_and_at_its_end(make_config, write_rows, capsys):
    lines = (REPOSITORY / "data/quickstart/train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:30]]
    paths = {"train_path": write_rows(rows[:24], "24.jsonl"), "valid_path": write_rows(rows[24:], "6.jsonl")}
    settings = {"num_epochs": 6, "num_warmup_steps": 0, "lora_config": LORA, "eval_first": True}
    run = fine_tune(make_config(learning_rate=1e4, **paths, **settings))
    printed = capsys.readouterr().out
    rise, worse = read_json(run.summary)["warnings"]
    assert "the training loss has risen from " in rise and "no evaluation was better than the one before" in worse
    assert printed.count("the training loss has risen from ") == 2 and printed.count("stop it and lower") == 1


def test_gaps_are_filled_from_the_data_and_recorded(make_config):
    config = make_config(
        train_batch_size_per_device=None, eval_batch_size_per_device=None, num_epochs=None, min_update_steps=7
    )
    filled = prepare(config, open_run(config)).config
    assert filled.context_length == 1024  # the base model's, which is above the 95th percentile
    assert filled.train_batch_size_per_device == filled.eval_batch_size_per_device == 8
    assert filled.num_epochs == 3  # 3 steps per epoch, 7 wanted
    assert filled.origins["num_epochs"] == filled.origins["context_length"] == "auto"


def test_the_resolved_config_records_the_origin_of_each_value(make_config):
    text = fine_tune(make_config()).config.read_text()
    assert re.search(r"^learning_rate: 0\.001\s+# file", text, flags=re.MULTILINE)
    assert re.search(r"^context_length: 1024\s+# auto", text, flags=re.MULTILINE)
    assert re.search(r"^seed: 42\s+# default", text, flags=re.MULTILINE)


def test_the_data_report(make_config):
    report = read_json(fine_tune(make_config()).data_report)
    assert report["train"]["rows"] == 24 and report["valid"]["rows"] == 6
    assert 0 < report["train"]["supervised_share"] < 1
    assert report["train"]["rows_dropped"] == 0
