"""Attention over examples that share one line, each of which sees itself alone: no padding, and no mask.

register()                                    transformers then knows the kernel "varlen"
reason = why_not_varlen(model_config)         what it would compute otherwise than the model's own code, or None

On a GPU it is torch's variable-length flash attention, which comes with torch; on a CPU each example's plain attention.
Where the lengths of examples are not given, as in generation, it is transformers' SDPA.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from forgebook.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

__all__ = ["VARLEN", "register", "why_not_varlen"]

VARLEN = "varlen"
PLAIN_LAYERS = {"full_attention", "sliding_attention", "attention"}
LARGEST_HEAD = 256  # of the flash kernels, in multiples of 8


def register() -> None:
    """Make the kernel known to transformers, unless it is: `sequence_parallel` may have put itself around it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if VARLEN in AttentionInterface():
        return
    AttentionInterface.register(VARLEN, _attend)
    # Generation has masks; a training batch brings one that transformers takes as it is (training/losses.py).
    AttentionMaskInterface.register(VARLEN, sdpa_mask)


def why_not_varlen(model_config: PretrainedConfig, model_class: type | None) -> str | None:
    """Return what an architecture has that the kernel does not; None if nothing."""
    text = model_config.get_text_config()
    others = set(getattr(text, "layer_types", None) or ()) - PLAIN_LAYERS
    if others:
        return f"it has layers of {min(others)}, which read the whole line"
    if getattr(text, "attn_logit_softcapping", None) is not None:
        return "its attention logits are capped"
    if getattr(text, "attention_chunk_size", None) is not None:
        return "its attention is cut into chunks"
    if getattr(text, "attention_dropout", 0.0):
        return "its attention has dropout"
    if not getattr(model_class, "_supports_attention_backend", False):
        return "its code, like that of models with ALiBi, takes no other kernel"
    if not getattr(model_class, "_supports_sdpa", False):
        return "its attention, like that with sinks, is a form of its own"
    if getattr(text, "kv_lora_rank", None) is not None:
        return "its keys and values are of different sizes"
    try:
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    except (AttributeError, RuntimeError):  # transformers refuses to name one size where layers differ, as in Gemma 4
        return "its attention heads are not of one size"
    return f"its attention heads are of {size} numbers" if size > LARGEST_HEAD or size % 8 else None


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' attention functions do; query, key, value: [1, heads, tokens, head size]."""
    if cu_seq_lens_q is None or max_length_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown or dropout:
        raise ModelError(f"attention: varlen has no {(unknown or ['dropout'])[0]}: set attention: sdpa")
    # How many tokens before itself a token sees; a window of w tokens includes itself.
    before = -1 if sliding_window is None else sliding_window - 1
    if query.device.type == "cpu":
        return _one_by_one(query, key, value, cu_seq_lens_q.tolist(), scaling, before), None
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    output = varlen_attn(
        q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
        scale=scaling, window_size=(before, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return output[None], None


def _one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: list[int], scaling: float | None, before: int
) -> torch.Tensor:
    """Compute what the kernel does, one example after the other; returns [1, tokens, heads, head size]."""
    import torch

    outputs = []
    for start, end in itertools.pairwise(starts):
        q, k, v = (tensor[:, :, start:end] for tensor in (query, key, value))
        window = None
        if 0 <= before < end - start - 1:
            ones = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device)
            window = ones.tril().triu(-before)
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, window, is_causal=window is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()
