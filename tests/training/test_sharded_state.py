"""The training state of FSDP2: exact, and fit for any number of workers and any sharding."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from conftest import LORA, losses_of, uneven_rows
from forgebook.launch.fine_tune import fine_tune
from forgebook.runs import upload
from support_ranks import run_two_ranks

TWO = {"num_devices": 2, "train_batch_size_per_device": 2, "gradient_accumulation_steps": 2}
STEPS = {"lr_scheduler_type": "constant", "num_warmup_steps": 0, "num_epochs": 9}
ONE = {"num_devices": 1, "train_batch_size_per_device": 2, "gradient_accumulation_steps": 4}


@pytest.mark.slow
def test_the_state_fits_any_number_of_workers_and_any_sharding(without_ray, make_config, write_rows):
    """fsdp on 2 workers -> fsdp on 1 -> none on 2 -> fsdp on 2 has the losses of a run without an interruption."""
    settings = {"train_path": write_rows(uneven_rows(24), "many.jsonl"), "lora_config": LORA, **STEPS}
    straight = fine_tune(make_config(run_name="straight", sharding="none", max_steps=8, **settings, **TWO))
    ways = [("fsdp", TWO), ("fsdp", ONE), ("none", TWO), ("fsdp", TWO)]
    for number, (sharding, devices) in enumerate(ways, start=1):
        config = make_config(run_name="moved", sharding=sharding, max_steps=2 * number, **settings, **devices)
        moved = fine_tune(config)
        assert len(losses_of(moved)) == 2 * number
    assert losses_of(moved) == pytest.approx(losses_of(straight), abs=1e-4)


@pytest.mark.slow
def test_a_resumed_run_has_the_same_losses_to_the_last_bit(without_ray, make_config, write_rows):
    settings = {"train_path": write_rows(uneven_rows(24), "many.jsonl"), "sharding": "fsdp", **STEPS, **TWO}
    settings |= {"lora_config": LORA | {"lora_dropout": 0.1}}
    straight = fine_tune(make_config(run_name="straight", max_steps=4, **settings))
    for steps in (2, 4):
        resumed = fine_tune(make_config(run_name="resumed", max_steps=steps, **settings))
    assert losses_of(resumed) == losses_of(straight) and len(losses_of(resumed)) == 4
    [state] = resumed.resume.iterdir()
    assert sorted(path.name for path in state.iterdir() if path.suffix == ".distcp") == ["__0_0.distcp", "__1_0.distcp"]


# In one session of two ranks ----------------------------------------------------------------------------


class Wrapped(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 1))
        self.model._no_split_modules = ("Linear",)

    def forward(self, inputs):
        return self.model(inputs).square().sum()


def save_to_bucket(rank: int, folder: str, uri: str) -> dict:
    """Two machines, each with a folder of its own, save twice to a bucket that answers slowly, and train meanwhile."""
    from forgebook.runs import object_store
    from forgebook.runs.run import Run
    from forgebook.training import fsdp
    from forgebook.training.background_save import BackgroundSave
    from forgebook.training.optimizers import AdamW
    from forgebook.training.training_state import Position, save_state

    os.environ["LOCAL_RANK"] = "0"  # the first of its machine
    run, saving = Run(Path(folder) / str(rank), uri), BackgroundSave()
    run.resume.mkdir(parents=True)
    wrapped = Wrapped()
    fsdp.shard(wrapped, torch.float32, torch.device("cpu"))
    model, optimizer = wrapped.model, AdamW([{"params": list(wrapped.parameters())}], lr=0.1)
    send, may_send = object_store.upload_files, threading.Event()
    object_store.upload_files = lambda *arguments: may_send.wait(30) and send(*arguments)

    def step():
        wrapped(torch.ones(3, 6) * (rank + 1)).backward()  # with collectives of its own
        optimizer.step()
        optimizer.zero_grad()

    step()
    save_state(run, Position(1), model, optimizer, background=saving)
    step()
    absent = upload.newest_state(upload.complete_folders(uri, object_store.list_files(uri)))
    torch.distributed.barrier()
    may_send.set()
    save_state(run, Position(2), model, optimizer, background=saving)
    step()
    saving.wait()
    torch.distributed.barrier()
    names = object_store.list_files(uri)
    left = [path.name for path in run.resume.iterdir()]
    return {
        "absent": absent,
        "newest": upload.newest_state(upload.complete_folders(uri, names)),
        "names": sorted(names),
        "left": left,
    }


def save_and_read(rank: int, folder: str) -> dict:
    from forgebook.errors import CheckpointError
    from forgebook.runs.run import Run
    from forgebook.training import checkpoints, fsdp, sharded_state
    from forgebook.training.background_save import BackgroundSave
    from forgebook.training.optimizers import AdamW
    from forgebook.training.training_state import Position, latest_state, load_state, save_state

    run, outcomes, saving = Run(Path(folder)), {}, BackgroundSave()
    wrapped = Wrapped()
    fsdp.shard(wrapped, torch.float32, torch.device("cpu"))
    model, optimizer = wrapped.model, AdamW([{"params": list(wrapped.parameters())}], lr=0.1)

    def step():
        wrapped(torch.ones(3, 6) * (rank + 1)).backward()
        optimizer.step()
        optimizer.zero_grad()

    def whole(tensor):
        return fsdp.gathered(tensor).tolist()

    step()
    expected = {name: whole(tensor) for name, tensor in sharded_state.named_state(model, optimizer).items()}
    # Training continues before anything is written.
    write, may_write = sharded_state.write_state, threading.Event()
    sharded_state.write_state = lambda *arguments: may_write.wait(30) and write(*arguments)
    save_state(run, Position(1), model, optimizer, background=saving)
    step()
    outcomes["absent"] = latest_state(run.resume) is None
    torch.distributed.barrier()
    may_write.set()
    saving.wait()
    outcomes["complete"] = [path.name for path in run.resume.iterdir()]
    load_state(*latest_state(run.resume), model, optimizer)
    read = {name: whole(tensor) for name, tensor in sharded_state.named_state(model, optimizer).items()}
    outcomes["as it was"] = read == expected and read["step"] == 1.0

    # A rank that cannot write ends the save of both, and leaves the earlier state.
    def full(*arguments):
        if rank == 1:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    real, sharded_state.write_state = FileSystemWriter.write_data, write
    FileSystemWriter.write_data = full
    save_state(run, Position(2), model, optimizer, background=saving)
    try:
        saving.wait()
    except CheckpointError as error:
        outcomes["full"] = str(error)
    FileSystemWriter.write_data = real
    torch.distributed.barrier()
    outcomes["left"] = sorted(path.name for path in run.resume.iterdir())
    step()
    # The state has its name before a slow rank would look for it under the other one.
    from torch.distributed.checkpoint import FileSystemReader

    opened = FileSystemReader.read_metadata
    if rank == 1:
        FileSystemReader.read_metadata = lambda reader: time.sleep(1) or opened(reader)
    save_state(run, Position(3), model, optimizer)  # here and now
    FileSystemReader.read_metadata = opened
    outcomes["newest"] = latest_state(run.resume)[1].step
    outcomes["checked"] = checkpoints.checksums.check_files(latest_state(run.resume)[0])
    try:
        other = torch.nn.Linear(2, 2)
        sharded_state.read_state(
            latest_state(run.resume)[0], other, AdamW([{"params": list(other.parameters())}], lr=1)
        )
    except CheckpointError as error:
        outcomes["other"] = str(error)
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return run_two_ranks(save_and_read, folder, str(folder))


def test_training_waits_for_the_copy_alone(outcomes):
    for each in outcomes:
        assert each["absent"] and each["complete"] == ["step-1"] and each["as it was"]


def test_a_failed_save_is_raised_on_both_and_leaves_the_earlier_state(outcomes):
    assert all("is full: make room there" in each["full"] for each in outcomes)
    assert [each["left"] for each in outcomes] == [["step-1"]] * 2
    assert [each["newest"] for each in outcomes] == [3, 3]


def test_a_state_of_other_weights_is_refused(outcomes):
    assert all("is the state of other weights" in each["other"] for each in outcomes)


def test_training_does_not_wait_for_a_bucket(s3, tmp_path):
    """Step 1 is trained on while no bucket has its state; that of step 2, of both machines, takes its place."""
    for each in run_two_ranks(save_to_bucket, tmp_path, str(tmp_path), "s3://forgebook/runs/one"):
        assert each["absent"] is None and each["newest"] == "resume/step-2" and not each["left"]
        states = {name for name in each["names"] if name.startswith("resume/")}
        assert {name.split("/")[1] for name in states} == {"step-2"}
        assert {f"resume/step-2/__{rank}_0.distcp" for rank in (0, 1)} <= states
