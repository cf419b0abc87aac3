"""Labels as tokens, and how well a classifier tells them apart.

A classifier here is a language model that answers with one token. Each label becomes one token of the tokenizer, the
loss is on that token alone, and the probability of a label is the softmax over the labels' logits.

The loss is over the whole vocabulary: one over the labels alone tells them apart as well, but leaves all other tokens
likelier than any label, so that a served model would never answer with one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["label_ids", "label_rate", "score_predictions"]

# A step of AdamW moves each number of a label's row by the learning rate, and so, with hidden states of about 1, the
# label's logit by the rate x hidden size. A new label starts 10 to 20 below the likeliest tokens; this closes that in a
# dozen steps, warm-up and decay included. On SmolLM2, with 16 to 75 steps, a half to twice of it does as well.
LOGIT_PER_STEP = 4.0
# Longer runs have time for the same way in smaller steps, each of which upsets the balance of the labels less.
LOGIT_PER_RUN = 160.0


def label_rate(learning_rate: float, hidden: int, steps: int) -> float:
    """Return the peak learning rate of the labels' embeddings; a rate for LoRA alone is too low in a small model.

    hidden: the model's hidden size. steps: of the whole run.
    """
    return max(learning_rate, min(LOGIT_PER_STEP, LOGIT_PER_RUN / steps) / hidden)


def label_ids(tokenizer: Any, labels: Sequence[str]) -> list[int]:
    """Return the token id of each label; `models.tokenizer.load_tokenizer` has added the tokens."""
    return [tokenizer.convert_tokens_to_ids(label) for label in labels]


def score_predictions(probabilities: np.ndarray, labels: np.ndarray, metrics: Sequence[str]) -> dict[str, float]:
    """Compute scikit-learn's metrics of predictions, under the names eval_accuracy and so on.

    probabilities: [examples, labels], each example's summing to 1; labels: [examples] index of the correct one.
    metrics: accuracy, f1, precision, recall, prauc, rocauc. With two labels they are those of the second, as usual;
    with more, the unweighted mean over the labels that occur (macro).
    """
    from sklearn import metrics as sk

    predicted = probabilities.argmax(1)
    count = probabilities.shape[1]
    average = {"average": "binary"} if count == 2 else {"average": "macro"}
    # A label that never occurs, or always, has no curve: macro averages leave it out.
    positives = [label for label in range(count) if (labels == label).any()] if count > 2 else [1]
    with_curve = [label for label in positives if 0 < (labels == label).sum() < len(labels)]
    values = {}
    for name in metrics:
        if name == "accuracy":
            values[name] = sk.accuracy_score(labels, predicted)
        elif name in ("f1", "precision", "recall"):
            score = {"f1": sk.f1_score, "precision": sk.precision_score, "recall": sk.recall_score}[name]
            values[name] = score(labels, predicted, zero_division=0, **average)
        else:
            area = sk.average_precision_score if name == "prauc" else sk.roc_auc_score
            areas = [area(labels == label, probabilities[:, label]) for label in with_curve]
            values[name] = float(np.mean(areas)) if areas else float("nan")
    return {f"eval_{name}": round(float(value), 6) for name, value in values.items()}
