"""Label noise: losses as transformers computes them, and answers of other questions among the highest."""

import numpy as np
import pytest
import torch

from conftest import CONVERSATION, REPOSITORY, TINY_MODEL, chat
from forgebook.config.parse import load_config
from forgebook.curation.label_noise import losses, make_loss_judge, robust_limit
from forgebook.data.row_formats import parse_row
from forgebook.errors import ConfigError
from forgebook.inference.loading import load_together

QUICKSTART = REPOSITORY / "training_configs/tiny/quickstart.yaml"


@pytest.fixture(scope="module")
def loaded():
    [one] = load_together([TINY_MODEL], "float32")
    return one


def examples_of(rows, task="instruction_tuning"):
    return {k: parse_row(row, f"a.jsonl:{k + 1}", task)[0] for k, row in enumerate(rows)}


def test_losses_are_those_of_transformers(loaded, tokenizer):
    """Of plain text every token but the first is in the loss: the model's own loss with labels = ids."""
    texts = ["The lamp is on the table.", "Maria is in the garden of the old house, near the door."]
    config = load_config(QUICKSTART, ["task=causal_lm"])
    examples = list(examples_of([{"text": text} for text in texts], "causal_lm").values())
    from forgebook.data import tokenize

    encoded = tokenize.encode_examples(examples, loaded.tokenizer, tokenize.EncodingOptions("causal_lm"))
    found = losses(loaded, examples, config)
    for value, [one] in zip(found, encoded, strict=True):
        ids = torch.tensor([one.input_ids])
        assert value == pytest.approx(float(loaded.model(input_ids=ids, labels=ids).loss), rel=1e-4)


def test_an_unlikely_answer_is_reported_and_the_lists_are_in_order(loaded, monkeypatch):
    monkeypatch.chdir(TINY_MODEL.parent)
    rows = [chat(f"Where is the {thing}?", "On the table.") for thing in "lamp key door book cup box".split() * 3]
    rows[7] = chat("Where is the key?", "Zrx qlp 99 vvw %% jjj.")
    config = load_config(QUICKSTART, ["curation.examples_per_reason=3"])
    judged = make_loss_judge(str(TINY_MODEL), config)(examples_of(rows))
    assert [one.number for one in judged.findings] == [7] and judged.findings[0].reason == "high_loss"
    lists = judged.report["lists"]
    assert lists["highest loss"][0][0] == 7 and all(len(part) == 3 for part in lists.values())
    assert {number for part in lists.values() for number, _ in part} == set(judged.report["shown"])
    assert judged.report["measured"] == 18
    assert judged.report["model"] == TINY_MODEL.name  # below the folder that the command runs in: no machine's path


def test_an_example_that_is_too_long_is_not_measured(loaded):
    rows = [{"messages": CONVERSATION}, chat("Where?", "There " * 300)]
    found = losses(loaded, list(examples_of(rows).values()), load_config(QUICKSTART))
    assert np.isfinite(found[0]) and np.isnan(found[1])


def test_the_limit_is_hardly_moved_by_outliers():
    values = np.random.default_rng(0).normal(2, 0.5, 10_000)
    assert robust_limit(values, 3) == pytest.approx(3.5, abs=0.05)
    values[:500] = 50
    assert robust_limit(values, 3) == pytest.approx(3.5, abs=0.2)


def test_pairs_have_no_loss_of_their_own():
    config = load_config(QUICKSTART, ["task=preference_tuning"])
    with pytest.raises(ConfigError, match="pairs"):
        make_loss_judge(str(TINY_MODEL), config)
