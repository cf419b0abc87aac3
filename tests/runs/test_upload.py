"""A run in a bucket: complete or absent there, and the same run wherever it is continued."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from conftest import REPOSITORY, TINY_MODEL, uneven_rows
from forgebook.cli.main import main
from forgebook.config.parse import CONFIG_HEADER
from forgebook.errors import StorageError
from forgebook.runs import object_store, upload
from forgebook.runs import run as storage
from forgebook.runs.metrics import read_metrics
from forgebook.runs.run_files import write_marker

STATE = re.compile(r"resume/step-\d+/manifest\.json")
URI = "s3://forgebook/runs/run"


@pytest.fixture
def run_folder(door, tmp_path, monkeypatch):
    """A run folder as training leaves it after a checkpoint, and quick looks and pauses."""
    monkeypatch.setattr(upload, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(upload, "PAUSES", (0.05,) * 4)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    object_store.remove_folder(URI)
    folder = tmp_path / "run"
    write(folder / "config.yaml", f"{CONFIG_HEADER}\na: 1\n")
    write(folder / "data_report.json", "{}")
    write(folder / "metrics.jsonl", '{"step": 1}\n{"step"')
    write(folder / "tokens/train.npz", "made again")
    write(folder / "logs/worker-0.log", "log\n")
    write(folder / "checkpoints/epoch-1/adapter_model.safetensors", "epoch 1")
    write(folder / "resume/step-1/place.json", "{}")
    write(folder / "resume/.writing-step-2/state.pt", "half")
    return folder


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def until(is_so):
    while not is_so():
        time.sleep(0.02)


def test_what_a_run_writes_is_uploaded_beside_it_and_comes_back(run_folder, tmp_path):
    warned = []
    with upload.uploading(run_folder, URI, warned.append):
        assert {"config.yaml", "data_report.json"} <= object_store.list_files(URI).keys()
        write(run_folder / "resume/.step-2/place.json", '{"step": 2}')
        os.rename(run_folder / "resume/.step-2", run_folder / "resume/step-2")
        shutil.rmtree(run_folder / "resume/step-1")
        until(lambda: "resume/step-2/manifest.json" in object_store.list_files(URI))
        write(run_folder / "metrics.jsonl", '{"step": 1}\n{"step": 2}\n')
    there = object_store.list_files(URI)
    assert not any(name.startswith(("tokens/", "resume/step-1", "resume/.", ".")) for name in there)
    assert "logs/worker-0.log" in there and warned == []
    upload.download_run(URI, tmp_path / "other")
    local = files_of(run_folder)
    assert files_of(tmp_path / "other") == {
        name: local[name]
        for name in (
            "config.yaml", "data_report.json", "metrics.jsonl", "checkpoints/epoch-1/adapter_model.safetensors",
            "resume/step-2/place.json",
        )
    }  # fmt: skip
    upload.download_run(URI, tmp_path / "to-look-at", with_state=False)
    assert not (tmp_path / "to-look-at/resume").exists()


def test_half_a_line_is_not_uploaded(run_folder):
    upload.upload_run(run_folder, URI, print)
    assert object_store.read_file(f"{URI}/metrics.jsonl") == b'{"step": 1}\n'


def test_an_upload_that_was_interrupted_is_not_taken(run_folder, door, tmp_path):
    """The state of step 1 is there; that of step 2 breaks off: step 1 is continued from, and stays until 2 is there."""
    upload.upload_run(run_folder, URI, print)
    os.rename(run_folder / "resume/step-1", run_folder / "resume/step-2")
    door.answers = lambda method, path: "slow down" if method == "PUT" and "step-2/place" in path else None
    with pytest.raises(StorageError, match=rf"The run is not complete in the bucket; all of it is in {run_folder}"):
        upload.upload_run(run_folder, URI, print)
    upload.download_run(URI, tmp_path / "other")
    assert [path.name for path in (tmp_path / "other/resume").iterdir()] == ["step-1"]
    door.answers = lambda method, path: None
    upload.upload_run(run_folder, URI, print)
    assert "resume/step-1/manifest.json" not in object_store.list_files(URI)
    upload.download_run(URI, tmp_path / "other")
    assert [path.name for path in (tmp_path / "other/resume").iterdir()] == ["step-2"]


def test_a_bucket_that_fails_for_a_while_does_not_stop_a_run(run_folder, door):
    warned = []
    with upload.uploading(run_folder, URI, warned.append):
        door.answers = lambda method, path: "slow down"
        write(run_folder / "checkpoints/epoch-2/adapter_model.safetensors", "epoch 2")
        until(lambda: warned)
        door.answers = lambda method, path: None
        until(lambda: len(warned) == 2)
    assert "overloaded" in warned[0] and "training continues" in warned[0] and "can be written again" in warned[1]
    assert object_store.read_manifest(f"{URI}/checkpoints/epoch-2")


def test_a_bucket_that_does_not_recover_is_an_error_that_names_the_local_run(run_folder, door):
    warned = []
    with (
        pytest.raises(StorageError, match=f"all of it is in {run_folder}"),
        upload.uploading(run_folder, URI, warned.append),
    ):
        door.answers = lambda method, path: "slow down"
        write(run_folder / "summary.json", "{}")
    assert "retrying in" in warned[-1] and (run_folder / "summary.json").exists()


def test_a_bucket_that_cannot_be_written_is_reported_at_once(run_folder, door):
    door.answers = lambda method, path: "no right" if method == "PUT" else None
    with (
        pytest.raises(StorageError, match="could not be written: the credentials do not allow it"),
        upload.uploading(run_folder, URI, print),
    ):
        pytest.fail("the block was entered")


def test_what_goes_wrong_in_a_run_is_not_hidden(run_folder, door):
    with pytest.raises(ValueError, match="the run's own"), upload.uploading(run_folder, URI, print):
        door.answers = lambda method, path: "no right"
        raise ValueError("the run's own")


def test_a_slow_upload_outlives_the_deletion_of_what_it_uploads(run_folder, door):
    """The state is replaced while its file is on the way: it arrives whole all the same."""

    def answer(method, path):
        if method == "PUT" and path.endswith("step-1/place.json"):
            shutil.rmtree(run_folder / "resume/step-1", ignore_errors=True)
        return None

    door.answers = answer
    upload.upload_run(run_folder, URI, print)
    assert object_store.read_manifest(f"{URI}/resume/step-1")


def test_the_run_that_is_further_ahead_is_kept(run_folder):
    upload.upload_run(run_folder, URI, print)
    write(run_folder / "metrics.jsonl", '{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    before = files_of(run_folder)
    upload.download_run(URI, run_folder)
    assert files_of(run_folder) == before
    write(run_folder / "config.yaml", "a: 2\n")  # another run of that name: the bucket's counts
    upload.download_run(URI, run_folder)
    assert (run_folder / "config.yaml").read_text() == f"{CONFIG_HEADER}\na: 1\n"
    assert (run_folder / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_run_deleted_from_the_bucket_is_deleted_here(run_folder):
    write_marker(run_folder)
    upload.upload_run(run_folder, URI, print)
    storage.remove_run(storage.Run(run_folder, URI))
    assert object_store.list_files(URI) == {} and not run_folder.exists()
    write(run_folder / "config.yaml", f"{CONFIG_HEADER}\na: 1\n")
    upload.download_run(URI, run_folder)
    assert not run_folder.exists()


def test_a_run_in_a_bucket_of_google(google, run_folder, tmp_path):
    uri = "gs://forgebook/runs/run"
    with pytest.raises(StorageError, match="there is no such bucket"):
        upload.upload_run(run_folder, "gs://no-such-bucket/run", print)
    write_marker(run_folder)
    upload.upload_run(run_folder, uri, print)
    upload.download_run(uri, tmp_path / "other")
    assert files_of(tmp_path / "other/checkpoints") == files_of(run_folder / "checkpoints")
    assert (tmp_path / "other/resume/step-1/place.json").exists()
    assert object_store.list_folders("gs://forgebook/runs") == ["run"]
    storage.remove_run(storage.Run(run_folder, uri))
    assert object_store.list_files(uri) == {}


# With the command -------------------------------------------------------------------------------------


@pytest.fixture
def command(s3, tmp_path):
    """A function that makes the command of a small run whose data and folder are in the bucket."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in uneven_rows(48)))
    for name in ("train", "valid"):
        s3.upload_file(str(rows), "forgebook", f"data/{name}.jsonl")

    def make(run_name):
        path = tmp_path / f"{run_name}.yaml"
        settings = {
            "model_id": str(TINY_MODEL), "train_path": "s3://forgebook/data/train.jsonl", "num_epochs": 3,
            "valid_path": "s3://forgebook/data/valid.jsonl", "storage_path": "s3://forgebook/runs", "num_devices": 0,
            "task": "instruction_tuning", "lora_config": {"r": 4, "lora_dropout": 0.1}, "deepspeed": None,
            "train_batch_size_per_device": 2, "eval_batch_size_per_device": 8, "learning_rate": 1e-3,
            "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 8}, "num_checkpoints_to_keep": 2,
        }  # fmt: skip
        path.write_text(json.dumps(settings))
        return [sys.executable, str(REPOSITORY / "main.py"), str(path)]

    return make


