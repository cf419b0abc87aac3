"""Sweeps: runs of one config with different values, through Ray Tune; ASHA stops the worse ones early.

    sweep = tune("config.yaml", ["learning_rate=[1.0e-4,3.0e-4]", "lora_config.r=[8,16]"])

A trial is a run like any other, in `<storage_path>/<run_name>-tune/<its values>`: its folder can be evaluated,
and one that was stopped early can be resumed. The same sweep again reuses the trials that are there.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from forgebook import ray_cluster
from forgebook.config.parse import load_config
from forgebook.config.schema import FinetuneConfig
from forgebook.errors import ConfigError, ForgebookError, StorageError, TrainingError
from forgebook.planning.prepare import check_rows
from forgebook.reporting import plots
from forgebook.reporting.console import make_console, make_table, quiet_descriptors
from forgebook.runs.atomic import read_json
from forgebook.runs.metrics import read_metrics, watch_lines
from forgebook.runs.object_store import is_remote
from forgebook.runs.run import Run, display_path, has_run, remove_run
from forgebook.runs.run_files import is_run_file

__all__ = ["Sweep", "Trial", "print_sweep", "sweep_as_json", "trial_rank", "tune", "variants"]

SAMPLED = re.compile(r"(uniform|loguniform)\(\s*([^,]+?)\s*,\s*([^,]+?)\s*\)")
LONGEST_NAME = 120


@dataclass(frozen=True)
class Trial:
    """One run of a sweep; `curve` holds (step, evaluation loss), `state` is complete, stopped or failed."""

    run: Run
    values: dict[str, Any]
    state: str
    curve: list[tuple[int, float]]
    reason: str = ""

    @property
    def eval_loss(self) -> float | None:
        """Return the lowest evaluation loss, None before the first evaluation that is finite."""
        return min((loss for _, loss in self.curve if math.isfinite(loss)), default=None)


def trial_rank(trial: Trial) -> tuple[bool, float]:
    """Return the key by which trials are sorted, the best first.

    One that was stopped early is below all that were completed, whatever its loss; one that diverged is the last.
    """
    return trial.state != "complete", math.inf if trial.eval_loss is None else trial.eval_loss


@dataclass(frozen=True)
class Sweep:
    """The results of a sweep: its trials, the best first; `command` runs the best one's values again."""

    folder: Path
    trials: list[Trial]
    command: str
    plot: Path


def tune(
    config_path: str, words: Sequence[str], samples: int | None = None, default: bool = False, silent: bool = False
) -> Sweep:
    """Run all variants of a config that `words` name, and rank them by their lowest evaluation loss.

    words: overrides; a list, `uniform(a,b)` or `loguniform(a,b)` as the value is searched (see `variants`).
    samples: how many values are sampled; needed if any is. All variants are checked before the first one starts.

    Raises ConfigError, DataError, StorageError; TrainingError if every trial failed.
    """
    fixed = [word for word in words if not _is_searched(word)]
    base = load_config(config_path, fixed, default)
    chosen = variants([word for word in words if _is_searched(word)], samples, base.seed)
    if base.valid_path is None:
        raise ConfigError("tune compares evaluation losses: set valid_path, the validation examples")
    if is_remote(base.storage_path):
        raise StorageError(f"storage_path {base.storage_path}: a sweep needs a local folder, or one that is mounted")
    folder = Path(base.storage_path).expanduser().resolve() / f"{base.run_name}-tune"
    overrides = {_name(values): _as_overrides(values) for values in chosen}
    configs = {
        name: load_config(
            config_path, [*fixed, *own, f"run_name={json.dumps(name)}", f"storage_path={folder}"], default
        )
        for name, own in overrides.items()
    }
    # A mistake in the data is reported before torch and Ray are imported; most sweeps have one data set.
    for config in {f"{one.train_path} {one.valid_path} {one.task}": one for one in configs.values()}.values():
        check_rows(config)
    ray_cluster.name_address(base.address)
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_descriptors(folder / "tune.log") as output:
        output.quiet = silent
        output.print(f"[bold]{base.run_name}[/bold]  {len(configs)} trials in {display_path(folder)}")
        try:
            reasons = _run_all(configs, base.num_devices, folder, output)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_stopped_text(folder, list(configs))) from None
    trials = [
        _outcome(Run(folder / name), values, reasons.get(name, ""))
        for name, values in zip(configs, _unique(chosen), strict=True)
    ]
    trials.sort(key=trial_rank)
    if all(trial.state == "failed" for trial in trials):
        raise TrainingError(f"all {len(trials)} trials failed, the first one with: {trials[0].reason}")
    best = overrides[trials[0].run.name]
    flags = ["--default"] if default else []
    curves = {
        _label(trial.values): ([step for step, _ in trial.curve], [loss for _, loss in trial.curve])
        for trial in trials
        if trial.curve
    }
    shown_best = dict(list(curves.items())[: len(plots.COLORS)])
    plots.plot_lines(shown_best, "optimizer step", "evaluation loss (nats)", markers=True, path=folder / "tune.png")
    command = shlex.join(["python", "main.py", config_path, *flags, *fixed, *best])
    return Sweep(folder, trials, command, folder / "tune.png")


