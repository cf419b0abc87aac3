"""Whole runs on images: resumed, divided among workers, with what trains and what does not."""

import json

import pytest
import torch
from safetensors.torch import load_file

from conftest import LORA, fine_tune_until, losses_of
from forgebook.config.parse import load_config
from forgebook.export.merge import merge_run
from forgebook.launch.fine_tune import fine_tune
from forgebook.models.load import load_model
from forgebook.runs.metrics import read_metrics
from support_vision import draw, image_row, save_vision_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_vision_model("SmolVLM", tmp_path_factory.mktemp("model"))


@pytest.fixture
def config_of(tmp_path, model):
    """Make a config of two epochs of three steps; some examples have no image, one has two."""
    for k in range(10):
        draw(tmp_path / f"{k}.png", f"n {k}", (40 + 9 * (k % 4), 30))
    names = [[f"{k}.png"] for k in range(8)] + [["8.png", "9.png"], [], [], []]
    rows = [image_row("what? " * (1 + k % 3), f"the lamp {k}", *paths) for k, paths in enumerate(names)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name="one", **values):
        about = {
            "model_id": model, "train_path": str(tmp_path / "rows.jsonl"), "valid_path": str(tmp_path / "rows.jsonl"),
            "vision_language_config": {}, "context_length": 256, "num_epochs": 2, "num_devices": 0, "sharding": "none",
            "storage_path": str(tmp_path / "runs"), "run_name": name, "dtype": "float32", "learning_rate": 1e-2,
            "num_warmup_steps": 0, "train_batch_size_per_device": 4, "eval_batch_size_per_device": 4,
            "lora_config": LORA,
        }  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(json.dumps(about | values))
        return load_config(tmp_path / f"{name}.yaml")

    return make


@pytest.mark.slow
def test_a_run_learns_and_an_interrupted_one_has_the_same_losses(config_of):
    whole = losses_of(fine_tune(config_of("whole")))
    config = config_of("twice", save_state_minutes=1e-9)
    with pytest.raises(KeyboardInterrupt):
        fine_tune_until(config, 5)
    assert losses_of(fine_tune(config)) == whole and whole[-1] < whole[0]


@pytest.mark.slow
def test_accumulation_does_not_change_the_loss(config_of):
    """In half of the micro batches of one example there is no image."""
    values = {"num_epochs": 1, "train_batch_size_per_device": 12}
    whole = fine_tune(config_of("whole", **values))
    divided = config_of("divided", num_epochs=1, train_batch_size_per_device=1, gradient_accumulation_steps=12)
    divided = fine_tune(divided)
    assert losses_of(divided) == pytest.approx(losses_of(whole), abs=1e-5)
    norms = [[row["grad_norm"] for row in read_metrics(run.metrics) if "grad_norm" in row] for run in (whole, divided)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "projector"])
def test_two_workers_have_the_losses_of_one(config_of, without_ray, trains):
    values = {"vision_language_config": {"train_projector": trains}}
    one = fine_tune(config_of("one", **values))
    two = fine_tune(config_of("two", num_devices=2, train_batch_size_per_device=2, **values))
    assert losses_of(two) == pytest.approx(losses_of(one), abs=2e-5)


def moved(run, model, name) -> set[str]:
    """List the parts of a fully fine-tuned model that differ from the base: tower, projector, text."""
    before = load_model(model, dtype="float32").state_dict()
    after = load_model(str(run.checkpoints / name), dtype="float32").state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    kinds = {"vision_model": "tower", "connector": "projector"}
    return {kinds.get(key.split(".")[1], "text") for key in changed}


@pytest.mark.parametrize(
    ("images", "parts"),
    [
        ({}, {"text"}),
        ({"train_projector": True}, {"text", "projector"}),
        ({"freeze_vision_encoder": False}, {"text", "projector", "tower"}),
    ],
)
def test_what_trains_is_what_the_config_says(config_of, model, images, parts):
    values = {"lora_config": None, "num_epochs": 1, "vision_language_config": images}
    run = fine_tune(config_of(**values))
    assert moved(run, model, "epoch-1") == parts


@pytest.mark.slow
def test_an_adapter_is_of_the_language_model_and_holds_the_projector_if_that_trains(config_of, model, tmp_path):
    run = fine_tune(config_of(num_epochs=1, vision_language_config={"train_projector": True}))
    folder = run.checkpoints / "epoch-1"
    names = load_file(folder / "adapter_model.safetensors")
    published = set(load_model(model, dtype="float32").state_dict())
    layers = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in names if ".lora_" in name}
    assert layers and all(f"{layer}.weight" in published and "text_model" in layer for layer in layers)
    saved = {name.removeprefix("base_model.model.") for name in names if ".lora_" not in name}
    assert saved and saved <= {name for name in published if "connector" in name}
    # PEFT and transformers alone load it, with its processor's files beside it.
    from peft import PeftModel

    plain = PeftModel.from_pretrained(load_model(model, dtype="float32"), folder)
    trained = plain.state_dict()
    assert all(torch.equal(value, trained[with_default(name)]) for name, value in names.items())
    assert (folder / "preprocessor_config.json").exists() and (folder / "processor_config.json").exists()
    merged = merge_run(str(folder), tmp_path / "merged")
    assert merged.kl_merged < 1e-6 < merged.kl_base
    assert merged.compared.endswith("8 examples of the run's validation file, 8 of them with images")
    assert (tmp_path / "merged/processor_config.json").exists()


def with_default(name: str) -> str:
    """Name a saved weight as PEFT does in a model."""
    if ".lora_" in name:
        return name.replace(".weight", ".default.weight")
    holder, _, rest = name.partition("connector")
    return f"{holder}connector.modules_to_save.default{rest}"
