"""How the next token is chosen and where an answer stops: one implementation for generate, chat and serve.

    sampling = TokenSampling(temperature=0.7, seed=prompt_seed(0, number))
    sampler = Sampler([sampling], [generator_of(sampling, device)], device)
    tokens = sampler(None, logits).argmax(-1)

The same prompt, seed and settings give the same answer through each of them, whatever shares its batch.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forgebook.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["LEAST", "Sampler", "Sampling", "StopStrings", "TokenSampling", "generator_of", "prompt_seed"]

# The smallest temperature and top_p that float32 computes with: below, logits overflow and no token has a probability.
LEAST = 1e-8
HOTTEST = 100.0


@dataclass(frozen=True)
class Sampling:
    """How a set of prompts is answered: greedily, or by sampling.

    temperature: 0 is greedy; top_p: sample among the most likely tokens that together hold this share of the
    probability. seed: the same seed gives a prompt the same answer, whatever prompts share its batch.
    batch_size: prompts at a time, None as many as fit in memory; it changes memory and speed but no answer.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int | None = None

    def __post_init__(self):
        if not (self.temperature == 0 or LEAST <= self.temperature <= HOTTEST):
            raise ConfigError(
                f"temperature must be 0 (greedy) or more ({LEAST:g} to {HOTTEST:g}), got {self.temperature:g}"
            )
        if not LEAST <= self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1 (from {LEAST:g}), got {self.top_p:g}")
        for name in ("max_new_tokens", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, got {value}")


def prompt_seed(seed: int, number: int = 0) -> int:
    """Derive the seed of one prompt of a set from the set's seed and the prompt's number; a lone prompt is number 0."""
    # CPython hashes tuples of integers alike in every process: PYTHONHASHSEED concerns text only.
    return hash((seed, number)) % 2**63


@dataclass(frozen=True)
class TokenSampling:
    """How the tokens of one answer are chosen. temperature 0 is greedy, top_k 0 is no limit.

    seed: of this answer, see `prompt_seed`; None takes a random one.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None


def generator_of(answer: TokenSampling, device) -> torch.Generator | None:
    """Make the random numbers of one answer; None for a greedy one."""
    import torch

    if not answer.temperature:
        return None
    return torch.Generator(device).manual_seed(secrets.randbits(63) if answer.seed is None else answer.seed)


class Sampler:
    """A logits processor that turns greedy decoding into sampling, each answer with random numbers of its own.

    The largest of p / e, with e sampled from the exponential distribution, is token k with probability p[k].
    """

    def __init__(self, answers: Sequence[TokenSampling], generators: Sequence[torch.Generator | None], device):
        """Make a processor. generators: of each answer, from `generator_of`; they advance with every token."""
        import torch

        self._generators = generators
        if not any(generators):
            return

        def column(values: Iterable[float], dtype=torch.float32) -> torch.Tensor:
            return torch.tensor(list(values), dtype=dtype, device=device).unsqueeze(1)

        self._samples = column((one.temperature > 0 for one in answers), torch.bool)
        self._temperature = column(one.temperature or 1.0 for one in answers)
        # The running sum of a float32 distribution may exceed 1, so "no limit" is infinity.
        self._top_p = column(one.top_p if one.top_p < 1 else math.inf for one in answers)
        self._top_k = column((one.top_k or 2**31 for one in answers), torch.int64)
        self._limits = any(one.temperature and (one.top_p < 1 or one.top_k) for one in answers)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return [answers, vocabulary] scores whose largest is the sampled token; scores of greedy answers stay."""
        import torch

        if not any(self._generators):
            return scores
        logits = scores.float() / self._temperature
        chances = self._limited(logits) if self._limits else torch.softmax(logits, dim=-1)
        noise = torch.ones_like(chances)
        for row, generator in zip(noise, self._generators, strict=True):
            if generator is not None:
                row.exponential_(generator=generator)
        return torch.where(self._samples, (chances / noise).log(), scores.float())

    def _limited(self, logits: torch.Tensor) -> torch.Tensor:
        """Compute the probabilities with 0 for tokens outside top_k and, of what top_k leaves, outside top_p."""
        import torch

        ranked, places = logits.sort(dim=-1, descending=True)
        rank = torch.arange(ranked.shape[1], device=ranked.device)
        chances = torch.softmax(ranked.masked_fill(rank >= self._top_k, -math.inf), dim=-1)
        before = chances.cumsum(-1) - chances
        chances = chances.masked_fill(before >= self._top_p, 0)
        return torch.zeros_like(chances).scatter(-1, places, chances)


class StopStrings:
    """Texts that end an answer and are no part of it, for answers that are complete and for those still written."""

    def __init__(self, stops: Iterable[str]):
        self.stops = tuple(dict.fromkeys(stop for stop in stops if stop))

    def find(self, text: str) -> int | None:
        """Return where the first stop string in a text begins; None without one."""
        return min((at for at in map(text.find, self.stops) if at >= 0), default=None)

    def cut(self, text: str) -> str:
        """Return a complete answer up to its first stop string."""
        return text[: self.find(text)]

    def settled(self, text: str) -> int:
        """Count the characters that belong to an answer still written: no stop string is or may be beginning there."""
        found = self.find(text)
        if found is not None:
            return found
        longest = max(map(len, self.stops), default=0)
        sizes = range(min(longest - 1, len(text)), 0, -1)
        begun = (size for size in sizes if any(stop.startswith(text[-size:]) for stop in self.stops))
        return len(text) - next(begun, 0)
