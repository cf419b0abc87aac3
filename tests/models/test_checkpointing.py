"""Checkpointing that keeps products, or inputs on the host: the same gradients, with less memory."""

import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import LORA, config_for
from forgebook.catalog import shape_of
from forgebook.errors import ModelError
from forgebook.models import checkpointing, fused_lora
from forgebook.models.adapters import add_lora
from forgebook.models.checkpointing import check_kept
from forgebook.models.families import freeze_towers
from forgebook.models.load import load_model
from forgebook.planning.hardware import TensorMemory
from forgebook.planning.memory import memory_of
from forgebook.training.losses import SupervisedLM
from support_families import FAMILIES, save_family
from support_vision import save_vision_model

WIDE = {"hidden_size": 320, "intermediate_size": 960, "num_hidden_layers": 6, "head_dim": 80}


class CountProducts(TorchDispatchMode):
    """Count the large matrix products of a block."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().partition(".")[0] in ("aten::mm", "aten::addmm") and min(args[-1].shape) > 100:
            self.count += 1
        return function(*args, **(kwargs or {}))


def wrapped_of(source, kind, lora=None):
    torch.manual_seed(0)
    model = load_model(source, dtype="float32", attention="auto", gradient_checkpointing=kind)
    if lora is not None:
        model = add_lora(model, {**LORA, "init_lora_weights": False, **lora})
    return SupervisedLM(model).train()


def gradients_of(wrapped, length=24):
    ids = torch.arange(3, 3 + 2 * length).view(2, length) % 100
    torch.manual_seed(1)  # dropout
    loss = wrapped(ids, ids.roll(-1, 1)) / ids.numel()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        *((name, lora) for name in ("Llama 3", "Gemma 3", "Qwen 3 MoE", "gpt-oss") for lora in (None, {})),
        ("Llama 3", {"lora_dropout": 0.2}),
        ("Llama 3", {"use_dora": True}),
    ],
)
def test_the_gradients_are_the_same(name, lora, tmp_path):
    wide = {} if "text_config" in FAMILIES[name][1] else WIDE | {"num_hidden_layers": 2}
    source = save_family(name, tmp_path, **wide)
    loss, gradients = gradients_of(wrapped_of(source, False, lora))
    selective_loss, selective = gradients_of(wrapped_of(source, "selective", lora))
    assert selective_loss == loss and selective.keys() == gradients.keys() and gradients
    for key, gradient in gradients.items():
        torch.testing.assert_close(selective[key], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("lora", [None, {"lora_dropout": 0.2}], ids=["full", "lora"])
def test_inputs_wait_on_the_host_and_nothing_else(lora, tmp_path, monkeypatch):
    """The same gradients; a copy of each layer's input, and of what the last norm saves."""
    source = save_family("Llama 3", tmp_path, **WIDE)
    loss, gradients = gradients_of(wrapped_of(source, True, lora))
    copied, plain = [], checkpointing._to_host
    monkeypatch.setattr(checkpointing, "_to_host", lambda *args: copied.append(plain(*args)) or copied[-1])
    offloaded_loss, offloaded = gradients_of(wrapped_of(source, "offload", lora))
    assert offloaded_loss == loss and offloaded.keys() == gradients.keys() and gradients
    for key, gradient in gradients.items():
        assert torch.equal(offloaded[key], gradient)
    hidden = [tensor for _, tensor in copied if tensor.shape == (2, 24, WIDE["hidden_size"])]
    layers = WIDE["num_hidden_layers"]
    assert layers < len(hidden) <= layers + 3


@pytest.mark.parametrize("tensor", [torch.ones(1, 1, 8, 8), torch.ones(1, 8, 16), torch.ones(8)])
def test_what_all_layers_share_stays_where_it_is(tensor):
    assert checkpointing._to_host(64, tensor)[1] is tensor
    states = torch.ones(1, 8, 64)
    device, moved = checkpointing._to_host(64, states)
    assert moved is not states and torch.equal(checkpointing._from_host((device, moved)), states)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_changes_what_is_kept(name, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointing, "FEW", 0)
    source = save_family(name, tmp_path)
    if name.startswith("Llama 4"):  # it adds what its experts return to what the shared one does
        with pytest.raises(ModelError, match=r"changes in place \(aten::add_.Tensor\)"):
            check_kept(wrapped_of(source, "selective"), torch.device("cpu"))
        return
    check_kept(wrapped_of(source, "selective"), torch.device("cpu"))
    assert gradients_of(wrapped_of(source, "selective"))[0] == gradients_of(wrapped_of(source, False))[0]


def test_a_model_that_changes_a_kept_result_is_refused(tmp_path, monkeypatch):
    """An adapter whose sum is made in place would be added twice."""
    wrapped = wrapped_of(save_family("Llama 3", tmp_path, **WIDE), "selective", {})
    check_kept(wrapped, torch.device("cpu"))
    monkeypatch.setattr(fused_lora, "_lora_operator", fused_lora._lora_product)
    with pytest.raises(ModelError, match=r"changes in place \(aten::addmm_\): set gradient_checkpointing: true"):
        check_kept(wrapped, torch.device("cpu"))


def test_no_large_product_is_computed_again(tmp_path):
    source = save_family("Llama 3", tmp_path, **WIDE)
    counts = {}
    for kind in (False, "selective", True):
        wrapped = wrapped_of(source, kind)
        with CountProducts() as counter:
            gradients_of(wrapped)
        counts[kind] = counter.count
    assert counts["selective"] == counts[False] < counts[True]


@pytest.mark.parametrize("lora", [None, {}], ids=["full", "lora"])
def test_the_plan_knows_its_memory(lora, tmp_path):
    """What no checkpointing and selective checkpointing hold, planned and measured on this process's tensors."""
    source = save_family("Llama 3", tmp_path, **WIDE)
    shape, length = shape_of(source), 512
    held = {}
    for kind in (False, "selective", True):
        wrapped = wrapped_of(source, kind, lora)
        gc.collect()
        with TensorMemory() as memory:
            gradients_of(wrapped, length)
        config = config_for(
            source, dtype="float32", deepspeed=None, context_length=length, train_batch_size_per_device=2,
            gradient_checkpointing=kind, lora_config=None if lora is None else LORA,
        )  # fmt: skip
        need = memory_of(config, shape, workers=1, length=length, on_gpu=False)
        held[kind] = memory.peak, need.tensors - need.optimizer
    (most, most_planned), (measured, planned), (least, least_planned) = held.values()
    assert measured == pytest.approx(planned, rel=0.1) and least < 0.75 * measured < 0.75 * most, held
    assert most_planned - least_planned == pytest.approx(most - least, rel=0.1), held


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_frozen_tower_is_not_passed_through_backward(lora, tmp_path):
    """transformers and PEFT let the embeddings of patches require gradients where layers are recomputed."""
    model = load_model(save_vision_model("SmolVLM", tmp_path), dtype="float32", gradient_checkpointing=True)
    if lora is None:
        freeze_towers(model)
    else:
        model = add_lora(model, lora)
    features = model.get_image_features(torch.ones(1, 1, 3, 28, 28)).pooler_output
    assert not features[0].requires_grad
