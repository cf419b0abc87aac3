"""A config -> checked data and a run folder -> Ray Train workers -> a result worth having.

    run = fine_tune(load_config("config.yaml"))

Everything that can be wrong is found here before a worker starts; a run folder appears only after that.
Workers run `forgebook.training.loop.train_loop`. num_devices: 0 runs it in this process, without Ray.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from forgebook import ray_cluster as cluster
from forgebook.config.blocks import PreferenceTuningConfig, needs_reference
from forgebook.config.parse import config_differences, dump_config, load_config
from forgebook.config.rules import check_rules, unread_keys
from forgebook.config.schema import FinetuneConfig, ResolvedConfig
from forgebook.data import token_store
from forgebook.errors import ForgebookError, ResourceError, StorageError, TrainingError, last_line
from forgebook.models import saved_adapters
from forgebook.models.tokenizer import locate, refuse_pickled
from forgebook.planning import preflight
from forgebook.planning.plan import Plan
from forgebook.planning.plan_report import plan_as_json
from forgebook.planning.prepare import Prepared, prepare
from forgebook.reporting import console as consoles
from forgebook.reporting import trackers
from forgebook.reporting.run_text import (
    print_choices,
    print_plan,
    print_run,
    print_summary,
    stopped_text,
    write_summary,
)
from forgebook.runs import atomic, run_files, run_lock, upload, worker_upload
from forgebook.runs import run as storage
from forgebook.runs.run import Run
from forgebook.training import distributed, kernels, reference

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem
    from rich.console import Console

    from forgebook.launch.ray_worker import Job

__all__ = ["fine_tune"]

# How often a run with min_devices looks for machines that came back; taking them in is a restart from its last state.
RESIZE_SECONDS = 15.0
STOP_SECONDS = 20.0  # for workers to end after Ctrl-C, before they are killed


def fine_tune(config: FinetuneConfig) -> Run:
    """Fine-tune as `config` says, or continue the run of that name, and return its folder.

    Raises a ForgebookError with one readable sentence for whatever the user can fix.
    """
    started = time.perf_counter()
    cluster.name_address(config.address)
    output = consoles.make_console()
    run = storage.open_run(config)
    if not config.is_default:
        _refuse_impossible(config, run)
    with consoles.progress_bar(output, "tokenizing") as on_progress:
        prepared = prepare(config, run, on_progress)
    if config.is_default:
        print_choices(output, prepared)
        _refuse_impossible(prepared.config, run)
    resolved = prepared.config
    is_overwritten = resolved.on_existing == "overwrite"
    if run.config.exists() and not is_overwritten:
        _check_same(run, prepared)
        if run.is_complete:
            if run.uri:  # its last upload may have failed
                upload.upload_run(run.folder, run.uri, _warner(output))
            output.print(f"{run.place} is complete already (on_existing=overwrite runs it again)")
            print_summary(output, run)
            return run
    ineffective, vllm = preflight.check_settings(prepared)
    plan, note = preflight.plan_run(prepared)
    if plan and vllm:
        plan = dataclasses.replace(plan, vllm=vllm)
    warnings = preflight.check_plan(plan, run.folder, force=resolved.force) if plan else []
    try:
        with run_lock.locked(run.folder):
            if is_overwritten and storage.has_run(run):
                kept = storage.remove_run(run, keep=frozenset({run_files.LOCK}))
                if kept:
                    _warner(output)(f"kept in {run.place}, because no run wrote it: {', '.join(kept)}")
            _write_run(run, prepared, plan)
            print_run(output, run, prepared, vllm)
            print_plan(output, plan, [*unread_keys(config), *ineffective, *warnings, *filter(None, [note])])
            summary_note = _train(run, resolved, plan, started)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(stopped_text(run)) from None
    print_summary(output, run)
    if summary_note:
        output.print(f"  [yellow]{escape(summary_note)}[/yellow]")
    return run


def _train(run: Run, config: ResolvedConfig, plan: Plan | None, started: float) -> str | None:
    """Run the loop in the run's folder, write its summary, and return what the user should know of it."""
    with (
        consoles.quiet_descriptors(run.logs / "driver.log") as live,
        contextlib.ExitStack() as uploads,
        trackers.tracking(config.loggers, run, live.print),
    ):
        try:
            with consoles.show_progress(run.logs / "progress.jsonl", live):
                run_loop = _run_on_ray if config.num_devices else _run_here
                result = run_loop(config, run, live, uploads)
        except ForgebookError:
            raise
        except Exception as error:
            raise TrainingError(
                f"training failed: {last_line(error)}\n{consoles.last_lines(run.logs)}\n"
                f"The logs are in {run.logs}; the same command resumes from the last complete state"
            ) from error
        return write_summary(run, config, plan, result, time.perf_counter() - started)


