"""The training state: what a run resumes from, exactly where it stopped.

<run>/resume/step-120/    weights, optimizer, random numbers, position: complete or absent

save_state(run, Position(step=120, ...), model, optimizer)      collective; deletes the older states
folder, position = latest_state(run.resume)
load_state(folder, position, model, optimizer)                  collective
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from forgebook.errors import CheckpointError
from forgebook.runs import atomic, checksums
from forgebook.runs.run import Run
from forgebook.training import distributed, fsdp, sharded_state
from forgebook.training.background_save import BackgroundSave
from forgebook.training.checkpoints import delete_published, publish, write_errors

__all__ = ["Position", "latest_state", "load_state", "save_state"]

POSITION_FILE = "place.json"  # written last: a state without it is incomplete


@dataclass
class Position:
    """How far a run is, as saved with its training state.

    seconds: of training, over all starts. losses: checkpoint name -> evaluation loss, oldest first. scores: the same of
    the metric that ranks checkpoints, negative, where that is not the loss. epoch_sums: of the steps of an unfinished
    epoch (`step_metrics.EpochSums`). world_size: the workers that saved the state. skipped: steps whose gradients
    overflowed float16.
    """

    step: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    losses: dict[str, float | None] = field(default_factory=dict)
    epoch_sums: dict[str, Any] = field(default_factory=dict)
    world_size: int = 1
    scores: dict[str, float | None] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)


def save_state(
    run: Run, position: Position, model, optimizer, deepspeed_engine=None, background: BackgroundSave | None = None
) -> None:
    """Save what exact resuming needs as `resume/step-N` of a run, and delete the older states. Collective.

    deepspeed_engine: saves its own shards. background: where FSDP2's shards are written while training continues; the
    state is complete after its `wait`, which raises what could not be written. The state is complete or absent: in the
    run's folder it is renamed last; to a bucket that the workers write themselves it is sent by `publish`.

    Raises CheckpointError, on all ranks, if it cannot be written.
    """
    is_fsdp = deepspeed_engine is None and fsdp.has_shards(model)
    if background is not None:
        background.wait()
    target = run.resume / f"step-{position.step}"
    aside = target.with_name(f".writing-{target.name}")
    is_writer = distributed.is_first_here() if run.uri else distributed.is_main()
    with distributed.raised_everywhere(), write_errors(run.resume):
        if is_writer:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
    saved = replace(position, world_size=distributed.world_size())
    try:
        with distributed.raised_everywhere(), write_errors(run.resume):
            torch.save(_random_state(), aside / f"random-{distributed.rank()}.pt")
            if deepspeed_engine is not None:
                with _errors_after_save(deepspeed_engine):
                    deepspeed_engine.save_checkpoint(aside, tag="deepspeed", exclude_frozen_parameters=True)
            elif not is_fsdp and distributed.is_main():
                trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
                torch.save({"model": trained, "optimizer": optimizer.state_dict()}, aside / "state.pt")
        if is_fsdp:
            write = _shards_writer(run, saved, aside, target.name, sharded_state.named_state(model, optimizer))
            if background is not None:
                background.start(write)
                return
            with distributed.raised_everywhere():
                write()
            return
        with distributed.raised_everywhere(), write_errors(run.resume):
            if distributed.is_main():
                _write_position(saved, aside)
        publish(run, aside, target.name)
    except Exception:  # on all ranks: half a state fills the disk for nothing
        if is_writer:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    with distributed.raised_everywhere():
        if is_writer:
            _finish(run, aside, target.name)


def _shards_writer(
    run: Run, position: Position, aside: Path, name: str, state: dict[str, torch.Tensor]
) -> Callable[[], None]:
    """Copy a state to the host's memory, and return what writes it: in a thread, if training continues meanwhile."""
    copy, group = sharded_state.copied(state), sharded_state.background_group()
    is_writer = distributed.is_first_here() if run.uri else distributed.is_main()

    def write() -> None:
        try:
            with distributed.raised_everywhere(group), write_errors(run.resume):
                sharded_state.write_state(copy, aside, group)
                if distributed.is_main():
                    _write_position(position, aside)
            publish(run, aside, name, group)
            with distributed.raised_everywhere(group), write_errors(run.resume):
                if is_writer:
                    _finish(run, aside, name)
        except Exception:
            if is_writer:
                shutil.rmtree(aside, ignore_errors=True)
            raise

    return write


def _write_position(position: Position, aside: Path) -> None:
    (aside / POSITION_FILE).write_text(json.dumps(asdict(position)))


