"""Experiment trackers: wandb, MLflow, TensorBoard, Trackio, several at once. To add one, add a row to TRACKERS.

    with tracking(config.loggers, run, warn):
        ...                           # train; write the summary

The driver reads what the run reports (forgebook.runs.metrics) and sends it on, one thread per tracker. Workers have no
part in it, so a tracker that is slow, down or misconfigured cannot stop them. A failure is reported once, what was
missed is sent later, and at the end each tracker gets a few seconds; metrics.jsonl has everything in any case.

A resumed run continues the same run of the tracker: its id is saved in `<run>/logs`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from forgebook.config.block_keys import flatten
from forgebook.config.blocks import Logger
from forgebook.errors import first_line
from forgebook.runs.atomic import read_json
from forgebook.runs.metrics import read_new_lines
from forgebook.runs.run import Run

__all__ = ["TRACKERS", "Tracker", "tracking"]

# How often new figures are sent; how long all trackers together may delay the end of a run.
POLL_SECONDS, GRACE_SECONDS, LONGEST_PAUSE = 1.0, 15.0, 60.0

Event = dict[str, Any]  # a line of progress.jsonl


@dataclass(frozen=True)
class _OpenTracker:
    """A connected tracker: `send` takes events of forgebook.runs.metrics, `end` the summary, None if there is none."""

    send: Callable[[list[Event]], None]
    end: Callable[[dict[str, Any] | None], None]


@contextlib.contextmanager
def tracking(loggers: Sequence[Logger], run: Run, warn: Callable[[str], None]) -> Iterator[None]:
    """Send what the run reports to its trackers while the block runs, and its summary at the end.

    warn: called with one sentence when a tracker fails. No tracker raises an error here, and the end of the block is
    delayed by at most GRACE_SECONDS.
    """
    log = run.logs / "progress.jsonl"
    start = log.stat().st_size if log.exists() else 0
    ended = threading.Event()
    threads = []
    for k, logger in enumerate(loggers):
        id_file = run.logs / f"{logger.provider}-{k}.id"
        batches = read_new_lines(log, start, ended, POLL_SECONDS)
        feed = functools.partial(_feed, logger, run, id_file, batches, ended, warn)
        threads.append(threading.Thread(target=feed, daemon=True, name=logger.provider))
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
                    f"{thread.name} did not finish in {GRACE_SECONDS:.0f} s and was abandoned; metrics.jsonl has all "
                    "figures"
                )


def _feed(
    logger: Logger,
    run: Run,
    id_file: Path,
    batches: Iterator[list[Event]],
    ended: threading.Event,
    warn: Callable[[str], None],
) -> None:
    """Send events to one tracker until the run ends; keep what it rejects and retry, less and less often."""
    row = TRACKERS[logger.provider]
    tracker: _OpenTracker | None = None
    pending: list[Event] = []
    is_reported, next_try, pause = False, 0.0, 1.0
    for events in batches:
        pending += [event for event in events if event["kind"] != "stage" or event["text"] == "training"]
        is_due = time.monotonic() >= next_try or ended.is_set()
        if not is_due or (tracker is not None and not pending):
            continue
        try:
            tracker = tracker or row.open(logger.provider_config, run, id_file)
            tracker.send(pending)
            pending, pause = [], 1.0
        except ImportError as error:
            warn(f"logger: {error}; the run continues without it. Install it: pip install {row.package}")
            return
        except Exception as error:  # a tracker may raise anything, and must not stop the run
            if not is_reported:
                warn(f"logger: {logger.provider} fails ({_short(error)}); the run continues and retries it")
            is_reported, next_try, pause = True, time.monotonic() + pause, min(2 * pause, LONGEST_PAUSE)
    if pending:
        warn(f"logger: {logger.provider} did not receive {len(pending)} lines of metrics.jsonl")
    if tracker is None:
        return
    try:
        tracker.end(read_json(run.summary) if run.is_complete else None)
    except Exception as error:  # likewise
        warn(f"logger: {logger.provider} failed at the end of the run ({_short(error)})")


# The trackers -----------------------------------------------------------------------------------------


def _open_wandb(settings: dict[str, Any], run: Run, id_file: Path) -> _OpenTracker:
    """Open Weights & Biases; provider_config goes to wandb.init (project, group, name, tags, entity, mode, ...)."""
    import wandb

    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:8])
    values = _config_values(run)
    named = {"project": "forgebook", "group": values["model_id"], "name": run.name}
    quiet = wandb.Settings(console="off", silent=True, init_timeout=10, finish_timeout=GRACE_SECONDS - 5)
    handle = wandb.init(
        **{**named, "id": id_file.read_text(), "resume": "allow", "dir": str(run.logs), **settings},
        config=values, reinit="create_new", settings=quiet,
    )  # fmt: skip
    # wandb's own step cannot go back, as that of a resumed run does.
    handle.define_metric("*", step_metric="step")

    def send(events: list[Event]) -> None:
        for event in events:
            if event["kind"] != "stage":
                handle.log({"step": event["step"], **_figures(event)})

    def end(summary: dict[str, Any] | None) -> None:
        if summary is not None:
            handle.summary.update({f"final/{name}": value for name, value in flatten(summary).items()})
            handle.log({"loss_curve": wandb.Image(str(run.loss_curve))})
        handle.finish(exit_code=0 if summary is not None else 1)

    return _OpenTracker(send, end)


def _open_mlflow(settings: dict[str, Any], run: Run, id_file: Path) -> _OpenTracker:
    """Open MLflow: tracking_uri, experiment_name, create_experiment_if_not_exists, run_name, tags."""
    # By default MLflow waits minutes for a dead server; what is not sent is stored here and sent again.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient(tracking_uri=settings.get("tracking_uri"))
    if id_file.exists():
        name = id_file.read_text()
        client.update_run(name, status="RUNNING")
    else:
        title = settings.get("experiment_name", "forgebook")
        experiment = client.get_experiment_by_name(title)
        if experiment is None and not settings.get("create_experiment_if_not_exists", True):
            raise LookupError(f"there is no experiment {title!r}, and create_experiment_if_not_exists is false")
        where = experiment.experiment_id if experiment else client.create_experiment(title)
        values = _config_values(run)
        tags = {"model_id": values["model_id"], **settings.get("tags", {})}
        name = client.create_run(where, run_name=settings.get("run_name", run.name), tags=tags).info.run_id
        id_file.write_text(name)
        texts = {key: str(value)[:6000] for key, value in flatten(values).items()}
        client.log_batch(name, params=[Param(key, text) for key, text in list(texts.items())[:100]])
        client.log_artifact(name, str(run.config))  # all values and their origins

    def send(events: list[Event]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            Metric(figure, value, now, event["step"])
            for event in events
            if event["kind"] != "stage"
            for figure, value in _figures(event).items()
        ]
        for first in range(0, len(metrics), 1000):  # the most that a server accepts at once
            client.log_batch(name, metrics=metrics[first : first + 1000])

    def end(summary: dict[str, Any] | None) -> None:
        if summary is not None:
            now = int(time.time() * 1000)
            finals = [Metric(f"final/{figure}", value, now, 0) for figure, value in _figures(flatten(summary)).items()]
            client.log_batch(name, metrics=finals)
            client.set_tag(name, "best_checkpoint", summary["best_checkpoint"])
            client.log_artifact(name, str(run.loss_curve))
        client.set_terminated(name, status="FINISHED" if summary is not None else "FAILED")

    return _OpenTracker(send, end)


def _open_tensorboard(settings: dict[str, Any], run: Run, id_file: Path) -> _OpenTracker:
    """Write event files to provider_config's log_dir, or `<run>/tensorboard`."""
    from tensorboardX import SummaryWriter

    folder = Path(settings.get("log_dir", run.folder / "tensorboard"))

    def begin_file(purge_step: int | None = None) -> SummaryWriter:
        # Their names contain the second: two of one second would be one file, and the first would be lost.
        number = len(list(folder.glob("events.out.tfevents.*")))
        return SummaryWriter(str(folder), purge_step=purge_step, filename_suffix=f".{number:03}")

    writers = [begin_file()]
    writers[0].add_text("config", f"```yaml\n{run.config.read_text()}```")
    steps = [0]

    def send(events: list[Event]) -> None:
        for event in events:
            if event["kind"] == "stage" and event["start"]:
                # A resumed run: TensorBoard drops what it had after that step.
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

    return _OpenTracker(send, end)