# What is tried ----------------------------------------------------------------------------------------


def _is_searched(word: str) -> bool:
    """Return whether an override names values to try instead of one."""
    value = word.partition("=")[2].strip()
    return value.startswith("[") or SAMPLED.fullmatch(value) is not None


def variants(searched: Sequence[str], samples: int | None, seed: int) -> list[dict[str, Any]]:
    """List the values of every trial, by dotted key: each combination of the lists, each sample of the ranges.

    `key=[a, b]` tries a and b; `key=uniform(a, b)` and `key=loguniform(a, b)` sample `samples` numbers, always
    the same ones for one seed. With both lists and ranges, each combination gets the same samples.
    """
    lists: dict[str, list[Any]] = {}
    ranges: dict[str, tuple[str, float, float]] = {}
    for word in searched:
        key, _, text = word.partition("=")
        if match := SAMPLED.fullmatch(text.strip()):
            kind, low, high = match.groups()
            ranges[key] = _range(key, kind, low, high)
            continue
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError:
            values = None
        if not isinstance(values, list) or not values:
            raise ConfigError(f"tune: {key}: got {text!r}, must be a list of values to try, such as [1.0e-4,3.0e-4]")
        lists[key] = values
    if not lists and not ranges:
        raise ConfigError("tune needs values to try, such as 'learning_rate=[1.0e-4,3.0e-4]' 'lora_config.r=[8,16]'")
    if bool(ranges) != (samples is not None):
        named = (
            f"{next(iter(ranges))} is sampled: set how often, samples=8" if ranges else "samples= has nothing to sample"
        )
        raise ConfigError(f"tune: {named}: it belongs to key=uniform(a,b) or key=loguniform(a,b)")
    generator = random.Random(seed)
    samplings = [{key: _sample(generator, *range_) for key, range_ in ranges.items()} for _ in range(samples or 1)]
    grid = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    return [point | sampling for point in grid for sampling in samplings]


def _range(key: str, kind: str, low: str, high: str) -> tuple[str, float, float]:
    try:
        least, most = float(low), float(high)
    except ValueError:
        least = most = math.nan
    if not least < most or (kind == "loguniform" and least <= 0):
        raise ConfigError(
            f"tune: {key}: got {kind}({low}, {high}), must be two numbers, the lower one first"
            + " and above 0" * (kind == "loguniform")
        )
    return kind, least, most


def _sample(generator: random.Random, kind: str, low: float, high: float) -> float:
    """Sample a number and keep four digits: what runs is what is shown."""
    if kind == "loguniform":
        return float(f"{math.exp(generator.uniform(math.log(low), math.log(high))):.4g}")
    return float(f"{generator.uniform(low, high):.4g}")


