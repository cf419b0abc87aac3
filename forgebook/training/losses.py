"""The loss, at supervised positions only and in chunks: the full logits never exist.

With a vocabulary of 128k the logits of one 4,096-token example are 2 GB in float32, and most of them belong to
prompt tokens that are not in the loss. So hidden states are selected at supervised positions before the output
layer, and the output layer is applied to a chunk of them at a time.

    wrapped = SupervisedLM(model)                       any causal LM of transformers, with or without PEFT
    loss_sum = wrapped(input_ids, labels)               sum over supervised positions of -log p(label)

The caller divides by the number of supervised tokens of the whole global batch.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from forgebook.data.batching import IGNORED
from forgebook.errors import ModelError
from forgebook.models.families import decoder_of, image_reader_of
from forgebook.models.sequence_parallel import SequenceGroup
from forgebook.models.varlen_attention import VARLEN
from forgebook.planning.loss_chunk import loss_chunk

__all__ = [
    "SupervisedLM",
    "check_isolation",
    "check_slices",
    "chunked_cross_entropy",
    "chunked_log_probabilities",
    "fused_linear_cross_entropy",
]

# Devices that have computed a value when the host gets it: looking at one costs nothing, two passes over logits do.
NEVER_WAITS = ("cpu",)
# In a large vocabulary most probabilities are below float16's smallest normal number, 6e-5: they are multiplied by this
# before they are rounded to it.
FLOAT16_LIFT = 64
SAVED_BY_AUTOGRAD = 16  # bytes of a logit that a loss without a gradient of its own saves, beside those of the weights


class SupervisedLM(nn.Module):
    """A causal language model whose forward pass returns the summed loss instead of logits.

    model: a transformers model with an output embedding layer, plain or inside a PeftModel. reads_images: its forward
    pass gets images, too. sequence_group: the ranks that get the same batches, of which each computes the loss of a
    slice of every line; None: each rank has its own.
    """

    def __init__(
        self, model: nn.Module, reads_images: bool = False, sequence_group: SequenceGroup | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.sequence_group = sequence_group
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        # A tuple hides the parts from nn.Module: registered twice, parameters would appear twice in the state dict.
        self._parts = ((image_reader_of if reads_images else decoder_of)(causal), causal.get_output_embeddings())
        # DeepSpeed and accelerate read the hidden size from here to choose their bucket sizes.
        self.config = causal.config.get_text_config()
        _fuse(self._parts[1], causal.config)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        supervised: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
        segments: tuple[torch.Tensor, int] | None = None,
        output: Literal["sum", "examples", "logits"] = "sum",
        **images: torch.Tensor,
    ) -> torch.Tensor:
        """Return the loss summed over supervised positions, a float32 scalar; in a group, over those of this rank.

        input_ids: [batch, length]; labels: [batch, length], labels[:, t] is predicted by position t, -100 = none.
        position_ids: [batch, length], of packed examples: each position 0 begins an example that sees no other.
        supervised: [positions], where labels.flatten() is not -100; None looks for them, which waits for the device.
        counts: [examples], how many of them each example has; None: each line is an example.
        segments: of examples in one line, where each begins and the last ends, and the tokens of the longest; only for
                  a kernel that takes them (models/attention.py: SEGMENTED).
        output: "examples" returns [examples] log-probabilities, summed over each one's supervised positions;
                "logits" returns [supervised positions, vocabulary] float32, for the few positions of a classifier.
        images: what the model takes of those in the batch, by its own names.
        """
        decoder, head = self._parts
        sliced: dict[str, Any] = {}
        if (group := self.sequence_group) is not None:
            sliced = _slice(group, input_ids, labels, position_ids, segments)
            input_ids, labels, supervised = sliced.pop("input_ids"), sliced.pop("labels"), None
            position_ids, segments = sliced.pop("position_ids"), sliced.pop("segments")
        if supervised is None:
            supervised = (labels.flatten() != IGNORED).nonzero()[:, 0]
        targets = labels.flatten().index_select(0, supervised)
        inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False, **images}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        if segments is not None:
            starts, longest = segments
            inputs |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
            inputs |= {"max_length_q": longest, "max_length_k": longest}
            if self.config._attn_implementation == VARLEN:
                # Without a mask, transformers would look for packed examples and wait for the device; it takes one of
                # four dimensions as it is, and the kernel does not read it.
                inputs["attention_mask"] = labels.new_zeros(1, 1, 1, 1, dtype=torch.bool)
        outputs = decoder(**inputs | sliced)
        hidden = outputs.last_hidden_state.flatten(0, 1)
        values = head(hidden.index_select(0, supervised), targets, output=output)
        if output == "sum" and self.training and getattr(outputs, "router_logits", None):
            # The caller divides by the number of supervised tokens, and with it the weight of each micro batch.
            values = values + len(supervised) * self._balance_loss(outputs.router_logits)
        if output != "examples":
            return values
        # `hidden.sum() * 0` keeps the graph connected when no position is supervised: under DDP and ZeRO every rank
        # must reach the backward pass with every parameter.
        if counts is None:
            counts = (labels != IGNORED).sum(1)
        sums = torch.zeros(len(counts), device=values.device) + hidden.float().sum() * 0
        numbers = torch.arange(len(counts), device=values.device)
        owners = numbers.repeat_interleave(counts, output_size=len(supervised))
        return sums.index_add(0, owners, values)

    def _balance_loss(self, router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Compute the loss of unevenly used experts as the model's class does; 0 if it defines none."""
        causal = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        own = getattr(sys.modules[type(causal).__module__], "load_balancing_loss_func", None)
        if own is None:
            return router_logits[0].new_zeros(())
        experts = getattr(self.config, "num_experts", None) or self.config.num_local_experts
        return self.config.router_aux_loss_coef * own(router_logits, experts, self.config.num_experts_per_tok)


