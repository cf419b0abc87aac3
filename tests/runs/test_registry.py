"""The fine-tuned models under a storage path: listed, shown and deleted, on disk and in a bucket."""

import pytest

from conftest import TINY_MODEL
from forgebook.errors import StorageError
from forgebook.runs import atomic, registry, upload
from forgebook.runs import run as storage


def test_models_are_listed_with_what_is_on_record(make_run, tmp_path):
    second = make_run("bb", lora_config={"r": 4}, custom_model_tag="tag")
    first = make_run("a", eval_loss=0.25)
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
def test_what_other_runs_start_from_is_not_deleted(make_run, tmp_path, start, written):
    first = make_run("first")
    path = str(first.checkpoints / "epoch-1") if written == "absolute" else "runs/first/checkpoints/epoch-1"
    second = make_run("second", lora_config={"r": 4}, **{start: path})
    runs = str(tmp_path / "runs")
    with pytest.raises(StorageError, match=f"is what other runs start from: {second.folder}"):
        registry.delete_model("first", runs)
    assert first.config.exists()
    assert registry.delete_model("second", runs).id == "second" and not second.folder.exists()
    registry.delete_model("first", runs)
    assert registry.list_models(runs) == []


def test_models_in_a_bucket(door, make_run):
    place = "s3://forgebook/kept"
    for name, values in (("a", {}), ("bb", {"initial_base_model_ckpt_path": f"{place}/a/checkpoints/epoch-1"})):
        upload.upload_run(make_run(name, **values).folder, f"{place}/{name}", print)
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


def test_a_run_that_has_not_finished_is_listed_as_such(make_run):
    run = make_run("a")
    run.summary.unlink()
    [model] = registry.list_models(str(run.folder.parent))
    assert not model.is_complete and model.best_checkpoint is None and model.created_at


def test_an_id_that_several_models_have_is_not_guessed(make_run):
    first, second = (make_run(name, custom_model_tag="tag") for name in ("a", "bb"))
    with pytest.raises(StorageError, match=f"'tag' names 2 models: {first.folder}, {second.folder}"):
        registry.get_model("tag", str(first.folder.parent))


@pytest.mark.parametrize("name", ["summary.json", "evaluation.json", "config.yaml"])
@pytest.mark.parametrize("content", ["", "{", "model_id: [", "[]"])
def test_a_run_with_a_damaged_file_is_left_out_and_named(make_run, name, content):
    make_run("a")
    damaged = make_run("bb")
    (damaged.folder / name).write_text(content)
    reasons = []
    runs = str(damaged.folder.parent)
    assert [model.id for model in registry.list_models(runs, reasons.append)] == ["a"]
    assert len(reasons) == 1 and f"bb/{name} is damaged" in reasons[0]
    with pytest.raises(StorageError, match=rf"bb/{name} is damaged"):
        registry.get_model("bb", runs)
