"""Adapters of experts by products of low rank: losses, gradients and files are PEFT's."""

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from conftest import REPOSITORY, TINY_MODEL, losses_of
from forgebook.inference.loading import load_for_generation
from forgebook.launch.fine_tune import fine_tune
from forgebook.models import adapters, load
from forgebook.models.expert_adapters import use_low_rank_products
from forgebook.runs.atomic import read_json, write_json
from forgebook.training.losses import SupervisedLM
from support_families import save_family

PARAMETERS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
FAMILIES = {
    "Qwen 3 MoE": {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
    "Qwen 3.5, 3.6 MoE": PARAMETERS,
    "Mixtral": PARAMETERS,
    "gpt-oss": PARAMETERS,  # its weights are transposed and have biases, and its gate is its own
    "GLM 4.5, 4.6": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    "Llama 4 (text)": PARAMETERS,  # stays with PEFT's way
}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def by_peft(source, settings):
    """Give a model an adapter of PEFT that changes something."""
    model = load.load_model(source, dtype="float32")
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, **settings))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


def loss_and_gradients(model):
    ids = torch.arange(3, 67).reshape(4, 16)
    model.zero_grad()
    loss = SupervisedLM(model)(ids, ids.roll(-1, 1)) / ids.numel()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_and_gradients_are_those_of_peft(name, tmp_path, monkeypatch):
    model = by_peft(save_family(name, tmp_path), FAMILIES[name])
    loss, gradients = loss_and_gradients(model)
    use_low_rank_products(model)
    changed = [type(module).__name__ for module in model.modules()].count("_ExpertsWrapper")
    assert (changed > 0) == (name != "Llama 4 (text)")
    if changed:  # the weights are never changed for a forward pass
        monkeypatch.delattr("torch.nn.utils.parametrize.register_parametrization")
    ours, own_gradients = loss_and_gradients(model)
    assert ours == pytest.approx(loss, abs=1e-5) and own_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(own_gradients[key], gradient, rtol=1e-5, atol=1e-6)
    assert any("experts" in key and gradient.abs().max() > 1e-6 for key, gradient in gradients.items())


def test_adapters_are_saved_loaded_switched_off_and_merged_as_by_peft(tmp_path):
    source = save_family("Qwen 3 MoE", tmp_path / "base")
    model = by_peft(source, FAMILIES["Qwen 3 MoE"])
    loss, _ = loss_and_gradients(model)
    use_low_rank_products(model)
    model.save_pretrained(tmp_path / "ours")
    weights = load_file(tmp_path / "ours/adapter_model.safetensors")
    assert any("experts.base_layer.lora_A" in name for name in weights)
    plain = PeftModel.from_pretrained(load.load_model(source, dtype="float32"), tmp_path / "ours", is_trainable=True)
    assert loss_and_gradients(plain)[0] == pytest.approx(loss, abs=1e-6)
    base, _ = loss_and_gradients(adapters.add_lora(load.load_model(source, dtype="float32"), FAMILIES["Qwen 3 MoE"]))
    ids = torch.arange(3, 67).reshape(4, 16)
    with torch.no_grad(), model.disable_adapter():
        assert (SupervisedLM(model)(ids, ids.roll(-1, 1)) / 64).item() == pytest.approx(base, abs=1e-6)
    merged = model.merge_and_unload()
    with torch.no_grad():
        assert (SupervisedLM(merged)(ids, ids.roll(-1, 1)) / 64).item() == pytest.approx(loss, abs=1e-5)


@pytest.mark.filterwarnings("error:The following .*_pattern keys")
def test_a_mixture_is_planned_trained_and_answers(make_config, tmp_path):
    """A whole run, whose parameters are those of its plan."""
    source = save_family("Qwen 3 MoE", tmp_path / "base", vocab_size=2048, max_position_embeddings=1024)
    for file in [*TINY_MODEL.glob("*token*.json"), TINY_MODEL / "chat_template.jinja"]:
        shutil.copy(file, source)
    values = {"lora_config": {"r": 4, "target_modules": "all-linear"}, "learning_rate": 1e-2, "num_epochs": 2}
    run = fine_tune(make_config(model_id=source, gradient_checkpointing=True, context_length=256, **values))
    losses, plan = losses_of(run), read_json(run.folder / "plan.json")
    assert len(losses) == 6 and losses[-1] < losses[0]
    model, _, _ = load_for_generation(run.folder / read_json(run.summary)["best_checkpoint"])
    assert model.get_nb_trainable_parameters()[1] == plan["parameters"] + plan["trainable_parameters"]


def test_new_and_continued_adapters_run_so(tmp_path):
    from forgebook.models.saved_adapters import continue_lora

    source = save_family("Qwen 3 MoE", tmp_path / "base")
    new = adapters.add_lora(load.load_model(source, dtype="float32"), {"r": 4, "target_modules": "all-linear"})
    new.save_pretrained(tmp_path / "adapter")
    continued = continue_lora(load.load_model(source, dtype="float32"), str(tmp_path / "adapter"), {})
    for model in (new, continued):
        assert [type(module).__name__ for module in model.modules()].count("_ExpertsWrapper") == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen 3 MoE", "gpt-oss"])
def test_two_workers_train_experts_alike_with_and_without_zero_3(name, without_ray, make_config, tmp_path):
    """ZeRO-3 partitions the experts and, without its threshold for small tensors, their adapters, too."""
    settings = read_json(REPOSITORY / "deepspeed_configs/zero_3.json")
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    write_json(tmp_path / "zero_3.json", settings)
    source = save_family(name, tmp_path / "base", vocab_size=2048, max_position_embeddings=1024)
    for file in [*TINY_MODEL.glob("*token*.json"), TINY_MODEL / "chat_template.jinja"]:
        shutil.copy(file, source)
    losses = {}
    for sharding in ("none", str(tmp_path / "zero_3.json")):
        config = make_config(
            model_id=source, lora_config={"r": 4, "lora_alpha": 12, **PARAMETERS}, deepspeed=sharding, num_devices=2,
            context_length=256, run_name=f"run-{len(losses)}", learning_rate=1e-2, num_epochs=2,
        )  # fmt: skip
        losses[sharding] = losses_of(fine_tune(config))
    plain, sharded = losses.values()
    assert sharded == pytest.approx(plain, abs=1e-4) and plain[-1] < plain[0]
