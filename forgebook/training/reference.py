"""The reference model's log-probabilities, once: the model is its own reference, as it was before its first step.

That holds for every way to begin: a fresh adapter changes nothing yet, a continued one is what preferences are
to be learnt from, and full weights are not moved so far.

    with_reference(...)             examples with what their task compares them with
    reference_logps(...)            by the training workers, before the first step
    start_stage(config, run)        by Ray Data workers of their own, while training runs: a block of rows after the
    StagedReference(...)            other, in the order in which the first epoch needs them; training waits if it must
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from forgebook.config.blocks import needs_reference
from forgebook.data import batching, token_store
from forgebook.data.token_store import Tokens
from forgebook.errors import TrainingError
from forgebook.models import load
from forgebook.models.tokenizer import tokenizer_of
from forgebook.training.losses import SupervisedLM

if TYPE_CHECKING:
    from forgebook.config.parse import FinetuneConfig
    from forgebook.runs.metrics import Progress
    from forgebook.runs.run import Run
    from forgebook.training.setup import Worker

__all__ = ["ExampleSet", "StagedReference", "reference_logps", "start_stage", "with_reference"]

POLL_SECONDS = 0.2
FAILED = "failed.txt"


@dataclass(frozen=True)
class ExampleSet:
    """Examples to train on or to evaluate; for preferences with the reference's log-probabilities [examples]."""

    tokens: Tokens
    reference: np.ndarray | StagedReference | None = None

    def batch(
        self, worker: Worker, part: list[batching.Sequence], width: int | None = None, packed: bool = False
    ) -> dict[str, torch.Tensor]:
        """Make the tensors of some sequences, on the worker's device."""
        tensors = batching.collate(self.tokens, part, worker.tokenizer.pad_token_id, width, packed=packed)
        return {name: tensor.to(worker.accelerator.device) for name, tensor in tensors.items()}

    def reference_of(self, worker: Worker, part: list[batching.Sequence]) -> torch.Tensor | None:
        """Return the reference's figures for the examples of a batch, in its order."""
        if self.reference is None or not part:
            return None
        return torch.from_numpy(self.reference[np.concatenate(part)]).to(worker.accelerator.device)


def with_reference(worker: Worker, run: Run, tokens: Tokens | None, name: str, progress: Progress) -> ExampleSet | None:
    """Return the examples with the reference's figures, if their loss compares with one; None without examples.

    They are computed once, before the first step; a resumed run reads what the first start saved. Collective.
    name: "training" or "validation".
    """
    config = worker.config
    if (
        tokens is None
        or config.task != "preference_tuning"
        or not needs_reference(config.preference_tuning_config.loss)
    ):
        return None if tokens is None else ExampleSet(tokens)
    processor = config.preference_tuning_config.logprob_processor_scaling_config
    if processor and name == "training" and config.num_devices:
        return ExampleSet(tokens, StagedReference(config, run, tokens))
    progress.stage(f"computing the reference model's log-probabilities of the {name} pairs")
    batch_size = 2 * ((processor and processor.batch_size) or config.eval_batch_size_per_device)
    path = run.tokens / f"reference-{name}.npy"
    pad_id = worker.tokenizer.pad_token_id
    return ExampleSet(tokens, reference_logps(worker.wrapped, worker.accelerator, tokens, batch_size, pad_id, path))


@torch.no_grad()
def reference_logps(
    wrapped: nn.Module, accelerator: Accelerator, rows: Tokens, batch_size: int, pad_id: int, kept: Path
) -> np.ndarray:
    """Return [rows] summed log-probabilities of the answers, float32; from the file `kept` if it is there.

    Collective: every rank computes its share and gets the whole.
    """
    if kept.exists():
        return np.load(kept)
    found = torch.zeros(len(rows), device=accelerator.device)
    order = np.argsort(-rows.lengths, kind="stable")
    wrapped.eval()
    world, rank = accelerator.num_processes, accelerator.process_index
    for start in range(0, len(order), batch_size * world):
        mine = order[start : start + batch_size * world][rank::world]
        batch = batching.collate(rows, list(mine[:, None]), pad_id)
        logps = wrapped(**{name: tensor.to(accelerator.device) for name, tensor in batch.items()}, want="rows")
        if len(mine):
            found[torch.from_numpy(mine.copy()).to(accelerator.device)] = logps
    wrapped.train()
    whole = accelerator.reduce(found, "sum").cpu().numpy()
    if accelerator.is_main_process:
        _save(whole, kept)
    return whole


