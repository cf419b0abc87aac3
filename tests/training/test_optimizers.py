"""AdamW on bfloat16 weights, and schedules."""

import copy

import pytest
import torch

from forgebook.training.optimizers import AdamW, learning_rates, set_rate


def train(parameters, optimizer, steps):
    for step in range(steps):
        torch.manual_seed(step)
        for p in parameters:
            p.grad = torch.randn(p.shape).to(p.dtype)
        optimizer.step()
        optimizer.zero_grad()


def test_updates_too_small_for_bfloat16_add_up():
    p = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = AdamW([p], lr=1e-4, weight_decay=0.0)
    for _ in range(200):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p.float().mean().item() == pytest.approx(1 - 200 * 1e-4, abs=4e-3)


def test_equals_torch_on_float32():
    torch.manual_seed(0)
    start = torch.randn(50)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    train([ours], AdamW([ours], lr=1e-2, weight_decay=0.1), 5)
    train([theirs], torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1), 5)
    torch.testing.assert_close(ours, theirs)


def test_state_brings_the_master_weights_back():
    torch.manual_seed(0)
    start = torch.randn(50).bfloat16()
    whole, first, second = (torch.nn.Parameter(start.clone()) for _ in range(3))
    settings = {"lr": 1e-3, "weight_decay": 0.0}
    train([whole], AdamW([whole], **settings), 3)
    optimizer = AdamW([first], **settings)
    train([first], optimizer, 3)
    continued = AdamW([second], **settings)
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    second.data.copy_(first.data)
    for p, o in ((first, optimizer), (second, continued)):
        train([p], o, 4)
    assert torch.equal(first, second) and not torch.equal(first, whole)


def test_a_state_of_an_earlier_version_has_groups_without_a_scale():
    optimizer = AdamW([torch.nn.Parameter(torch.ones(2))], lr=1e-3)
    optimizer.load_state_dict(optimizer.state_dict())
    set_rate(optimizer.param_groups, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_warm_up_peak_and_end(schedule):
    rates = learning_rates(schedule, 1e-3, 10, 100)
    assert len(rates) == 100 and rates[0] == 0
    assert rates[10] == pytest.approx(1e-3)
    assert rates[5] == pytest.approx(5e-4)
    assert rates[99] == pytest.approx(1e-3) if schedule == "constant" else rates[99] < 2e-5
    assert rates[55] == pytest.approx(1e-3 if schedule == "constant" else 5e-4, rel=0.01)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 7), (10, 100), (5, 3)])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_are_those_of_transformers(schedule, warmup, steps):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    (share,) = get_scheduler(name, optimizer, warmup, steps).lr_lambdas
    expected = [1e-3 * share(step) for step in range(steps)]
    assert learning_rates(schedule, 1e-3, warmup, steps) == pytest.approx(expected, rel=1e-12, abs=0)
