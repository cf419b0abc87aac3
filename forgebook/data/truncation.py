"""Examples longer than context_length: cut, dropped or refused, and what that loses.

    fit_length(length, context_length, "right")          which part of one example stays
    tokens, counts = fit_context(tokens, 512, "error")   a set, before training

`truncation: error` refuses what would lose tokens of the loss; the other policies count them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from forgebook.data.image_tokens import PlacedImage
from forgebook.data.token_store import Tokens
from forgebook.errors import DataError

__all__ = ["Fitted", "Truncation", "fit_context", "fit_length", "fit_tokens", "truncation_losses"]

Truncation = Literal["error", "drop", "left", "right"]


def fit_length(length: int, context_length: int, truncation: Truncation) -> slice | None:
    """Return which tokens of an example stay, or None if it is dropped. Everything that truncates asks this.

    truncation: "drop" leaves longer examples out; "left" and "right" cut that end off; "error" cuts the right end,
                and `fit_tokens` keeps the example only if that end has no token in the loss.
    """
    if length <= context_length:
        return slice(0, length)
    if truncation == "drop":
        return None
    return slice(length - context_length, length) if truncation == "left" else slice(0, context_length)


@dataclass(frozen=True)
class Fitted:
    """What truncation leaves of a set.

    tokens: the examples that stay, cut. stays: [examples before] whether it does. lost: [examples before] its
    tokens in the loss that are cut off, all of them if it is dropped for its length.
    """

    tokens: Tokens
    stays: np.ndarray
    lost: np.ndarray


def fit_tokens(tokens: Tokens, context_length: int, truncation: Truncation, group: int = 1) -> Fitted:
    """Cut or drop the examples longer than context_length; drop those with no token in the loss left. No image is cut.

    group: this many adjacent examples are kept or dropped together: 2 for preference pairs.
    """
    begin, end, supervised = tokens.begin.copy(), tokens.end.copy(), tokens.supervised.copy()
    stays = np.ones(len(tokens), bool)
    for k in np.flatnonzero(tokens.lengths > context_length):
        part = fit_length(int(tokens.lengths[k]), context_length, truncation)
        part = part and _around_images(part, tokens.images_of(k))
        if part is None:
            supervised[k], stays[k] = 0, False
            continue
        supervised[k] = tokens.example(k)[1][part][1:].sum()
        begin[k], end[k] = tokens.begin[k] + part.start, tokens.begin[k] + part.stop
        stays[k] = supervised[k] == tokens.supervised[k] if truncation == "error" else supervised[k] > 0
    lost = tokens.supervised - supervised
    stays = np.repeat(stays.reshape(-1, group).all(axis=1), group)
    fitted = replace(tokens, begin=begin, end=end, supervised=supervised).select(np.flatnonzero(stays))
    return Fitted(fitted, stays, lost)


def _around_images(part: slice, images: Sequence[PlacedImage]) -> slice:
    """Move the ends of a part of an example out of the images that they would divide."""
    start, stop = part.start, part.stop
    for image in images:
        if image.start < start < image.stop:
            start = image.stop
        if image.start < stop < image.stop:
            stop = image.start
    return slice(start, max(start, stop))


def truncation_losses(tokens: Tokens, context_length: int) -> dict[str, int]:
    """Count the examples longer than context_length, and the tokens in the loss that each truncation would cut off."""
    policies: tuple[Truncation, ...] = ("drop", "left", "right")
    lost = {policy: int(fit_tokens(tokens, context_length, policy).lost.sum()) for policy in policies}
    longer = int((tokens.lengths > context_length).sum())
    return {"longer_rows": longer, **{f"answer_tokens_lost_{policy}": count for policy, count in lost.items()}}


def fit_context(
    tokens: Tokens, context_length: int, truncation: Truncation, name: str = "the data", group: int = 1
) -> tuple[Tokens, dict[str, int]]:
    """Apply the truncation to a set before training, as `fit_tokens`, and count what it cuts.

    Returns the examples that stay, and the counts rows_cut, rows_dropped, tokens_cut, answer_tokens_cut.
    Raises DataError under "error" if a token in the loss would be cut off, and if no example is left.
    """
    fitted = fit_tokens(tokens, context_length, truncation, group)
    long = tokens.lengths > context_length
    if truncation == "error" and fitted.lost.any():
        first, lost = tokens.where(np.flatnonzero(long)[0]), fitted.lost.sum()
        raise DataError(
            f"{long.sum()} of {len(tokens)} examples of {name} (the first: {first}) are longer than context_length "
            f"{context_length} and would lose {lost} tokens of the loss: set context_length to {tokens.lengths.max()} "
            "to lose none, or truncation to drop, left or right"
        )
    if not fitted.stays.any():
        raise DataError(
            f"no example of {name} has a token in the loss within context_length {context_length}: "
            f"the longest has {tokens.lengths.max()} tokens"
        )
    return fitted.tokens, {
        "rows_cut": int((long & fitted.stays).sum()),
        "rows_dropped": int((~fitted.stays).sum()),
        "tokens_cut": int(tokens.lengths.sum() - fitted.tokens.lengths.sum()),
        "answer_tokens_cut": int(tokens.supervised.sum() - fitted.tokens.supervised.sum()),
    }
