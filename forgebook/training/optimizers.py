"""AdamW, Adafactor and Muon for weights of 16 bits, and the learning rate of every step."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch

__all__ = ["AdamW", "deepspeed_adamw", "learning_rates", "matrix_names", "rate_groups", "set_rate", "undecayed_names"]

# The names of norms and biases, as transformers' Trainer knows them; LayerNorm is known by its class as well.
_NORM_OR_BIAS = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
# By `optimizer`: the class of bitsandbytes. The paged one moves its state to the host while the GPU lacks memory.
IN_8_BITS = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}
LOWEST_RATIO = 0.1  # of cosine_with_min_lr, where the config sets none
FIRST_LOSS_SCALE = 2.0**16


class AdamW:
    """AdamW that updates a float32 master copy of each parameter in bfloat16 or float16.

    bfloat16 has about three decimal digits, so that an update smaller than 1/256 of a weight is lost; with a learning
    rate of 1e-5 nearly every one is. DeepSpeed's optimizers do the same for ZeRO runs; this one serves plain DDP, so
    that a run trains alike with both.

    float16 has no small numbers: gradients below 6e-8 are zero. Where parameters are in it, `scaler` multiplies the
    loss by as much as their gradients allow: half as much after a step in which one overflowed, which is skipped, and
    twice as much after 2,000 steps without. `scaled_step` then takes the place of clipping and `step`.

    params: parameters, or groups of them, as torch takes them; one with `muon: true` is updated by Muon. kind: as the
    config's `optimizer`; adafactor takes neither betas nor eps.
    """

    def __init__(
        self, params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]], *, kind: str = "adamw", **kwargs: Any
    ):
        groups: list[Any] = list(params)
        groups = groups if isinstance(groups[0], dict) else [{"params": groups}]
        self.trained = [p for group in groups for p in group["params"]]
        # A float32 parameter is its own master copy: adapters, and full fine-tuning in float32.
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.trained]
        self.scaler: torch.amp.GradScaler | None = None
        if any(p.dtype == torch.float16 for p in self.trained):
            self.scaler = torch.amp.GradScaler(self.trained[0].device.type, init_scale=FIRST_LOSS_SCALE)
        own_copies = [pair for pair in zip(self.trained, self.masters, strict=True) if pair[0] is not pair[1]]
        self._rounded, self._copies = [p for p, _ in own_copies], [master for _, master in own_copies]
        rest = iter(self.masters)
        own = [{**group, "params": [next(rest) for _ in group["params"]]} for group in groups]
        self.inner: Any
        if any(group.get("muon") for group in own):
            self.inner = _MuonAndAdamW(own, **kwargs)
        elif kind == "adafactor":
            # As the Trainer sets it up: the learning rate is that of the config, where torch's own Adafactor would
            # multiply it by the size of the weights.
            from transformers.optimization import Adafactor

            kwargs = {name: value for name, value in kwargs.items() if name in ("lr", "weight_decay")}
            self.inner = Adafactor(own, scale_parameter=False, relative_step=False, **kwargs)
        else:
            self.inner = (
                _in_8_bits(kind, own, **kwargs) if kind in IN_8_BITS else torch.optim.AdamW(own, fused=True, **kwargs)
            )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return the groups whose "lr" a schedule sets."""
        return self.inner.param_groups

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters from their gradients."""
        self._copy_gradients()
        self.inner.step()
        self._copy_masters()

    @torch.no_grad()
    def scaled_step(self, max_norm: float) -> torch.Tensor:
        """Update the parameters from the gradients of a scaled loss, clipped to a norm, unless one of them overflowed.

        Returns the norm without the scale, 1 if the step was skipped else 0, and the scale that the loss had: float64,
        on the device, for which the host does not wait. Workers whose gradients were reduced agree by themselves.
        """
        if self.scaler is None:
            raise ValueError("no parameter is in float16")
        self._copy_gradients()
        self.scaler.unscale_(self.inner)
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_norm).double()
        figures = torch.stack([norm, (~norm.isfinite()).double(), self.scaler.scale(torch.ones_like(norm))])
        self.scaler.step(self.inner)  # fused: on the device, it is skipped where a gradient overflowed
        self.scaler.update()
        self._copy_masters()
        return figures

    def _copy_gradients(self) -> None:
        """Give the masters their gradients, in float32."""
        # All tensors in one call: an adapter has hundreds of small ones, each a kernel to launch.
        pairs = [(p.grad, master) for p, master in zip(self._rounded, self._copies, strict=True) if p.grad is not None]
        for _, master in pairs:
            master.grad = torch.empty_like(master)
        if pairs:
            torch._foreach_copy_([master.grad for _, master in pairs], [grad for grad, _ in pairs])

    def _copy_masters(self) -> None:
        """Round the masters to the parameters, and drop their gradients."""
        if any(master.grad is not None for master in self._copies):
            torch._foreach_copy_(self._rounded, self._copies)
        for master in self._copies:
            master.grad = None

    def zero_grad(self) -> None:
        """Drop the gradients, whose memory the next forward pass can use."""
        for p in self.trained:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return the moments and the master copies: rounded weights alone would lose the small updates."""
        scale = {} if self.scaler is None else {"loss_scale": self.scaler.state_dict()}
        return {**self.inner.state_dict(), "masters": [master.detach() for master in self.masters], **scale}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        state = dict(state)
        for master, saved in zip(self.masters, state.pop("masters"), strict=True):
            master.copy_(saved)
        if self.scaler is not None:
            self.scaler.load_state_dict(state.pop("loss_scale"))
        self.inner.load_state_dict(state)


