"""A run on Ray Train: one worker per device, restarted where they fail; where they save.

    result = run_on_ray(config, run, output, uploads)

Workers run `forgebook.training.loop.train_loop` (`ray_worker`) and report to the process that started the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgebook import ray_cluster as cluster
from forgebook.config.blocks import PreferenceTuningConfig, needs_reference
from forgebook.config.schema import ResolvedConfig
from forgebook.data import token_store
from forgebook.errors import ForgebookError, ResourceError
from forgebook.reporting.console import warner
from forgebook.runs import upload, worker_upload
from forgebook.runs.run import Run
from forgebook.training import distributed

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem
    from rich.console import Console

    from forgebook.launch.ray_worker import Job

__all__ = ["run_on_ray"]

# How often a run with min_devices looks for machines that came back; taking them in is a restart from its last state.
RESIZE_SECONDS = 15.0
STOP_SECONDS = 20.0  # for workers to end after Ctrl-C, before they are killed
# Parts of Ray Train that start a process each, some three seconds of a core while the workers start: one hands out data
# of Ray Data, of which there is none; one frees what a dead controller held, in a cluster that outlives it.
_IDLE_CALLBACKS = frozenset({"DatasetsCallback"})
_CLEANER = "PlacementGroupCleanerCallback"


def run_on_ray(config: ResolvedConfig, run: Run, output: Console, uploads: contextlib.ExitStack) -> dict[str, Any]:
    """Run the loop in one Ray Train worker per device; failed workers are restarted and continue.

    uploads: where the upload of the run's folder to its bucket is entered, to end when the summary is written.
    """
    # Tokenization is over before workers start.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # oneDNN keeps a kernel for each of the last 1,024 shapes it met, some megabytes each: keep fewer.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    import ray

    if not ray.is_initialized():
        output.print("[dim]starting Ray[/dim]")
    cluster.start_ray()
    use_gpu = ray.cluster_resources().get("GPU", 0) > 0
    scorers = _scorers(config.preference_tuning_config)
    per_worker = _resources_per_worker(config.num_devices, scorers, use_gpu, ray.cluster_resources())
    per_worker |= config.worker_resources
    fewest = config.min_devices or config.num_devices
    _check_cluster(fewest, per_worker, ray.cluster_resources(), ray.available_resources())
    job = _make_job(config, run, per_worker)
    count = f"{config.min_devices} to {config.num_devices}" if config.min_devices else str(config.num_devices)
    output.print(f"[dim]starting {count} worker{'s' * (config.num_devices > 1)}[/dim]")
    if not job.through_bucket:
        uploads.enter_context(upload.uploading(run.folder, run.uri, warner(output)))
        return _fit(job, use_gpu, per_worker, output)
    assert run.uri is not None
    worker_upload.send_inputs(run.folder, run.uri, warner(output))
    try:
        with worker_upload.passing_stop(run.folder / distributed.STOP_FILE, run.uri):
            result = _fit(job, use_gpu, per_worker, output)
    finally:
        worker_upload.fetch_logs(run.uri, run.folder)
    worker_upload.remove_inputs(run.uri)
    upload.download_run(run.uri, run.folder)
    uploads.enter_context(upload.uploading(run.folder, run.uri, warner(output)))
    return result


def _make_job(config: ResolvedConfig, run: Run, per_worker: dict[str, float]) -> Job:
    """Decide where the workers save: in the run's folder if all machines see it, else in its bucket.

    Raises StorageError if some machine does not see the folder and there is no bucket.
    """
    from forgebook.launch import ray_worker

    job = ray_worker.Job(config, run, uuid.uuid4().hex, str(Path.cwd()))
    job.write_mark()
    if not cluster.is_joined():
        return job
    # Shards in this machine's cache are in no other's.
    for view in run.tokens.glob("*.npz"):
        token_store.collect_shards(view, run.tokens / "shards")
    see = functools.partial(ray_worker.sees_folder, run.folder, job.mark)
    blind = cluster.machines_without(see, per_worker)
    if blind and run.uri is None:
        raise ray_worker.storage_refusal(run, ", ".join(blind))
    # Machines that come later, to a run that may grow, are not known yet.
    through_bucket = run.uri is not None and (bool(blind) or config.min_devices is not None)
    if through_bucket and _scorers(config.preference_tuning_config):
        raise ResourceError(
            "logprob_processor_scaling_config needs a disk that all machines share, and not all of them see "
            f"{run.folder}: set storage_path to such a disk, or leave the block out"
        )
    return dataclasses.replace(job, through_bucket=through_bucket)


def _fit(job: Job, use_gpu: bool, per_worker: dict[str, float], output: Console) -> dict[str, Any]:
    """Run Ray Train, whose storage is the run's own, and return what the workers do.

    Raises the ForgebookError that they end with.
    """
    from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from forgebook.launch import ray_worker

    idle = _IDLE_CALLBACKS if cluster.is_joined() else _IDLE_CALLBACKS | {_CLEANER}

    class Trainer(TorchTrainer):
        """Ray Train without processes that would do nothing, which leaves Ctrl-C to Python.

        Its own handler of Ctrl-C ends the process with exit code 1 and no message.
        """

        controller: Any = None

        def _register_sigint_handler(self, controller: Any) -> None:
            self.controller = controller

        def _create_default_callbacks(self) -> list[Any]:
            return [one for one in super()._create_default_callbacks() if type(one).__name__ not in idle]

    config, run = job.config, job.run
    file_system, path = job.storage()
    trainer = Trainer(
        ray_worker.train_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=(config.min_devices, config.num_devices) if config.min_devices else config.num_devices,
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            use_gpu=use_gpu,
            resources_per_worker=per_worker,
        ),
        run_config=RunConfig(
            name=run.name,
            storage_path=path.rpartition("/")[0],
            storage_filesystem=file_system,
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=[ray_worker.ReportReceiver(run.logs / "progress.jsonl")],
        ),
    )
    if _scorers(config.preference_tuning_config):
        from forgebook.training import reference

        output.print("[dim]starting the workers of the reference model[/dim]")
        reference.start_stage(config, run)
    _forget_earlier(file_system, path)
    try:
        with distributed.handle_sigterm(run.folder):  # Ray has a handler of its own, set when it started
            outcome = trainer.fit().return_value
    except ControllerError as error:
        if isinstance(error.controller_failure, ForgebookError):  # see ReportReceiver
            raise error.controller_failure from None
        raise
    except KeyboardInterrupt:
        _stop_workers(trainer.controller, output)
        raise
    finally:
        _forget_earlier(file_system, path)
    if isinstance(outcome, ForgebookError):
        raise outcome
    return outcome


def _stop_workers(controller: Any, output: Console) -> None:
    """End the workers of a run, so that none writes any more when this process is done with it."""
    import ray

    output.print("[dim]stopping the workers; a second Ctrl-C ends at once[/dim]")
    if controller is None:
        return
    with contextlib.suppress(ray.exceptions.RayError):  # it ends as requested, and cannot answer
        ray.get(controller.abort.remote(), timeout=STOP_SECONDS)
    with contextlib.suppress(ray.exceptions.RayError, ValueError):
        ray.kill(controller)


def _forget_earlier(file_system: FileSystem, path: str) -> None:
    """Delete Ray's list of a run's checkpoints: of an earlier start it may name some that are deleted by now."""
    for name in (upload.RAY_LIST, ".validate_storage_marker"):
        with contextlib.suppress(OSError):
            file_system.delete_file(f"{path}/{name}")


def _resources_per_worker(
    workers: int, scorers: int, use_gpu: bool, cluster: dict[str, float]
) -> dict[str, int | float]:
    """Give each training worker one GPU, or its share of the cores; scorers: workers that take a core each."""
    if use_gpu:
        return {"GPU": 1, "CPU": 1}
    # A cluster of CPUs is shared out evenly: torch uses as many threads as the worker has cores.
    return {"CPU": max(1, (int(cluster.get("CPU", 1)) - scorers) // workers)}


def _scorers(preference: PreferenceTuningConfig | None) -> int:
    """Count the workers, one core each, that compute the reference's log-probabilities beside the training workers."""
    if preference is None or not needs_reference(preference) or not preference.logprob_processor_scaling_config:
        return 0
    return preference.logprob_processor_scaling_config.concurrency


def _check_cluster(workers: int, each: dict[str, float], total: dict[str, float], free: dict[str, float]) -> None:
    """Raise ResourceError if the cluster could never hold the workers; Ray would wait forever."""
    short = {name: amount * workers for name, amount in each.items() if amount * workers > total.get(name, 0)}
    if short:
        needs = ", ".join(f"{amount:g} {name}" for name, amount in short.items())
        has = ", ".join(f"{free.get(name, 0):g} of {total.get(name, 0):g} {name} free" for name in short)
        raise ResourceError(
            f"num_devices: {workers} workers need {needs}; the cluster has {has}: "
            "lower num_devices, or correct worker_resources"
        )
