"""Experiment trackers beside a run: wandb, MLflow, TensorBoard, several at once.

    with tracking(config, run, warn):
        ...                              # train; write the summary

The driver follows what the run reports of itself (forgebook.runs.metrics) and hands it on, a thread for each tracker.
Workers know nothing of it: a tracker that is slow, dead or wrong cannot hold one up. It is told once, what it
missed is sent again later, and at the end it gets a few seconds; metrics.jsonl has everything in any case.

A continued run goes on in the same run of the tracker: its id is kept in `<run>/logs`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from forgebook.config.parse import FinetuneConfig, Logger, dump_config
from forgebook.config.schema import flatten
from forgebook.runs.atomic import read_json
from forgebook.runs.metrics import read_new_lines
from forgebook.runs.run import Run

__all__ = ["tracking"]

PACKAGES = {"wandb": "wandb==0.31.0", "mlflow": "mlflow-skinny==3.17.2", "tensorboard": "tensorboardX==2.6.5"}
# How often new figures are sent; how long all trackers together may hold up the end of a run.
POLL_SECONDS, GRACE_SECONDS, LONGEST_PAUSE = 1.0, 15.0, 60.0


@dataclass(frozen=True)
class _Tracker:
    """An open tracker: `push` takes events of forgebook.runs.metrics, `end` the summary, or None if there is none."""

    push: Callable[[list[dict[str, Any]]], None]
    end: Callable[[dict[str, Any] | None], None]


@contextlib.contextmanager
def tracking(config: FinetuneConfig, run: Run, warn: Callable[[str], None]) -> Iterator[None]:
    """Send what the run reports to the trackers of its config while the block runs, and its summary at the end.

    warn: called with one sentence when a tracker fails. Nothing is raised on a tracker's account, and the block's
    end is held up by at most GRACE_SECONDS.
    """
    given = config.logger or []
    loggers = given if isinstance(given, list) else [given]
    log = run.logs / "progress.jsonl"
    start = log.stat().st_size if log.exists() else 0
    ended = threading.Event()
    threads = []
    for k, logger in enumerate(loggers):
        kept = run.logs / f"{logger.provider}-{k}.id"
        job = (logger, config, run, kept, read_new_lines(log, start, ended, POLL_SECONDS), ended, warn)
        threads.append(threading.Thread(target=_serve, args=job, daemon=True, name=logger.provider))
        threads[-1].start()
    try:
        yield
    finally:
        ended.set()
        deadline = time.monotonic() + GRACE_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                warn(
                    f"{thread.name} did not finish in {GRACE_SECONDS:.0f} s and is left: metrics.jsonl has all figures"
                )


def _serve(
    logger: Logger,
    config: FinetuneConfig,
    run: Run,
    kept: Path,
    batches: Iterator[list[dict[str, Any]]],
    ended: threading.Event,
    warn: Callable[[str], None],
) -> None:
    """Hand events to one tracker until the run ends; keep what it does not take and try again, less and less often."""
    tracker, pending, is_told, next_try, pause = None, [], False, 0.0, 1.0
    for events in batches:
        pending += [event for event in events if event["kind"] != "stage" or event["text"] == "training"]
        is_due = time.monotonic() >= next_try or ended.is_set()
        if not is_due or (tracker is not None and not pending):
            continue
        try:
            tracker = tracker or OPENERS[logger.provider](logger.provider_config, config, run, kept)
            tracker.push(pending)
            pending, pause = [], 1.0
        except ImportError as error:
            warn(f"logger: {error}: the run goes on without it. Mend: pip install {PACKAGES[logger.provider]}")
            return
        except Exception as error:  # a tracker may raise anything, and must not stop the run
            if not is_told:
                warn(f"logger: {logger.provider} fails ({_short(error)}): the run goes on, and it is tried again")
            is_told, next_try, pause = True, time.monotonic() + pause, min(2 * pause, LONGEST_PAUSE)
    if pending:
        warn(f"logger: {logger.provider} has not got {len(pending)} of the lines of metrics.jsonl")
    if tracker is None:
        return
    try:
        tracker.end(read_json(run.summary) if run.is_complete else None)
    except Exception as error:  # likewise
        warn(f"logger: {logger.provider} did not take the end of the run ({_short(error)})")


# The trackers -----------------------------------------------------------------------------------------


def _open_wandb(given: dict[str, Any], config: FinetuneConfig, run: Run, kept: Path) -> _Tracker:
    """Open Weights & Biases; provider_config goes to wandb.init (project, group, name, tags, entity, mode, ...)."""
    import wandb

    if not kept.exists():
        kept.write_text(uuid.uuid4().hex[:8])
    named = {"project": "forgebook", "group": config.model_id, "name": run.name}
    quiet = wandb.Settings(console="off", silent=True, init_timeout=10, finish_timeout=GRACE_SECONDS - 5)
    handle = wandb.init(
        **{**named, "id": kept.read_text(), "resume": "allow", "dir": str(run.logs), **given},
        config=_plain(config), reinit="create_new", settings=quiet,
    )  # fmt: skip
    # wandb's own step may not go back, as a continued run does.
    handle.define_metric("*", step_metric="step")

    def push(events: list[dict[str, Any]]) -> None:
        for event in events:
            if event["kind"] != "stage":
                handle.log({"step": event["step"], **_figures(event)})

    def end(summary: dict[str, Any] | None) -> None:
        if summary is not None:
            handle.summary.update({f"final/{name}": value for name, value in flatten(summary).items()})
            handle.log({"loss_curve": wandb.Image(str(run.loss_curve))})
        handle.finish(exit_code=0 if summary is not None else 1)

    return _Tracker(push, end)


def _open_mlflow(given: dict[str, Any], config: FinetuneConfig, run: Run, kept: Path) -> _Tracker:
    """Open MLflow: tracking_uri, experiment_name, create_experiment_if_not_exists, run_name, tags."""
    # MLflow's own patience with a dead server is minutes; what is not sent is kept here and sent again.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient(tracking_uri=given.get("tracking_uri"))
    if kept.exists():
        name = kept.read_text()
        client.update_run(name, status="RUNNING")
    else:
        title = given.get("experiment_name", "forgebook")
        experiment = client.get_experiment_by_name(title)
        if experiment is None and not given.get("create_experiment_if_not_exists", True):
            raise LookupError(f"there is no experiment {title!r}, and create_experiment_if_not_exists is false")
        where = experiment.experiment_id if experiment else client.create_experiment(title)
        tags = {"model_id": config.model_id, **given.get("tags", {})}
        name = client.create_run(where, run_name=given.get("run_name", run.name), tags=tags).info.run_id
        kept.write_text(name)
        values = {key: str(value)[:6000] for key, value in flatten(_plain(config)).items()}
        client.log_batch(name, params=[Param(key, value) for key, value in list(values.items())[:100]])
        client.log_artifact(name, str(run.config))  # all values, and where they came from

    def push(events: list[dict[str, Any]]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            Metric(figure, value, now, event["step"])
            for event in events
            if event["kind"] != "stage"
            for figure, value in _figures(event).items()
        ]
        for first in range(0, len(metrics), 1000):  # the most that a server takes at once
            client.log_batch(name, metrics=metrics[first : first + 1000])

    def end(summary: dict[str, Any] | None) -> None:
        if summary is not None:
            now = int(time.time() * 1000)
            finals = [Metric(f"final/{figure}", value, now, 0) for figure, value in _figures(flatten(summary)).items()]
            client.log_batch(name, metrics=finals)
            client.set_tag(name, "best_checkpoint", summary["best_checkpoint"])
            client.log_artifact(name, str(run.loss_curve))
        client.set_terminated(name, status="FINISHED" if summary is not None else "FAILED")

    return _Tracker(push, end)


def _open_tensorboard(given: dict[str, Any], config: FinetuneConfig, run: Run, kept: Path) -> _Tracker:
    """Write event files to provider_config's log_dir, or `<run>/tensorboard`."""
    from tensorboardX import SummaryWriter

    folder = Path(given.get("log_dir", run.folder / "tensorboard"))

    def begin_file(purge_step: int | None = None) -> SummaryWriter:
        # Their names hold the second: two of one second would be one file, and the first be lost.
        number = len(list(folder.glob("events.out.tfevents.*")))
        return SummaryWriter(str(folder), purge_step=purge_step, filename_suffix=f".{number:03}")

    writers = [begin_file()]
    writers[0].add_text("config", f"```yaml\n{dump_config(config)}```")
    steps = [0]

    def push(events: list[dict[str, Any]]) -> None:
        for event in events:
            if event["kind"] == "stage" and event["start"]:
                # A run that went back: TensorBoard drops what it had after that step.
                writers[-1].close()
                writers.append(begin_file(purge_step=event["start"] + 1))
            elif event["kind"] != "stage":
                steps.append(event["step"])
                for name, value in _figures(event).items():
                    writers[-1].add_scalar(name, value, event["step"])
        writers[-1].flush()

    def end(summary: dict[str, Any] | None) -> None:
        if summary is not None:
            from matplotlib.image import imread

            for name, value in _figures(flatten(summary)).items():
                writers[-1].add_scalar(f"final/{name}", value, steps[-1])
            curve = imread(run.loss_curve)[..., :3]  # (height, width, RGB), from 0 to 1
            writers[-1].add_image("loss_curve", curve, steps[-1], dataformats="HWC")
        writers[-1].close()

    return _Tracker(push, end)


OPENERS = {"wandb": _open_wandb, "mlflow": _open_mlflow, "tensorboard": _open_tensorboard}


def _figures(event: dict[str, Any]) -> dict[str, float]:
    """Pick what can be drawn: every number, and truth as 0 or 1."""
    return {name: float(value) for name, value in event.items() if isinstance(value, int | float) and name != "step"}


def _plain(config: FinetuneConfig) -> dict[str, Any]:
    """Turn the config into plain values, without its secrets, as the run folder has it."""
    return yaml.safe_load(dump_config(config))


def _short(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()[:200]}" if lines else type(error).__name__
