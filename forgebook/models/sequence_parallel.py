"""Sequence parallelism: the ranks of a group share each line of a batch, and each holds a slice of its positions.

register()                                   transformers' attention kernels then take a group
group = SequenceGroup.of(2)                  collective; ranks 0 and 1, 2 and 3, ...
decoder(ids, sequence_group=group, ...)      of a slice: hidden states of the slice, which attend to all of the line

Around attention the ranks exchange positions for heads (Ulysses, arXiv 2309.14509): each attends over the whole line
with its share of the heads, by the kernel that would compute all of them, so that nothing is approximated.
torch's context parallelism has no kernel for CPUs and takes no mask; DeepSpeed's Ulysses drops the mask of packed
examples.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from forgebook.models import varlen_attention

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["KERNELS", "SequenceGroup", "register", "why_not_divided"]

KERNELS = ("sdpa", "varlen", "flash_attention_2", "flash_attention_3")


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share a line. size: how many; rank: this one's number among them."""

    size: int
    rank: int
    group: dist.ProcessGroup

    @classmethod
    def of(cls, size: int) -> SequenceGroup:
        """Divide all ranks into groups of `size` neighbors; return this rank's. Collective."""
        group, _ = dist.new_subgroups(size)
        return cls(size, dist.get_rank() % size, group)

    def slice_of(self, line: torch.Tensor) -> torch.Tensor:
        """Take this rank's positions out of [batch, length]; the length is a multiple of the group's size."""
        return line.chunk(self.size, dim=1)[self.rank]


def register() -> None:
    """Let the kernels that transformers knows exchange positions for heads where a call brings a group."""
    from transformers import AttentionInterface

    varlen_attention.register()
    known = AttentionInterface()
    for name in KERNELS:
        if name in known and not hasattr(known[name], "is_divided"):
            AttentionInterface.register(name, _divided(known[name]))


def why_not_divided(model_config: PretrainedConfig, size: int) -> str | None:
    """Return what keeps a model from being computed in `size` slices; None if nothing does."""
    text = model_config.get_text_config()
    others = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if others:
        return f"it has layers of {min(others)}, which do not see the whole line"
    if getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        return "it has sliding windows"
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, name, None)
        if heads is None or heads % size:
            return f"its {name}, {heads}, cannot be divided by {size}"
    return None


def _divided(kernel: Any) -> Any:
    @functools.wraps(kernel)
    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *arguments: Any,
        sequence_group: SequenceGroup | None = None,
        **settings: Any,
    ) -> tuple[torch.Tensor, Any]:
        """Query, key, value: [batch, heads, positions, head size]; returns [batch, positions, heads, head size]."""
        if sequence_group is None:
            return kernel(module, query, key, value, attention_mask, *arguments, **settings)
        query, key, value = (_Exchange.apply(one, sequence_group, 1, 2) for one in (query, key, value))
        # A mask of one element stands for none, which transformers would make one of a slice for.
        mask = None if attention_mask is None or attention_mask.numel() == 1 else attention_mask
        output, _ = kernel(module, query, key, value, mask, *arguments, **settings)
        return _Exchange.apply(output, sequence_group, 1, 2), None

    attend.is_divided = True  # type: ignore[attr-defined]
    return attend


class _Exchange(torch.autograd.Function):
    """Give every rank its part along one dimension, and join what comes along another."""

    @staticmethod
    def forward(ctx, tensor, group, divided, joined):
        ctx.group, ctx.divided, ctx.joined = group, divided, joined
        return _exchange(tensor, group, divided, joined)

    @staticmethod
    def backward(ctx, grad):
        return _exchange(grad, ctx.group, ctx.joined, ctx.divided), None, None, None


def _exchange(tensor: torch.Tensor, group: SequenceGroup, divided: int, joined: int) -> torch.Tensor:
    sent = torch.stack(tensor.chunk(group.size, dim=divided))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group.group)
    return torch.cat(received.unbind(), dim=joined)