def _slice(
    group: SequenceGroup,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None,
    segments: tuple[torch.Tensor, int] | None,
) -> dict[str, Any]:
    """Take this rank's positions out of a batch; return the decoder's inputs, with the mask of the whole lines."""
    length = input_ids.shape[1]
    missing = -length % group.size
    mask = labels.new_zeros(1, 1, 1, 1, dtype=torch.bool)  # none: each position sees those before it
    if position_ids is None:
        position_ids = torch.arange(length + missing, device=labels.device).expand(len(labels), -1)
    else:
        position_ids = nn.functional.pad(position_ids, (0, missing))
        if segments is None:
            example = (position_ids == 0).cumsum(1)
            mask = (example[:, None, :, None] == example[:, None, None, :]).tril()
    if segments is not None and missing:
        starts, longest = segments
        segments = torch.cat([starts, starts[-1:] + missing]), max(longest, missing)
    return {
        "input_ids": group.slice_of(nn.functional.pad(input_ids, (0, missing))),
        "labels": group.slice_of(nn.functional.pad(labels, (0, missing), value=IGNORED)),
        "position_ids": group.slice_of(position_ids),
        "segments": segments,
        "attention_mask": mask,
        "sequence_group": group,
    }


@torch.no_grad()
def check_slices(wrapped: nn.Module, device: torch.device) -> None:
    """Raise ModelError if a model computes another loss in slices than as a whole. Collective.

    Measured on the model itself: that detects layers that hand no group on to their attention, by whatever name.
    """
    inner = next(module for module in wrapped.modules() if isinstance(module, SupervisedLM))
    group = inner.sequence_group
    assert group is not None
    ids = torch.arange(5, 22, device=device)[None]
    was_training = wrapped.training
    wrapped.eval()
    sliced = wrapped(input_ids=ids, labels=ids)
    dist.all_reduce(sliced, group=group.group)
    inner.sequence_group = None
    try:
        whole = wrapped(input_ids=ids, labels=ids)
    finally:
        inner.sequence_group = group
    wrapped.train(was_training)
    near = 1e-4 if inner.config.dtype == torch.float32 else 2e-2
    if not abs(float(sliced - whole)) <= near * abs(float(whole)):  # NaN, too, is another loss
        raise ModelError("sequence_parallel changes the loss of this model: set sequence_parallel: 1")


