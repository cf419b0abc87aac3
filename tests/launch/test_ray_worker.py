"""What a Ray worker does before and after the loop: whose folder it works in, what it saves where, what it reports."""

import json

import pytest

from conftest import LORA, losses_of, uneven_rows
from forgebook.config.parse import dump_config
from forgebook.data import token_store
from forgebook.errors import ResourceError
from forgebook.launch.fine_tune import fine_tune
from forgebook.launch.ray_worker import Job, ReportReceiver, sees_folder
from forgebook.planning.prepare import prepare
from forgebook.runs import atomic, object_store, upload, worker_upload
from forgebook.runs.metrics import read_metrics
from forgebook.runs.run import Run
from support_worker import start_workers

URI = "s3://forgebook/both"


def make_job(config, folder, **values) -> Job:
    """Write a run folder as the process that starts a run does, and make its workers' job."""
    run = Run(folder, values.pop("uri", None))
    prepared = prepare(config, run)
    (folder / "logs").mkdir(parents=True)
    run.config.write_text(dump_config(prepared.config))
    for name in ("train", "valid"):
        token_store.save_view(getattr(prepared, name), run.tokens / f"{name}.npz")
        token_store.collect_shards(run.tokens / f"{name}.npz", run.tokens / "shards")
    atomic.write_json(run.data_report, prepared.report)
    job = Job(prepared.config, run, "mark", str(folder), **values)
    job.write_mark()
    return job


def results_of(workers, folder) -> list[dict]:
    for worker in workers:
        assert worker.wait(timeout=240) == 0
    return [json.loads((folder / f"{k}.json").read_text()) for k in range(len(workers))]


@pytest.mark.slow
def test_two_machines_that_share_a_bucket_alone(make_config, write_rows, door, tmp_path):
    """Equal to one process; what the machines wrote is in the bucket, whole, and nothing of it is left on them."""
    settings = {
        "train_path": write_rows(uneven_rows(48), "many.jsonl"), "lora_config": LORA, "num_epochs": 1,
        "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 3}, "num_checkpoints_to_keep": 1,
    }  # fmt: skip
    alone = fine_tune(make_config(run_name="alone", **settings))
    config = make_config(run_name="both", num_devices=2, train_batch_size_per_device=4, **settings)
    job = make_job(config, tmp_path / "here/both", uri=URI, through_bucket=True)
    worker_upload.send_inputs(job.run.folder, URI, print)
    caches = [tmp_path / "cache-0", tmp_path / "cache-1"]
    results = results_of(start_workers(job, tmp_path, caches), tmp_path)
    assert [result["error"] for result in results] == [None, None]
    # Rank 0 reports the checkpoint where it is, and its progress for whom cannot read it.
    assert results[0]["checkpoint"] == "forgebook/both/checkpoints/step-6" and results[1]["checkpoint"] is None
    assert results[0]["metrics"]["step"] == 6 and results[0]["metrics"]["eval_loss"] > 0
    log = tmp_path / "progress.jsonl"
    ReportReceiver(log).after_report(None, [result["metrics"] for result in results], None)
    assert [event["step"] for event in read_metrics(log) if event["kind"] == "step"][-1] == 6
    assert all(not list(cache.glob("workers/*")) for cache in caches)

    worker_upload.fetch_logs(URI, job.run.folder)
    assert {path.name for path in job.run.logs.glob("worker-*")} == {"worker-0.log", "worker-1.log"}
    worker_upload.remove_inputs(URI)
    upload.download_run(URI, job.run.folder)
    assert len(losses_of(job.run)) == 6 and losses_of(job.run) == pytest.approx(losses_of(alone), abs=1e-4)
    [checkpoint] = job.run.checkpoints.iterdir()
    [state] = job.run.resume.iterdir()
    assert (checkpoint / "adapter_model.safetensors").exists() and state.name == "step-6"
    assert {path.name for path in state.glob("random-*")} == {"random-0.pt", "random-1.pt"}
    assert not any(name.startswith(".workers") for name in object_store.list_files(URI))


@pytest.mark.slow
def test_full_weights_continue_with_another_number_of_workers(make_config, tmp_path):
    """Stopped with two workers on a shared disk, continued by one: equal to one process all the way."""
    alone = fine_tune(make_config(run_name="alone", num_epochs=2))
    settings = {"num_devices": {"min": 1, "max": 2}, "train_batch_size_per_device": 4, "num_epochs": 2}
    job = make_job(make_config(run_name="both", **settings), tmp_path / "here/both")
    (job.run.folder / ".stop").touch()
    results = results_of(start_workers(job, tmp_path, [tmp_path / "cache"] * 2), tmp_path)
    assert results[0]["error"] == results[1]["error"] and "step 1 is saved" in results[0]["error"]
    (job.run.folder / ".stop").unlink()
    [result] = results_of(start_workers(job, tmp_path, [tmp_path / "cache"]), tmp_path)
    assert result["error"] is None and result["metrics"]["step"] == 6
    assert result["checkpoint"] == str(job.run.checkpoints / "epoch-2")
    workers = [event["workers"] for event in read_metrics(job.run.logs / "progress.jsonl") if "workers" in event]
    assert workers == [2, 1] and losses_of(job.run) == pytest.approx(losses_of(alone), abs=1e-3)


@pytest.mark.slow
def test_a_machine_that_does_not_see_the_folder_names_storage_path(make_config, tmp_path):
    """The error is returned: Ray would start a worker that raises it again and again."""
    job = make_job(make_config(run_name="both", num_devices=1), tmp_path / "here/both")
    (job.run.folder / ".mark").unlink()
    [result] = results_of(start_workers(job, tmp_path, [tmp_path / "cache"]), tmp_path)
    assert "set storage_path to a bucket" in result["error"] and str(job.run.folder) in result["error"]


def test_only_the_mark_of_this_start_counts(tmp_path):
    """A folder of that name on another machine's own disk is not the run's."""
    assert not sees_folder(tmp_path, "new")
    (tmp_path / ".mark").write_text("old")
    assert not sees_folder(tmp_path, "new") and sees_folder(tmp_path, "old")


def test_a_mistake_that_a_worker_raises_ends_the_run(tmp_path):
    """Raised where Ray calls it, it keeps Ray from starting the workers again; other errors do not."""
    receiver = ReportReceiver(tmp_path / "progress.jsonl")
    mistake = ResourceError("the GPU ran out of memory")
    receiver.after_exception(None, {0: RuntimeError("Connection closed by peer")})
    with pytest.raises(ResourceError) as raised:
        receiver.after_exception(None, {0: RuntimeError("Connection closed by peer"), 1: mistake})
    assert raised.value is mistake
