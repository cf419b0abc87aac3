"""Log-probabilities of texts, against plain transformers."""

import numpy as np
import pytest
import torch

from conftest import TINY_MODEL, chat, uneven_rows
from forgebook.data.masking import encode
from forgebook.data.row_formats import Example
from forgebook.data.token_store import Tokens
from forgebook.data.tokenize import EncodingOptions
from forgebook.errors import DataError
from forgebook.evaluation.logprobs import label_probabilities, log_probabilities, measure
from forgebook.inference.loading import load_together


@pytest.fixture(scope="module")
def loaded():
    return load_together([TINY_MODEL], "float32")[0]


def examples(count):
    return [Example(f"rows.jsonl:{k + 1}", row["messages"]) for k, row in enumerate(uneven_rows(count))]


def plain(model, one) -> float:
    """Sum the log-probabilities of an example's tokens in the loss with plain transformers."""
    with torch.no_grad():
        logs = torch.log_softmax(model(torch.tensor([one.input_ids])).logits[0].float(), -1)
    return sum(float(logs[k - 1, one.input_ids[k]]) for k in range(1, len(one.input_ids)) if one.loss_mask[k])


def test_sums_are_those_of_plain_transformers_in_the_order_of_the_examples(loaded):
    encoded = [encode(one.messages, loaded.tokenizer) for one in examples(5)]
    tokens, done = Tokens.from_examples((one.input_ids, one.loss_mask) for one in encoded), []
    sums = log_probabilities(loaded.model, loaded.tokenizer, tokens, batch_size=2, on_progress=done.append)
    assert sums == pytest.approx([plain(loaded.model, one) for one in encoded], rel=1e-4) and done == [2, 4, 5]


def test_label_probabilities_are_the_shares_of_their_likelihoods(loaded):
    labels = ["yes", "no, it is not"]
    one = Example("rows.jsonl:1", chat("Is it?", "yes")["messages"])
    [shares] = label_probabilities(loaded.model, loaded.tokenizer, [one], labels)
    logs = []
    for label in labels:
        encoded = encode(chat("Is it?", label)["messages"], loaded.tokenizer)
        encoded.loss_mask[-1] = False  # the end-of-turn token is not measured
        logs.append(plain(loaded.model, encoded))
    assert shares.sum() == pytest.approx(1) and shares[0] == pytest.approx(
        1 / (1 + np.exp(logs[1] - logs[0])), rel=1e-3
    )


def test_examples_are_measured_as_the_run_truncates_them(loaded):
    held_out, calls = examples(4), []
    lengths = [len(encode(one.messages, loaded.tokenizer).input_ids) for one in held_out]

    def measured(context_length, truncation):
        models = iter([("base", loaded), ("tuned", loaded)])
        report = lambda *progress: calls.append(progress)  # noqa: E731
        return measure(held_out, EncodingOptions(), context_length, truncation, models, report)

    whole = measured(1024, "error")
    assert whole.left_out == 0 and np.array_equal(whole.base, whole.tuned) and whole.base.shape == (4, 1, 2)
    assert calls[-1] == ("tuned", 4, 4)
    cut = measured(sorted(lengths)[-2], "drop")
    assert (
        cut.left_out == 1
        and len(cut.examples) == 3
        and max(lengths) not in [len(encode(one.messages, loaded.tokenizer).input_ids) for one in cut.examples]
    )
    with pytest.raises(DataError, match="no held-out example has a token in the loss within context_length 2"):
        measured(2, "drop")


def test_examples_that_cannot_be_encoded_are_named(loaded):
    wrong = Example(
        "rows.jsonl:7", [{"role": "user", "content": "private \U000f0001"}, *chat("a", "b")["messages"][2:]]
    )
    with pytest.raises(DataError, match=r"rows\.jsonl:7"):
        measure([wrong], EncodingOptions(), 64, "error", iter([("base", loaded)]), lambda *progress: None)
