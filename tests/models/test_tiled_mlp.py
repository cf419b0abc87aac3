"""Tiled MLPs: the same losses and gradients, from activations that are held of one tile at a time."""

import pytest
import torch

from conftest import LORA, losses_of
from forgebook.errors import ModelError
from forgebook.launch.fine_tune import fine_tune
from forgebook.models import tiled_mlp
from forgebook.models.adapters import add_lora
from forgebook.models.load import load_model
from forgebook.training.losses import SupervisedLM
from support_families import save_family


@pytest.fixture
def compute(tmp_path):
    """A function that returns a model's loss of 3 lines of 50 tokens, its gradients, and the largest kept tensor."""

    def compute(family: str, *, tiles: bool, lora: bool = False, recomputes: bool = False):
        source = save_family(family, tmp_path / family)
        model = load_model(source, dtype="float32", attention="sdpa", gradient_checkpointing=recomputes)
        torch.manual_seed(0)
        model = add_lora(model, LORA | {"lora_dropout": 0.1}) if lora else model
        if tiles:
            tiled_mlp.tile_mlps(model)
        model.train()
        ids, kept = (torch.arange(150) % 60).reshape(3, 50), []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor) or tensor, lambda saved: saved
        ):
            loss = SupervisedLM(model)(ids, ids)
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        inner = model.config.get_text_config().intermediate_size
        widest = max((one.numel() // inner for one in kept if one.dim() > 1 and one.shape[-1] == inner), default=0)
        return loss.item(), gradients, widest

    return compute


@pytest.mark.parametrize("family", ["Llama 3", "Gemma 3", "Phi 4", "LFM 2", "Granite 3"])
@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
def test_losses_and_gradients_are_those_of_whole_mlps(compute, family, recomputes):
    whole, tiled = (compute(family, tiles=tiles, recomputes=recomputes) for tiles in (False, True))
    assert tiled[0] == pytest.approx(whole[0], rel=1e-6) and tiled[1].keys() == whole[1].keys()
    for name, gradient in whole[1].items():
        assert torch.allclose(tiled[1][name], gradient, rtol=1e-4, atol=1e-5), name


def test_an_adapter_with_dropout_has_its_own_masks_again(compute):
    """The tiles are computed again with the random numbers of the forward pass: gradients are those of the loss."""
    first, second = (compute("Llama 3", tiles=True, lora=True) for _ in range(2))
    assert first[0] == second[0] and all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    assert any("mlp" in name and gradient.abs().max() > 0 for name, gradient in first[1].items())


def test_nothing_as_wide_as_the_mlp_is_kept_of_all_tokens(compute):
    assert compute("Llama 3", tiles=False)[2] >= 150
    assert compute("Llama 3", tiles=True)[2] == 0


def test_a_vision_tower_stays_as_it_is(tmp_path):
    model = load_model(save_family("Gemma 3", tmp_path / "model"), dtype="float32", attention="sdpa")
    tiled_mlp.tile_mlps(model)
    is_tiled = {name: "forward" in vars(module) for name, module in model.named_modules() if name.endswith(".mlp")}
    assert {"vision" not in name for name in is_tiled} == {True, False}
    assert all(tiled is ("vision" not in name) for name, tiled in is_tiled.items())


@pytest.mark.slow
def test_two_workers_of_fsdp2_train_alike_with_tiles(without_ray, make_config):
    """A batch has some 330 tokens, the tiny model a width of 256."""
    settings = {"sharding": "fsdp", "num_devices": 2, "gradient_checkpointing": True, "learning_rate": 3e-4}
    whole, tiled = (
        losses_of(fine_tune(make_config(run_name=name, tiled_mlp=name == "tiled", **settings)))
        for name in ("whole", "tiled")
    )
    assert tiled == pytest.approx(whole, abs=1e-5) and tiled[-1] < tiled[0]


def test_experts_are_refused(tmp_path):
    model = load_model(save_family("Qwen 3 MoE", tmp_path / "moe"), dtype="float32", attention="sdpa")
    with pytest.raises(ModelError, match="route tokens to experts: remove it"):
        tiled_mlp.tile_mlps(model)
