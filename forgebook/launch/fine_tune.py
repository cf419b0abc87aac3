"""A config -> checked data and a run folder -> workers -> a result worth having.

    run = fine_tune(load_config("config.yaml"))

Everything that can be wrong is found here before a worker starts; a run folder appears only after that.
num_devices: 0 runs the training loop in this process, any other number in workers of Ray (`ray_train`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from forgebook import ray_cluster as cluster
from forgebook.config.parse import dump_config
from forgebook.config.rules import check_rules
from forgebook.config.schema import FinetuneConfig, ResolvedConfig
from forgebook.config.unread_keys import unread_keys
from forgebook.data import token_store
from forgebook.errors import ForgebookError, ResourceError, StorageError, TrainingError, last_line
from forgebook.launch import ray_train
from forgebook.launch.resumed_run import check_same, record_changes
from forgebook.models import saved_adapters
from forgebook.models.tokenizer import locate, refuse_pickled
from forgebook.planning import preflight
from forgebook.planning.plan import Plan
from forgebook.planning.plan_report import plan_as_json
from forgebook.planning.prepare import Prepared, prepare
from forgebook.reporting import console as consoles
from forgebook.reporting import trackers
from forgebook.reporting.console import warner
from forgebook.reporting.run_text import (
    print_choices,
    print_plan,
    print_run,
    print_summary,
    stopped_text,
    write_summary,
)
from forgebook.runs import atomic, run_files, run_lock, upload
from forgebook.runs import run as storage
from forgebook.runs.run import Run
from forgebook.training import distributed, kernels

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["fine_tune"]


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
    is_overwritten, changes = resolved.on_existing == "overwrite", list[str]()
    if run.config.exists() and not is_overwritten:
        changes = check_same(run, prepared)
        if run.is_complete and not changes:
            if run.uri:  # its last upload may have failed
                upload.upload_run(run.folder, run.uri, warner(output))
            output.print(f"{run.location} is complete already (on_existing=overwrite runs it again)")
            print_summary(output, run)
            return run
    prepared, chosen = preflight.choose_checkpointing(prepared)
    resolved = prepared.config
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
                    warner(output)(f"kept in {run.location}, because no run wrote it: {', '.join(kept)}")
            for text in changes:
                output.print(f"  {escape(text)}")
            record_changes(run, changes)
            _write_run(run, prepared, plan)
            print_run(output, run, prepared, vllm)
            print_plan(output, plan, [*chosen, *unread_keys(config), *ineffective, *warnings, *filter(None, [note])])
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
                run_loop = ray_train.run_on_ray if config.num_devices else _run_here
                result = run_loop(config, run, live, uploads)
        except ForgebookError:
            raise
        except Exception as error:
            raise TrainingError(
                f"training failed: {last_line(error)}\n{consoles.last_lines(run.logs)}\n"
                f"The logs are in {run.logs}; the same command resumes from the last complete state"
            ) from error
        return write_summary(run, config, plan, result, time.perf_counter() - started)


def _run_here(config: ResolvedConfig, run: Run, output: Console, uploads: contextlib.ExitStack) -> dict[str, Any]:
    """Run the loop in this process; uploads: as for `run_on_ray`."""
    from forgebook.training.loop import train_loop

    uploads.enter_context(upload.uploading(run.folder, run.uri, warner(output)))
    with distributed.handle_sigterm(run.folder):
        return train_loop(config, Run(run.folder))


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
