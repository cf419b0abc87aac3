"""Adapters trained before: whatever lora_config says of them beside what they are is an error that names the key."""

import functools
import json
import re

import pytest
import transformers
from peft import LoraConfig, get_peft_model

from conftest import LORA, TINY_MODEL, chat
from forgebook.errors import ModelError
from forgebook.inference.loading import load_together
from forgebook.launch.fine_tune import fine_tune
from forgebook.models import adapters, load
from forgebook.models.saved_adapters import attach_adapter, check_adapter, check_reach, continue_lora
from forgebook.models.tokenizer import load_tokenizer
from forgebook.training.checkpoints import save_checkpoint
from support_models import model_with_towers


def skeleton():
    return load.load_skeleton(str(TINY_MODEL))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An adapter of the tiny model with dropout and a layer saved whole."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    model = adapters.add_lora(load.load_model(str(TINY_MODEL), dtype="float32"), LORA | {"lora_dropout": 0.1})
    save_checkpoint(model, load_tokenizer(str(TINY_MODEL)), folder, trained=False)
    return str(folder)


@pytest.mark.parametrize(
    "lora_config",
    [
        {},
        LORA,
        {"lora_dropout": 0.1, "use_dora": False, "rank_pattern": {}, "modules_to_save": None},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
        {"target_modules": r"model\.layers\..*_proj"},
    ],
)
def test_a_config_that_says_what_the_adapter_is_continues_it(saved, lora_config):
    check_adapter(saved, lora_config)
    check_reach(skeleton, saved, lora_config)


@pytest.mark.parametrize(
    ("lora_config", "message"),
    [
        ({"r": 16}, "has r: 8, lora_config says 16: .*leave the key out or set it to the same"),
        ({"lora_dropout": 0.0}, "has lora_dropout: 0.1, lora_config says 0.0"),
        (
            {"bias": "all", "use_rslora": True},
            "has bias: none, lora_config says all; use_rslora: False, lora_config says",
        ),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights: True, lora_config says pissa"),
        ({"alpha_pattern": {"q_proj": 4}}, "has alpha_pattern: {}, lora_config says {'q_proj': 4}"),
        ({"trainable_token_indices": [3]}, r"has trainable_token_indices: None, lora_config says \[3\]"),
    ],
)
def test_a_setting_that_the_adapter_does_not_have_is_an_error(saved, lora_config, message):
    with pytest.raises(ModelError, match=message):
        check_adapter(saved, lora_config)


@pytest.mark.parametrize(
    ("lora_config", "layer", "place"),
    [
        ({"target_modules": ["q_proj"]}, "model.layers.0.mlp.down_proj", "the adapter"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, "model.layers.0.mlp.down_proj", "the adapter"),
        ({**LORA, "exclude_modules": ["up_proj"]}, "model.layers.0.mlp.up_proj", "the adapter"),
        ({**LORA, "modules_to_save": ["lm_head"]}, "lm_head", "lora_config"),
    ],
)
def test_other_layers_than_the_adapters_are_an_error(saved, lora_config, layer, place):
    with pytest.raises(ModelError, match=re.escape(f"{layer} is in {place} alone")) as error:
        check_reach(skeleton, saved, lora_config)
    assert all(key in str(error.value) for key in lora_config if key not in ("r", "lora_alpha"))


def test_a_run_reports_it_before_it_starts(saved, make_config):
    start = {"initial_adapter_model_ckpt_path": saved, "max_steps": 1, "num_warmup_steps": 0}
    with pytest.raises(ModelError, match=r"lora_dropout: 0\.1, lora_config says 0\.2"):
        fine_tune(make_config(lora_config=LORA | {"lora_dropout": 0.2}, **start))
    with pytest.raises(ModelError, match="is of other layers than lora_config says"):
        fine_tune(make_config(lora_config={"target_modules": ["q_proj"]}, **start))


def test_labels_that_an_adapter_lacks_are_an_error(saved, make_config, write_rows):
    """Their embeddings would be neither trained nor saved, and random where the checkpoint is loaded."""
    path = write_rows([chat(str(k), "[[odd]]" if k % 2 else "the") for k in range(16)], "labels.jsonl")
    labels = {"task": "classification", "classifier_config": {"label_tokens": ["[[odd]]", "the"]}}
    start = {"initial_adapter_model_ckpt_path": saved, "max_steps": 1, "num_warmup_steps": 0}
    with pytest.raises(ModelError, match=r"label_tokens: \[\[odd\]\] are new to the adapter"):
        fine_tune(make_config(lora_config=LORA, train_path=path, valid_path=path, **start, **labels))


@pytest.mark.parametrize("name", ["Gemma3"])
def test_a_part_in_a_tower_is_no_other_layer(name, tmp_path):
    """Another program may have trained it; here it stays, frozen."""
    whole = get_peft_model(model_with_towers(name), LoraConfig(r=2, target_modules=["q_proj"]))
    whole.save_pretrained(tmp_path, save_embedding_layers=False)
    check_reach(functools.partial(model_with_towers, name), str(tmp_path), {"target_modules": ["q_proj"]})


def test_an_adapter_of_a_model_with_other_names_is_not_loaded_in_silence(tmp_path):
    """PEFT only warns: an adapter of Qwen3.5's text class on the published class would be the base."""
    wrapped = model_with_towers("Qwen3_5")
    wrapped.save_pretrained(tmp_path / "base")
    load_tokenizer(str(TINY_MODEL)).save_pretrained(tmp_path / "theirs")
    text = transformers.AutoModelForCausalLM.from_config(wrapped.config.get_text_config())
    adapter = get_peft_model(text, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapter.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    settings = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "theirs/adapter_config.json").write_text(json.dumps(settings))
    theirs = str(tmp_path / "theirs")
    for use in (
        lambda: attach_adapter(model_with_towers("Qwen3_5"), theirs),
        lambda: continue_lora(model_with_towers("Qwen3_5"), theirs, {}),
        lambda: load_together([theirs]),
    ):
        with pytest.raises(ModelError, match=r"has no weights for model\.language_model\.layers\.1\..* and 3 more"):
            use()


def test_a_second_adapter_of_other_names_is_not_loaded_either(saved, tmp_path):
    model = attach_adapter(load.load_model(str(TINY_MODEL)), saved)
    text = transformers.AutoModelForCausalLM.from_pretrained(TINY_MODEL).model
    get_peft_model(text, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has no weights for model\.layers\.0\.self_attn\.q_proj"):
        attach_adapter(model, str(tmp_path), "second")
