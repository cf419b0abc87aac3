"""Losses that prefer one answer to another, as functions of summed log-probabilities.

    logps = PairLogps(chosen, rejected, chosen_tokens, rejected_tokens, reference_chosen, reference_rejected)
    losses = preference_loss("dpo", logps, beta=0.1)        one loss per pair; the caller averages

Notation of the formulas below: w is the chosen answer and l the rejected one, p(y) the model's probability of an
answer, r(y) the reference model's, |y| the number of supervised tokens of y, s the logistic function.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["METRICS", "PairLogps", "preference_loss", "preference_metrics"]

METRICS = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of pairs of answers, each summed over the answer's supervised tokens; float32 [pairs]."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    """Number of supervised tokens of each chosen answer."""
    rejected_tokens: Tensor
    """Number of supervised tokens of each rejected answer."""
    reference_chosen: Tensor | None = None
    """The same of the reference model; None for losses that have none."""
    reference_rejected: Tensor | None = None

    def per_token(self) -> tuple[Tensor, Tensor]:
        """Return the mean log-probability of a token of the chosen and of the rejected answers."""
        return self.chosen / _count(self.chosen_tokens), self.rejected / _count(self.rejected_tokens)

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """Return log p(y) - log r(y) of the chosen and of the rejected answers."""
        if self.reference_chosen is None or self.reference_rejected is None:
            raise ValueError("this loss compares with a reference model: reference_chosen and reference_rejected")
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected


def preference_loss(kind: str, logps: PairLogps, beta: float, **options) -> Tensor:
    """Return one loss per pair, [pairs]; the mean over the pairs of the whole global batch is what to minimize.

    kind, formula, options:

    dpo    Rafailov et al. 2023, arXiv 2305.18290, eq. 7:
           -log s(beta m), m = log p(w)/r(w) - log p(l)/r(l).
           label_smoothing e (0): the share of pairs believed to be labeled the wrong way round,
           -(1 - e) log s(beta m) - e log s(-beta m) ("conservative DPO").
    ipo    Azar et al. 2023, arXiv 2310.12036, eq. 17, each log-ratio divided by its answer's tokens (as TRL does):
           (m - 1 / (2 beta))^2, m = 1/|w| log p(w)/r(w) - 1/|l| log p(l)/r(l).
    simpo  Meng et al. 2024, arXiv 2405.14734, eq. 6, no reference:
           -log s(beta (1/|w| log p(w) - 1/|l| log p(l)) - gamma).
           gamma_beta_ratio (0.5): gamma / beta, the requested margin.
    orpo   Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7, no reference; beta is the paper's lambda:
           -1/|w| log p(w) - beta log s(log odds(w) - log odds(l)), odds(y) = q / (1 - q), q = p(y)^(1/|y|).
    kto    Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7 and 8, both weights 1; every chosen answer is desirable
           and every rejected one undesirable, and a pair's loss is the mean of its two answers':
           1/2 (1 - s(beta (log p(w)/r(w) - kl))) + 1/2 (1 - s(beta (kl - log p(l)/r(l)))).
           kl (0): the reference point z_0, an estimate of KL(p, r) >= 0 computed by the caller, for example from
           mismatched prompts and answers of the global batch. It is a constant here: no gradient flows into it.
    """
    match kind:
        case "dpo":
            return _dpo(logps, beta, **options)
        case "ipo":
            return _ipo(logps, beta, **options)
        case "simpo":
            return _simpo(logps, beta, **options)
        case "orpo":
            return _orpo(logps, beta, **options)
        case "kto":
            return _kto(logps, beta, **options)
    raise ValueError(f"got {kind!r}, must be dpo, ipo, simpo, orpo or kto")


@torch.no_grad()
def preference_metrics(logps: PairLogps, beta: float) -> dict[str, Tensor]:
    """Return what is logged of each pair: METRICS -> [pairs] each.

    An answer's reward is beta (log p(y) - log r(y)), or beta/|y| log p(y) where there is no reference.
    The margin is chosen - rejected; the accuracy is 1 where it is positive, 0 where negative, a half where neither
    is preferred, as with a model that is its own reference.
    """
    chosen, rejected = logps.per_token() if logps.reference_chosen is None else logps.log_ratios()
    margin = beta * (chosen - rejected)
    return dict(zip(METRICS, (beta * chosen, beta * rejected, margin, (margin.sign() + 1) / 2), strict=True))


def _dpo(logps: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    chosen, rejected = logps.log_ratios()
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def _ipo(logps: PairLogps, beta: float) -> Tensor:
    chosen, rejected = logps.log_ratios()
    margin = chosen / _count(logps.chosen_tokens) - rejected / _count(logps.rejected_tokens)
    return (margin - 1 / (2 * beta)) ** 2


def _simpo(logps: PairLogps, beta: float, gamma_beta_ratio: float = 0.5) -> Tensor:
    chosen, rejected = logps.per_token()
    return -logsigmoid(beta * (chosen - rejected - gamma_beta_ratio))


def _orpo(logps: PairLogps, beta: float) -> Tensor:
    chosen, rejected = logps.per_token()
    return -chosen - beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _kto(logps: PairLogps, beta: float, kl: float | Tensor = 0.0) -> Tensor:
    chosen, rejected = logps.log_ratios()
    kl = kl.detach() if isinstance(kl, Tensor) else kl
    # 1 - s(x) = s(-x), without the rounding of the difference
    return (torch.sigmoid(beta * (kl - chosen)) + torch.sigmoid(beta * (rejected - kl))) / 2


def _log_odds(logp: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of log p < 0, exact where p is near 0 and where it is near 1."""
    # A token of probability 1 in float32 would have infinite odds, and a gradient that is not finite.
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))


def _count(tokens: Tensor) -> Tensor:
    """Return at least one token: an answer without any has log-probability 0, not 0 / 0."""
    return tokens.clamp(min=1)
