"""How devices share a model, as the memory of a run depends on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from forgebook.config.deepspeed_file import read_deepspeed_config, zero_of

if TYPE_CHECKING:
    from forgebook.config.schema import FinetuneConfig

__all__ = ["Sharding", "sharding_of"]


@dataclass(frozen=True)
class Sharding:
    """What DeepSpeed shards and offloads to the host; stage 0: plain data parallelism. Sizes in elements.

    is_fsdp: FSDP2 shards instead, what stage 3 does, and has no buckets. keeps_gathered: the weights of all layers,
    from the forward pass to the backward pass.
    bucket: gradients that are reduced together; buckets: buffers of that size. live: parameters gathered at a time;
    step: masters updated at a time.
    """

    stage: int = 0
    offload_optimizer: bool = False
    offload_param: bool = False
    bucket: int = 0
    buckets: int = 0
    live: int = 0
    step: int = 0
    is_fsdp: bool = False
    keeps_gathered: bool = False


def sharding_of(config: FinetuneConfig, hidden: int) -> Sharding:
    """Read how a config shards a model: FSDP2, or DeepSpeed's settings, with `auto` as accelerate fills it in.

    hidden: the model's hidden size.
    """
    if config.sharding == "fsdp":
        moves = config.fsdp.cpu_offload
        keeps = config.fsdp.reshard_after_forward is False
        return Sharding(3, offload_optimizer=moves, offload_param=moves, is_fsdp=True, keeps_gathered=keeps)
    settings = read_deepspeed_config(config.deepspeed, config.source)
    if settings is None:
        return Sharding()
    stated, zero = zero_of(settings), settings.get("zero_optimization", {})
    bucket = zero.get("reduce_bucket_size", 500_000_000)
    bucket = hidden**2 if bucket == "auto" else int(bucket)
    # With overlap, one bucket is filled while the other is reduced; ZeRO-3 has one.
    buckets = 2 if stated.stage < 3 and zero.get("overlap_comm", False) else 1

    def elements(name: str) -> int:
        value = zero.get(name, 1_000_000_000)
        return 1_000_000_000 if value == "auto" else int(value)

    return Sharding(
        stated.stage,
        stated.offload_optimizer,
        stated.offload_param,
        bucket,
        buckets if zero.get("contiguous_gradients", True) and stated.stage else 0,
        elements("stage3_max_live_parameters"),
        elements("sub_group_size"),
    )
