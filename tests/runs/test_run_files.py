"""What makes a folder a run's, and which files in it are the run's."""

import json
from unittest.mock import Mock

import pytest

from forgebook.config.parse import dump_config, load_config
from forgebook.errors import StorageError, TrainingError
from forgebook.launch import fine_tune as launch
from forgebook.runs import object_store, registry, run_files
from forgebook.runs import run as storage
from forgebook.runs.run import Run

MARK = json.dumps({"program": "forgebook", "format": 1})


def put(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "is_run"),
    [
        ({run_files.MARKER: MARK}, True),
        ({run_files.MARKER: MARK, "config.yaml": "a: 1"}, True),
        ({"config.yaml": "HEADER", "metrics.jsonl": ""}, True),  # from before the marker
        ({"config.yaml": "HEADER", "tokens/train.npz": ""}, True),
        ({run_files.MARKER: "", "config.yaml": "HEADER", "summary.json": "{}"}, True),
        ({"config.yaml": "HEADER", "notes.txt": ""}, False),  # a copy of a run's config
        ({"config.yaml": "model: mine", "metrics.jsonl": "", "summary.json": "{}"}, False),
        ({"config.yaml": "", "data_report.json": ""}, False),
        ({run_files.MARKER: "[]", "config.yaml": "a: 1"}, False),
        ({run_files.MARKER: '{"program": "other"}', "config.yaml": "a: 1"}, False),
        ({"summary.json": "{}"}, False),
        ({}, False),
    ],
)
def test_a_folder_is_a_runs_by_its_marker_or_by_what_only_runs_wrote_before_it(make_config, files, is_run):
    texts = {name: dump_config(make_config()) if text == "HEADER" else text for name, text in files.items()}
    assert run_files.is_run_folder(texts.__contains__, texts.__getitem__) is is_run


@pytest.mark.parametrize(
    ("name", "is_own"),
    [
        ("config.yaml", True),
        ("checkpoints/epoch-1/adapter_model.safetensors", True),
        ("checkpoints/epoch-1/model-00001-of-00002.safetensors", True),
        ("checkpoints/.writing-epoch-2/tokenizer.json", True),
        ("resume/step-6/deepspeed/mp_rank_00_model_states.pt", True),
        ("logs/worker-0.log", True),
        (".summary.json.4711", True),
        ("evaluation/mistakes.jsonl", True),
        ("notes.txt", False),
        ("checkpoints/epoch-1/notes.txt", False),
        ("checkpoints/config.json", False),
        ("resume/step-6/zero_to_torch.py", True),
        ("logs/old/worker-0.log", False),
        ("data/train.jsonl", False),
        (".git/config", False),
        (".env", False),
        ("model.gguf", False),
    ],
)
def test_files_of_a_run_are_known_by_name(name, is_own):
    assert run_files.is_run_file(name) is is_own


USERS_OWN = {"config_dot_yaml": "lr: 1\n", "thesis_dot_txt": "years of work", "metrics_dot_jsonl": "{}\n"}


@pytest.mark.parametrize("on_existing", ["overwrite", "resume", "fail"])
def test_a_folder_of_the_users_own_is_no_run(make_config, tmp_path, on_existing):
    folder = put(tmp_path / "runs/mine", **USERS_OWN)
    config = make_config(run_name="mine", storage_path=str(tmp_path / "runs"), on_existing=on_existing)
    with pytest.raises(StorageError, match=r"runs/mine exists and is not a run folder .*choose another run_name"):
        launch.fine_tune(config)
    with pytest.raises(StorageError, match=r"no model '.*mine'"):
        registry.delete_model(str(folder))
    with pytest.raises(StorageError, match="is not a run folder: nothing was deleted"):
        storage.remove_run(Run(folder))
    assert registry.list_models(str(tmp_path / "runs")) == []
    assert len(list(folder.iterdir())) == 3


def test_files_of_the_user_in_a_run_are_kept_and_named(make_run, tmp_path):
    run = make_run("run")
    put(
        run.folder, notes_dot_txt="", checkpoints__epoch_1__notes_dot_txt="", checkpoints__epoch_1__config_dot_json="{}"
    )
    target = put(tmp_path / "elsewhere", data_dot_txt="")
    (run.folder / "data").symlink_to(target)
    kept = []
    registry.delete_model("run", str(tmp_path / "runs"), kept.extend)
    assert kept == ["checkpoints/epoch_1/notes.txt", "data", "notes.txt"]
    left = {path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*") if not path.is_dir()}
    assert left == {"checkpoints/epoch_1/notes.txt", "notes.txt"} and (target / "data.txt").exists()
    assert registry.list_models(str(tmp_path / "runs")) == []


def test_files_of_the_user_in_a_bucket_are_kept(door, make_run):
    uri = "s3://forgebook/kept/run"
    for path in make_run("run").folder.rglob("*.*"):
        object_store.write_file(f"{uri}/{path.name}", path.read_bytes())
    object_store.write_file(f"{uri}/notes.txt", b"")
    object_store.write_file("s3://forgebook/kept/mine/config.yaml", b"lr: 1")
    with pytest.raises(StorageError, match="no model"):
        registry.delete_model("s3://forgebook/kept/mine")
    kept = []
    registry.delete_model(uri, on_kept=kept.extend)
    assert kept == ["notes.txt"] and set(object_store.list_files(uri)) == {"notes.txt"}


def test_overwriting_a_run_keeps_the_users_files(make_run, capsys, monkeypatch):
    run = make_run("run", num_devices=0)
    put(run.folder, notes_dot_txt="", loss_dot_png="")
    config = load_config(run.config, ["on_existing=overwrite"])
    monkeypatch.setattr(launch, "_run_here", Mock(side_effect=TrainingError("not in this test")))
    with pytest.raises(TrainingError, match="not in this test"):
        launch.fine_tune(config)
    assert "because no run wrote it: notes.txt" in " ".join(capsys.readouterr().out.split())
    assert {"notes.txt", "config.yaml", run_files.MARKER} <= {path.name for path in run.folder.iterdir()}
    assert not run.is_complete and not run.loss_curve.exists()


@pytest.mark.parametrize(("name", "content"), [("data_report.json", ""), ("data_report.json", "{}")])
def test_training_on_a_run_with_a_damaged_file_is_a_sentence(make_run, name, content):
    run = make_run("run", num_devices=0, context_length=1024)
    run.summary.unlink()
    (run.folder / name).write_text(content)
    with pytest.raises(StorageError, match=rf"{name} is damaged: .*the run's checkpoints can be used"):
        launch.fine_tune(load_config(run.config))
