"""A server finds an adapter's layers by the names of the published weights: real classes, tiny and random."""

import json

import pytest
import torch
import transformers

from conftest import TINY_MODEL
from forgebook.models import adapters, load
from forgebook.models.adapter_names import published_layers, saved_names, unserved_layers
from forgebook.models.load import load_skeleton
from forgebook.models.tokenizer import load_tokenizer
from forgebook.models.vllm_support import vllm_serves_saved
from forgebook.planning.preflight import check_settings
from forgebook.planning.prepare import prepare
from forgebook.runs.run import open_run
from forgebook.training.checkpoints import save_checkpoint, vllm_verdict
from support_models import TEXT, WITH_TOWERS, model_with_towers

ALL_LINEAR = {"r": 2, "target_modules": "all-linear"}
EXPERTS = {
    "Mixtral": {"num_local_experts": 2},
    "Qwen3Moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32},
    "GptOss": {"num_local_experts": 2, "num_experts_per_tok": 1},
}


def save(name: str, folder) -> str:
    """Save a random model as its family publishes it."""
    if name in WITH_TOWERS:
        model = model_with_towers(name)
    else:
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**TEXT, **EXPERTS.get(name, {}))
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return str(folder)


def names_of(model, lora_config=ALL_LINEAR) -> list[str]:
    """Name the tensors of an adapter on a model without weights."""
    adapted = adapters.add_lora(model, {**lora_config, "init_lora_weights": False})
    return [name for name, p in adapted.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "Qwen3VL", "Qwen3_5", "Llama4"])
def test_an_adapter_has_the_names_of_the_published_class(name, tmp_path):
    base = save(name, tmp_path)
    names = names_of(load_skeleton(base))
    assert names and unserved_layers(names, base) is None


def test_gemma_3_is_published_with_names_of_older_code_that_servers_know(tmp_path):
    base = save("Gemma3", tmp_path)
    assert any(name.startswith("language_model.model.") for name in published_layers(base))
    assert all(".model.language_model." in name for name in names_of(load_skeleton(base)))


def test_an_adapter_of_a_text_class_does_not_fit_a_published_conditional_generation_class(tmp_path):
    """transformers loads Qwen3.5 as a text model, too; vLLM would serve its base without an error."""
    base = save("Qwen3_5", tmp_path)
    config = transformers.AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        names = names_of(transformers.AutoModelForCausalLM.from_config(config))
    reason = unserved_layers(names, base)
    assert reason.startswith("the published weights of its base have no layer model.layers.0.linear_attn.in_proj_")
    assert reason.endswith("more, and vLLM answers as the base there")


@pytest.mark.parametrize(
    ("name", "lora_config", "layer"),
    [
        ("Mixtral", ALL_LINEAR, "model.layers.0.mlp.experts"),
        ("Qwen3Moe", {"r": 2, "target_modules": ["gate_proj", "up_proj"]}, "model.layers.0.mlp.experts and 1 more"),
        ("Qwen3Moe", {"r": 2, "target_modules": ["q_proj"]}, None),
        ("GptOss", {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}, None),
    ],
)
def test_experts_are_found_where_they_are_published_as_one_tensor(name, lora_config, layer, tmp_path):
    base = save(name, tmp_path)
    reason = unserved_layers(names_of(load_skeleton(base), lora_config), base)
    assert layer in reason if layer else reason is None


def test_a_base_in_memory_answers_as_its_files_do(tmp_path, monkeypatch):
    """Under ZeRO-3 rank 0 saves alone: making a model there would wait for the other ranks."""
    base = save("Gemma3", tmp_path)
    model = load_skeleton(base)
    names = names_of(model)
    monkeypatch.setattr(load, "load_skeleton", lambda source: pytest.fail("a model was made"))
    assert unserved_layers(names, base, model) is None
    model.config.architectures = ["Gemma3ForAnotherTask"]
    assert "have no layer model.language_model.layers.0" in unserved_layers(names, base, model)


def test_without_the_weights_there_is_no_verdict(tmp_path):
    base = save("Llama", tmp_path)
    assert "model.layers.1.mlp.up_proj" in published_layers(base)
    names = saved_names(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    assert published_layers(base) is None and unserved_layers(["x.lora_A.weight"], base) is None
    assert published_layers("owner/name") is published_layers("/no/such/folder") is None
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.layers.1.mlp.up_proj" in published_layers(base)


@pytest.mark.parametrize(("name", "is_served"), [("Gemma3", True), ("Qwen3Moe", False)])
def test_plan_and_checkpoint_say_whether_vllm_finds_the_layers(name, is_served, make_config, tmp_path):
    base = save(name, tmp_path / "base")
    tokenizer = load_tokenizer(str(TINY_MODEL))
    tokenizer.save_pretrained(base)
    config = make_config(model_id=base, lora_config=ALL_LINEAR, context_length=128)
    _, before = check_settings(prepare(config, open_run(config)))

    model = adapters.add_lora(load.load_model(base, dtype="float32"), ALL_LINEAR)
    save_checkpoint(model, tokenizer, tmp_path / "checkpoint", trained=False)
    after = vllm_serves_saved(tmp_path / "checkpoint")
    assert before == after == vllm_verdict(model)
    assert after == "yes" if is_served else after.startswith("no: the published weights of its base have no layer")
    card = (tmp_path / "checkpoint/README.md").read_text()
    assert card.startswith("---\n") and f"base_model: {base}" in card and "More Information Needed" not in card
    assert f"\nvLLM can serve the adapter: {after}" in card and ("Merge it" in card) != is_served