class _MuonAndAdamW:
    """Muon for the groups that are marked, AdamW for the others, as one optimizer.

    Muon's updates are scaled to the size of AdamW's (Moonlight, arXiv 2502.16982), so that one learning rate and one
    weight decay serve both.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], *, lr: float, weight_decay: float, **adamw: Any):
        matrices = [group for group in groups if group.get("muon")]
        rest = [group for group in groups if not group.get("muon")]
        settings = {"lr": lr, "weight_decay": weight_decay}
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **settings),
            *([torch.optim.AdamW(rest, fused=True, **settings, **adamw)] if rest else []),
        ]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self._parts for group in part.param_groups]

    def step(self) -> None:
        for part in self._parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, saved in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(saved)


def matrix_names(model: torch.nn.Module) -> set[str]:
    """Name the weights of a model's linear layers, without its output layer: the matrices that Muon updates."""
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    others = {id(module.weight) for module in embeddings if module is not None}
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module.weight) not in others
    }


def rate_groups(
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    label_scale: float = 1.0,
    loraplus_ratio: float | None = None,
    undecayed: Collection[str] = (),
    muon: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Group the trainable parameters by what multiplies their learning rate, and by whether their weights decay.

    parameters: by name, as of `named_parameters`. label_scale: of the embeddings of new tokens in an adapter.
    loraplus_ratio: of the B matrices of an adapter. undecayed: names of parameters whose weights do not decay; muon: of
    those that Muon updates. Each group has its `rate_scale`, which `set_rate` applies.
    """
    groups: dict[tuple[float, bool, bool], list[torch.nn.Parameter]] = {(1.0, True, False): []}
    for name, p in parameters:
        if p.requires_grad:
            scale = label_scale if "trainable_tokens_delta" in name else _loraplus_scale(name, loraplus_ratio)
            groups.setdefault((scale, name not in undecayed, name in muon), []).append(p)
    return [
        {
            "params": params,
            "rate_scale": scale,
            **({} if decays else {"weight_decay": 0.0}),
            **({"muon": True} if is_muon else {}),
        }
        for (scale, decays, is_muon), params in groups.items()
        if params
    ]


def _loraplus_scale(name: str, ratio: float | None) -> float:
    """Return what multiplies a parameter's learning rate under LoRA+: PEFT's choice, but for adapters of embeddings."""
    is_fast = "lora_B" in name or "lora_magnitude_vector" in name or name.endswith("bias")
    return ratio if ratio is not None and is_fast else 1.0


def undecayed_names(model: torch.nn.Module) -> set[str]:
    """Name the norms and biases of a model, whose weights transformers' Trainer does not decay."""
    inside = {
        f"{name}.{own}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.LayerNorm)
        for own, _ in module.named_parameters(recurse=False)
    }
    return inside | {name for name, _ in model.named_parameters() if _NORM_OR_BIAS.search(name.lower())}


def set_rate(groups: Iterable[dict[str, Any]], learning_rate: float) -> None:
    """Set the learning rate of an optimizer's groups, each times its `rate_scale`."""
    for group in groups:
        group["lr"] = learning_rate * group.get("rate_scale", 1.0)


def deepspeed_adamw(kind: str, groups: Sequence[dict[str, Any]], **kwargs: Any) -> torch.optim.Optimizer:
    """Return the optimizer that DeepSpeed runs on its own float32 partitions: "adamw", or one of IN_8_BITS."""
    return torch.optim.AdamW(groups, **kwargs) if kind == "adamw" else _in_8_bits(kind, groups, **kwargs)


def _in_8_bits(kind: str, groups: Sequence[dict[str, Any]], **kwargs: Any) -> torch.optim.Optimizer:
    from bitsandbytes.optim import adamw

    return getattr(adamw, IN_8_BITS[kind])(groups, **kwargs)


def learning_rates(
    schedule: str,
    peak: float,
    num_warmup_steps: int,
    total_steps: int,
    min_ratio: float | None = None,
    decay_ratio: float = 0.1,
) -> list[float]:
    """List the learning rate of every step, as transformers' schedule of that name computes it.

    schedule: "cosine", "linear", "constant", "wsd" or "cosine_with_min_lr", each after a linear warm-up from zero.
    min_ratio: of the last rate to the peak. decay_ratio: of wsd, the share of the steps over which the rate falls. A
    list has no state to save: a resumed run continues at its step.
    """
    lowest = min_ratio if min_ratio is not None else LOWEST_RATIO if schedule == "cosine_with_min_lr" else 0.0
    falling = max(1, round(decay_ratio * total_steps)) if schedule == "wsd" else total_steps - num_warmup_steps
    start = max(num_warmup_steps, total_steps - falling)  # of the fall

    # Not transformers' own functions: they are in a module that imports PEFT and all that comes with it.
    def share_of_peak(step: int) -> float:
        if step < num_warmup_steps:
            return step / max(1, num_warmup_steps)
        if step < start or schedule == "constant":
            return 1.0
        progress = (step - start) / max(1, total_steps - start)
        share = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return lowest + (1 - lowest) * share

    return [peak * share_of_peak(step) for step in range(total_steps)]
