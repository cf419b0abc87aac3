"""AdamW on bfloat16 weights, and schedules."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import TINY_MODEL, losses_of
from forgebook.launch.fine_tune import fine_tune
from forgebook.training.optimizers import (
    AdamW,
    learning_rates,
    matrix_names,
    rate_groups,
    set_rate,
    undecayed_names,
)


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


@pytest.mark.parametrize("ratio", [None, 0.25])
def test_schedules_with_a_lowest_rate_are_those_of_transformers(ratio):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    settings = {"min_lr_rate": 0.1 if ratio is None else ratio}
    (share,) = get_scheduler("cosine_with_min_lr", optimizer, 10, 100, settings).lr_lambdas
    expected = [1e-3 * share(step) for step in range(100)]
    assert learning_rates("cosine_with_min_lr", 1e-3, 10, 100, ratio) == pytest.approx(expected, rel=1e-12)
    settings = {"num_decay_steps": 20, "min_lr_ratio": ratio or 0.0}
    (share,) = get_scheduler("warmup_stable_decay", optimizer, 10, 100, settings).lr_lambdas
    # Its warm-up starts at the lowest rate, ours at zero.
    expected = [1e-3 * share(step) for step in range(10, 100)]
    rates = learning_rates("wsd", 1e-3, 10, 100, ratio, 0.2)
    assert rates[10:] == pytest.approx(expected, rel=1e-12) and rates[:2] == [0, pytest.approx(1e-4)]
    assert learning_rates("linear", 1.0, 0, 4, 0.5) == pytest.approx([1, 0.875, 0.75, 0.625])
    assert learning_rates("constant", 1.0, 0, 2, 0.5) == [1, 1]


def test_what_does_not_decay_is_what_transformers_trainer_leaves_out():
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer

    sizes = {"vocab_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 4}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=4))
    for model in (llama, GPT2LMHeadModel(GPT2Config(**sizes))):
        decays = set(Trainer.get_decay_parameter_names(None, model))
        names = {name for name, _ in model.named_parameters()}
        assert undecayed_names(model) == names - decays and names - decays and decays
        every = rate_groups(model.named_parameters(), undecayed=undecayed_names(model))
        assert [group.get("weight_decay") for group in every] == [None, 0.0]
        assert sum(len(group["params"]) for group in every) == len(names)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"bias": "all"}])
def test_lora_plus_has_the_rates_of_peft(settings):
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    inner = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model = get_peft_model(inner, LoraConfig(r=2, target_modules=["0", "1"], **settings))
    theirs = create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=16)
    ours = rate_groups(model.named_parameters(), loraplus_ratio=16)
    set_rate(ours, 1e-3)
    rates = [{id(p): g["lr"] for g in groups for p in g["params"]} for groups in (ours, theirs.param_groups)]
    assert rates[0] == rates[1] and set(rates[0].values()) == {1e-3, 1.6e-2}


def test_muon_updates_matrices_and_adamw_the_rest():
    torch.manual_seed(0)
    starts = torch.randn(12, 8), torch.randn(8)
    ours, theirs = ([torch.nn.Parameter(one.clone()) for one in starts] for _ in range(2))
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    train(ours, AdamW([{"params": ours[:1], "muon": True}, {"params": ours[1:]}], **settings), 4)
    train(theirs[:1], torch.optim.Muon(theirs[:1], adjust_lr_fn="match_rms_adamw", **settings), 4)
    torch.testing.assert_close(ours[0], theirs[0])
    alone = torch.nn.Parameter(starts[1].clone())
    optimizer = torch.optim.AdamW([alone], **settings)
    for step in range(4):  # the random numbers of `train`, of which the matrix takes the first
        torch.manual_seed(step)
        torch.randn(12, 8)
        alone.grad = torch.randn(8)
        optimizer.step()
    torch.testing.assert_close(ours[1], alone)


def test_muon_resumes_with_the_same_updates():
    torch.manual_seed(0)
    start = torch.randn(6, 4).bfloat16()
    whole, resumed = ([torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.ones(4))] for _ in range(2))

    def make(params):
        groups = [{"params": params[:1], "muon": True, "rate_scale": 1.0}, {"params": params[1:]}]
        return AdamW(groups, lr=1e-2, weight_decay=0.0)

    first = make(whole)
    set_rate(first.param_groups, 5e-3)
    train(whole, first, 3)
    second = make(resumed)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for p, o in zip(resumed, whole, strict=True):
        p.data.copy_(o.data)
    assert {group["lr"] for group in second.param_groups} == {5e-3}
    for params, optimizer in ((whole, first), (resumed, second)):
        train(params, optimizer, 3)
    assert torch.equal(whole[0], resumed[0]) and torch.equal(whole[1], resumed[1])


def test_adafactor_is_the_trainers_on_masters_and_resumes_with_the_same_updates():
    from transformers.optimization import Adafactor

    torch.manual_seed(0)
    start = torch.randn(6, 4).bfloat16()
    whole, resumed = ([torch.nn.Parameter(start.clone())] for _ in range(2))
    settings = {"lr": 1e-3, "weight_decay": 0.1}
    first, second = (
        AdamW(params, kind="adafactor", betas=(0.9, 0.99), eps=1e-8, **settings) for params in (whole, resumed)
    )
    theirs = [torch.nn.Parameter(start.float())]
    train(whole, first, 3)
    train(theirs, Adafactor(theirs, scale_parameter=False, relative_step=False, **settings), 3)
    assert torch.equal(whole[0], theirs[0].bfloat16()) and not torch.equal(whole[0], start)
    assert {
        tuple(one.shape) for one in first.inner.state[first.masters[0]].values() if torch.is_tensor(one) and one.ndim
    } == {
        (6,),
        (4,),
    }
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed[0].data.copy_(whole[0].data)
    for params, optimizer in ((whole, first), (resumed, second)):
        train(params, optimizer, 3)
    assert torch.equal(whole[0], resumed[0])


def test_the_matrices_of_a_model_are_its_linear_layers_without_the_head():
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    names = matrix_names(model)
    layers = model.config.num_hidden_layers
    assert len(names) == 7 * layers and not any("embed" in name or "lm_head" in name for name in names)
    groups = rate_groups(model.named_parameters(), undecayed=undecayed_names(model), muon=names)
    by_muon = [p for group in groups if group.get("muon") for p in group["params"]]
    assert len(by_muon) == len(names) and all(p.ndim == 2 for p in by_muon)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("optimizer", ["muon", "adafactor"])
def test_a_run_trains_with_it(make_config, optimizer):
    run = fine_tune(make_config(optimizer=optimizer, num_epochs=3, train_batch_size_per_device=4))
    losses = losses_of(run)
    assert losses[-1] < 0.7 * losses[0]
