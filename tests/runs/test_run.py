"""The run folder: opened, found and removed, on disk and in a bucket."""

import math
from pathlib import Path

import pytest

from conftest import TINY_MODEL
from forgebook.errors import StorageError
from forgebook.runs import object_store
from forgebook.runs import run as storage
from forgebook.runs.run_files import MARKER


def test_a_run_is_found_by_folder_and_by_name(make_run, monkeypatch, tmp_path):
    run = make_run("run")
    monkeypatch.chdir(tmp_path)
    assert storage.find_run("run") == storage.find_run(str(run.folder)) == run
    assert run.location == "runs/run" and run.is_complete
    with pytest.raises(StorageError, match="no run 'other'"):
        storage.find_run("other")
    with pytest.raises(StorageError, match="runs are stored in a local folder, s3:// or gs://"):
        storage.find_run("https://host/runs/run")
    with pytest.raises(StorageError, match="runs are stored in a local folder, s3:// or gs://"):
        storage.run_at("hf://owner/name", "run")  # a folder of that name is not meant


def test_a_checkpoint_is_the_best_one_the_named_one_or_a_model_folder(make_run, monkeypatch, tmp_path):
    run = make_run("run")
    monkeypatch.chdir(tmp_path)
    for name in ("epoch-1", "epoch-2", ".writing-epoch-3"):
        (run.checkpoints / name).mkdir(parents=True)
    assert storage.find_checkpoint("run") == storage.best_checkpoint(run) == run.checkpoints / "epoch-1"
    assert storage.find_checkpoint("run", "epoch-2") == run.checkpoints / "epoch-2"
    assert storage.find_checkpoint(str(TINY_MODEL)) == TINY_MODEL
    for name in ("epoch-3", "../checkpoints"):
        with pytest.raises(StorageError, match=f"no checkpoint '{name}'; it has epoch-1, epoch-2$"):
            storage.find_checkpoint("run", name)
    run.summary.unlink()
    with pytest.raises(StorageError, match="the run run has not finished"):
        storage.find_checkpoint("run")
    assert storage.find_checkpoint("run", "epoch-2").name == "epoch-2"


@pytest.mark.parametrize("content", ["", "{}", '{"best_checkpoint": ', '{"best_checkpoint": "checkpoints/gone"}'])
def test_a_damaged_summary_is_a_sentence_and_named_checkpoints_can_be_used(make_run, content):
    run = make_run("run")
    (run.checkpoints / "epoch-1").mkdir(parents=True)
    run.summary.write_text(content)
    with pytest.raises(
        StorageError, match=r"summary\.json (is damaged: .*checkpoint=epoch-1|names .*the run has epoch-1)"
    ):
        storage.find_checkpoint(str(run.folder))
    assert storage.find_checkpoint(str(run.folder), "epoch-1").name == "epoch-1"


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("losses", "ranked"),
    [
        ({"a": 3.0, "b": 1.0, "c": 2.0}, ["b", "c", "a"]),
        ({"a": 3.0, "b": NAN, "c": 2.0}, ["c", "a", "b"]),
        ({"a": NAN, "b": 2.0}, ["b", "a"]),
        ({"a": 1.0, "b": NAN, "c": 0.5, "d": NAN}, ["c", "a", "d", "b"]),
        ({"a": INF, "b": None, "c": 9.0}, ["c", "b", "a"]),
        ({"a": None, "b": None}, ["b", "a"]),  # without evaluation: the newest
        ({"a": 1.0, "b": 1.0}, ["b", "a"]),
        ({"a": -INF, "b": 1.0}, ["b", "a"]),
    ],
)
def test_checkpoints_are_ranked_by_loss_and_one_that_diverged_is_last(losses, ranked):
    assert storage.rank_checkpoints(losses) == ranked


def test_a_config_without_a_name_has_no_run(make_config):
    with pytest.raises(StorageError, match="run_name"):
        storage.open_run(make_config().model_copy(update={"run_name": None}))


def test_a_run_is_removed_whole(make_run):
    run = make_run("run")
    storage.save_json(run, "evaluation/a.json", {"a": 1})
    assert (run.folder / "evaluation/a.json").exists()
    storage.remove_run(run)
    assert not run.folder.exists()


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_prompts_that_are_answered_already_are_reported(door, make_config, tmp_path, place):
    path = str(tmp_path / "runs") if place == "folder" else "s3://forgebook/there"
    config = make_config(storage_path=path, on_existing="fail")
    assert not storage.open_run(config).config.exists()
    write(f"{path}/run/notes.txt")
    with pytest.raises(
        StorageError, match=f"{'s3://' if place == 'bucket' else ''}.*/run exists and is not a run folder"
    ):
        storage.open_run(config)
    write(f"{path}/run/config.yaml")
    with pytest.raises(StorageError, match="/run exists and is not a run folder"):
        storage.open_run(config)
    write(f"{path}/run/{MARKER}", '{"program": "forgebook"}')
    with pytest.raises(StorageError, match=r"the run .*/run exists: choose another run_name"):
        storage.open_run(config)
    assert storage.open_run(make_config(storage_path=path)).config.exists()


def write(path, text="x"):
    if path.startswith("s3://"):
        object_store.write_file(path, text.encode())
    else:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
