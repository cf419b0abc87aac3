"""The training state: complete or absent, and a run resumes from it exactly."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from forgebook.errors import CheckpointError, TrainingError
from forgebook.runs.run import Run
from forgebook.training import training_state
from forgebook.training.optimizers import AdamW, set_rate
from forgebook.training.training_state import Position, latest_state, load_state, save_state
from support_ranks import run_two_ranks


@pytest.fixture
def model():
    """A frozen layer and a trained one in bfloat16, whose master weights are part of the state."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)).bfloat16()
    model[0].requires_grad_(False)
    return model


def optimizer_of(model) -> AdamW:
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)


def train(model, optimizer) -> None:
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.rand_like(p)
    optimizer.step()


def test_weights_optimizer_random_numbers_and_position_come_back(model, tmp_path):
    optimizer = optimizer_of(model)
    train(model, optimizer)
    position = Position(7, 1000, 2.5, {"step-5": 1.5, "step-6": None}, {"steps": 2, "loss": 3.0})
    save_state(Run(tmp_path), position, model, optimizer)
    drawn = torch.rand(3), np.random.rand(), random.random()
    train(model, optimizer)
    values = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        if p.requires_grad:
            p.data.zero_()
    fresh = optimizer_of(model)
    folder, saved = latest_state(tmp_path / "resume")
    assert saved == position
    load_state(folder, saved, model, fresh)
    assert torch.equal(torch.rand(3), drawn[0]) and (np.random.rand(), random.random()) == drawn[1:]
    load_state(folder, saved, model, fresh)
    torch.rand(3)
    train(model, fresh)
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), values, strict=True))


def test_rates_of_groups_are_those_of_the_config_and_not_of_the_state(model, tmp_path):
    """The rate of labels is absolute: beside another learning rate it is another multiple."""

    def optimizer_with(scale: float) -> AdamW:
        return AdamW([{"params": [p], "rate_scale": k * scale} for k, p in enumerate(model[1].parameters(), 1)], lr=0.1)

    save_state(Run(tmp_path), Position(1), model, optimizer_with(2.0))
    fresh = optimizer_with(1.0)
    load_state(*latest_state(tmp_path / "resume"), model, fresh)
    set_rate(fresh.param_groups, 0.5)
    assert [group["lr"] for group in fresh.param_groups] == [0.5, 1.0]


def test_only_the_newest_complete_state_is_kept(model, tmp_path):
    for step in (9, 10):
        save_state(Run(tmp_path), Position(step), model, optimizer_of(model))
    (tmp_path / "resume/step-11").mkdir()  # without its position: not complete
    assert latest_state(tmp_path / "resume")[0].name == "step-10"
    assert not (tmp_path / "resume/step-9").exists()
    assert latest_state(tmp_path / "nothing") is None


def test_another_number_of_workers_resumes_but_not_deepspeeds_shards(model, tmp_path):
    optimizer = optimizer_of(model)
    save_state(Run(tmp_path), Position(1), model, optimizer)
    folder, position = latest_state(tmp_path / "resume")
    position.world_size = 2
    with pytest.raises(CheckpointError, match=r"saved by 2 workers and cannot be resumed by 1: set num_devices=2"):
        load_state(folder, position, model, optimizer, deepspeed_engine=object())
    load_state(folder, position, model, optimizer)
    (folder / "random-0.pt").unlink()  # a worker that the state was not saved by has random numbers of its own
    load_state(folder, position, model, optimizer, is_elastic=True)


@pytest.mark.parametrize(
    ("error", "kind"), [(OSError(28, "No space left on device"), CheckpointError), (ValueError("a bug"), ValueError)]
)
def test_a_failed_save_leaves_the_old_state_and_no_half_of_a_new_one(model, tmp_path, monkeypatch, error, kind):
    save_state(Run(tmp_path), Position(1), model, optimizer_of(model))

    def fail(*arguments):
        raise error

    monkeypatch.setattr(training_state.torch, "save", fail)
    with pytest.raises(kind):
        save_state(Run(tmp_path), Position(2), model, optimizer_of(model))
    assert [path.name for path in (tmp_path / "resume").iterdir()] == ["step-1"]


# DeepSpeed ----------------------------------------------------------------------------------------------


class Engine:
    """A DeepSpeed engine's save as far as it matters here: a file of each rank, then a barrier."""

    def __init__(self, rank: int, error: Exception | None):
        self.checkpoint_engine, self.rank, self.error = self, rank, error

    def save(self, values, path) -> None:
        if self.error:
            raise self.error
        torch.save(values, path)

    def save_checkpoint(self, folder, tag, exclude_frozen_parameters) -> None:
        (folder / tag).mkdir(exist_ok=True)
        self.checkpoint_engine.save(torch.zeros(3), folder / tag / f"shard-{self.rank}.pt")
        torch.distributed.barrier()


def save_in_two_ranks(rank: int, folder: str) -> list[str | None]:
    """Save three states, of which rank 1 can write its shard of the first alone; return what each save raised."""
    outcomes = []
    for step, error in enumerate((None, OSError(28, "No space left on device"), ValueError("a bug")), 1):
        try:
            save_state(Run(Path(folder)), Position(step), None, None, Engine(rank, error if rank == 1 else None))
            outcomes.append(None)
        except (CheckpointError, TrainingError) as raised:
            outcomes.append(f"{type(raised).__name__}: {raised}")
    return outcomes


def test_a_shard_that_one_rank_cannot_write_ends_the_save_of_both(tmp_path):
    """Although the other waits for it in a barrier of DeepSpeed's by then."""
    (tmp_path / "group").mkdir()
    run = tmp_path / "run"
    first, second = run_two_ranks(save_in_two_ranks, tmp_path / "group", str(run))
    assert first == second and first[0] is None
    assert first[1].startswith(f"CheckpointError: the disk of {run / 'resume'} is full: make room there")
    assert first[2] == "TrainingError: worker 1: ValueError: a bug"
    assert [path.name for path in (run / "resume").iterdir()] == ["step-1"]
    shards = sorted(path.name for path in (run / "resume").rglob("*.pt"))
    assert shards == ["random-0.pt", "random-1.pt", "shard-0.pt", "shard-1.pt"]
    assert latest_state(run / "resume")[1].world_size == 2
