"""What decoders consist of, layer by layer: all that a plan counts adapters, weights and activations from. No torch.

The catalog computes it for the families whose parameters follow from a few figures; models/shapes.py counts it on the
model's own class for the others, and both store it as JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["MLP_NAMES", "CountedDecoder", "ImageLoad", "LayerKind", "counted_from"]

MLP_NAMES = ("mlp", "feed_forward", "ffn")  # what published decoders call it in their layers


@dataclass(frozen=True)
class LayerKind:
    """Decoder layers of one form. layers: their numbers. parameters: of one of them. norms: as wide as hidden states.

    linears: (name within the layer, inputs, outputs). experts: tensors that hold the weights of all experts: (name,
    experts, inputs, outputs). modules: names of all modules within the layer.
    """

    layers: tuple[int, ...]
    parameters: int
    norms: int
    linears: tuple[tuple[str, int, int], ...]
    experts: tuple[tuple[str, int, int, int], ...]
    modules: tuple[str, ...]

    @property
    def expert_parameters(self) -> int:
        """Count the weights of all experts of one layer."""
        return sum(count * inputs * outputs for _, count, inputs, outputs in self.experts)


@dataclass(frozen=True)
class ImageLoad:
    """The vision tower of a run with images.

    layers, hidden: of the tower. kept: numbers per patch that one layer keeps for its backward pass; forward, backward:
    the most that it holds at once without one, and that its backward pass adds. pixels: numbers of a patch. patches:
    that it computes per token of an example. parameters: its own, with the projector's; trained: those of them that
    train. is_frozen: whether nothing before the projector trains.
    """

    layers: int
    hidden: int
    kept: int
    forward: int
    backward: int
    pixels: int
    patches: float
    parameters: int
    trained: int
    is_frozen: bool

    @property
    def flops_per_token(self) -> float:
        """Count the FLOPs of the tower per token of an example."""
        return (2 if self.is_frozen else 6) * self.parameters * self.patches


@dataclass(frozen=True)
class CountedDecoder:
    """A text decoder, as counted on the class that transformers loads it as.

    layers: whole name of the list of decoder layers. others: linear layers outside of it, but the output layer: (whole
    name, inputs, outputs). modules: whole names of all modules outside of it. parameters: with embeddings and output
    layer. embeddings: those of look-up tables. softcap: the logits pass through a tanh. adapts_experts: whether
    all-linear reaches the experts' tensors. eager: whether its class has no kernel that `attention: auto` takes.
    """

    layers: str
    kinds: tuple[LayerKind, ...]
    others: tuple[tuple[str, int, int], ...]
    modules: tuple[str, ...]
    parameters: int
    embeddings: int
    softcap: bool
    adapts_experts: bool
    eager: bool

    def inner(self, active_experts: int) -> int:
        """Return the largest width inside an MLP, over the experts that work on a token."""
        return max(
            max((inputs for _, inputs, _ in kind.linears), default=0)
            + active_experts * max((inputs for name, _, inputs, _ in kind.experts if "down" in name), default=0)
            for kind in self.kinds
        )


def counted_from(facts: dict[str, Any]) -> CountedDecoder:
    """Read what `dataclasses.asdict` wrote, from JSON. Raises TypeError for anything else."""
    kinds = tuple(LayerKind(**{key: _frozen(value) for key, value in kind.items()}) for kind in facts["kinds"])
    return CountedDecoder(**{key: _frozen(value) for key, value in facts.items()} | {"kinds": kinds})


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