def _finish(run: Run, aside: Path, name: str) -> None:
    if run.uri is None:  # in a bucket each machine has its own files of it
        checksums.write_checksums(aside)
    _replace_states(run, aside, name)


@contextlib.contextmanager
def _errors_after_save(deepspeed_engine) -> Iterator[None]:
    """Raise what DeepSpeed cannot write once its save is over.

    Its save has barriers after each file: a rank that left it early would leave the others in one of them.
    """
    writer, errors = deepspeed_engine.checkpoint_engine, []
    save = writer.save

    def save_or_remember(*arguments: Any, **keywords: Any) -> None:
        try:
            save(*arguments, **keywords)
        except Exception as error:
            errors.append(error)

    writer.save = save_or_remember
    try:
        yield
    finally:
        writer.save = save
    if errors:
        raise errors[0]


def _replace_states(run: Run, aside: Path, name: str) -> None:
    """Give a training state its name, now that it is complete, and delete the older ones."""
    if run.uri:  # it is in the bucket, from where the next start downloads it
        shutil.rmtree(aside)
        if distributed.is_main():
            delete_published(f"{run.uri}/{run.resume.name}", lambda other: other != name)
        return
    aside.rename(aside.with_name(name))
    for old in aside.parent.iterdir():
        if old.name != name:
            atomic.delete_folder(old)


def latest_state(folder: Path) -> tuple[Path, Position] | None:
    """Find the newest complete training state and its position; None if there is none."""
    states = [path.parent for path in folder.glob(f"step-*/{POSITION_FILE}")]
    if not states:
        return None
    newest = max(states, key=lambda path: int(path.name.removeprefix("step-")))
    try:
        return newest, Position(**atomic.read_json(newest / POSITION_FILE))
    except TypeError as error:
        raise CheckpointError(f"{newest / POSITION_FILE} is damaged: {error}. Delete {newest}") from None


def load_state(
    state: Path, position: Position, model, optimizer, deepspeed_engine=None, *, is_elastic: bool = False
) -> None:
    """Restore a saved training state. Collective.

    A worker that the state was not saved by starts with random numbers of its own. is_elastic: workers may have left.

    Raises CheckpointError if another number of workers saved DeepSpeed's state: its shards belong to a rank.
    """
    if position.world_size != distributed.world_size() and deepspeed_engine is not None:
        raise CheckpointError(
            f"this run was saved by {position.world_size} workers and cannot be resumed by "
            f"{distributed.world_size()}: set num_devices={position.world_size}, or choose another run_name"
        )
    with distributed.raised_everywhere():
        if distributed.is_main() and not is_elastic:  # an elastic run may lack files of workers that left
            checksums.check_files(state)
    scales = [group.get("rate_scale", 1.0) for group in optimizer.param_groups]
    if deepspeed_engine is not None:
        # Not strict: frozen weights are not in the state, they are those of the base model.
        deepspeed_engine.load_checkpoint(str(state), tag="deepspeed", load_module_strict=False)
    elif sharded_state.is_sharded_state(state):
        sharded_state.read_state(state, model, optimizer)
    elif fsdp.has_shards(model):
        whole = torch.load(state / "state.pt", map_location="cpu", mmap=True, weights_only=True)
        sharded_state.take_whole(whole, model, optimizer)
    else:
        saved = torch.load(state / "state.pt", map_location="cpu", weights_only=True)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in saved["model"].items():
                parameters[name].copy_(tensor)
        groups = len(saved["optimizer"]["param_groups"])
        if groups != len(optimizer.param_groups):
            raise CheckpointError(
                f"{state} has {groups} groups of parameters and this version {len(optimizer.param_groups)}: an earlier "
                "version, which had one learning rate for labels as well, saved it; choose another run_name"
            )
        optimizer.load_state_dict(saved["optimizer"])
    # The state brings its own, of the learning rate that the config had then.
    for group, scale in zip(optimizer.param_groups, scales, strict=True):
        group["rate_scale"] = scale
    random_state = state / f"random-{distributed.rank()}.pt"
    if random_state.exists() or position.world_size == distributed.world_size():
        _set_random_state(torch.load(random_state, weights_only=True))


def _random_state() -> dict[str, Any]:
    numpy_state = np.random.get_state(legacy=False)["state"]
    return {
        "python": random.getstate(),
        # As a tensor, which loads with weights_only=True.
        "numpy": (torch.from_numpy(numpy_state["key"].astype(np.int64)), numpy_state["pos"]),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    key, position = state["numpy"]
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), position, 0, 0.0))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
