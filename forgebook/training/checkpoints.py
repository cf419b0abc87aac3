"""Checkpoints for use: save, re-open and verify; delete all but the best; send them to a bucket.

    <run>/checkpoints/epoch-1/    adapter or full weights, tokenizer, prompt format: complete or absent

Saving is collective (ZeRO and FSDP2 gather weights over all ranks); the files are written by rank 0, and its errors are
raised on every rank, so that none waits for the others. What a run resumes from is in `training_state`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from forgebook.errors import CheckpointError, ForgebookError
from forgebook.models import adapters
from forgebook.models.processor import copy_processor
from forgebook.models.unused_packages import without_unused
from forgebook.models.vllm_support import vllm_serves, vllm_serves_saved
from forgebook.runs import atomic, checksums, object_store, worker_upload
from forgebook.runs.run import Run, rank_checkpoints
from forgebook.training import distributed, fsdp
from forgebook.training.streamed_weights import write_streamed

__all__ = [
    "delete_published",
    "keep_best",
    "publish",
    "save_checkpoint",
    "save_start",
    "try_save",
    "verify_checkpoint",
    "vllm_verdict",
    "write_errors",
]

FULL_DISK_BYTES = 1 << 20  # a disk with fewer bytes free is full


def save_checkpoint(
    model,
    tokenizer,
    folder: Path,
    *,
    prompt_format: str | None = None,
    overrides: dict[str, Any] | None = None,
    processor: str | None = None,
    start: dict[str, torch.Tensor] | None = None,
    trained: bool = True,
    dtype: str | None = None,
) -> None:
    """Save a model (full or PEFT) with all that is needed to use it, verify it, and only then name it `folder`.

    Collective. prompt_format: YAML text, saved with the model. overrides: how an adapter's base was loaded, likewise.
    processor: where that of a model that reads images is.
    start: what `save_start` returned. trained: False before the first step, when an adapter is still all zero.
    dtype: in which weights are saved that FSDP2 shards, and trains in float32.

    Raises CheckpointError, on all ranks, if it cannot be written or fails verification.
    """
    saved_dtype = getattr(torch, dtype) if dtype is not None and fsdp.has_shards(model) else None
    # An adapter is small. Weights whose names or shapes transformers changes back are converted together.
    is_whole = hasattr(model, "peft_config") or bool(getattr(model, "_weight_conversions", None))
    is_streamed = saved_dtype is not None and not is_whole
    weights = {} if is_streamed else _gather_weights(model, saved_dtype)
    with contextlib.ExitStack() as stack:
        aside = folder
        with distributed.raised_everywhere(), write_errors(folder.parent):
            if distributed.is_main():
                aside = stack.enter_context(atomic.atomic_folder(folder))
        error = None
        if is_streamed and saved_dtype is not None:
            weights = dict(_named_weights(model))
            error = write_streamed(weights, aside, saved_dtype)
        with distributed.raised_everywhere(), write_errors(folder.parent):
            if not distributed.is_main():
                return
            if error is not None:
                raise error
            if start is not None:
                weights = adapters.fit_original_base(weights, start, trained)
            if not is_streamed:
                _write_model(model, weights, aside)
            if saved_dtype is not None and not hasattr(model, "peft_config"):
                _write_configs(model, str(dtype), aside)
            if start is not None:
                adapters.double_rank(aside / "adapter_config.json")
            if overrides:
                (aside / adapters.OVERRIDES).write_text(json.dumps(overrides, indent=2))
            tokenizer.save_pretrained(aside)
            if processor is not None:
                copy_processor(processor, aside)
            if prompt_format is not None:
                (aside / "prompt_format.yaml").write_text(prompt_format)
            verify_checkpoint(aside, expected=len(weights), trained=trained)
            if hasattr(model, "peft_config"):
                _write_card(aside, vllm_serves_saved(aside, model.get_base_model()))
            checksums.write_checksums(aside)
            stack.close()


def _gather_weights(model, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Collect what a checkpoint holds in rank 0's host memory: the adapter's weights, or all of them.

    Under ZeRO-3 and FSDP2 one parameter at a time is gathered, so that no GPU ever holds more than the largest one.
    Collective. dtype: of sharded weights.
    """
    is_adapter = hasattr(model, "peft_config")
    state = {}
    for name, tensor in _named_weights(model):
        # A frozen part of an adapter, in a tower, stays part of it.
        if is_adapter and not tensor.requires_grad and "lora_" not in name:
            continue
        with _gathered_parameter(tensor):
            whole = fsdp.gathered(tensor.detach())
            if distributed.is_main():
                state[name] = whole.to("cpu", dtype if dtype and fsdp.is_shard(tensor) else whole.dtype, copy=True)
    return state


def _named_weights(model) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and saved buffers by their names in the state dict."""
    yield from model.named_parameters()
    saved = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def _gathered_parameter(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Gather a ZeRO-3 parameter for the length of a block; do nothing for any other tensor."""
    if not hasattr(tensor, "ds_id"):
        return contextlib.nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters([tensor])


def _write_model(model, weights: dict[str, torch.Tensor], folder: Path) -> None:
    if hasattr(model, "peft_config"):
        # Resized embeddings are saved by the adapter or modules_to_save; the default, "auto", would query the hub.
        model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
        model.get_base_model().generation_config.save_pretrained(folder)
    else:
        with without_unused("deepspeed"):
            model.save_pretrained(folder, state_dict=weights)


