"""How likely a model finds given texts: for perplexity, for the labels of a classifier, for pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from forgebook.data import batching, masking, special_tokens
from forgebook.data.row_formats import Example
from forgebook.data.token_store import Tokens
from forgebook.errors import DataError
from forgebook.training.losses import SupervisedLM

__all__ = ["label_probabilities", "log_probabilities"]


def log_probabilities(
    model,
    tokenizer,
    tokens: Tokens,
    batch_size: int = 16,
    on_progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Return [examples] the log-probability of the tokens in the loss, summed."""
    import torch

    wrapped, sums_of = SupervisedLM(model).eval(), np.zeros(len(tokens))
    order = np.argsort(-tokens.lengths, kind="stable")  # batches grouped by length, the longest first
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        batch = batching.collate(tokens, [np.array([k]) for k in part], tokenizer.pad_token_id)
        with torch.inference_mode():
            sums = wrapped(**{name: value.to(model.device) for name, value in batch.items()}, output="examples")
        sums_of[part] = sums.float().cpu().numpy()
        on_progress(start + len(part))
    return sums_of


def label_probabilities(
    model,
    tokenizer,
    rows: list[Example],
    labels: list[str],
    prompt_format=None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Return [rows, labels] how a model shares the last answer out among the labels.

    A label may be one token, as in a trained classifier, or several, as in its base: then it is as likely as all of
    them in turn.
    """
    encoded = []
    for row in rows:
        for label in labels:
            messages = [*row.messages[:-1], {**row.messages[-1], "content": label}]
            try:
                one = masking.encode(messages, tokenizer, prompt_format, loss_on="last", tools=row.tools)
            except DataError as error:
                raise DataError(f"{row.where}: {error}") from None
            encoded.append(_without_end(one, tokenizer))
    tokens = Tokens.from_examples((one.input_ids, one.loss_mask) for one in encoded)
    logs = log_probabilities(model, tokenizer, tokens, on_progress=lambda done: on_progress(done // len(labels)))
    logs = logs.reshape(len(rows), len(labels))
    weights = np.exp(logs - logs.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def _without_end(encoded: masking.Encoded, tokenizer) -> masking.Encoded:
    """Leave the token that ends the turn out of what is measured: a classifier is not trained on it."""
    special = special_tokens.special_ids(tokenizer)
    kept = [t and i not in special for i, t in zip(encoded.input_ids, encoded.loss_mask, strict=True)]
    return dataclasses.replace(encoded, loss_mask=kept)