# Before the run ---------------------------------------------------------------------------------------


def _refuse_impossible(config: FinetuneConfig, run: Run) -> None:
    """Refuse what this version cannot do, or this machine if it still has to."""
    check_rules(config)
    refuse_pickled(locate(config.initial_base_model_ckpt_path or config.model_id))
    if config.initial_adapter_model_ckpt_path is not None:
        adapter = locate(config.initial_adapter_model_ckpt_path)
        refuse_pickled(adapter)
        saved_adapters.check_adapter(adapter, config.lora_config or {}, config.rope_scaling)
    if not run.is_complete:
        _check_devices(config)


def _check_same(run: Run, prepared: Prepared) -> None:
    """Raise StorageError unless an existing run folder has this config and this data."""
    earlier = load_config(run.config)
    differences = config_differences(earlier, prepared.config)
    if differences:
        raise StorageError(
            f"{run.place} holds a run with another config ({', '.join(differences)}): "
            "choose another run_name, or on_existing=overwrite"
        )
    report = atomic.read_json(run.data_report, ["train"])
    for name in ("train", "valid"):
        if name in report and report[name]["fingerprint"] != prepared.report[name]["fingerprint"]:
            raise StorageError(
                f"{report[name]['path']} is not what {run.place} was started with: "
                "choose another run_name, or on_existing=overwrite"
            )


def _check_devices(config: FinetuneConfig) -> None:
    """Raise ResourceError for what this machine cannot run, before a local Ray cluster is started."""
    if cluster.is_joined():
        return
    import torch

    kernels.refuse_missing(config)
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    if config.deepspeed and not gpus and not shutil.which("g++"):
        raise ResourceError(
            "deepspeed on a CPU compiles a small extension at its first use and finds no g++: install g++, or set "
            "deepspeed: none"
        )
    if config.num_devices == 0:
        return
    have, kind = (gpus, "GPUs") if gpus else (cores, "CPU cores and no GPU")
    if (config.min_devices or config.num_devices) > have:
        raise ResourceError(
            f"num_devices is {config.num_devices}, this machine has {have} {kind}: "
            f"set num_devices to at most {have}, or address to a larger cluster"
        )


def _write_run(run: Run, prepared: Prepared, plan: Plan | None) -> None:
    """Write the run folder: config, data report, plan and tokens."""
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        run_files.write_marker(run.folder)  # first: it makes the folder a run's
        run.config.write_text(dump_config(prepared.config))
        for folder in (run.logs, run.checkpoints, run.resume):
            folder.mkdir(exist_ok=True)
        token_store.save_view(prepared.train, run.tokens / "train.npz")
        if prepared.valid is not None:
            token_store.save_view(prepared.valid, run.tokens / "valid.npz")
        if not run.held_out.exists():
            prepared.write_held_out(run.held_out)
        atomic.write_json(run.data_report, prepared.report)
        if plan:
            atomic.write_json(run.plan, plan_as_json(plan))
    except OSError as error:
        raise StorageError(f"{run.folder} cannot be written: {error}: set storage_path to another location") from None


# The workers ------------------------------------------------------------------------------------------


def _run_here(config: ResolvedConfig, run: Run, output: Console, uploads: contextlib.ExitStack) -> dict[str, Any]:
    """Run the loop in this process; uploads: as for `_run_on_ray`."""
    from forgebook.training.loop import train_loop

    uploads.enter_context(upload.uploading(run.folder, run.uri, _warner(output)))
    with distributed.handle_sigterm(run.folder):
        return train_loop(config, Run(run.folder))


def _run_on_ray(config: ResolvedConfig, run: Run, output: Console, uploads: contextlib.ExitStack) -> dict[str, Any]:
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
        uploads.enter_context(upload.uploading(run.folder, run.uri, _warner(output)))
        return _fit(job, use_gpu, per_worker, output)
    assert run.uri is not None
    worker_upload.send_inputs(run.folder, run.uri, _warner(output))
    try:
        with worker_upload.passing_stop(run.folder / distributed.STOP_FILE, run.uri):
            result = _fit(job, use_gpu, per_worker, output)
    finally:
        worker_upload.fetch_logs(run.uri, run.folder)
    worker_upload.remove_inputs(run.uri)
    upload.download_run(run.uri, run.folder)
    uploads.enter_context(upload.uploading(run.folder, run.uri, _warner(output)))
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

    class Trainer(TorchTrainer):
        """Ray Train that leaves Ctrl-C to Python: its own handler ends the process with exit code 1 and no word."""

        controller: Any = None

        def _register_sigint_handler(self, controller: Any) -> None:
            self.controller = controller

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


def _warner(output: Console) -> Callable[[str], None]:
    """Return a function that prints a warning while the run trains."""
    return lambda text: output.print(f"[yellow]{escape(text)}[/yellow]")
