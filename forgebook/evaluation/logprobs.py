"""How likely a model finds texts: for perplexity, for the labels of a classifier, for preference pairs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from forgebook.data import batching, masking, special_tokens, tokenize
from forgebook.data.row_formats import Example
from forgebook.data.token_store import Tokens
from forgebook.data.truncation import Truncation, fit_tokens
from forgebook.errors import DataError
from forgebook.inference.loading import LoadedModel
from forgebook.training.losses import SupervisedLM

__all__ = ["Measured", "Models", "OnProgress", "label_probabilities", "log_probabilities", "measure"]

# (name, model): "base", then "tuned".
Models = Iterator[tuple[str, LoadedModel]]
# Called with the name of the model, examples done, examples in all; for answers also with the tokens so far and the
# answers in progress (`OnAnswers`).
OnProgress = Callable[..., None]


def log_probabilities(
    model,
    tokenizer,
    tokens: Tokens,
    batch_size: int = 16,
    on_progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Return [examples] the summed log-probability, in nats, of each example's tokens in the loss."""
    import torch

    wrapped, totals = SupervisedLM(model).eval(), np.zeros(len(tokens))
    order = np.argsort(-tokens.lengths, kind="stable")  # batches grouped by length, the longest first
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        batch = batching.collate(tokens, [np.array([k]) for k in part], tokenizer.pad_token_id)
        with torch.inference_mode():
            sums = wrapped(**{name: value.to(model.device) for name, value in batch.items()}, output="examples")
        totals[part] = sums.float().cpu().numpy()
        on_progress(start + len(part))
    return totals


def label_probabilities(
    model,
    tokenizer,
    examples: list[Example],
    labels: Sequence[str],
    prompt_format=None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Return [examples, labels] a model's probability of each label as the last answer; they sum to 1.

    A label may be one token, as in a trained classifier, or several, as in its base: then its probability is their
    product. Raises DataError, with file:line, for an example that cannot be encoded.
    """
    encoded = []
    for example in examples:
        *prompt, answer = example.conversation
        for label in labels:
            messages = [*prompt, {**answer, "content": label}]
            try:
                one = masking.encode(messages, tokenizer, prompt_format, loss_on="last", tools=example.tools)
            except DataError as error:
                raise DataError(f"{example.where}: {error}") from None
            encoded.append(_without_end(one, tokenizer))
    tokens = Tokens.from_examples((one.input_ids, one.loss_mask) for one in encoded)
    logs = log_probabilities(model, tokenizer, tokens, on_progress=lambda done: on_progress(done // len(labels)))
    logs = logs.reshape(len(examples), len(labels))
    weights = np.exp(logs - logs.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


@dataclass(frozen=True)
class Measured:
    """How likely both models find examples.

    base, tuned: [examples, conversations, 2] the log-probability and the number of the tokens in the loss
    (conversations: 1, or 2 of a pair, the chosen first). left_out: how many truncation dropped for either model.
    """

    examples: list[Example]
    base: np.ndarray
    tuned: np.ndarray
    left_out: int


def measure(
    examples: list[Example],
    options: tokenize.EncodingOptions,
    context_length: int,
    truncation: Truncation,
    models: Models,
    on_progress: OnProgress,
) -> Measured:
    """Measure examples truncated as in the run; one that truncation drops for either model is left out.

    options: of the run; each model has its own prompt format.
    """
    group = batching.group_size(options.task)
    measured, stays = {}, np.ones(len(examples), bool)
    for name, loaded in models:
        encoded = _encode(examples, loaded.tokenizer, dataclasses.replace(options, prompt_format=loaded.prompt_format))
        tokens = Tokens.from_examples((one.input_ids, one.loss_mask) for pieces in encoded for one in pieces)
        owners = np.repeat(np.arange(len(encoded)), [len(pieces) for pieces in encoded])
        fitted = fit_tokens(tokens, context_length, truncation, group)
        tokens, owners = fitted.tokens, owners[fitted.stays]
        report = functools.partial(_report, on_progress, name, len(tokens))
        with loaded.active() as model:
            logs = log_probabilities(model, loaded.tokenizer, tokens, on_progress=report)
        del loaded, model
        # Several encodings of one example (expanded turns) are summed: they are resampled together.
        sums = np.zeros((len(examples), group, 2))
        np.add.at(sums, (owners, np.arange(len(owners)) % group), np.stack([logs, tokens.supervised], axis=1))
        measured[name] = sums
        stays &= sums[:, :, 1].all(axis=1)
    if not stays.any():
        raise DataError(f"no held-out example has a token in the loss within context_length {context_length}")
    left = [example for example, stay in zip(examples, stays, strict=True) if stay]
    return Measured(left, measured["base"][stays], measured["tuned"][stays], len(examples) - len(left))


def _encode(examples: list[Example], tokenizer, options: tokenize.EncodingOptions) -> list[list[masking.Encoded]]:
    """Encode examples; raise DataError with the first ten that cannot be."""
    encoded, errors = [], []
    for one in tokenize.encode_examples(examples, tokenizer, options):
        errors.append(str(one)) if isinstance(one, DataError) else encoded.append(one)
    if errors:
        raise DataError("\n".join(errors[:10]))
    return encoded


def _without_end(encoded: masking.Encoded, tokenizer) -> masking.Encoded:
    """Take the end-of-turn token out of what is measured: a classifier is not trained on it."""
    special = special_tokens.special_ids(tokenizer)
    mask = [t and i not in special for i, t in zip(encoded.input_ids, encoded.loss_mask, strict=True)]
    return dataclasses.replace(encoded, loss_mask=mask)


def _report(on_progress: OnProgress, name: str, total: int, done: int) -> None:
    on_progress(name, done, total)
