"""Whether FSDP2 keeps the weights that a forward pass has gathered: what sends less, where it fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from forgebook.planning.feasibility import capacity, comfortable
from forgebook.planning.hardware import Cpu
from forgebook.planning.memory import memory_of

if TYPE_CHECKING:
    from forgebook.catalog import Gpu, Shape
    from forgebook.config.schema import ResolvedConfig

__all__ = ["settle_resharding"]


def settle_resharding(
    config: ResolvedConfig,
    shape: Shape,
    workers: int,
    length: int,
    device: Gpu | Cpu | None,
    lengths: Sequence[int] = (),
) -> ResolvedConfig:
    """Choose `fsdp.reshard_after_forward: auto`: false, which sends less, where that fits. Others stay.

    config: with its checkpointing chosen. device: None where it is not known, or one of several. lengths: as for
    `memory_of`.
    """
    if config.sharding != "fsdp" or config.fsdp.reshard_after_forward != "auto":
        return config
    on_gpu = not isinstance(device, Cpu)
    kept = config.resolve(fsdp={**config.fsdp.model_dump(), "reshard_after_forward": False})
    reason = "the hardware is not known"
    if device is not None:
        need = memory_of(kept, shape, workers=workers, length=length, on_gpu=on_gpu, lengths=lengths).total
        reason = f"without, it takes {need / 1e9:,.1f} GB of {capacity(device) / 1e9:,.1f}"
        if need <= comfortable(device):
            return kept.explained({"fsdp.reshard_after_forward": reason})
    freed = config.resolve(fsdp={**config.fsdp.model_dump(), "reshard_after_forward": True})
    return freed.explained({"fsdp.reshard_after_forward": reason})