def _write_configs(model, dtype: str, folder: Path) -> None:
    """Write what save_pretrained writes beside the weights."""
    model.config.dtype, model.config.architectures = dtype, [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _write_card(folder: Path, verdict: str) -> None:
    """Write the README.md of an adapter: PEFT's header with the base, and whether vLLM can serve it there."""
    card = folder / "README.md"
    header = card.read_text().split("---")[1]
    fix = "" if verdict == "yes" else ". Merge it into its base first: `python main.py merge RUN FOLDER`"
    base = atomic.read_json(folder / "adapter_config.json")["base_model_name_or_path"]
    card.write_text(
        f"---{header}---\n\n# An adapter of {base}\n\nFine-tuned with Forgebook. PEFT loads it on its base.\n\n"
        f"vLLM can serve the adapter: {verdict}{fix}\n"
    )


def vllm_verdict(model) -> str | None:
    """Report whether vLLM can serve a model's adapter, as its checkpoints do; None if it has none."""
    if not hasattr(model, "peft_config"):
        return None
    config = model.peft_config["default"].to_dict()
    names = [name for name, _ in model.named_parameters()]
    return vllm_serves(config, names, config["base_model_name_or_path"], model.get_base_model())


@contextlib.contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Raise CheckpointError if `folder` cannot be written; for a full disk each library has its own message."""
    try:
        yield
    except ForgebookError:
        raise
    except Exception as error:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if "No space left" in str(error) or shutil.disk_usage(existing).free < FULL_DISK_BYTES:
            raise CheckpointError(
                f"the disk of {folder} is full: make room there; the same command continues from the last complete "
                "state"
            ) from None
        if isinstance(error, OSError):
            raise CheckpointError(f"the checkpoint could not be written: {error}") from None
        raise


def verify_checkpoint(folder: Path, expected: int, trained: bool = True) -> None:
    """Re-open a saved checkpoint; raise CheckpointError if it is empty, zero-sized, not finite or untrained.

    expected: the number of tensors that should be saved (tied ones may be stored once).
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
        raise CheckpointError(f"the checkpoint holds {len(names)} tensors instead of {expected}")
    if is_adapter and trained and not moved and any("lora_B" in name for name in names):
        raise CheckpointError("the saved adapter is all zero: it changes nothing")


def try_save(model, tokenizer, folder: Path, *, copies: int, **settings: Any) -> None:
    """Save once before the first step and delete it: a full disk or a bad path fails now, not after hours of training.

    copies: how many checkpoints the run will keep. settings: as for `save_checkpoint`.

    Raises CheckpointError, on all ranks. Collective.
    """
    test_folder = folder / ".test-save"
    save_checkpoint(model, tokenizer, test_folder, **settings, trained=False)
    trainable = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    with distributed.raised_everywhere():
        if distributed.is_main():
            size = sum(path.stat().st_size for path in test_folder.rglob("*") if path.is_file())
            shutil.rmtree(test_folder)
            # The training state: weights in two bytes, master weights and two moments in four each. The old one is
            # deleted after the new one is complete, so that both exist for a while; checkpoints likewise.
            needed = size * (copies + 1) + 2 * 14 * trainable
            free = shutil.disk_usage(folder).free
            if free < needed:
                raise CheckpointError(
                    f"the run needs about {needed / 1e9:.1f} GB under {folder}, but {free / 1e9:.1f} GB are free: "
                    "set storage_path to a larger disk"
                )


def keep_best(run: Run, losses: Mapping[str, float | None], keep: int) -> str:
    """Delete all but the `keep` best checkpoints of a run; return the best one's name, on all ranks. Collective.

    losses: checkpoint name -> evaluation loss, oldest first.
    """
    ranked = rank_checkpoints(losses)
    with distributed.raised_everywhere():
        if distributed.is_main():
            for name in ranked[keep:]:
                atomic.delete_folder(run.checkpoints / name)
            if run.uri:
                delete_published(f"{run.uri}/{run.checkpoints.name}", lambda name: name in ranked[keep:])
    return ranked[0]


def save_start(model, path: Path, is_resumed: bool) -> dict[str, torch.Tensor] | None:
    """Return the start of an adapter that changed its base (PiSSA), which its checkpoints need; None for others.

    path: a fresh run saves it there; a resumed one reads it and changes its base in the same way. Collective.
    """
    if not adapters.changes_base(model):
        return None
    with distributed.raised_everywhere():
        if is_resumed:
            start = load_file(path)
            adapters.align_base(model, start)
            return start
        start = adapters.start_of(model)
        if distributed.is_main():
            save_file(start, path)
        return start


# A bucket that the workers write themselves -----------------------------------------------------------


def publish(run: Run, folder: Path, name: str, group: dist.ProcessGroup | None = None) -> None:
    """Upload a folder of the run to its bucket as `name`, where the workers do that themselves. Collective.

    Each machine sends its own files; rank 0 marks the folder as complete once all of them are there. Before that it
    sends the metrics of the steps before the folder was saved. group: of all ranks, in a thread beside training.
    """
    if run.uri is None:
        return
    uri = f"{run.uri}/{folder.parent.name}/{name}"
    with distributed.raised_everywhere(group):
        if distributed.is_main():
            worker_upload.start_folder(uri)
    files: object_store.Manifest = {}
    with distributed.raised_everywhere(group):
        if distributed.is_first_here():
            files = worker_upload.send_folder(folder, uri)
    manifests = distributed.gathered(files, group)
    with distributed.raised_everywhere(group):
        if distributed.is_main():
            worker_upload.send_run_files(run.folder, run.uri)
            worker_upload.finish_folder(uri, {name: size for files in manifests for name, size in files.items()})


def delete_published(uri: str, is_old: Callable[[str], bool]) -> None:
    """Delete the published folders under `uri` whose names are old."""
    for name in object_store.list_folders(uri):
        if is_old(name):
            object_store.remove_folder(f"{uri}/{name}")
