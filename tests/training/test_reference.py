"""The reference of preference losses: computed once, saved, and waited for where other workers compute it."""

import json
import threading
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from conftest import TINY_MODEL
from forgebook.data.token_store import save_view
from forgebook.errors import TrainingError
from forgebook.models.tokenizer import load_tokenizer
from forgebook.planning.prepare import prepare
from forgebook.runs.metrics import Progress
from forgebook.runs.run import open_run
from forgebook.training import reference
from forgebook.training.losses import SupervisedLM
from forgebook.training.reference import ExampleSet, StagedReference, reference_logps, with_reference


@pytest.fixture(scope="module")
def wrapped():
    from transformers import AutoModelForCausalLM

    return SupervisedLM(AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32))


@pytest.fixture
def job(make_config, tmp_path):
    """A config, run and training tokens of 6 pairs; `processor` scores them beside the training, in 3 blocks."""

    def make(**preference):
        question = [{"role": "user", "content": "where is the lamp"}]
        rows = [
            {
                side: [*question, {"role": "assistant", "content": " ".join([word] * (1 + k % 4))}]
                for side, word in (("chosen", "table"), ("rejected", "no"))
            }
            for k in range(6)
        ]
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = make_config(
            task="preference_tuning", preference_tuning_config={"loss": "dpo", **preference}, train_path=str(path),
            valid_path=None, train_batch_size_per_device=2, num_devices=1, num_data_blocks_per_device=3,
        )  # fmt: skip
        run = open_run(config)
        prepared = prepare(config, run)
        (run.tokens / "reference").mkdir(parents=True)
        run.logs.mkdir()
        save_view(prepared.train, run.tokens / "train.npz")
        return prepared.config, run, prepared.train

    return make


PROCESSOR = {"logprob_processor_scaling_config": {"concurrency": 1, "batch_size": 2, "custom_resources": {}}}


def examples_of(tokens, **values) -> ExampleSet:
    return ExampleSet(tokens, load_tokenizer(str(TINY_MODEL)).pad_token_id, torch.device("cpu"), **values)


def test_the_log_probabilities_are_saved_once_and_read_again(job, wrapped, tmp_path):
    _, _, tokens = job()
    path = tmp_path / "reference.npy"
    accelerator = Accelerator(cpu=True)
    logps = reference_logps(wrapped.train(), accelerator, examples_of(tokens), 4, path)
    assert logps.shape == (12,) and (logps < 0).all() and wrapped.training
    for k in (0, 7):
        with torch.no_grad():
            alone = wrapped(**examples_of(tokens).batch([np.array([k])]), output="examples")
        assert logps[k] == pytest.approx(float(alone), abs=1e-4)
    np.save(path, np.arange(12.0))  # as an earlier start of the run saved them: the weights have moved since
    assert (reference_logps(wrapped, accelerator, examples_of(tokens), 4, path) == np.arange(12)).all()


def test_a_batch_gets_the_figures_of_its_examples_in_order(job):
    _, _, tokens = job()
    examples = examples_of(tokens, reference=np.arange(12, dtype=np.float32))
    assert examples.reference_of([np.array([4, 5]), np.array([0, 1])]).tolist() == [4, 5, 0, 1]
    assert examples.reference_of([]) is None and examples_of(tokens).reference_of([np.array([0, 1])]) is None


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_a_loss_without_reference_computes_none(job, loss):
    config, run, tokens = job(loss=loss)
    examples = examples_of(tokens)
    assert with_reference(config, run, None, examples, "training", Progress(run, silent=True)) is examples


def test_training_examples_wait_for_their_block(job, monkeypatch):
    monkeypatch.setattr(reference, "POLL_SECONDS", 0.01)
    config, run, tokens = job(**PROCESSOR)
    examples = with_reference(config, run, None, examples_of(tokens), "training", Progress(run, silent=True))
    blocks = reference._blocks(config, tokens)
    assert len(blocks) == 3 and sorted(np.concatenate(blocks)) == list(range(12))
    values = np.arange(12, dtype=np.float32)

    def write():
        for number, block in enumerate(blocks):
            time.sleep(0.05)
            reference._save(values[block], run.tokens / "reference" / f"{number}.npy")

    writer = threading.Thread(target=write)
    writer.start()
    assert (examples.reference[np.array([3, 0, 11, 8])] == [3, 0, 11, 8]).all()
    writer.join()
    for path in (run.tokens / "reference").glob("*.npy"):
        path.unlink()  # what was read is not read again
    assert (examples.reference[np.array([3, 0, 11, 8])] == [3, 0, 11, 8]).all()


@pytest.mark.parametrize(
    ("error", "text"), [(RuntimeError(""), "RuntimeError"), (ValueError("\nno GPU\nhere"), "no GPU")]
)
def test_a_stage_that_fails_ends_the_training_that_waits_for_it(job, monkeypatch, error, text):
    """Whatever its error says, an empty message included: nobody would tell the waiting workers otherwise."""
    ray = pytest.importorskip("ray")

    def fail(*arguments, **keywords):
        raise error

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2})
    monkeypatch.setattr("ray.data.from_items", fail)
    config, run, tokens = job(**PROCESSOR)
    reference.start_stage(config, run).join()
    with pytest.raises(TrainingError, match=f"scoring the reference model failed: {text}"):
        StagedReference(run.tokens / "reference", reference._blocks(config, tokens))[np.array([0])]


def test_blocks_of_an_earlier_start_are_not_scored_again(job, monkeypatch):
    ray = pytest.importorskip("ray")
    requested = []

    def record(items, **keywords):
        requested.extend(items)
        raise RuntimeError("not scored in this test")

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2})
    monkeypatch.setattr("ray.data.from_items", record)
    config, run, _ = job(**PROCESSOR)
    np.save(run.tokens / "reference" / "1.npy", np.zeros(4))
    reference.start_stage(config, run).join()
    assert requested == [{"block": 0}, {"block": 2}]


def test_a_scorer_computes_what_the_training_workers_would(job, wrapped, tmp_path):
    config, run, tokens = job(**PROCESSOR)
    scorer = reference._Scorer(config, run)
    scorer({"block": np.arange(3)})
    whole = reference_logps(wrapped, Accelerator(cpu=True), examples_of(tokens), 4, tmp_path / "whole.npy")
    staged = StagedReference(run.tokens / "reference", reference._blocks(config, tokens))[np.arange(12)]
    np.testing.assert_allclose(staged, whole, atol=1e-3)