@pytest.mark.slow
def test_a_run_in_a_bucket_resumes_anywhere(command, door, tmp_path, monkeypatch, capsys):
    """Undisturbed; then with 503s, SIGKILL and the loss of the machine's disk; then read on a third machine."""
    monkeypatch.setenv("FORGEBOOK_CACHE", str(tmp_path / "first"))
    undisturbed = subprocess.run(command("undisturbed"), capture_output=True, text=True)
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert "stored in        s3://forgebook/runs/undisturbed" in undisturbed.stdout

    uri = "s3://forgebook/runs/disturbed"
    door.answers = busy_then_closed(door, uri.removeprefix("s3:/"))
    first = subprocess.Popen(command("disturbed"), stdout=subprocess.DEVNULL)
    while first.poll() is None and not has_state(uri):
        time.sleep(0.02)
    first.kill()
    assert first.wait() == -signal.SIGKILL, "the run had ended before it could be killed"
    assert door.refused >= 4
    door.answers = lambda method, path: None
    shutil.rmtree(tmp_path / "first")
    again = subprocess.run(command("disturbed"), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert int(re.search(r"resumed after step (\d+)", again.stdout)[1]) < 72
    assert len(losses_in(uri)) == 72 and losses_in(uri) == losses_in("s3://forgebook/runs/undisturbed")
    [there] = (tmp_path / "first/runs").glob("*/disturbed")

    monkeypatch.setenv("FORGEBOOK_CACHE", str(tmp_path / "second"))
    run = storage.find_run(uri)
    assert run.is_complete and read_metrics(run.metrics)[-1]["step"] == 72
    assert files_of(run.checkpoints) == files_of(there / "checkpoints")
    undisturbed = storage.find_run("s3://forgebook/runs/undisturbed")
    assert weights_of(run) == weights_of(undisturbed)
    assert main(command("disturbed")[2:]) == 0 and f"{uri} is complete already" in capsys.readouterr().out


def busy_then_closed(door, run):
    """Refuse each kind of file of a training state once, let one state through, then nothing: the run cannot end."""
    names, manifests = set(), []

    def answer(method, path):
        if method not in ("PUT", "POST") or not path.startswith(f"{run}/"):
            return None
        if len(manifests) == 2:  # not complete, then complete
            return "slow down"
        if not path.startswith(f"{run}/resume/"):
            return None
        if (name := path.rpartition("/")[2]) not in names:
            names.add(name)
            return "slow down"
        manifests.extend([path] * path.endswith("manifest.json"))
        return None

    return answer


def has_state(uri):
    """Tell whether a bucket's run has a complete training state."""
    manifests = filter(STATE.fullmatch, object_store.list_files(uri))
    try:
        return any(object_store.read_manifest(f"{uri}/{name.rpartition('/')[0]}") for name in manifests)
    except json.JSONDecodeError:  # this server, unlike S3, shows what it has of an object that is being written
        return False


def losses_in(uri):
    rows = [json.loads(line) for line in object_store.read_file(f"{uri}/metrics.jsonl").splitlines()]
    return [row["train_loss_batch"] for row in rows if "grad_norm" in row]


def weights_of(run):
    return {name: content for name, content in files_of(run.checkpoints).items() if name.endswith(".safetensors")}