@torch.no_grad()
def check_isolation(wrapped: nn.Module, device: torch.device, takes_segments: bool = False) -> None:
    """Raise ModelError if a packed example can see the one before it in this model, with its attention kernel.

    Measured on the model itself: the loss of an example must not change with the example before it. That detects
    models that carry a state along (Mamba, linear attention) and kernels that ignore positions, by whatever name.
    Collective under ZeRO-3. takes_segments: whether the kernel keeps
    examples apart by their lengths.
    """
    length = 8
    ids = torch.arange(5, 5 + length, device=device)
    positions = torch.arange(length, device=device).repeat(2)[None]
    inputs: dict[str, Any] = {"position_ids": positions}
    if takes_segments:
        inputs["segments"] = torch.arange(0, 2 * length + 1, length, dtype=torch.int32, device=device), length
    labels = torch.cat([torch.full((length,), IGNORED, device=device), ids])[None]
    pairs = (torch.cat([other, ids])[None] for other in (ids, ids.flip(0)))
    was_training = wrapped.training
    wrapped.eval()  # dropout and embedding noise would differ between the two calls
    try:
        losses = [float(wrapped(input_ids=pair, labels=labels, **inputs)) for pair in pairs]
    except TypeError:  # a model whose forward pass takes no positions cannot tell packed examples apart
        losses = [0.0, 1.0]
    wrapped.train(was_training)
    if abs(losses[0] - losses[1]) > 1e-6 * abs(losses[0]):
        raise ModelError(
            "padding: packed would let examples see each other in this model with this attention kernel: "
            + ("set attention: sdpa" if takes_segments else "set padding: longest, or attention: sdpa")
        )