def _as_overrides(values: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _name(values: dict[str, Any]) -> str:
    """Name a trial's folder by its values, so that a longer sweep finds the trials of a shorter one."""
    label = _label(values)
    name = re.sub(r"[^\w.=,+-]+", "_", label)
    if name == label and len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{zlib.crc32(label.encode()):08x}"  # other values may read the same otherwise


def _label(values: dict[str, Any]) -> str:
    return ",".join(f"{key}={_shown(value)}" for key, value in values.items())


def _shown(value: Any) -> str:
    """Write a value as short as it stays itself: 0.0001, 20240601."""
    short = f"{value:g}" if _is_number(value) else str(value)
    return short if not _is_number(value) or float(short) == value else repr(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unique(chosen: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop values that were named twice."""
    return list({_name(values): values for values in chosen}.values())


# Running them -----------------------------------------------------------------------------------------


def _run_all(configs: dict[str, FinetuneConfig], num_devices: int, folder: Path, output) -> dict[str, str]:
    """Run the trials, as many at once as the cluster holds; return why some failed."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # Its own handler would end the sweep as if it were complete.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    import ray
    from ray import tune as ray_tune
    from ray.tune.schedulers import ASHAScheduler

    class TrialPrinter(ray_tune.Callback):
        def __reduce__(self):  # Ray Tune stores its callbacks, and a console cannot be stored
            return ray_tune.Callback, ()

        def on_trial_result(self, iteration, trials, trial, result, **info):
            output.print(f"{trial.config['name']}  step {result['step']}  evaluation loss {result['eval_loss']:.4f}")

    if not ray.is_initialized():
        output.print("[dim]starting Ray[/dim]")
    ray_cluster.start_ray()
    gpus = ray.cluster_resources().get("GPU", 0)
    # A trial with workers of its own needs nothing itself; CPU workers share all cores, one trial at a time.
    own = {"CPU": 0} if num_devices else {"CPU": 1, "GPU": 1} if gpus else {"CPU": 1}
    at_once = None if num_devices == 0 else max(1, int(gpus // num_devices))
    trainable = functools.partial(_trial, configs=configs, folder=str(Path.cwd()))
    scheduler = ASHAScheduler(time_attr="training_iteration", max_t=10_000, grace_period=1, reduction_factor=2)
    state_folder = folder / ".ray"
    shutil.rmtree(state_folder, ignore_errors=True)
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(trainable, own),
        param_space={"name": ray_tune.grid_search(list(configs))},
        tune_config=ray_tune.TuneConfig(
            metric="eval_loss", mode="min", scheduler=scheduler, max_concurrent_trials=at_once
        ),
        run_config=ray_tune.RunConfig(
            name="sweep", storage_path=str(state_folder), callbacks=[TrialPrinter()], verbose=0
        ),
    )
    reasons = {}
    for name, result in zip(configs, tuner.fit(), strict=True):
        if result.error is not None:
            lines = [line.strip() for line in str(result.error).splitlines() if line.strip()]
            reasons[name] = re.sub(r"^[\w.]+Error: ", "", lines[-1]) if lines else type(result.error).__name__
    shutil.rmtree(state_folder, ignore_errors=True)
    return reasons


def _stopped_text(folder: Path, names: Sequence[str]) -> str:
    """Describe what an interrupted sweep has saved, and how to resume it."""
    runs = [Run(folder / name) for name in names]
    complete = sum(run.is_complete for run in runs)
    saved = sum(not run.is_complete and any(run.resume.glob("step-*/place.json")) for run in runs)
    if not complete + saved:
        return (
            f"stopped before a trial saved a state in {display_path(folder)}; the same command starts the sweep again"
        )
    return (
        f"stopped; {complete} of {len(runs)} trials are complete in {display_path(folder)}, {saved} "
        f"{'has' if saved == 1 else 'have'} a saved state; the same command resumes those and runs the others"
    )


def _trial(parameters: dict[str, Any], configs: dict[str, FinetuneConfig], folder: str) -> None:
    """Fine-tune one variant in a process of Ray Tune's."""
    from forgebook.launch.fine_tune import fine_tune

    if os.path.isdir(folder):
        os.chdir(folder)
    config = configs[parameters["name"]]
    run = Run(Path(config.storage_path) / str(config.run_name))
    if config.on_existing == "overwrite" and has_run(run):
        remove_run(run)
    with _reporting(run):
        try:
            fine_tune(config)
        except ForgebookError as error:
            # One line, which Ray puts at the end of its own report.
            raise RuntimeError(" ".join(str(error).split())) from None


@contextmanager
def _reporting(run: Run) -> Iterator[None]:
    """Report evaluations to Ray Tune as the run makes them, those before a restart first.

    The one after the last step is reported when the run is complete: ASHA may stop a trial at a report, and would save
    nothing then.
    """
    from ray import tune as ray_tune

    last, steps, at_end = -1, math.inf, list[dict[str, Any]]()

    def report(event: dict[str, Any]) -> None:
        nonlocal last, steps
        steps = event.get("steps", steps)
        if "eval_loss" in event and event["step"] > last:
            last = event["step"]
            result = {"eval_loss": event["eval_loss"], "step": last}
            (ray_tune.report if last < steps else at_end.append)(result)

    with watch_lines(run.logs / "progress.jsonl", 0, 0.5, report):
        yield
    for result in at_end:
        ray_tune.report(result)


def _outcome(run: Run, values: dict[str, Any], reason: str) -> Trial:
    """Read a trial's results; delete what a trial that was stopped in the middle of a write left half-written."""
    metrics = read_metrics(run.metrics) if run.metrics.exists() else []
    curve = [(row["step"], row["eval_loss"]) for row in metrics if "eval_loss" in row]
    state = "complete" if run.is_complete else "failed" if reason else "stopped"
    if state == "stopped":
        for path in list(run.folder.rglob(".*")):
            name = path.relative_to(run.folder).as_posix()
            if path.is_dir() and is_run_file(f"{name}/file"):
                shutil.rmtree(path)
            elif path.is_file() and is_run_file(name):
                path.unlink()
    return Trial(run, values, state, curve, reason)


# Printing ---------------------------------------------------------------------------------------------


def print_sweep(sweep: Sweep) -> None:
    """Print a table of the trials, the best first, and how to run it."""
    output = make_console()
    keys = list(sweep.trials[0].values)
    rows = [
        [
            *[_shown(trial.values[key]) for key in keys],
            "" if trial.eval_loss is None else f"{trial.eval_loss:.4f}",
            str(trial.curve[-1][0]) if trial.curve else "",
            f"failed: {trial.reason[:200]}" if trial.state == "failed" else trial.state,
        ]
        for trial in sweep.trials
    ]
    output.print(make_table("Trials, the best first", [*keys, "evaluation loss", "steps", "state"], rows))
    best = sweep.trials[0]
    if best.state == "complete":
        output.print(
            f"  best checkpoint  {display_path(best.run.folder / read_json(best.run.summary)['best_checkpoint'])}"
        )
    output.print(f"  figure           {display_path(sweep.plot)}\n  again            {sweep.command}", markup=False)


def sweep_as_json(sweep: Sweep) -> dict[str, Any]:
    """Turn a sweep into plain values."""
    return {
        "folder": str(sweep.folder),
        "plot": str(sweep.plot),
        "command": sweep.command,
        "trials": [
            {
                "folder": str(trial.run.folder),
                "values": trial.values,
                "state": trial.state,
                "eval_loss": trial.eval_loss,
                "curve": trial.curve,
                **({"reason": trial.reason} if trial.reason else {}),
            }
            for trial in sweep.trials
        ],
    }
