"""A run that its workers upload: what they fetch, and what counts as saved when several machines save it."""

import time

import pytest

from forgebook.errors import StorageError
from forgebook.runs import object_store, upload, worker_upload

URI = "s3://forgebook/carried"


@pytest.fixture
def run_folder(tmp_path, door):
    """A run's folder as it is before its workers start, sent to the bucket."""
    folder = tmp_path / "here"
    (folder / "tokens/shards").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 1")
    (folder / "tokens/train.npz").write_bytes(b"view")
    (folder / "tokens/shards/a.arrow").write_bytes(b"shard")
    object_store.remove_folder(URI)
    worker_upload.send_inputs(folder, URI, print)
    return folder


def save(machine, name: str, **contents: str) -> dict:
    """Write a folder on one machine and send it."""
    folder = machine / name
    folder.mkdir(parents=True)
    for file, content in contents.items():
        (folder / file).write_text(content)
    return worker_upload.send_folder(folder, f"{URI}/{name}")


def test_a_worker_starts_from_the_newest_complete_state(run_folder, tmp_path):
    for step in (5, 10):
        worker_upload.finish_folder(
            f"{URI}/resume/step-{step}", save(tmp_path / "old", f"resume/step-{step}", state="x")
        )
    worker_upload.start_folder(f"{URI}/resume/step-15")
    save(tmp_path / "old", "resume/step-15", state="half")
    machine = tmp_path / "machine"
    (machine / "resume/step-15").mkdir(parents=True)  # what a worker that was killed left
    worker_upload.fetch_inputs(URI, machine)
    assert [path.name for path in (machine / "resume").iterdir()] == ["step-10"]
    assert (machine / "config.yaml").read_text() == "seed: 1"
    assert (machine / ".tokens/shards/a.arrow").read_bytes() == b"shard"
    assert (machine / "tokens/train.npz").read_bytes() == b"view"


def test_shards_are_fetched_once_per_machine(run_folder, door, tmp_path):
    worker_upload.fetch_inputs(URI, tmp_path / "machine")
    (tmp_path / "machine/tokens/train.npz").write_bytes(b"points at the shards of this machine")
    paths = []
    door.answers = lambda method, path: paths.append(path)
    worker_upload.fetch_inputs(URI, tmp_path / "machine")
    assert paths and not any("a.arrow" in path for path in paths)


def test_a_folder_of_two_machines_is_complete_when_rank_0_says_so(run_folder, tmp_path):
    name = "resume/step-5"
    worker_upload.start_folder(f"{URI}/{name}")
    files = save(tmp_path / "one", name, rank_0="a")
    files |= save(tmp_path / "two", name, rank_1="b")
    there = object_store.list_files(URI)
    assert {f"{name}/rank_0", f"{name}/rank_1"} <= there.keys() and upload.complete_folders(URI, there) == []
    worker_upload.finish_folder(f"{URI}/{name}", files)
    upload.download_run(URI, run_folder)
    assert {path.name for path in (run_folder / name).iterdir()} == {"rank_0", "rank_1"}


def test_a_folder_saved_again_is_not_mixed_with_the_first(run_folder, tmp_path):
    """Workers that were killed repeat steps: until the new files are all there, there is no such folder."""
    name = "checkpoints/epoch-1"
    worker_upload.finish_folder(f"{URI}/{name}", save(tmp_path / "first", name, weights="old"))
    worker_upload.start_folder(f"{URI}/{name}")
    assert upload.complete_folders(URI, object_store.list_files(URI)) == []


def test_a_busy_bucket_holds_a_save_up_and_ends_the_run_when_it_stays_busy(
    run_folder, door, tmp_path, monkeypatch, capsys
):
    def pauses():
        yield 0.01
        door.answers = lambda method, path: None
        yield 0.02

    name = "checkpoints/epoch-1"
    monkeypatch.setattr(upload, "PAUSES", pauses())
    door.answers = lambda method, path: "slow down"
    files = save(tmp_path / "one", name, weights="new")
    worker_upload.finish_folder(f"{URI}/{name}", files)
    assert upload.complete_folders(URI, object_store.list_files(URI)) == [name]
    assert "retrying in 0.01 s" in capsys.readouterr().out
    monkeypatch.setattr(upload, "PAUSES", (0.01,))
    door.answers = lambda method, path: "slow down"
    with pytest.raises(StorageError, match="overloaded") as failed:
        save(tmp_path / "one", "checkpoints/epoch-2", weights="newer")
    assert failed.value.exit_code == 2


def test_metrics_are_sent_when_they_have_changed(run_folder, door, tmp_path):
    machine = tmp_path / "machine"
    worker_upload.fetch_inputs(URI, machine)
    (machine / "metrics.jsonl").write_text('{"step": 1}\n')
    puts = []
    door.answers = lambda method, path: puts.append(path) if method == "PUT" else None
    for _ in range(2):
        worker_upload.send_run_files(machine, URI)
    assert len(puts) == 1 and puts[0].startswith("/forgebook/carried/metrics.jsonl")
    assert object_store.read_file(f"{URI}/metrics.jsonl") == b'{"step": 1}\n'


def test_a_request_to_stop_and_the_logs_pass_through_the_bucket(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_upload, "LOOK_SECONDS", 0.1)
    here, there = run_folder / ".stop", tmp_path / "machine/.stop"
    (tmp_path / "machine/logs").mkdir(parents=True)
    (tmp_path / "machine/logs/worker-1.log").write_text("last words")
    with worker_upload.passing_stop(here, URI), worker_upload.uploading_logs(tmp_path / "machine", URI, there):
        time.sleep(0.5)
        assert not there.exists()
        here.touch()
        until = time.monotonic() + 20
        while not there.exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert there.exists()
    worker_upload.fetch_logs(URI, run_folder)
    assert (run_folder / "logs/worker-1.log").read_text() == "last words"


def test_what_only_the_workers_needed_is_no_part_of_the_run(run_folder, tmp_path):
    upload.download_run(URI, tmp_path / "elsewhere")
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"config.yaml"}
    worker_upload.remove_inputs(URI)
    assert set(object_store.list_files(URI)) == {"config.yaml"}
    with pytest.raises(StorageError, match="start the run again"):
        worker_upload.fetch_inputs(URI, tmp_path / "machine")
