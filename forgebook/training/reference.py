"""The reference model's log-probabilities, computed once: the model is its own reference, as it was before step 1.

That holds for every start of a run: a fresh adapter changes nothing yet, a continued one is what preferences are to
be learned from, and full weights have not moved yet.

    with_reference(...)             examples with what their loss compares them with
    reference_logps(...)            by the training workers, before the first step
    start_stage(config, run)        by Ray Data workers of their own, while training runs: block after block of
    StagedReference(...)            examples, in the order of the first epoch; training waits for a block if it must
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from forgebook.config.blocks import PreferenceTuningConfig, needs_reference
from forgebook.data import batching, token_store
from forgebook.data.image_batches import Pixels
from forgebook.data.token_store import Tokens
from forgebook.errors import TrainingError, first_line
from forgebook.models import load
from forgebook.models.tokenizer import tokenizer_of
from forgebook.runs import atomic
from forgebook.training.batches_ahead import in_order, threads_for
from forgebook.training.losses import SupervisedLM
from forgebook.training.profiler import phase

if TYPE_CHECKING:
    from forgebook.config.blocks import LogprobProcessor
    from forgebook.config.schema import ResolvedConfig
    from forgebook.runs.metrics import Progress
    from forgebook.runs.run import Run
    from forgebook.training.setup import Worker

__all__ = ["ExampleSet", "StagedReference", "reference_logps", "start_stage", "with_reference"]

POLL_SECONDS = 0.2
FAILED = "failed.txt"


@dataclass(frozen=True)
class ExampleSet:
    """Examples to train on or to evaluate, as batches on one device.

    pad_to, packed, one_line: as `data.batching.collate` takes them. reference: [examples] log-probabilities of the
    reference model, for losses that compare with one. pixels: of a run with images.
    """

    tokens: Tokens
    pad_id: int
    device: torch.device
    pad_to: int | None = None
    packed: bool = False
    one_line: bool = False
    reference: np.ndarray | StagedReference | None = None
    pixels: Pixels | None = None

    def batch(self, part: list[batching.Sequence]) -> batching.Batch:
        """Return the tensors of some sequences."""
        return self.sent(self.on_host(part))

    @property
    def threads(self) -> int:
        """Return how many threads make batches ahead; 0 where there are no images."""
        return threads_for(self.device.type == "cuda") if self.pixels else 0

    def batches(self, parts: Iterable[list[batching.Sequence]]) -> Iterator[tuple[batching.Batch, torch.Tensor | None]]:
        """Yield the batch of each part, and the reference's log-probabilities of its examples, when it is taken."""
        parts, to_make = itertools.tee(parts)
        made = in_order(self.on_host, to_make, self.threads)
        for part in parts:
            with phase("batch"):
                batch = self.sent(next(made))
            yield batch, self.reference_of(part)

    def on_host(self, part: list[batching.Sequence]) -> batching.Batch:
        """Make the tensors of some sequences in the host's memory, in any thread."""
        images = batching.images_of(self.tokens, part) if self.pixels else []
        filler = self.pixels.blank_ids if self.pixels and not any(images) else None
        batch = batching.collate(
            self.tokens, part, self.pad_id, self.pad_to, packed=self.packed, one_line=self.one_line, filler=filler
        )
        if self.pixels:
            batch |= self.pixels.inputs(images, batch["input_ids"])
        return batch

    def sent(self, batch: batching.Batch) -> batching.Batch:
        """Copy the tensors of a batch to the device."""
        segments = batch.pop("segments", None)
        sent: batching.Batch = {name: self._sent(tensor) for name, tensor in batch.items()}
        return sent if segments is None else {**sent, "segments": (self._sent(segments[0]), segments[1])}

    def reference_of(self, part: list[batching.Sequence]) -> torch.Tensor | None:
        """Return the reference's log-probabilities for the examples of a batch, in its order."""
        if self.reference is None or not part:
            return None
        return self._sent(torch.from_numpy(self.reference[np.concatenate(part)]))

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy to the device; the host does not wait for a copy out of pinned memory."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)


def with_reference(
    config: ResolvedConfig, run: Run, worker: Worker, examples: ExampleSet, name: str, progress: Progress
) -> ExampleSet:
    """Return the examples with the reference's log-probabilities, if their loss compares with a reference.

    They are computed once, before the first step; a resumed run reads what the first start saved. Collective.
    name: "training" or "validation".
    """
    preference = config.preference_tuning_config
    if preference is None or not needs_reference(preference):
        return examples
    processor = preference.logprob_processor_scaling_config
    if processor and name == "training" and config.num_devices:
        blocks = _blocks(config, examples.tokens)
        return replace(examples, reference=StagedReference(run.tokens / "reference", blocks))
    progress.stage(f"computing the reference model's log-probabilities of the {name} pairs")
    # A pair is two examples.
    batch_size = 2 * ((processor and processor.batch_size) or config.eval_batch_size_per_device)
    path = run.tokens / f"reference-{name}.npy"
    return replace(examples, reference=reference_logps(worker.wrapped, worker.accelerator, examples, batch_size, path))


