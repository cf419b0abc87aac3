"""What is checked, kept and reported of a set with images before a run."""

import base64
import json
import re
import shutil
from pathlib import Path

import pytest

from conftest import TINY_MODEL
from forgebook.config.schema import FinetuneConfig
from forgebook.data import token_store
from forgebook.data.examples import read_examples
from forgebook.data.images import open_image
from forgebook.errors import DataError, ModelError
from forgebook.planning.image_report import image_line
from forgebook.planning.prepare import prepare, report_rows
from forgebook.runs import atomic, run
from support_vision import draw, image_row, save_vision_model

TEXT_ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_vision_model("SmolVLM", tmp_path_factory.mktemp("model"))


@pytest.fixture
def config_of(tmp_path, model):
    """Write rows and make a config that trains on them."""

    def make(rows, **values):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        about = {
            "model_id": model, "train_path": str(tmp_path / "rows.jsonl"), "vision_language_config": {},
            "context_length": 128, "num_epochs": 1, "num_devices": 0, "storage_path": str(tmp_path / "runs"),
            "run_name": "one",
        }  # fmt: skip
        return FinetuneConfig.model_validate(about | values)

    return make


def prepared(config):
    return prepare(config, run.open_run(config))


def test_sizes_before_and_after_the_processor_are_reported(config_of, tmp_path):
    for k, size in enumerate([(40, 30), (40, 30), (90, 30)]):
        draw(tmp_path / f"{k}.png", str(k), size)
    rows = [image_row("q", "a", "0.png"), image_row("q", "b", "1.png", "2.png"), TEXT_ROW]
    report = prepared(config_of(rows)).report
    about = report["train"]["images"]
    assert (about["images"], about["examples"], about["most_in_an_example"], about["pixels_max"]) == (3, 2, 2, 2700)
    assert about["sizes"][0] == {"pixels": "40 x 30", "images": 2, "tokens": 33, "resized": "5 of 28 x 28"}
    assert about["tokens"] == 2 * 33 + about["sizes"][1]["tokens"]
    assert ["images", image_line(report["train"])] in report_rows(report)
    assert image_line(report["train"]).startswith("3 in 2 examples, ")


def test_every_bad_image_is_named_with_its_line_and_message(config_of, tmp_path):
    draw(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    (tmp_path / "page.png").write_text("<html>")
    (tmp_path / "folder").mkdir()
    names = ("good.png", "missing.png", "cut.png", "page.png", "folder")
    rows = [image_row("q", "a", name, system="s") for name in names]
    config = config_of([*rows, image_row("q", "a", "good.png", "cut.png")])
    with pytest.raises(DataError, match="5 of 6 rows"):
        prepared(config)
    problems = atomic.read_json(run.open_run(config).data_report)["train"]["problems"]
    wrong = ("does not exist", "a damaged image", "not an image", "is a folder", "image 2 of 2: .*a damaged image")
    for line, (problem, reason) in enumerate(zip(problems, wrong, strict=True), 2):
        assert problem.startswith(f"rows.jsonl:{line}: messages[{1 if line < 6 else 0}]: image")
        assert re.search(reason, problem)
    assert not (tmp_path / "runs/one/tokens").exists()
    assert len(prepared(config_of([*rows, rows[0]], on_bad_rows="drop")).train) == 2


def test_a_model_of_text_alone_is_refused(config_of, tmp_path):
    draw(tmp_path / "0.png")
    with pytest.raises(ModelError, match="reads no images"):
        prepared(config_of([image_row("q", "a", "0.png")], model_id=str(TINY_MODEL)))


def test_an_image_that_is_replaced_is_read_again(config_of, tmp_path, monkeypatch):
    draw(tmp_path / "0.png", "old", (40, 30))
    config = config_of([image_row("q", "a", "0.png"), TEXT_ROW])
    first = prepared(config).train
    monkeypatch.setattr("forgebook.data.tokenize.readers.split_source", None)  # nothing is tokenized again
    assert prepared(config).train.content.tolist() == first.content.tolist()
    monkeypatch.undo()
    draw(tmp_path / "0.png", "new", (90, 30))
    again = prepared(config).train
    assert again.images_of(0)[0].file.width == 90 and again.content[0] != first.content[0]
    assert again.content[1] == first.content[1]


def test_the_same_question_about_another_image_may_be_held_out(config_of, tmp_path):
    for k in range(8):
        draw(tmp_path / f"{k}.png", str(k // 2))  # each picture twice, under two names
    rows = [image_row("What is it?", f"{k}", f"{k}.png") for k in range(8)]
    config = config_of(rows, valid_path={"split": 0.25})
    one = prepared(config)
    held = {line for _, chosen in one.held_out.items() for line, _ in chosen}
    assert len(held) == 2 and len({(line - 1) // 2 for line in held}) == 1  # both copies of a picture, or none
    one.write_held_out(tmp_path / "elsewhere/held_out.jsonl")
    [first, second] = read_examples(str(tmp_path / "elsewhere/held_out.jsonl"), "vision_language")
    names = {image.uri for message in (*first.messages, *second.messages) for image in message.get("images", ())}
    assert names == {str(tmp_path / f"{line - 1}.png") for line in held}


def test_bytes_of_a_row_are_kept_for_training(config_of, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = draw(tmp_path / "0.png").read_bytes()
    rows = {"image": [{"bytes": data, "path": "x.png"}], "prompt": ["<image>q"], "completion": ["a"]}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    train = prepared(config_of([], train_path=str(tmp_path / "rows.parquet"))).train
    [placed] = train.images_of(0)
    assert placed.file.path == "" and [path.read_bytes() for path in train.store_of(0).glob("*/*")] == [data]


def test_images_go_where_the_shards_of_a_run_go(config_of, tmp_path):
    """As before workers on other machines start, which see the run's folder alone."""
    data = base64.b64encode(draw(tmp_path / "1.png", "b").read_bytes()).decode()
    draw(tmp_path / "0.png", "a")
    rows = [image_row("q", "a", "0.png"), image_row("q", "b", f"data:image/png;base64,{data}")]
    train, folder = prepared(config_of(rows)).train, tmp_path / "runs/one/tokens"
    token_store.save_view(train, folder / "train.npz")
    token_store.collect_shards(folder / "train.npz", folder / "shards")
    shutil.rmtree(tmp_path / "runs/.tokens")
    (tmp_path / "0.png").unlink()
    shutil.move(folder, tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere"
    token_store.relocate_view(moved / "train.npz", lambda shard: str(moved / "shards" / Path(shard).name))
    collected = token_store.load_view(moved / "train.npz")
    for k in range(2):
        [placed] = collected.images_of(k)
        assert open_image(placed.file, collected.store_of(k)).size == (40, 30)