def _save(values: np.ndarray, path: Path) -> None:
    """Write an array that is complete or absent."""
    aside = path.with_name(f".{path.name}")
    with open(aside, "wb") as file:
        np.save(file, values)
    os.replace(aside, path)


# Beside the training ----------------------------------------------------------------------------------


def _blocks(config: FinetuneConfig, rows: Tokens) -> list[np.ndarray]:
    """Divide the rows into blocks, in the order in which the first epoch needs them."""
    sequences = batching.make_sequences(rows, config)
    steps = batching.epoch_batches(rows, sequences, config.global_batch_size, config.seed, 0)
    order = np.concatenate([row for step in steps for row in step])
    return np.array_split(order, min(len(steps), config.num_data_blocks_per_device * config.num_devices))


def start_stage(config: FinetuneConfig, run: Run) -> threading.Thread:
    """Start workers that score the training rows block by block, and return the thread that watches them.

    Blocks that an earlier start of the run has scored are not scored again.
    """
    folder = run.tokens / "reference"
    folder.mkdir(exist_ok=True)
    (folder / FAILED).unlink(missing_ok=True)
    count = len(_blocks(config, token_store.load_view(run.tokens / "train.npz")))
    missing = [k for k in range(count) if not (folder / f"{k}.npy").exists()]
    watcher = threading.Thread(target=_run_stage, args=(config, run, missing), daemon=True)
    watcher.start()
    return watcher


def _run_stage(config: FinetuneConfig, run: Run, missing: list[int]) -> None:
    import ray

    settings = config.preference_tuning_config.logprob_processor_scaling_config
    has_gpu = ray.cluster_resources().get("GPU", 0) > 0
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        blocks = ray.data.from_items([{"block": k} for k in missing], override_num_blocks=max(1, len(missing)))
        scored = blocks.map_batches(
            _Scorer, batch_size=1, fn_constructor_args=(config, run), num_cpus=1, num_gpus=1 if has_gpu else None,
            compute=ray.data.ActorPoolStrategy(size=settings.concurrency), resources=settings.custom_resources,
        )  # fmt: skip
        for _ in scored.iter_rows():
            pass
    except Exception as error:  # told to the training workers, who would wait for ever
        (run.tokens / "reference" / FAILED).write_text(str(error).strip().splitlines()[-1])


class _Scorer:
    """A Ray Data worker with a copy of the model as it is before the first step."""

    def __init__(self, config: FinetuneConfig, run: Run):
        self.config, self.folder = config, run.tokens / "reference"
        self.rows = token_store.load_view(run.tokens / "train.npz")
        self.blocks = _blocks(config, self.rows)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = tokenizer_of(config)
        self.wrapped = SupervisedLM(load.load_start(config, self.tokenizer).to(self.device)).eval()

    @torch.no_grad()
    def __call__(self, batch: dict) -> dict:
        for number in batch["block"].tolist():
            rows, found = self.blocks[number], []
            settings = self.config.preference_tuning_config.logprob_processor_scaling_config
            size = 2 * (settings.batch_size or self.config.train_batch_size_per_device)
            for start in range(0, len(rows), size):
                part = list(rows[start : start + size, None])
                made = batching.collate(self.rows, part, self.tokenizer.pad_token_id)
                found.append(self.wrapped(**{k: t.to(self.device) for k, t in made.items()}, want="rows").cpu().numpy())
            _save(np.concatenate(found), self.folder / f"{number}.npy")
        return {"block": batch["block"]}


class StagedReference:
    """[rows] log-probabilities as the stage's workers write them; asking for rows waits until they are there."""

    def __init__(self, config: FinetuneConfig, run: Run, rows: Tokens):
        self._folder = run.tokens / "reference"
        self._blocks = _blocks(config, rows)
        self._block_of = np.empty(len(rows), np.int64)
        for number, block in enumerate(self._blocks):
            self._block_of[block] = number
        self._values = np.full(len(rows), np.nan, np.float32)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Return the figures of some rows; raise TrainingError if the stage has failed."""
        for number in np.unique(self._block_of[rows[np.isnan(self._values[rows])]]):
            self._values[self._blocks[number]] = np.load(self._waited_for(int(number)))
        return self._values[rows]

    def _waited_for(self, number: int) -> Path:
        path, failed = self._folder / f"{number}.npy", self._folder / FAILED
        while not path.exists():
            if failed.exists():
                raise TrainingError(f"the workers that score the reference have failed: {failed.read_text()}")
            time.sleep(POLL_SECONDS)
        return path
