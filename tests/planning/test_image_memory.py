import json
import sys
from dataclasses import replace

import pytest

from conftest import REPOSITORY, config_for
from forgebook.layer_counts import ImageLoad
from forgebook.models.shapes import find_shape
from forgebook.planning.memory import memory_of
from forgebook.planning.plan import plan
from forgebook.planning.trainable import trained_parameters

LOAD = ImageLoad(
    layers=8, hidden=384, kept=6000, forward=4000, backward=3500, pixels=600, patches=4.0, parameters=15_000_000,
    trained=0, is_frozen=True,
)  # fmt: skip
TRAINED = replace(LOAD, trained=15_000_000, is_frozen=False)
SHAPE = find_shape("tiny")


def need(load, **values):
    about = {"vision_language_config": {}, "train_batch_size_per_device": 4, "dtype": "float32", "context_length": 512}
    config = config_for("tiny", **about | {"gradient_checkpointing": False, "deepspeed": None} | values)
    return memory_of(config, replace(SHAPE, images=load), workers=1, length=512, on_gpu=False)


def test_a_frozen_tower_keeps_its_pixels_and_a_trained_one_its_layers():
    few = {"patches": 0.1}
    text, frozen, trained = (
        need(load).activations for load in (None, replace(LOAD, **few), replace(TRAINED, **few | {"trained": 0}))
    )
    patches = 0.1 * 4 * 512
    assert frozen - text == pytest.approx(patches * 4 * 3 * 600, abs=2)
    assert trained - frozen == pytest.approx(8 * patches * 4 * 6000, abs=2)
    # Many patches of a frozen tower take more for a moment, before there is anything of the text.
    less, more = (need(replace(LOAD, patches=patches)).activations for patches in (20, 40))
    assert more - less == pytest.approx(20 * 4 * 512 * 4 * (4000 + 4 * 600), abs=2)


def test_the_backward_pass_of_a_tower_comes_after_the_texts_gradients():
    load = replace(TRAINED, patches=0.2, backward=10**6, trained=1000)
    planned = need(load, gradient_checkpointing=True)
    each = 3 * 600 + 2 * 384 + 8 * 384 + 6000 + 10**6  # pixels, ends, a layer's inputs, and one layer again
    at_tower = 4 * SHAPE.text_parameters + 0.2 * 4 * 512 * 4 * each
    assert planned.gradients + planned.activations == pytest.approx(at_tower, abs=2)


def test_recomputing_keeps_one_input_per_layer():
    kept = need(TRAINED, gradient_checkpointing=True).activations
    assert kept < need(TRAINED).activations / 2


def test_what_trains_of_a_tower_has_gradients_and_an_optimizer():
    assert need(TRAINED).gradients - need(LOAD).gradients == 4 * 15_000_000
    assert need(TRAINED).optimizer - need(LOAD).optimizer == 8 * 15_000_000
    config = config_for("tiny", lora_config={"r": 8}, vision_language_config={})
    projector = replace(SHAPE, images=replace(LOAD, trained=1_000))
    assert trained_parameters(config, projector) - trained_parameters(config, SHAPE) == 1_000


def test_the_plan_counts_the_tower_and_says_what_trains():
    config = config_for("tiny", vision_language_config={}, context_length=512)
    text, images = plan(config, SHAPE), plan(config, replace(SHAPE, images=LOAD))
    assert images.flops_per_token - text.flops_per_token == 2 * 15_000_000 * 4
    assert "15,000,000 parameters of the vision encoder and its projector are frozen" in images.notes
    config = config_for("tiny", vision_language_config={"freeze_vision_encoder": False}, context_length=512)
    notes = plan(config, replace(SHAPE, images=TRAINED)).notes
    assert any("15,000,000 of the 15,000,000 parameters" in note for note in notes)


def test_the_plan_is_within_15_percent_of_every_run_that_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(REPOSITORY / "benchmarks/plan"), *sys.path])
    import images

    measured = json.loads((REPOSITORY / "benchmarks/plan/images.json").read_text())["results"]
    assert [one["case"] for one in measured] == list(images.CASES)
    off = {one["case"]: one["error"] for one in images.replan(measured, tmp_path)}
    assert max(map(abs, off.values())) < 0.15, off
