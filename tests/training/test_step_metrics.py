"""The figures of a step and of an epoch, which a resumed run continues."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from forgebook.errors import TrainingError
from forgebook.planning.hardware import TensorMemory
from forgebook.training.step_metrics import EpochSums, Step, StepMemory, check_step


def step(loss=2.0, gradient=1.0, seconds=1.0, tokens=100, supervised=40, **values) -> Step:
    settings = {"forward_seconds": 0.25, "backward_seconds": 0.5, "padded": 2 * tokens} | values
    return Step(loss=loss, gradient=gradient, seconds=seconds, tokens=tokens, supervised=supervised, **settings)


def test_a_step_reports_its_own_figures():
    metrics = step(loss=1.5, seconds=2.0, task={"reward_margin": 0.3}).metrics()
    assert metrics["train_loss_batch"] == 1.5 and metrics["grad_norm"] == 1.0 and metrics["reward_margin"] == 0.3
    assert metrics["trained_tokens_throughput_this_iter"] == 50 and metrics["padding_share"] == 0.5
    assert (metrics["fwd_time"], metrics["bwd_time"], metrics["train_time_per_step"]) == (0.25, 0.5, 2.0)
    assert metrics["supervised_tokens_this_iter"] == 40 and metrics["padded_tokens_this_iter"] == 200


def test_tokens_behind_the_last_supervised_one_are_no_negative_padding():
    """They count as trained tokens and are left out of the batch."""
    assert step(tokens=100, padded=90).metrics()["padding_share"] == 0


@pytest.mark.parametrize("values", [{"loss": math.nan}, {"loss": math.inf}, {"gradient": math.nan}])
def test_a_step_that_diverged_is_an_error(values):
    with pytest.raises(TrainingError, match=r"step 7: the loss is .*: training has diverged\. Lower learning_rate"):
        check_step(step(**values), 7, is_first=False)


def test_a_zero_gradient_is_an_error_in_the_first_step_alone():
    check_step(step(), 1, is_first=True)
    check_step(step(gradient=0.0), 2, is_first=False)
    with pytest.raises(TrainingError, match="gradient of the first step is zero"):
        check_step(step(gradient=0.0), 1, is_first=True)


def test_throughput_leaves_the_first_step_out():
    sums = EpochSums()
    sums.add(step(seconds=10.0, tokens=100, supervised=40))
    first = sums.metrics()
    assert first["trained_tokens_throughput"] == 10 and first["supervised_tokens_throughput"] == 4
    sums.add(step(seconds=1.0, tokens=300, supervised=0))
    metrics = sums.metrics()
    assert metrics["trained_tokens_throughput"] == 300 and metrics["padded_tokens_throughput"] == 600
    assert metrics["supervised_tokens_throughput"] == 0


def test_an_epoch_averages_over_its_steps():
    sums = EpochSums()
    for loss in (3.0, 2.0, 1.0):
        sums.add(step(loss=loss, seconds=2.0))
    assert sums.metrics()["avg_train_loss_epoch"] == 2.0
    assert sums.totals() == {
        "avg_train_loss_epoch": 2.0, "avg_fwd_time_per_epoch": 0.25, "avg_bwd_time_per_epoch": 0.5,
        "train_time_per_epoch": 6.0,
    }  # fmt: skip


def test_saved_sums_continue_in_another_process():
    """With the averages of an undisturbed epoch; the first step after the restart is no measure of speed either."""
    whole, halves = EpochSums(), EpochSums()
    for k in range(4):
        if k == 2:
            halves = EpochSums(**json.loads(json.dumps(halves.state())))
        for sums in (whole, halves):
            sums.add(step(loss=float(k), seconds=50.0 if k in (0, 2) and sums is halves else 1.0))
    assert halves.metrics()["avg_train_loss_epoch"] == whole.metrics()["avg_train_loss_epoch"] == 1.5
    assert halves.metrics()["trained_tokens_throughput"] == 100


def test_memory_is_measured_in_the_step_with_the_most_tokens():
    """Not in an epoch's last one, which holds the longest sequence alone."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    worker = SimpleNamespace(accelerator=accelerator, model=torch.nn.Linear(1, 1), deepspeed_engine=None, is_fsdp=False)
    with TensorMemory() as others:  # tensors of other tests, which the same process holds
        pass
    memory, allocated = StepMemory(worker), [10_000, 30_000, 20_000]
    steps = [[np.array([k]) for k in step] for step in ([0, 1], [2, 3], [4])]
    for k, size in enumerate(allocated):
        with memory.measured(np.array([10, 12, 20, 11, 30]), steps[k:]):
            torch.zeros(size * 1_000)
    assert memory.step_peak() - others.peak == pytest.approx(4 * 30_000_000, rel=0.2)