def _fuse(head: nn.Module, config) -> None:
    """Let the output layer take labels and return the loss.

    The loss is computed in the layer's own forward pass, because ZeRO-3 gathers a layer's weights when the layer is
    called, and because LoRA or a trainable copy may have replaced the layer.
    """
    plain_forward = head.forward
    text_config = config.get_text_config()
    softcap = getattr(text_config, "final_logit_softcapping", None)  # Gemma
    scale = getattr(text_config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(text_config, "logits_scaling", None) or 1.0  # Granite
    is_plain = type(head) is nn.Linear and head.bias is None and softcap is None and scale == 1.0

    def logits_of(hidden: torch.Tensor) -> torch.Tensor:
        logits = plain_forward(hidden).float() * scale
        return torch.tanh(logits / softcap) * softcap if softcap is not None else logits

    def forward(hidden: torch.Tensor, labels: torch.Tensor | None = None, output: str = "sum") -> torch.Tensor:
        if labels is None:  # generation
            return plain_forward(hidden)
        if output == "logits":
            return logits_of(hidden)
        if output == "examples":
            return chunked_log_probabilities(hidden, labels, logits_of, text_config.vocab_size)
        if is_plain:
            return fused_linear_cross_entropy(hidden, head.weight, labels)
        return chunked_cross_entropy(hidden, labels, logits_of, text_config.vocab_size)

    head.forward = forward


def _chunks(hidden: torch.Tensor, count: int, vocabulary: int, bytes_of_logit: int) -> list[slice]:
    """Divide positions into chunks; bytes_of_logit: beside those in the dtype of the weights."""
    chunk = loss_chunk(hidden.device.type == "cuda", vocabulary * (hidden.element_size() + bytes_of_logit))
    return [slice(start, start + chunk) for start in range(0, count, chunk)]


def chunked_cross_entropy(hidden: torch.Tensor, labels: torch.Tensor, logits_of, vocabulary: int) -> torch.Tensor:
    """Sum -log p(label) over positions, for any output layer, recomputing each chunk's logits in backward.

    hidden: [positions, width]; labels: [positions]; logits_of: [n, width] -> [n, vocabulary] in float32.
    """

    def loss_of(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits_of(hidden), labels, reduction="sum")

    # `hidden.sum() * 0` keeps the graph connected when a micro batch has no supervised position.
    total = hidden.float().sum() * 0
    for chunk in _chunks(hidden, len(labels), vocabulary, SAVED_BY_AUTOGRAD):
        total = total + checkpoint(loss_of, hidden[chunk], labels[chunk], use_reentrant=False)
    return total


def chunked_log_probabilities(hidden: torch.Tensor, labels: torch.Tensor, logits_of, vocabulary: int) -> torch.Tensor:
    """Compute log p(label) at each position, for any output layer, recomputing each chunk's logits in backward.

    hidden: [positions, width]; labels: [positions]. Returns [positions] float32.
    """

    def logp_of(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return -nn.functional.cross_entropy(logits_of(hidden), labels, reduction="none")

    chunks = _chunks(hidden, len(labels), vocabulary, SAVED_BY_AUTOGRAD)
    logps = [checkpoint(logp_of, hidden[chunk], labels[chunk], use_reentrant=False) for chunk in chunks]
    return torch.cat(logps) if logps else hidden.new_zeros(0, dtype=torch.float32)


def fused_linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum -log p(label) over positions for a plain linear output layer; gradients are computed with the loss.

    hidden: [positions, width]; weight: [vocabulary, width]; labels: [positions]. Returns a float32 scalar.

    The logits of a chunk are used at once for the loss and for both gradients and then overwritten by the next
    chunk's: nothing of size vocabulary is saved for the backward pass but the weight's own gradient. The idea is that
    of Liger Kernel's fused linear cross-entropy (Hsu et al., 2024, arXiv 2410.10989).
    """
    return _FusedLinearCrossEntropy.apply(hidden, weight, labels)


def _label_losses(logits: torch.Tensor, probabilities: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return -log p(label) of each position: from the softmax or, where that underflows, from the logits."""
    p_label = probabilities.gather(1, target)
    if p_label.device.type in NEVER_WAITS and not (p_label == 0).any():
        return -p_label.log()
    # The softmax of the largest logit is 1 / sum(exp(logit - largest)).
    log_sum = logits.amax(1, keepdim=True).float() - probabilities.amax(1, keepdim=True).log()
    return torch.where(p_label == 0, log_sum - logits.gather(1, target), -p_label.log())


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels):
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        lift = FLOAT16_LIFT if hidden.dtype == torch.float16 else 1
        # The gradient of the weight is a sum over positions, which would overflow float16: there it is their mean.
        mean = 1 / max(1, len(labels)) if hidden.dtype == torch.float16 else 1
        parts = _chunks(hidden, len(labels), len(weight), 4)
        chunk = min(parts[0].stop, len(labels)) if parts else 1
        # One buffer in the weights' dtype for the matrix products, one in float32 for the softmax: two allocations for
        # all chunks, where a new one per chunk would fragment GPU memory.
        logits = hidden.new_empty(chunk, len(weight))
        probabilities = torch.empty_like(logits, dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for part in parts:
            inputs, target = hidden[part], labels[part, None]
            z, p = logits[: len(inputs)], probabilities[: len(inputs)]
            torch.mm(inputs, weight.T, out=z)
            torch.softmax(p.copy_(z), dim=-1, out=p)
            total += _label_losses(z, p, target).sum()
            if not (wants_hidden or wants_weight):
                continue
            # The gradient of cross-entropy in the logits is softmax - one-hot(label). In the weights' dtype it
            # overwrites the logits, which are not needed any more.
            p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
            z.copy_(p if lift == 1 else p.mul_(lift))
            if grad_hidden is not None:
                torch.mm(z, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.addmm_(z.T, inputs, alpha=mean)
        ctx.factors = 1 / lift, 1 / (lift * mean)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        # In place: the loss is a scalar, so its gradient only scales those of forward, and backward runs once.
        grads = (
            None if grad is None else grad.mul_((grad_total * factor).to(grad.dtype))
            for grad, factor in zip(ctx.saved_tensors, ctx.factors, strict=True)
        )
        return (*grads, None)
