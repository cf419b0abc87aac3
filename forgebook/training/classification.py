"""Labels as tokens, and how well they are told apart.

A classifier here is a language model that answers with one token. Each label becomes one token of the tokenizer,
the loss is on that token alone, and the probability of a label is the softmax over the labels' logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["label_ids", "scores"]


def label_ids(tokenizer, labels: Sequence[str]) -> list[int]:
    """List the token of each label; models.load_tokenizer has added them."""
    return [tokenizer.convert_tokens_to_ids(label) for label in labels]


def scores(probabilities: np.ndarray, truth: np.ndarray, metrics: Sequence[str]) -> dict[str, float]:
    """Score predictions with scikit-learn.

    probabilities: [rows, labels], rows summing to 1; truth: [rows] the right label's number.
    metrics: accuracy, f1, precision, recall, prauc, rocauc. With two labels they are those of the second, as
    usual; with more, the plain mean over the labels that occur (macro).
    """
    from sklearn import metrics as sk

    predicted = probabilities.argmax(1)
    count = probabilities.shape[1]
    average = {"average": "binary"} if count == 2 else {"average": "macro"}
    # Averages over labels leave out those that never occur: they have no curve.
    seen = [label for label in range(count) if (truth == label).any()] if count > 2 else [1]
    found = {}
    for name in metrics:
        if name == "accuracy":
            found[name] = sk.accuracy_score(truth, predicted)
        elif name in ("f1", "precision", "recall"):
            score = {"f1": sk.f1_score, "precision": sk.precision_score, "recall": sk.recall_score}[name]
            found[name] = score(truth, predicted, zero_division=0, **average)
        else:
            curve = sk.average_precision_score if name == "prauc" else sk.roc_auc_score
            both = [label for label in seen if 0 < (truth == label).sum() < len(truth)]
            areas = [curve(truth == label, probabilities[:, label]) for label in both]
            found[name] = float(np.mean(areas)) if areas else float("nan")
    return {f"eval_{name}": round(float(value), 6) for name, value in found.items()}
