"""The run folder: opened, found and removed, on disk and in a bucket."""

from pathlib import Path

import pytest

from conftest import TINY_MODEL
from forgebook.config.parse import dump_config
from forgebook.errors import StorageError
from forgebook.launch.ray_train import fine_tune
from forgebook.runs import atomic, object_store, registry, upload
from forgebook.runs import run as storage


def test_a_run_is_found_by_folder_and_by_name(make_config, monkeypatch, tmp_path):
    run = fine_tune(make_config())
    monkeypatch.chdir(tmp_path)
    assert storage.find_run("run") == storage.find_run(str(run.folder)) == run
    with pytest.raises(StorageError, match="no run 'other'"):
        storage.find_run("other")
    record = registry.get_model("run")
    assert record.created_at and record.figures["eval_loss"] and (run.folder / record.best_checkpoint).is_dir()


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_what_is_there_already_is_told(door, make_config, tmp_path, place):
    path = str(tmp_path / "runs") if place == "folder" else "s3://forgebook/there"
    config = make_config(storage_path=path, on_existing="fail")
    assert not storage.open_run(config).config.exists()
    write(f"{path}/run/notes.txt")
    with pytest.raises(
        StorageError, match=f"{'s3://' if place == 'bucket' else ''}.*/run exists and is not a run folder"
    ):
        storage.open_run(config)
    write(f"{path}/run/config.yaml")
    with pytest.raises(StorageError, match=r"the run .*/run exists: choose another run_name"):
        storage.open_run(config)
    assert storage.open_run(make_config(storage_path=path)).config.exists()


def write(path):
    if path.startswith("s3://"):
        object_store.write_file(path, b"x")
    else:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("x")


# The list of models -----------------------------------------------------------------------------------


@pytest.fixture
def keep_run(make_config, tmp_path):
    """Make a complete run's files under a name, as they lie after training, without training."""

    def make(name, eval_loss=0.5, **values):
        config = make_config(run_name=name, storage_path=str(tmp_path / "runs"), **values)
        run = storage.open_run(config)
        run.folder.mkdir(parents=True)
        run.config.write_text(dump_config(config))
        summary = {"best_checkpoint": "checkpoints/epoch-1", "eval_loss": eval_loss, "job_id": "raysubmit_1"}
        atomic.write_json(run.summary, summary | {"created_at": f"2026-01-0{len(name)}T00:00:00+00:00"})
        return run

    return make


def test_models_are_listed_with_what_is_on_record(keep_run, tmp_path):
    second = keep_run("bb", lora_config={"r": 4}, custom_model_tag="tag")
    first = keep_run("a", eval_loss=0.25)
    atomic.write_json(first.folder / "evaluation.json", {"exact_match_after": 0.75})
    (tmp_path / "runs/.tokens").mkdir()
    (tmp_path / "runs/no-run").mkdir()
    models = registry.list_models(str(tmp_path / "runs"))
    assert [model.id for model in models] == ["a", "tag"]  # the oldest first
    assert models[0].figures == {"eval_loss": 0.25, "exact_match_after": 0.75}
    tagged = models[1]
    assert tagged.ft_type == "instruction_tuning, LoRA r=4" and tagged.base_model_id == str(TINY_MODEL)
    assert tagged.job_id == "raysubmit_1" and tagged.storage_uri == str(second.folder) and tagged.is_complete
    assert "prompt_format" in tagged.generation_config
    for name in ("tag", "bb", str(second.folder)):
        assert registry.get_model(name, str(tmp_path / "runs")) == tagged
    assert registry.list_models(str(tmp_path / "none")) == []
    with pytest.raises(StorageError, match="no model 'c'"):
        registry.get_model("c", str(tmp_path / "runs"))


@pytest.mark.parametrize("start", ["initial_adapter_model_ckpt_path", "initial_base_model_ckpt_path", "model_id"])
@pytest.mark.parametrize("written", ["absolute", "relative"])
def test_what_other_runs_start_from_is_not_deleted(keep_run, tmp_path, start, written):
    first = keep_run("first")
    path = str(first.checkpoints / "epoch-1") if written == "absolute" else "runs/first/checkpoints/epoch-1"
    second = keep_run("second", lora_config={"r": 4}, **{start: path})
    runs = str(tmp_path / "runs")
    with pytest.raises(StorageError, match=f"is what other runs start from: {second.folder}"):
        registry.delete_model("first", runs)
    assert first.config.exists()
    assert registry.delete_model("second", runs).id == "second" and not second.folder.exists()
    registry.delete_model("first", runs)
    assert registry.list_models(runs) == []


def test_models_in_a_bucket(door, keep_run):
    place = "s3://forgebook/kept"
    for name, values in (("a", {}), ("bb", {"initial_base_model_ckpt_path": f"{place}/a/checkpoints/epoch-1"})):
        upload.upload_run(keep_run(name, **values).folder, f"{place}/{name}", print)
    assert [model.storage_uri for model in registry.list_models(place)] == [f"{place}/a", f"{place}/bb"]
    assert registry.get_model(f"{place}/a").figures == {"eval_loss": 0.5}
    with pytest.raises(StorageError, match=f"is what other runs start from: {place}/bb"):
        registry.delete_model(f"{place}/a")
    storage.save_json(storage.find_run(f"{place}/a"), "evaluation.json", {"exact_match_after": 0.75})
    assert registry.get_model(f"{place}/a").figures == {"eval_loss": 0.5, "exact_match_after": 0.75}
    registry.delete_model(f"{place}/bb")
    registry.delete_model(f"{place}/a")
    assert registry.list_models(place) == []
    with pytest.raises(StorageError, match="there is no such bucket"):
        registry.list_models("s3://no-such-bucket/runs")
