"""LoRA on linear layers as one function: outputs and gradients are PEFT's, and it steps aside where PEFT does more."""

import copy
from collections import Counter

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from conftest import TINY_MODEL
from forgebook.models import load
from forgebook.models.adapters import add_lora
from forgebook.models.fused_lora import _LoraProduct, use_fused_products


class Net(nn.Module):
    def __init__(self, bias: bool):
        super().__init__()
        self.inner, self.outer = nn.Linear(48, 96, bias=bias), nn.Linear(96, 32, bias=bias)

    def forward(self, x):
        return self.outer(nn.functional.silu(self.inner(x)))


def net_of_peft(with_bias=True, **settings):
    torch.manual_seed(3)
    config = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["inner", "outer"]} | settings)
    model = get_peft_model(Net(with_bias), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model


def results_of(model, x):
    """Return the output, and the gradients of the input and of the adapters."""
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}


@pytest.fixture
def calls(monkeypatch):
    """Count the layers that run fused."""
    counted, forward = [], _LoraProduct.forward
    monkeypatch.setattr(_LoraProduct, "forward", staticmethod(lambda *words: counted.append(1) or forward(*words)))
    return counted


@pytest.mark.parametrize("settings", [{}, {"with_bias": False}, {"use_rslora": True}, {"lora_dropout": 0.5}], ids=str)
@pytest.mark.parametrize("shape", [(5, 48), (2, 7, 48)], ids=str)
def test_outputs_and_gradients_are_those_of_peft(calls, settings, shape):
    """Dropout does nothing in evaluation."""
    model = net_of_peft(**settings).eval()
    fused, x = copy.deepcopy(model), torch.randn(shape)
    use_fused_products(fused)
    expected, ours = results_of(model, x), results_of(fused, x)
    assert len(calls) == 2 and ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_in_bfloat16_it_is_closer_to_the_exact_result_than_peft(calls):
    exact = net_of_peft()
    model = copy.deepcopy(exact).to(torch.bfloat16)
    exact.load_state_dict(model.state_dict())  # the same rounded weights, computed in float32
    fused = copy.deepcopy(model)
    use_fused_products(fused)
    errors = {"PEFT": Counter(), "fused": Counter()}
    for _ in range(6):
        x = torch.randn(64, 48).to(torch.bfloat16)
        right = results_of(exact, x.float())
        for kind, one in (("PEFT", model), ("fused", fused)):
            one.zero_grad()
            errors[kind].update(
                {k: (value.float() - right[k]).norm().item() for k, value in results_of(one, x).items()}
            )
        exact.zero_grad()
    assert len(calls) == 12 and all(errors["fused"][name] <= error for name, error in errors["PEFT"].items()), errors


def zero_3(model):
    model.base_model.model.inner.base_layer.weight.ds_id = 1
    model.base_model.model.outer.base_layer.weight.ds_id = 2


def offload(model):
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


REASONS = {
    "dropout in training": ({"lora_dropout": 0.5}, lambda model: model.train()),
    "DoRA": ({"use_dora": True}, lambda model: None),
    "a bias of the adapter": ({"lora_bias": True}, lambda model: None),
    "a bias that trains": ({"bias": "all"}, lambda model: None),
    "switched off": ({}, lambda model: model.disable_adapter_layers()),
    "merged": ({}, lambda model: model.merge_adapter()),
    "shards of ZeRO-3": ({}, zero_3),
    "weights offloaded for inference": ({}, offload),
    "weights that train": ({}, lambda model: model.base_model.model.requires_grad_(True)),
}


@pytest.mark.parametrize("reason", REASONS)
def test_it_steps_aside(calls, reason):
    settings, change = REASONS[reason]
    model = net_of_peft(**settings)
    fused, x = copy.deepcopy(model), torch.randn(5, 48)
    use_fused_products(fused)
    change(model), change(fused)
    torch.manual_seed(5)
    expected = model(x)
    torch.manual_seed(5)
    assert torch.equal(fused(x), expected) and not calls


def test_every_linear_layer_of_a_new_adapter_is_fused(calls):
    model = add_lora(load.load_model(str(TINY_MODEL), dtype="float32"), {"r": 4, "target_modules": "all-linear"})
    model(input_ids=torch.tensor([[3, 4, 5]]))
    assert len(calls) == 4 * 7  # layers x products
    assert {type(module).__name__ for module in model.modules() if hasattr(module, "lora_A")} == {"_FusedLinear"}
