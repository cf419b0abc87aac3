"""AdamW for bfloat16 weights, and the learning rate of every step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["AdamW", "deepspeed_adamw", "learning_rates"]


class AdamW:
    """AdamW that updates a float32 master copy of each bfloat16 parameter.

    bfloat16 has about three decimal digits, so that an update smaller than 1/256 of a weight is lost; with a learning
    rate of 1e-5 nearly every one is. DeepSpeed's optimizers do the same for ZeRO runs; this one serves plain DDP, so
    that a run trains alike with both.

    bits: 32, or 8 for moments that bitsandbytes stores in 8 bits.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], *, bits: int = 32, **kwargs: Any):
        self.trained = list(params)
        # A float32 parameter is its own master copy: adapters, and full fine-tuning in float32.
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.trained]
        self.inner = (
            torch.optim.AdamW(self.masters, fused=True, **kwargs) if bits == 32 else _in_8_bits(self.masters, **kwargs)
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return the groups whose "lr" a schedule sets."""
        return self.inner.param_groups

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters from their gradients."""
        for p, master in self._copies():
            master.grad = p.grad.float() if p.grad is not None else None
        self.inner.step()
        for p, master in self._copies():
            p.copy_(master)
            master.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or set them to zero."""
        for p in self.trained:
            p.grad = None if set_to_none or p.grad is None else p.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return the moments and the master copies: rounded weights alone would lose the small updates."""
        return {**self.inner.state_dict(), "masters": [master.detach() for master in self.masters]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        state = dict(state)
        for master, saved in zip(self.masters, state.pop("masters"), strict=True):
            master.copy_(saved)
        self.inner.load_state_dict(state)

    def _copies(self) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        return [(p, master) for p, master in zip(self.trained, self.masters, strict=True) if p is not master]


def deepspeed_adamw(kind: str, params: Iterable[torch.nn.Parameter], **kwargs: Any) -> torch.optim.Optimizer:
    """Return the optimizer that DeepSpeed runs on its own float32 partitions: "adamw" or "adamw_8bit"."""
    return torch.optim.AdamW(params, **kwargs) if kind == "adamw" else _in_8_bits(params, **kwargs)


def _in_8_bits(params: Iterable[torch.nn.Parameter], **kwargs: Any) -> torch.optim.Optimizer:
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit(params, **kwargs)


def learning_rates(schedule: str, peak: float, num_warmup_steps: int, total_steps: int) -> list[float]:
    """List the learning rate of every step, as transformers' schedule of that name computes it.

    schedule: "cosine", "linear" or "constant", each after a linear warm-up from zero. A list has no state to save: a
    resumed run continues at its step.
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
