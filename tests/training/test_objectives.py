"""Pairs through the loop: the loss that the functions of training.preference give, whatever divides the work."""

import json

import numpy as np
import pytest
import torch

from conftest import LORA, TINY_MODEL, fine_tune_until, losses_of
from forgebook.data import masking
from forgebook.launch.fine_tune import fine_tune
from forgebook.models.tokenizer import load_tokenizer
from forgebook.runs.metrics import read_metrics
from forgebook.training.preference import PairLogps, preference_loss


def pair(k):
    question = {"role": "user", "content": "the lamp " * (1 + k % 5)}
    return {
        "chosen": [question, {"role": "assistant", "content": "on the table " * (1 + k % 3)}],
        "rejected": [question, {"role": "assistant", "content": "no"}],
    }


@pytest.fixture
def preferences(make_config, tmp_path):
    """A config for 12 pairs of uneven lengths."""

    def make(loss="dpo", **values):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(pair(k)) + "\n" for k in range(12)))
        settings = {
            "task": "preference_tuning", "preference_tuning_config": {"loss": loss, "beta": 0.2},
            "train_path": str(path), "valid_path": str(path), "train_batch_size_per_device": 4,
        }  # fmt: skip
        return make_config(**settings | values)

    return make


def logps_of(model, tokenizer, messages) -> tuple[float, int]:
    """Sum the answer's log-probabilities with plain transformers."""
    encoded = masking.encode(messages, tokenizer, loss_on="last")
    ids = torch.tensor([encoded.input_ids])
    with torch.no_grad():
        logp = torch.log_softmax(model(ids).logits[0, :-1].float(), -1).gather(1, ids[0, 1:, None])[:, 0]
    mask = torch.tensor(encoded.loss_mask[1:])
    return float(logp[mask].sum()), int(mask.sum())


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "orpo", "kto"])
def test_the_evaluation_is_that_of_plain_transformers(preferences, loss):
    """The reference is the model before its first step; the policy is the saved checkpoint."""
    from transformers import AutoModelForCausalLM

    run = fine_tune(preferences(loss))
    tokenizer = load_tokenizer(str(TINY_MODEL))
    reference = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)
    policy = AutoModelForCausalLM.from_pretrained(run.checkpoints / "epoch-1", dtype=torch.float32)
    figures = {
        (name, side): np.array([logps_of(model, tokenizer, pair(k)[side]) for k in range(12)], np.float32)
        for name, model in (("policy", policy), ("reference", reference))
        for side in ("chosen", "rejected")
    }
    sums = {key: torch.from_numpy(values[:, 0].copy()) for key, values in figures.items()}
    counts = {side: torch.from_numpy(figures["policy", side][:, 1].copy()) for side in ("chosen", "rejected")}
    pairs = PairLogps(
        sums["policy", "chosen"], sums["policy", "rejected"], counts["chosen"], counts["rejected"],
        sums["reference", "chosen"], sums["reference", "rejected"],
    )  # fmt: skip
    evaluation = read_metrics(run.metrics)[-1]
    assert evaluation["eval_loss"] == pytest.approx(float(preference_loss(loss, pairs, 0.2).mean()), abs=1e-4)
    if loss in ("dpo", "ipo", "kto"):
        margin = 0.2 * (pairs.chosen - pairs.reference_chosen - pairs.rejected + pairs.reference_rejected)
        assert evaluation["eval_reward_margin"] == pytest.approx(float(margin.mean()), abs=1e-3)


def test_dpo_begins_at_log_two_and_learns(preferences):
    run = fine_tune(preferences(num_epochs=6, lora_config=LORA, eval_first=True))
    evaluations = [row for row in read_metrics(run.metrics) if "eval_loss" in row]
    assert evaluations[0]["eval_loss"] == pytest.approx(np.log(2), abs=1e-5)
    # A model that is its own reference prefers neither answer: its margins are 0, but for rounding in their sums.
    assert evaluations[0]["eval_reward_margin"] == pytest.approx(0, abs=1e-5)
    assert evaluations[-1]["eval_reward_margin"] > 0.4
    assert evaluations[-1]["eval_loss"] < 0.5 and evaluations[-1]["eval_reward_accuracy"] > 0.9
    assert "perplexity" not in evaluations[-1]


def test_accumulation_does_not_change_the_loss_of_pairs(preferences):
    whole = fine_tune(preferences(run_name="whole", num_epochs=2))
    split = fine_tune(
        preferences(run_name="split", num_epochs=2, train_batch_size_per_device=1, gradient_accumulation_steps=4)
    )
    assert len(losses_of(whole)) == 6 and losses_of(whole) == pytest.approx(losses_of(split), abs=2e-5)


def test_a_continued_run_compares_with_the_same_reference(preferences, tmp_path):
    """The reference is saved with the tokens: the weights, which have moved, are not taken for it."""
    straight = fine_tune(preferences(run_name="straight", num_epochs=2))
    config = preferences(run_name="halves", num_epochs=2)
    with pytest.raises(KeyboardInterrupt):
        fine_tune_until(config, step=4)  # one step after the first state is saved
    assert losses_of(fine_tune(config)) == losses_of(straight)


@pytest.mark.slow
def test_two_workers_prefer_as_one(without_ray, preferences):
    one = fine_tune(preferences(run_name="one"))
    two = fine_tune(preferences(run_name="two", num_devices=2, train_batch_size_per_device=2, deepspeed="zero_2"))
    assert losses_of(two) == pytest.approx(losses_of(one), abs=1e-4)


@pytest.mark.slow
def test_the_reference_can_be_scored_beside_the_training(ray_session, preferences):
    """By Ray Data workers with resources of their own; the losses are those of a run that scored it first."""
    first = fine_tune(preferences(run_name="first", num_epochs=2))
    processor = {"concurrency": 1, "batch_size": 3, "custom_resources": {}}
    block = {"loss": "dpo", "beta": 0.2, "logprob_processor_scaling_config": processor}
    beside = fine_tune(
        preferences(run_name="beside", num_devices=1, num_epochs=2, preference_tuning_config=block,
                    num_data_blocks_per_device=3)
    )  # fmt: skip
    assert losses_of(beside) == pytest.approx(losses_of(first), abs=1e-5) and len(losses_of(first)) == 6
    assert {path.name for path in (beside.tokens / "reference").iterdir()} == {"0.npy", "1.npy", "2.npy"}


def test_both_answers_of_a_pair_are_dropped_together(preferences):
    from forgebook.planning.prepare import prepare
    from forgebook.runs.run import open_run

    config = preferences(context_length=16, truncation="drop", num_epochs=None, min_update_steps=4)
    prepared = prepare(config, open_run(config))
    assert len(prepared.train) % 2 == 0 and 0 < prepared.report["train"]["rows_dropped"] < 24
    assert [prepared.train.where(k) for k in range(0, len(prepared.train), 2)] == [
        prepared.train.where(k) for k in range(1, len(prepared.train), 2)
    ]


def test_pairs_that_share_a_line_have_the_same_losses(preferences):
    rows = [
        read_metrics(fine_tune(preferences(run_name=kind, loss="ipo", attention=kind)).metrics)
        for kind in ("sdpa", "varlen")
    ]
    for one, other in zip(*rows, strict=True):
        for key in one.keys() & {"train_loss_batch", "eval_loss", "reward_margin", "grad_norm"}:
            assert one[key] == pytest.approx(other[key], abs=1e-5, rel=1e-4)
