"""What a model's config.json says of its context; families are rows of catalog.yaml."""

import json
import shutil

import pytest
import torch
import transformers

from conftest import LORA, TINY_MODEL
from forgebook.catalog import read_catalog, shape_of
from forgebook.errors import ConfigError, ModelError
from forgebook.models import adapters, load, saved_adapters
from forgebook.models.families import (
    check_positions,
    context_limit,
    freeze_towers,
    native_context_length,
    tower_modules,
)
from forgebook.training.losses import SupervisedLM
from support_models import WITH_TOWERS, model_with_towers

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_the_context_limit_grows_with_rope_scaling():
    source = str(TINY_MODEL)
    assert native_context_length(source) == context_limit(source) == 1024
    assert context_limit(source, {"rope_type": "linear", "factor": 2.0}) == 2048
    assert context_limit(source, {**LLAMA3, "original_max_position_embeddings": 256}) == 2048


def test_a_model_without_positions_has_no_limit(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    assert context_limit(str(tmp_path)) is None
    with pytest.raises(ModelError, match="has no max_position_embeddings: set context_length"):
        native_context_length(str(tmp_path))


@pytest.mark.parametrize("kind", ["GPT2", "OPT"])
def test_a_context_beyond_learned_positions_is_an_error(kind, tmp_path):
    getattr(transformers, f"{kind}Config")(max_position_embeddings=64).save_pretrained(tmp_path)
    assert check_positions(str(tmp_path), 64) is None
    with pytest.raises(ConfigError, match="context_length: 65 is beyond the 64 positions"):
        check_positions(str(tmp_path), 65)


def test_a_context_beyond_rotary_positions_is_a_warning():
    source = str(TINY_MODEL)
    assert check_positions(source, 1024) is None
    assert "beyond the 1,024 positions" in check_positions(source, 2048)
    assert check_positions(source, 2048, {"rope_type": "linear", "factor": 2.0}) is None


def test_a_broken_config_is_one_readable_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{oops")
    with pytest.raises(ModelError, match="no model could be loaded from"):
        context_limit(str(tmp_path))


def test_a_family_is_added_by_a_row_of_the_catalog_alone(tmp_path, monkeypatch):
    """A family like Llama with two more norms per layer and norms of queries and keys, in a copy of the catalog."""
    shutil.copytree(TINY_MODEL, tmp_path / "model")
    settings = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(settings | {"model_type": "newcomer"}))
    with pytest.raises(ModelError, match="has model_type 'newcomer': the shape is known for llama"):
        shape_of(str(tmp_path / "model"))
    tiny, parameters = shape_of("tiny"), shape_of("tiny").parameters
    own = tmp_path / "own.yaml"
    own.write_text(
        "prices: {date: 2026-01, source: our own}\ngpus: {}\nmodels: []\n"
        "families: {newcomer: {architecture: NewcomerForCausalLM, norms: 4, qk_norm: true}}\n"
    )
    monkeypatch.setenv("FORGEBOOK_CATALOG", str(own))
    added = tiny.layers * (2 * tiny.hidden + 2 * tiny.head_dim)
    assert shape_of(str(tmp_path / "model")).parameters == parameters + added


def test_every_shape_of_the_catalog_follows_a_rule_or_was_counted():
    catalog = read_catalog()
    shapes = catalog.shapes.values()
    assert all(shape.counted or catalog.families[shape.model_type].counted for shape in shapes)


# Towers ------------------------------------------------------------------------------------------------


def without_gradient(model) -> list[str]:
    """Name the trainable parameters that a step on texts gives no gradient."""
    ids = torch.arange(5, 37).reshape(2, 16)
    SupervisedLM(model).train()(ids, ids).backward()
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("name", WITH_TOWERS)
def test_what_no_text_passes_through_is_not_trained(name):
    """Under DDP with two workers, a trainable parameter without a gradient ends the second step."""
    model = model_with_towers(name)
    towers = tower_modules(model)
    assert towers == WITH_TOWERS[name][1]
    freeze_towers(model)
    assert without_gradient(model) == []
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen and all(any(one.startswith(f"{tower}.") for tower in towers) for one in frozen)


@pytest.mark.parametrize(
    "settings",
    [
        LORA,
        {"r": 4, "target_modules": r".*(q_proj|fc1|qkv)", "exclude_modules": ["1.self_attn.q_proj"]},
        {"r": 4, "target_modules": ["q_proj", "fc1"], "exclude_modules": r".*\.1\.self_attn\.q_proj"},
    ],
)
@pytest.mark.parametrize("name", ["Gemma3", "Mllama"])
def test_no_adapter_reaches_a_tower(name, settings):
    model = adapters.add_lora(model_with_towers(name), settings)
    assert without_gradient(model) == []
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".language_model." in one for one in trained)
    assert not any("exclude_modules" in settings and ".1.self_attn.q_proj" in one for one in trained)


def test_an_adapter_of_another_program_keeps_its_part_in_a_tower(tmp_path):
    """It is frozen, not dropped: the saved checkpoint has it, unchanged."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    from forgebook.models.tokenizer import load_tokenizer
    from forgebook.training.checkpoints import save_checkpoint

    whole = get_peft_model(model_with_towers("Gemma3"), LoraConfig(r=2, target_modules=["q_proj"]))
    whole.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    model = saved_adapters.continue_lora(model_with_towers("Gemma3"), str(tmp_path / "theirs"), {})
    assert without_gradient(model) == []
    save_checkpoint(model, load_tokenizer(str(TINY_MODEL)), tmp_path / "ours", trained=False)
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() and any("vision_tower" in name for name in ours)


def test_a_model_without_towers_trains_whole():
    model = load.load_model(str(TINY_MODEL))
    freeze_towers(model)
    assert tower_modules(model) == [] and all(p.requires_grad for p in model.parameters())
