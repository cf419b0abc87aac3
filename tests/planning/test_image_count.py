"""Image tokens before anything is tokenized equal those of the tokens."""

import json

import pytest

from conftest import config_for
from forgebook.catalog import hardware_of
from forgebook.config.schema import FinetuneConfig
from forgebook.models.image_load import with_images
from forgebook.models.shapes import find_shape
from forgebook.planning.image_count import ASSUMED_TOKENS
from forgebook.planning.plan import plan
from forgebook.planning.prepare import prepare
from forgebook.planning.token_count import count_data
from forgebook.runs import run
from support_vision import draw, image_row, save_vision_model


@pytest.mark.parametrize("family", ["SmolVLM", "Qwen 3 VL"])
def test_images_count_by_their_sizes_alone(family, tmp_path, monkeypatch):
    for k, size in enumerate([(40, 30), (90, 30), (28, 56)]):
        draw(tmp_path / f"{k}.png", str(k), size)
    rows = [image_row("q", "a", "0.png"), image_row("q", "b", "1.png", "2.png"), image_row("q", "c")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = {
        "model_id": save_vision_model(family, tmp_path / "model"), "train_path": str(tmp_path / "rows.jsonl"),
        "vision_language_config": {}, "context_length": 128, "num_epochs": 1, "num_devices": 0,
        "storage_path": str(tmp_path / "runs"), "run_name": "one",
    }  # fmt: skip
    config = FinetuneConfig.model_validate(about)
    prepared = prepare(config, run.open_run(config))
    monkeypatch.setattr("forgebook.data.images._decode", None)  # only headers are read
    counted = count_data(config)
    exact = prepared.train.lengths
    # What the template writes beside contents is estimated; the images are not.
    estimated = [int(one - other) for one, other in zip(counted.lengths, exact, strict=True)]
    around = 0 if family == "SmolVLM" else 2  # tokens that Qwen's template writes around each image
    assert estimated == [estimated[2] - around, estimated[2] - 2 * around, estimated[2]]
    pixels = prepared.report["train"]["images"]["resized_pixels"]
    assert counted.pixels * sum(counted.lengths) == pytest.approx(pixels)


def test_a_model_that_is_not_here_takes_an_assumed_number_of_tokens_per_image(tmp_path):
    """`plan` downloads nothing: a known model has a plan on a machine that cannot reach the hub."""
    draw(tmp_path / "0.png", "0", (40, 30))
    rows = [image_row("q", "a", "0.png", "0.png"), image_row("q", "a")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_for("Qwen/Qwen3-VL-8B-Instruct", train_path=str(tmp_path / "rows.jsonl"), vision_language_config={})
    counted = count_data(config)
    assert counted.lengths[0] - counted.lengths[1] == 2 * ASSUMED_TOKENS and "256 tokens per image" in counted.how
    shape = find_shape(config.model_id)
    assert with_images(shape, config, 0.0) is shape
    planned = plan(config, shape, hardware_of("1xA100-80G"), counted)
    assert "what the encoder computes is not counted: the model's config is not on this machine" in planned.notes
