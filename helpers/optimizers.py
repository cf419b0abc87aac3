"""AdamW for bfloat16 weights, and the learning rate of every step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["AdamW", "learning_rates"]


class AdamW(torch.optim.AdamW):
    """AdamW that keeps a float32 copy of each bfloat16 parameter and updates that.

    bfloat16 holds about three decimal digits, so an update smaller than 1/256 of a weight would be lost; with
    a learning rate of 1e-5 nearly every update is. DeepSpeed's optimizers do the same for ZeRO runs; this one
    serves plain DDP, so that all of them train alike.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], **kwargs: Any):
        self.trained = list(params)
        # A float32 parameter is its own master copy.
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.trained]
        super().__init__(self.masters, fused=True, **kwargs)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for p, master in self._copies():
            master.grad = p.grad.float() if p.grad is not None else None
        super().step(closure)
        for p, master in self._copies():
            p.copy_(master)
            master.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.trained:
            p.grad = None if set_to_none or p.grad is None else p.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "masters": [master.detach() for master in self.masters]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        for master, saved in zip(self.masters, state.pop("masters"), strict=True):
            master.copy_(saved)
        super().load_state_dict(state)

    def _copies(self) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        return [(p, master) for p, master in zip(self.trained, self.masters, strict=True) if p is not master]


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
