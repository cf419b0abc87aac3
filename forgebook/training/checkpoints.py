"""Save, re-open and verify; keep the best; resume.

Two kinds of folder, each complete or absent:

    <run>/checkpoints/epoch-1/    the model: adapter or full weights, tokenizer, prompt format. For use.
    <run>/resume/step-120/        the training state: weights, optimizer, random numbers, place. For continuing.

Only the newest resume folder is kept. Saving is collective (ZeRO gathers weights over all ranks); the files
are written by rank 0, and what goes wrong there is raised on every rank, so that none waits for the others.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from forgebook.errors import CheckpointError, ForgebookError
from forgebook.models import adapters
from forgebook.runs import atomic, object_store, worker_upload
from forgebook.runs.run import Run, rank_checkpoints
from forgebook.training import distributed

__all__ = [
    "keep_best",
    "keep_start",
    "latest_resume",
    "load_resume",
    "publish",
    "rehearse",
    "save_checkpoint",
    "save_resume",
    "verify_checkpoint",
]

PLACE = "place.json"
SPARE = 1 << 20  # bytes: a disk with fewer of them free is full


# The model --------------------------------------------------------------------------------------------


def save_checkpoint(
    model,
    tokenizer,
    folder: Path,
    *,
    prompt_format: str | None = None,
    overrides: dict[str, Any] | None = None,
    start: dict[str, torch.Tensor] | None = None,
    trained: bool = True,
) -> None:
    """Save a model (full or PEFT) with all that is needed to use it, verify it, and only then name it `folder`.

    Collective. prompt_format: YAML text, saved beside. overrides: how an adapter's base was made, saved beside.
    start: what `keep_start` returned. trained: False for the rehearsal before the first step, when an adapter is
    still all zero.

    Raises CheckpointError, on all ranks, if it cannot be written or is not what it should be.
    """
    weights = _gather_weights(model)
    with distributed.raised_everywhere(), contextlib.ExitStack() as stack:
        if not distributed.is_main():
            return
        stack.enter_context(_write_errors(folder.parent))
        aside = stack.enter_context(atomic.atomic_folder(folder))
        if start is not None:
            weights = adapters.fit_original_base(weights, start, trained)
        _write_model(model, weights, aside)
        if start is not None:
            adapters.double_rank(aside / "adapter_config.json")
        if overrides:
            (aside / adapters.OVERRIDES).write_text(json.dumps(overrides, indent=2))
        tokenizer.save_pretrained(aside)
        if prompt_format is not None:
            (aside / "prompt_format.yaml").write_text(prompt_format)
        verify_checkpoint(aside, expected=len(weights), trained=trained)


def _gather_weights(model) -> dict[str, torch.Tensor]:
    """Collect what a checkpoint holds, on rank 0's host memory: the adapter's weights, or all of them.

    Under ZeRO-3 one parameter at a time is made whole, so that no GPU ever holds more than the largest one.
    """
    is_adapter = hasattr(model, "peft_config")
    state = {}
    for name, tensor in _named_weights(model):
        if is_adapter and not tensor.requires_grad:
            continue
        with _whole(tensor):
            if distributed.is_main():
                state[name] = tensor.detach().to("cpu", copy=True)
    return state


def _named_weights(model) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and saved buffers by their names in the state dict."""
    yield from model.named_parameters()
    saved = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def _whole(tensor: torch.Tensor):
    """Gather a ZeRO-3 parameter for the length of a block; leave any other tensor as it is."""
    if not hasattr(tensor, "ds_id"):
        return contextlib.nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters([tensor])


def _write_model(model, weights: dict[str, torch.Tensor], folder: Path) -> None:
    if hasattr(model, "peft_config"):
        # Resized embeddings are adapters' or modules_to_save's business; "auto" would ask the hub.
        model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
        model.get_base_model().generation_config.save_pretrained(folder)
    else:
        model.save_pretrained(folder, state_dict=weights)


@contextlib.contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Raise CheckpointError if `folder` cannot be written; for a full disk each library has its own words."""
    try:
        yield
    except ForgebookError:
        raise
    except Exception as error:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if "No space left" in str(error) or shutil.disk_usage(existing).free < SPARE:
            raise CheckpointError(
                f"the disk of {folder} is full: make room there; the same command continues from the last complete "
                "state"
            ) from None
        if isinstance(error, OSError):
            raise CheckpointError(f"the checkpoint could not be written: {error}") from None
        raise


def verify_checkpoint(folder: Path, expected: int, trained: bool = True) -> None:
    """Re-open a saved checkpoint; raise CheckpointError if it is empty, zero-sized, not finite or untrained.

    expected: how many tensors were meant to be saved (tied ones may be stored once).
    """
    from safetensors import safe_open

    names, moved, is_adapter = [], False, (folder / "adapter_config.json").exists()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dict)
                tensor = tensors.get_tensor(name)
                names.append(name)
                if tensor.numel() == 0:
                    raise CheckpointError(
                        f"saved tensor {name} has no elements: its ZeRO-3 partitions were not gathered"
                    )
                if not torch.isfinite(tensor).all():
                    raise CheckpointError(f"saved tensor {name} holds NaN or infinite values")
                if "lora_B" in name or "lora_embedding_B" in name:
                    moved = moved or bool(tensor.any())
    if not names or (is_adapter and len(names) < expected):
        raise CheckpointError(f"the checkpoint holds {len(names)} tensors, {expected} were to be saved")
    if is_adapter and trained and not moved and any("lora_B" in name for name in names):
        raise CheckpointError("the saved adapter is all zero: it would change nothing")


def rehearse(model, tokenizer, folder: Path, *, copies: int, **beside: Any) -> None:
    """Save once before the first step and delete it: a full disk or a bad path fails now, not after the night.

    copies: how many checkpoints the run will hold at a time. beside: as for `save_checkpoint`.

    Raises CheckpointError, on all ranks.
    """
    rehearsal = folder / ".rehearsal"
    save_checkpoint(model, tokenizer, rehearsal, **beside, trained=False)
    trainable = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    with distributed.raised_everywhere():
        if distributed.is_main():
            one = sum(path.stat().st_size for path in rehearsal.rglob("*") if path.is_file())
            shutil.rmtree(rehearsal)
            # The resume state: weights in two bytes, master weights and two moments in four; old and new at once.
            needed = one * (copies + 1) + 2 * 14 * trainable
            free = shutil.disk_usage(folder).free
            if free < needed:
                raise CheckpointError(
                    f"the run needs about {needed / 1e9:.1f} GB under {folder}, {free / 1e9:.1f} GB are free: "
                    "set storage_path to a larger disk"
                )


def keep_best(folder: Path, losses: dict[str, float | None], keep: int, uri: str | None = None) -> str:
    """Delete all but the `keep` checkpoints of lowest evaluation loss (without evaluation: the newest).

    losses: checkpoint name -> evaluation loss, oldest first. uri: where in a bucket the workers save checkpoints
    themselves, None otherwise. Returns the best one's name.
    """
    ranked = rank_checkpoints(losses)
    if distributed.is_main():
        for name in ranked[keep:]:
            atomic.delete_folder(folder / name)
        if uri:
            _delete_published(uri, lambda name: name in ranked[keep:])
    return ranked[0]


def keep_start(model, path: Path, is_continued: bool) -> dict[str, torch.Tensor] | None:
    """Keep the start of an adapter that changed its base (PiSSA) for as long as the run lasts; None for others.

    path: where it is written by a fresh run; a continued one reads it and makes its base the same. Collective.
    """
    if not adapters.changes_base(model):
        return None
    with distributed.raised_everywhere():
        if is_continued:
            start = load_file(path)
            adapters.align_base(model, start)
            return start
        start = adapters.start_of(model)
        if distributed.is_main():
            save_file(start, path)
        return start


# The training state -----------------------------------------------------------------------------------


def save_resume(run: Run, place: dict[str, Any], model, optimizer, engine=None) -> None:
    """Save what continuing exactly needs as `resume/step-N` of a run, and delete the older ones. Collective.

    place: JSON values: where the run is. engine: DeepSpeed's, which saves its own shards. The state is complete or
    absent: in the run's folder by its name, given last; in a bucket that the workers write themselves, by `publish`.
    """
    target = run.resume / f"step-{place['step']}"
    aside = target.with_name(f".writing-{target.name}")
    is_writer = distributed.is_first_here() if run.uri else distributed.is_main()
    with distributed.raised_everywhere():
        if is_writer:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
    try:
        with distributed.raised_everywhere(), _write_errors(run.resume):
            torch.save(_random_state(), aside / f"random-{distributed.rank()}.pt")
            if engine is not None:
                engine.save_checkpoint(aside, tag="deepspeed", exclude_frozen_parameters=True)
            elif distributed.is_main():
                trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
                torch.save({"model": trained, "optimizer": optimizer.state_dict()}, aside / "state.pt")
            if distributed.is_main():
                (aside / PLACE).write_text(json.dumps({**place, "world_size": distributed.world_size()}))
        publish(run, aside, target.name)
    except ForgebookError:  # on all ranks: what is half-written fills the disk for nothing
        if is_writer:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    with distributed.raised_everywhere():
        if is_writer:
            _replace_states(run, aside, target.name)


def _replace_states(run: Run, aside: Path, name: str) -> None:
    """Give a training state its name, now that all of it is there, and delete the older ones."""
    if run.uri:  # it is in the bucket, where the next start fetches it from
        shutil.rmtree(aside)
        if distributed.is_main():
            _delete_published(f"{run.uri}/{run.resume.name}", lambda other: other != name)
        return
    aside.rename(aside.with_name(name))
    for old in aside.parent.iterdir():
        if old.name != name:
            atomic.delete_folder(old)


# A bucket that the workers write themselves -----------------------------------------------------------


def publish(run: Run, folder: Path, name: str) -> None:
    """Upload a folder of the run to its bucket as `name`, where the workers do that themselves. Collective.

    Each machine sends its own files; rank 0 says that the folder is complete once all of them are there, and before
    that sends the metrics that lead to it.
    """
    if run.uri is None:
        return
    uri = f"{run.uri}/{folder.parent.name}/{name}"
    with distributed.raised_everywhere():
        if distributed.is_main():
            worker_upload.start_folder(uri)
    files: object_store.Manifest = {}
    with distributed.raised_everywhere():
        if distributed.is_first_here():
            files = worker_upload.send_folder(folder, uri)
    everyones = distributed.gathered(files)
    with distributed.raised_everywhere():
        if distributed.is_main():
            worker_upload.send_run_files(run.folder, run.uri)
            worker_upload.finish_folder(uri, {name: size for files in everyones for name, size in files.items()})


def _delete_published(uri: str, is_old: Callable[[str], bool]) -> None:
    for name in object_store.list_folders(uri):
        if is_old(name):
            object_store.remove_folder(f"{uri}/{name}")


def latest_resume(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Find the newest complete training state and its place, if there is one."""
    states = [path.parent for path in folder.glob(f"step-*/{PLACE}")]
    if not states:
        return None
    newest = max(states, key=lambda path: int(path.name.removeprefix("step-")))
    return newest, json.loads((newest / PLACE).read_text())


def load_resume(state: Path, place: dict[str, Any], model, optimizer, engine=None, *, is_elastic: bool = False) -> None:
    """Put a saved training state back. Collective.

    is_elastic: another number of workers may go on; those that none of them was keep the random numbers they have.

    Raises CheckpointError if it was saved by another number of workers and is not elastic: their shards and random
    numbers cannot be continued.
    """
    if place["world_size"] != distributed.world_size() and not is_elastic:
        raise CheckpointError(
            f"this run was saved by {place['world_size']} workers and cannot be continued by "
            f"{distributed.world_size()}: set num_devices={place['world_size']}, or choose another run_name"
        )
    if engine is not None:
        engine.load_checkpoint(str(state), tag="deepspeed", load_module_strict=False)
    else:
        saved = torch.load(state / "state.pt", map_location="cpu", weights_only=True)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in saved["model"].items():
                parameters[name].copy_(tensor)
        optimizer.load_state_dict(saved["optimizer"])
    random_state = state / f"random-{distributed.rank()}.pt"
    if random_state.exists() or not is_elastic:
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