@torch.no_grad()
def reference_logps(
    wrapped: nn.Module, accelerator: Accelerator, examples: ExampleSet, batch_size: int, path: Path
) -> np.ndarray:
    """Return [examples] summed log-probabilities of the answers, float32; read from `path` if it exists.

    Collective: each rank computes its share and returns the whole. batch_size: examples per device.
    """
    if path.exists():
        return np.load(path)
    logps = torch.zeros(len(examples.tokens), device=accelerator.device)
    # Batches grouped by length, the longest first: if memory does not suffice, it fails at once.
    order = np.argsort(-examples.tokens.lengths, kind="stable")
    world, rank = accelerator.num_processes, accelerator.process_index
    wrapped.eval()
    for start in range(0, len(order), batch_size * world):
        # In an uneven last batch a rank may have no example; it still takes part in collectives with an empty batch.
        own = order[start : start + batch_size * world][rank::world]
        batch_logps = wrapped(**examples.batch(list(own[:, None])), output="examples")
        if len(own):
            logps[torch.from_numpy(own.copy()).to(accelerator.device)] = batch_logps
    wrapped.train()
    whole = accelerator.reduce(logps, "sum").cpu().numpy()
    if accelerator.is_main_process:
        _save(whole, path)
    return whole


def _save(values: np.ndarray, path: Path) -> None:
    """Write an array that is complete or absent."""
    with atomic.atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, values)


# Ray Data workers, while training runs -------------------------------------------------------------------


def _blocks(config: ResolvedConfig, tokens: Tokens) -> list[np.ndarray]:
    """Divide the examples into blocks, in the order in which the first epoch needs them."""
    sequences = batching.make_sequences(tokens, config.padding, config.context_length, batching.group_size(config.task))
    steps = batching.epoch_batches(tokens, sequences, config.global_batch_size, config.seed, 0)
    order = np.concatenate([pair for step in steps for pair in step])
    return np.array_split(order, min(len(steps), config.num_data_blocks_per_device * config.num_devices))


def start_stage(config: ResolvedConfig, run: Run) -> threading.Thread:
    """Start workers that score the training examples block by block; return the thread that watches them.

    Blocks that an earlier start of the run has scored are not scored again.
    """
    folder = run.tokens / "reference"
    folder.mkdir(exist_ok=True)
    (folder / FAILED).unlink(missing_ok=True)
    count = len(_blocks(config, token_store.load_view(run.tokens / "train.npz")))
    missing = [number for number in range(count) if not (folder / f"{number}.npy").exists()]
    watcher = threading.Thread(target=_run_stage, args=(config, run, missing), daemon=True)
    watcher.start()
    return watcher


def _run_stage(config: ResolvedConfig, run: Run, missing: list[int]) -> None:
    import ray

    settings = _processor_of(config.preference_tuning_config)
    has_gpu = ray.cluster_resources().get("GPU", 0) > 0
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        blocks = ray.data.from_items(
            [{"block": number} for number in missing], override_num_blocks=max(1, len(missing))
        )
        scored = blocks.map_batches(
            _Scorer, batch_size=1, fn_constructor_args=(config, run), num_cpus=1, num_gpus=1 if has_gpu else None,
            compute=ray.data.ActorPoolStrategy(size=settings.concurrency), resources=settings.custom_resources,
        )  # fmt: skip
        for _ in scored.iter_rows():
            pass
    except Exception as error:  # written down for the training workers, which would wait forever
        (run.tokens / "reference" / FAILED).write_text(first_line(error))


def _processor_of(preference: PreferenceTuningConfig | None) -> LogprobProcessor:
    if preference is None or preference.logprob_processor_scaling_config is None:
        raise ValueError("preference_tuning_config.logprob_processor_scaling_config is not set")
    return preference.logprob_processor_scaling_config


class _Scorer:
    """A Ray Data worker with a copy of the model as it is before the first step."""

    def __init__(self, config: ResolvedConfig, run: Run):
        self.folder = run.tokens / "reference"
        pairs = _processor_of(config.preference_tuning_config).batch_size or config.train_batch_size_per_device
        self.batch_size = 2 * pairs
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = tokenizer_of(config)
        tokens = token_store.load_view(run.tokens / "train.npz")
        self.examples = ExampleSet(tokens, tokenizer.pad_token_id, device)
        self.blocks = _blocks(config, tokens)
        self.wrapped = SupervisedLM(load.load_start(config, tokenizer).to(device)).eval()

    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for number in batch["block"].tolist():
            block = self.blocks[number]
            parts = [list(block[k : k + self.batch_size, None]) for k in range(0, len(block), self.batch_size)]
            logps = [self.wrapped(**self.examples.batch(part), output="examples").cpu().numpy() for part in parts]
            _save(np.concatenate(logps), self.folder / f"{number}.npy")
        return batch


class StagedReference:
    """[examples] log-probabilities as the stage's workers write them; indexing waits until they are there."""

    def __init__(self, folder: Path, blocks: list[np.ndarray]):
        """Expect the log-probabilities of block k in the file k.npy of a folder; blocks: numbers of examples."""
        self._folder, self._blocks = folder, blocks
        count = sum(map(len, blocks))
        self._block_of = np.empty(count, np.int64)
        for number, block in enumerate(blocks):
            self._block_of[block] = number
        self._values = np.full(count, np.nan, np.float32)

    def __getitem__(self, examples: np.ndarray) -> np.ndarray:
        """Return the log-probabilities of some examples; raise TrainingError if the stage has failed."""
        for number in np.unique(self._block_of[examples[np.isnan(self._values[examples])]]):
            self._values[self._blocks[number]] = np.load(self._wait_for(int(number)))
        return self._values[examples]

    def _wait_for(self, number: int) -> Path:
        path, failed = self._folder / f"{number}.npy", self._folder / FAILED
        while not path.exists():
            if failed.exists():
                raise TrainingError(f"scoring the reference model failed: {failed.read_text()}")
            time.sleep(POLL_SECONDS)
        return path
