"""A step for which the host never waits, and the figures of several steps read at once."""

import re

import pytest
import torch
from test_objectives import preferences  # noqa: F401  (a fixture)
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import LORA, losses_of
from forgebook.errors import TrainingError
from forgebook.launch.fine_tune import fine_tune
from forgebook.runs.metrics import read_metrics
from forgebook.training import loop, losses, step

# Where a GPU makes the host wait: the value of a tensor becomes a number of Python, or decides the shape of another.
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::equal"}


class CountWaits(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.waits, self.calls = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition(".")[0]
        by_mask = name in ("aten::index", "aten::index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.waits += [name] if name in WAITS or by_mask else []
        self.calls += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def counted(monkeypatch):
    """Count the waits of every step of the runs in a test, as on a GPU."""
    counter, queue_step = CountWaits(), step.queue_step

    def counting(*args):
        with counter:
            return queue_step(*args)

    monkeypatch.setattr(loop, "queue_step", counting)
    monkeypatch.setattr(losses, "NEVER_WAITS", ())
    return counter


# For SDPA, transformers looks once per forward pass whether positions restart.
WITH_SDPA = ["aten::_local_scalar_dense"]
PACKED = {"attention": "varlen", "padding": "packed", "context_length": 160, "train_batch_size_per_device": 2}
METHODS = {
    "full": {"train_batch_size_per_device": 2, "gradient_accumulation_steps": 4},
    "float16": {"dtype": "float16", "lora_config": LORA},
    "bfloat16": {"dtype": "bfloat16", "lora_config": {**LORA, "lora_dropout": 0.1}},
    "checkpointing": {"gradient_checkpointing": True, "lora_config": LORA},
    "varlen": {"attention": "varlen", "lora_config": LORA},
    "varlen, packed": PACKED,
}


@pytest.mark.parametrize("method", METHODS)
def test_the_host_never_waits_within_a_step(counted, make_config, method):
    fine_tune(make_config(max_steps=2, valid_path=None, **METHODS[method]))
    is_sdpa, micro_batches = "varlen" not in method, 2 * METHODS[method].get("gradient_accumulation_steps", 1)
    assert counted.calls > 200 and counted.waits == is_sdpa * micro_batches * WITH_SDPA


def test_the_host_never_waits_for_pairs(counted, preferences):  # noqa: F811
    fine_tune(preferences(max_steps=2, valid_path=None))
    assert counted.calls > 200 and counted.waits == 2 * WITH_SDPA


def test_figures_read_later_are_the_same(make_config, monkeypatch):
    """Steps 1, 2 and those with an evaluation are read at once; in between, several together."""
    settings = {
        "num_epochs": 3, "train_batch_size_per_device": 2,
        "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 10},
    }  # fmt: skip
    at_once = fine_tune(make_config(run_name="at-once", **settings))
    reads, read_steps = [], loop.read_steps
    monkeypatch.setattr(loop, "READ_SECONDS", {"cpu": 1e6})
    monkeypatch.setattr(loop, "MOST_UNREAD", 4)
    monkeypatch.setattr(loop, "read_steps", lambda *args: reads.append(len(args[1])) or read_steps(*args))
    later = fine_tune(make_config(run_name="later", **settings))
    assert reads == [1, 1, 4, 4, 4, 4, 2, 4, 4, 2, 4, 2] and len(losses_of(later)) == 36
    keys = ("step", "epoch", "train_loss_batch", "grad_norm", "avg_train_loss_epoch", "learning_rate", "trained_tokens",
            "padded_tokens_this_iter", "eval_loss", "num_iterations")  # fmt: skip
    rows = [[[row.get(key) for key in keys] for row in read_metrics(run.metrics)] for run in (at_once, later)]
    assert rows[0] == rows[1]


def test_a_step_that_diverged_is_named_however_late_it_is_read(make_config, monkeypatch):
    def diverged(name):
        with pytest.raises(TrainingError, match="the loss is") as raised:
            fine_tune(make_config(run_name=name, learning_rate=1e30, train_batch_size_per_device=2, valid_path=None))
        return re.search(r"step (\d+):", str(raised.value))[1]

    at_once = diverged("at-once")
    monkeypatch.setattr(loop, "READ_SECONDS", {"cpu": 1e6})
    assert int(at_once) > 2 and diverged("later") == at_once


def test_batches_are_made_one_ahead():
    made = []
    ahead = step.Ahead((made.append(k) or ({"k": k}, None)) for k in range(3))
    ahead.prepare()
    ahead.prepare()
    assert made == [0] and ahead.take() == ({"k": 0}, None) and made == [0]
    assert [ahead.take()[0]["k"] for _ in range(2)] == [1, 2]
    ahead.prepare()  # after the last one there is nothing to make
    with pytest.raises(ValueError, match="no micro batch is left"):
        ahead.take()