def _open_trackio(settings: dict[str, Any], run: Run, id_file: Path) -> _OpenTracker:
    """Open Trackio; provider_config goes to trackio.init (project, group, name, space_id, server_url, ...)."""
    import trackio

    if not id_file.exists():
        id_file.write_text(f"{run.name}-{uuid.uuid4().hex[:8]}")  # a name is a run's identity there
    values = _config_values(run)
    named = {"project": "forgebook", "group": values["model_id"], "name": id_file.read_text(), "resume": "allow"}
    quiet = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
    handle = trackio.init(**{**named, **quiet, **settings}, config=flatten(values))

    def send(events: list[Event]) -> None:
        for event in events:
            if event["kind"] != "stage":
                handle.log(_figures(event), step=event["step"])

    def end(summary: dict[str, Any] | None) -> None:
        if summary is not None:
            handle.log({f"final/{name}": value for name, value in _figures(flatten(summary)).items()})
        handle.finish()

    return _OpenTracker(send, end)


@dataclass(frozen=True)
class Tracker:
    """A row of TRACKERS.

    package: what to install. open: (provider_config, run, file for the tracker's run id) -> an open tracker.
    environment: the variables that it reads; ray_cluster passes them on to other machines, which a test checks.
    """

    package: str
    open: Callable[[dict[str, Any], Run, Path], _OpenTracker]
    environment: tuple[str, ...] = ()


TRACKERS = {
    "wandb": Tracker("wandb==0.31.0", _open_wandb, ("WANDB_API_KEY", "WANDB_BASE_URL")),
    "mlflow": Tracker("mlflow-skinny==3.17.2", _open_mlflow, ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN")),
    "tensorboard": Tracker("tensorboardX==2.6.5", _open_tensorboard),
    "trackio": Tracker("trackio==0.43.0", _open_trackio, ("TRACKIO_SERVER_URL", "TRACKIO_DIR", "HF_TOKEN")),
}


def _figures(event: dict[str, Any]) -> dict[str, float]:
    """Select what can be plotted: every number, and booleans as 0 or 1."""
    return {name: float(value) for name, value in event.items() if isinstance(value, int | float) and name != "step"}


def _config_values(run: Run) -> dict[str, Any]:
    """Read the config from the run folder, where it has no secrets."""
    return yaml.safe_load(run.config.read_text())


def _short(error: BaseException) -> str:
    line = first_line(error)[:200]
    return line if line == type(error).__name__ else f"{type(error).__name__}: {line}"
