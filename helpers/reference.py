"""The reference model's log-probabilities, once: the model is its own reference, as it was before its first step.

That holds for every way to begin: a fresh adapter changes nothing yet, a continued one is what preferences are
to be learnt from, and full weights are not moved so far.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from helpers import batches
from helpers.tokens import Tokens

__all__ = ["reference_logps"]


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
        batch = batches.collate(rows, list(mine[:, None]), pad_id)
        logps = wrapped(**{name: tensor.to(accelerator.device) for name, tensor in batch.items()}, want="rows")
        if len(mine):
            found[torch.from_numpy(mine.copy()).to(accelerator.device)] = logps
    wrapped.train()
    whole = accelerator.reduce(found, "sum").cpu().numpy()
    if accelerator.is_main_process:
        aside = kept.with_name(f".{kept.name}")
        with open(aside, "wb") as file:
            np.save(file, whole)
        os.replace(aside, kept)
    return whole
