"""AdamW for bfloat16 weights, and the learning rate of every step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["AdamW", "adamw", "learning_rates"]


class AdamW:
    """AdamW that keeps a float32 copy of each bfloat16 parameter and updates that.

    bfloat16 holds about three decimal digits, so an update smaller than 1/256 of a weight would be lost; with
    a learning rate of 1e-5 nearly every update is. DeepSpeed's optimizers do the same for ZeRO runs; this one
    serves plain DDP, so that all of them train alike.

    bits: 32, or 8 for moments that bitsandbytes holds in 8 bits.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], *, bits: int = 32, **kwargs: Any):
        self.trained = list(params)
        # A float32 parameter is its own master copy.
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.trained]
        self.inner = (
            torch.optim.AdamW(self.masters, fused=True, **kwargs) if bits == 32 else _in_8_bits(self.masters, **kwargs)
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @torch.no_grad()
    def step(self) -> None:
        for p, master in self._copies():
            master.grad = p.grad.float() if p.grad is not None else None
        self.inner.step()
        for p, master in self._copies():
            p.copy_(master)
            master.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.trained:
            p.grad = None if set_to_none or p.grad is None else p.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {**self.inner.state_dict(), "masters": [master.detach() for master in self.masters]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        for master, saved in zip(self.masters, state.pop("masters"), strict=True):
            master.copy_(saved)
        self.inner.load_state_dict(state)

    def _copies(self) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        return [(p, master) for p, master in zip(self.trained, self.masters, strict=True) if p is not master]


def adamw(kind: str, params: Iterable[torch.nn.Parameter], **kwargs: Any) -> torch.optim.Optimizer:
    """Make the optimizer that DeepSpeed runs on float32 partitions: "adamw" or "adamw_8bit"."""
    return torch.optim.AdamW(params, **kwargs) if kind == "adamw" else _in_8_bits(params, **kwargs)


def _in_8_bits(params: Iterable[torch.nn.Parameter], **kwargs: Any) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params, **kwargs)


def learning_rates(schedule: str, peak: float, num_warmup_steps: int, total_steps: int) -> list[float]:
    """List the learning rate of every step, as transformers' schedule of that name gives it.

    schedule: "cosine", "linear" or "constant", each behind a linear warm-up from zero.
    """
    from transformers import get_scheduler

    name = "constant_with_warmup" if schedule == "constant" else schedule
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps, total_steps)
    rates = []
    for _ in range(total_steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates
