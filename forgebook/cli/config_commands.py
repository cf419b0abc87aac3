"""The commands that take a CONFIG: fine-tune, plan, preview, tune, submit; the state of a submitted job; the schema.

Each takes its arguments and returns an exit code; each imports what it needs when it is called.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from forgebook.cli.arguments import Arguments, load_noting_retired, parse_arguments
from forgebook.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from forgebook.catalog import Gpu, Shape
    from forgebook.config.data_block import DataPath, HeldOut
    from forgebook.config.schema import FinetuneConfig
    from forgebook.planning.auto_config import Choice
    from forgebook.planning.token_count import Statistics

__all__ = [
    "fine_tune_command",
    "plan_command",
    "preview_command",
    "schema_command",
    "status_command",
    "stop_command",
    "submit_command",
    "tune_command",
]


def _load(parsed: Arguments) -> FinetuneConfig:
    return load_noting_retired(parsed.target, parsed.rest, parsed.flags.default)


def fine_tune_command(arguments: list[str]) -> int:
    """Run the training that a CONFIG describes."""
    config = _load(parse_arguments("", arguments))
    from forgebook.planning.prepare import check_rows

    check_rows(config)  # a mistake in the data is reported before torch and Ray are imported
    from forgebook.launch.fine_tune import fine_tune

    with _second_interrupt_ends():
        fine_tune(config)
    return 0


@contextlib.contextmanager
def _second_interrupt_ends() -> Iterator[None]:
    """Let a second Ctrl-C end the process at once, also while it cleans up after the first one."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def end_at_once(number: int, frame: object) -> None:
        os._exit(130)

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, end_at_once)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def plan_command(arguments: list[str]) -> int:
    """Print memory, time and cost before the run."""
    parsed = parse_arguments("plan", arguments)
    from forgebook.models.image_load import with_images
    from forgebook.models.shapes import find_shape
    from forgebook.planning.hardware import cpu_share, hardware_in, has_gpu
    from forgebook.planning.history import read_throughputs
    from forgebook.planning.plan import plan
    from forgebook.planning.plan_report import choice_rows, plan_as_json, plan_rows, plan_summary, price_rows, verdict
    from forgebook.planning.settings import check_written
    from forgebook.planning.token_count import count_data

    config = _load(parsed)
    choices: list[Choice] = []
    if config.is_default:
        config, hardware, data, choices = _choose(config)
    else:
        hardware, data = hardware_in(config), count_data(config)
    shape = with_images(find_shape(config.model_id), config, data.pixels if data else 0.0)
    if parsed.options["fit"]:
        config = _write_fitting(config, shape, hardware, data)
    throughputs, warning = read_throughputs()
    planned = plan(config, shape, hardware, data, mfu=parsed.options.get("mfu"), throughputs=throughputs)
    warnings = check_written(config, shape, planned.steps)
    if _are_all_here(config.train_path, config.valid_path):
        from forgebook.planning.prepare import row_warnings

        warnings += row_warnings(config)
    if parsed.flags.json:
        added = {"choices": [vars(choice) for choice in choices], "warnings": warnings}
        print(json.dumps(plan_as_json(planned) | added, indent=2))
        return 0
    from forgebook.reporting.console import make_console, make_table

    output = make_console()
    if choices:
        output.print(make_table("Chosen (--default)", ["key", "value", "reason"], choice_rows(choices)))
    output.print(make_table(f"Plan of {config.run_name}: {planned.model_id}", ["", "", ""], plan_rows(planned)))
    columns = ["hardware", "fits", "time", "cost", "per million tokens"]
    output.print(make_table(f"Time and cost {planned.assumption}; {planned.priced}", columns, price_rows(planned)))
    if hardware is None and not has_gpu():
        workers = max(1, config.num_devices)
        here = plan(config, shape, (workers, cpu_share(workers)), data, throughputs=throughputs)
        output.print(f"on this machine ({here.cpu}): {plan_summary(here)}")
    for note in [*planned.notes, *filter(None, [warning])]:
        output.print(f"note: {note}", markup=False)
    for text in warnings:
        output.print(f"warning: {text}", style="yellow", markup=False)
    output.print(f"[bold]{verdict(planned)}[/bold]")
    return 0


def _are_all_here(*paths: DataPath | HeldOut | None) -> bool:
    """Check whether the examples of all these paths are stored on this machine."""
    from forgebook.planning.token_count import data_is_here

    return all(data_is_here(path) for path in paths if path)


def _choose(
    config: FinetuneConfig,
) -> tuple[FinetuneConfig, tuple[int, Gpu] | None, Statistics | None, list[Choice]]:
    """Choose what CONFIG leaves open, from a quick count of the data; return (config, hardware, data, choices)."""
    from forgebook.models.image_load import with_images
    from forgebook.planning.auto_config import choose, choose_task, core_shape, first_rows
    from forgebook.planning.hardware import hardware_in, local_hardware
    from forgebook.planning.token_count import count_data, data_is_here

    shape = core_shape(config.model_id)
    config = choose_task(config, first_rows(config.train_path) if data_is_here(config.train_path) else [])
    hardware = hardware_in(config) or local_hardware()
    data = count_data(config)
    shape = with_images(shape, config, data.pixels if data else 0.0)
    config, choices = choose(config, shape, hardware, data)
    if hardware is not None:  # the config may use fewer of its GPUs
        hardware = (max(1, config.num_devices), hardware[1])
    return config, hardware, data, choices


def _write_fitting(
    config: FinetuneConfig, shape: Shape, hardware: tuple[int, Gpu] | None, data: Statistics | None
) -> FinetuneConfig:
    """Write the fastest settings that fit the hardware next to the config, as RUN_NAME-fit.yaml; return them."""
    from pathlib import Path

    from forgebook.config.parse import dump_config
    from forgebook.planning.feasibility import fit

    if hardware is None:
        raise ConfigError("plan: fit=true needs the hardware to fit, such as hardware=8xA100-80G")
    fitting = fit(config, shape, hardware, data)
    if fitting is None:
        raise ResourceError(f"{config.model_id} fits {hardware[0]}x{hardware[1].name} with no settings: take more GPUs")
    folder = Path() if config.source is None or "://" in config.source else Path(config.source).parent
    target, text = folder / f"{config.run_name}-fit.yaml", dump_config(fitting)
    if target.exists() and target.read_bytes() != text.encode():
        kept = next(path for k in itertools.count(1) if not (path := target.with_suffix(f".yaml.{k}")).exists())
        target.rename(kept)
        print(f"{target} was there with other content, which is now {kept}", file=sys.stderr)
    target.write_text(text, encoding="utf-8")
    print(f"wrote {target}", file=sys.stderr)
    return fitting


def preview_command(arguments: list[str]) -> int:
    """Show examples as the model will see them."""
    parsed = parse_arguments("preview", arguments)
    config = _load(parsed)
    if config.is_default:
        from forgebook.planning.auto_config import choose_task, first_rows

        config = choose_task(config, first_rows(config.train_path))
    from forgebook.data.preview import example_as_json, ignored_keys, preview_examples, print_example

    examples = preview_examples(config, parsed.options["n"])
    if parsed.flags.json:
        print("\n".join(map(example_as_json, examples)))
        if ignored := ignored_keys(config):
            print(f"ignored keys: {ignored}", file=sys.stderr)
        return 0
    from forgebook.reporting.console import make_console

    output = make_console()
    for example in examples:
        print_example(example, output)
    if ignored := ignored_keys(config):
        output.print(f"ignored keys: {ignored}", style="yellow", markup=False)
    return 0


def schema_command(arguments: list[str]) -> int:
    """Print the JSON schema of a config."""
    parse_arguments("schema", arguments)
    from forgebook.config.json_schema import config_schema

    print(json.dumps(config_schema(), indent=2))
    return 0


def tune_command(arguments: list[str]) -> int:
    """Sweep over values of some keys."""
    parsed = parse_arguments("tune", arguments)
    from forgebook.launch.ray_tune import print_sweep, sweep_as_json, tune

    samples, is_json = parsed.options.get("samples"), parsed.flags.json
    with _second_interrupt_ends():
        sweep = tune(parsed.target, parsed.rest, samples, parsed.flags.default, silent=is_json)
    if is_json:
        print(json.dumps(sweep_as_json(sweep), indent=2))
    else:
        print_sweep(sweep)
    return 0


def submit_command(arguments: list[str]) -> int:
    """Send the run to a Ray cluster as a job, or print its manifest."""
    parsed = parse_arguments("submit", arguments)
    options, flags = parsed.options, parsed.flags
    config = _load(parsed)
    overrides = ["--default", *parsed.rest] if flags.default else parsed.rest
    usable = {"image", "working_dir", "max_retries"} if flags.format else {"address"}
    unusable = set(options) - usable - ({"gpus_per_node", "secret"} if flags.format == "kuberay" else set())
    if unusable:
        where = f"--format {flags.format}" if flags.format else "a job on a running cluster (see --format)"
        raise ConfigError(f"submit: {', '.join(sorted(unusable))} has no effect on {where}")
    if _are_all_here(
        config.train_path, config.valid_path
    ):  # the job has what is in this repository; what is elsewhere may be there only
        from forgebook.planning.prepare import check_rows

        check_rows(config)
    if flags.format:
        _print_job_file(flags.format, config, overrides, parsed)
        return 0
    from forgebook.launch import ray_jobs

    address = ray_jobs.find_job_server(options.get("address"))
    command = ray_jobs.job_command(config.source, config.storage_path, overrides)
    job = ray_jobs.submit_job(command, config.run_name, address)
    there = f" address={address}" if "address" in options else ""
    print(
        f"job {job} at {address}\n  python main.py status {job}{there}\n  python main.py stop {job}{there}", flush=True
    )
    if flags.no_follow:
        return 0
    try:
        state = ray_jobs.follow_job(job, address)
    except KeyboardInterrupt:
        print(f"the job is still running: python main.py status {job}{there}", file=sys.stderr)
        return 130
    message = "" if state == "SUCCEEDED" else f": {ray_jobs.job_status(job, address)['message']}"
    print(f"job {job} {state.lower()}{message}")
    return 0 if state == "SUCCEEDED" else 1


def _print_job_file(kind: str, config: FinetuneConfig, overrides: list[str], parsed: Arguments) -> None:
    """Print the file of a job for KubeRay or Anyscale."""
    import yaml

    from forgebook.launch import ray_jobs

    image, folder = parsed.options.get("image"), parsed.options.get("working_dir")
    if kind == "kuberay":
        if image is None:
            raise ConfigError("submit: --format kuberay needs image=, one with requirements.txt installed")
        command = ray_jobs.job_command(config.source, config.storage_path, overrides)
        settings = parsed.get("gpus_per_node", "max_retries", "secret")
        name, devices = str(config.run_name), config.num_devices
        manifest = ray_jobs.kuberay_manifest(command, name, devices, image, folder or "", **settings)
    else:
        command = ray_jobs.job_command(config.source, config.storage_path, overrides)
        manifest = ray_jobs.anyscale_job(command, config.run_name, image, folder or ".", **parsed.get("max_retries"))
    print(yaml.safe_dump(manifest, sort_keys=False, width=1000), end="")


def _job_of(name: str, arguments: list[str]) -> tuple[str, str]:
    """Parse the arguments of a command about one job: its id, and the address of its cluster."""
    parsed = parse_arguments(name, arguments)
    from forgebook.launch.ray_jobs import find_job_server

    return parsed.target, find_job_server(parsed.options.get("address"))


def status_command(arguments: list[str]) -> int:
    """Print the state of a job."""
    job, address = _job_of("status", arguments)
    from forgebook.launch.ray_jobs import job_status

    details = job_status(job, address)
    for name, value in details.items():
        if value is not None:
            if name in ("started", "ended"):
                value = datetime.datetime.fromtimestamp(value).astimezone().isoformat(" ", "seconds")
            print(f"{name:<11}{value}")
    return 0


def stop_command(arguments: list[str]) -> int:
    """Stop a job."""
    job, address = _job_of("stop", arguments)
    from forgebook.launch.ray_jobs import ENDED, stop_job

    state = stop_job(job, address)
    print(f"job {job} had already {state.lower()}" if state in ENDED else f"job {job} is stopping")
    return 0
