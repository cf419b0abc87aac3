"""The verbs that take a CONFIG: fine-tune it, plan it, preview its rows, sweep it, submit it as a job.

Each takes its command-line words and returns an exit code; each imports what it needs when it is called.
"""

from __future__ import annotations

import sys

from forgebook.cli.options import A_CONFIG, load, make_config_parser, make_parser, only, split, whole

__all__ = ["fine_tune", "plan", "preview", "status", "stop", "submit", "tune"]


def fine_tune(arguments: list[str]) -> int:
    """Run the training that a CONFIG describes."""
    parser = make_config_parser(
        "", "CONFIG [--default] [key=value ...]",
        "Fine-tune as CONFIG says, or continue the run of that name. The verbs: python main.py --help",
    )  # fmt: skip
    given = parser.parse_intermixed_args(arguments)
    config_path, *overrides = given.words
    config = load(config_path, overrides, given.default)
    from forgebook.launch.ray_train import fine_tune

    fine_tune(config)
    return 0


def plan(arguments: list[str]) -> int:
    """Tell memory, time and cost before the run."""
    parser = make_config_parser(
        "plan", "CONFIG [hardware=8xA100-80G] [mfu=0.4] [fit=true] [--default] [--json] [key=value ...]",
        "Memory, time and cost before the run; trains nothing.\n"
        "hardware: as many of which GPU; mfu: the share of the peak taken to be reached (else as in past runs here);\n"
        "fit=true: write the fastest settings that fit as CONFIG-fit.yaml",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_intermixed_args(arguments)
    from forgebook.catalog import shape_of
    from forgebook.errors import ConfigError
    from forgebook.planning.hardware import cpu_share, hardware_in, has_gpu
    from forgebook.planning.history import past_paces
    from forgebook.planning.plan import plan
    from forgebook.planning.plan_report import as_json, in_short, plan_rows, price_rows, verdict
    from forgebook.planning.token_count import count_data

    config_path, overrides, options = split("plan", A_CONFIG, given.words, ("mfu", "fit"))
    try:
        mfu = float(options["mfu"]) if "mfu" in options else None
    except ValueError:
        mfu = 0.0
    if mfu is not None and not 0 < mfu <= 1:
        raise ConfigError(f"plan: mfu must be a share of the peak, above 0 and at most 1, got {options['mfu']!r}")
    if options.get("fit", "false") not in ("true", "false"):
        raise ConfigError(f"plan: fit must be true or false, got {options['fit']!r}")
    config = load(config_path, overrides, given.default)
    choices = []
    if config.is_default:
        config, hardware, data, choices = _choose(config)
    else:
        hardware, data = hardware_in(config), count_data(config)
    shape = shape_of(config.model_id)
    if options.get("fit") == "true":
        config = _fitted(config, shape, hardware, data)
    paces, unread = past_paces()
    told = plan(config, shape, hardware, data, mfu=mfu, paces=paces)
    if given.json:
        import json

        print(json.dumps(as_json(told) | {"choices": [vars(choice) for choice in choices]}, indent=2))
        return 0
    from forgebook.reporting.console import make_console, table

    output = make_console()
    if choices:
        from forgebook.planning.auto_config import choice_rows

        output.print(table("Chosen (--default)", ["key", "value", "reason"], choice_rows(choices)))
    output.print(table(f"Plan of {config.run_name}: {told.model_id}", ["", "", ""], plan_rows(told)))
    columns = ["hardware", "fits", "time", "cost", "per million tokens"]
    output.print(table(f"Time and cost {told.pace}; {told.priced}", columns, price_rows(told)))
    if hardware is None and not has_gpu():
        workers = max(1, config.num_devices)
        here = plan(config, shape, (workers, cpu_share(workers)), data, paces=paces)
        output.print(f"on this machine ({here.cpu}): {in_short(here)}")
    for note in [*told.notes, *filter(None, [unread])]:
        output.print(f"note: {note}")
    output.print(f"[bold]{verdict(told)}[/bold]")
    return 0


def _choose(config):
    """Choose what CONFIG leaves open, by a quick count of the data; return (config, hardware, data, choices)."""
    from forgebook.planning.auto_config import choose, choose_task, core_shape, first_rows
    from forgebook.planning.hardware import found_hardware, hardware_in
    from forgebook.planning.token_count import count_data, data_is_here

    shape = core_shape(config)
    config = choose_task(config, first_rows(config) if data_is_here(config) else [])
    hardware = hardware_in(config) or found_hardware()
    data = count_data(config)
    config, choices = choose(config, shape, hardware, data)
    if hardware is not None:  # of which the config may give fewer
        hardware = (max(1, config.num_devices), hardware[1])
    return config, hardware, data, choices


def _fitted(config, shape, hardware, data):
    """Write the fastest settings that fit the hardware beside the config, under a name of their own."""
    from pathlib import Path

    from forgebook.config.parse import dump_config
    from forgebook.errors import ConfigError, ResourceError
    from forgebook.planning.feasibility import fit

    if hardware is None:
        raise ConfigError("plan: fit=true needs the hardware to fit, such as hardware=8xA100-80G")
    found = fit(config, shape, hardware, data)
    if found is None:
        raise ResourceError(f"{config.model_id} fits {hardware[0]}x{hardware[1].name} with no settings: take more GPUs")
    folder = Path(config.source).parent if "://" not in config.source else Path()
    target = folder / f"{config.run_name}-fit.yaml"
    target.write_text(dump_config(found))
    print(f"wrote {target}", file=sys.stderr)
    return found


def preview(arguments: list[str]) -> int:
    """Show examples as the model will see them."""
    parser = make_config_parser(
        "preview",
        "CONFIG [n=3] [--json] [key=value ...]",
        "Examples as the model will see them, tokens in the loss highlighted.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per example")
    given = parser.parse_intermixed_args(arguments)
    config_path, overrides, options = split("preview", A_CONFIG, given.words, ("n",))
    count = whole("preview", "n", options.get("n", "3"))
    config = load(config_path, overrides, given.default)
    if config.is_default:
        from forgebook.planning.auto_config import choose_task, first_rows

        config = choose_task(config, first_rows(config))
    from forgebook.data.preview import example_as_json, preview_examples, print_example

    examples = preview_examples(config, count)
    if given.json:
        print("\n".join(map(example_as_json, examples)))
        return 0
    from forgebook.reporting.console import make_console

    output = make_console()
    for example in examples:
        print_example(example, output)
    return 0


def tune(arguments: list[str]) -> int:
    """Sweep over values of some keys."""
    parser = make_config_parser(
        "tune", "CONFIG 'KEY=[A,B]' 'KEY=loguniform(LOW,HIGH)' [samples=N] [--default] [--json] [key=value ...]",
        "A sweep: one run for each combination of the values in lists, through Ray Tune; those with a worse\n"
        "evaluation loss than half of the others are stopped early (ASHA).\n"
        "'KEY=[A,B]': each of these; 'KEY=uniform(LOW,HIGH)', 'KEY=loguniform(LOW,HIGH)': drawn samples=N times.\n"
        "The same command again continues the sweep. A list as one value: 'KEY=[[a,b]]'.",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_intermixed_args(arguments)
    from forgebook.launch.ray_tune import as_json, print_sweep, tune

    config_path, words, options = split("tune", A_CONFIG, given.words, ("samples",))
    samples = whole("tune", "samples", options["samples"]) if "samples" in options else None
    sweep = tune(config_path, words, samples, given.default, silent=given.json)
    if given.json:
        import json

        print(json.dumps(as_json(sweep), indent=2))
    else:
        print_sweep(sweep)
    return 0


def submit(arguments: list[str]) -> int:
    """Send the run to a Ray cluster as a job, or print its manifest."""
    known = ("address", "image", "working_dir", "gpus_per_node", "max_retries", "secret")
    parser = make_config_parser(
        "submit",
        "CONFIG [address=http://HEAD:8265] [--no-follow] [--format kuberay|anyscale] [--default] [key=value ...]",
        "The same run as a job on a Ray cluster: ships this repository, then follows the log.\n"
        "address: the cluster's job server; else RAY_API_SERVER_ADDRESS, else this machine's\n"
        "--format prints a file instead: image=, max_retries=1, working_dir= (kuberay: the address of a zip of this\n"
        "repository, or its folder in the image), and for kuberay gpus_per_node=1, secret=forgebook (CLUSTERS.md)",
    )
    parser.add_argument("--no-follow", action="store_true", help="return as soon as the job is taken")
    parser.add_argument("--format", choices=("kuberay", "anyscale"), help="print a job file; submit nothing")
    given = parser.parse_intermixed_args(arguments)
    from forgebook.errors import ConfigError
    from forgebook.launch import ray_jobs

    config_path, overrides, options = split("submit", A_CONFIG, given.words, known)
    config = load(config_path, overrides, given.default)
    if given.default:
        overrides = ["--default", *overrides]
    unused = set(options) - ({"image", "working_dir", "max_retries"} if given.format else {"address"})
    if unused - ({"gpus_per_node", "secret"} if given.format == "kuberay" else set()):
        where = f"--format {given.format}" if given.format else "a job on a running cluster (see --format)"
        raise ConfigError(f"submit: {', '.join(sorted(unused))} means nothing for {where}")
    if given.format:
        import yaml

        numbers = ("gpus_per_node", "max_retries")
        values = {name: whole("submit", name, options[name]) for name in numbers if options.get(name, "0") != "0"}
        values |= {name: 0 for name in ("max_retries",) if options.get(name) == "0"}
        values |= {name: value for name, value in options.items() if name not in numbers}
        if given.format == "kuberay" and "image" not in options:
            raise ConfigError("submit: --format kuberay needs image=, one with requirements.txt installed")
        values.setdefault("working_dir", "." if given.format == "anyscale" else "")
        write = ray_jobs.kuberay_manifest if given.format == "kuberay" else ray_jobs.anyscale_job
        print(yaml.safe_dump(write(config, overrides, **values), sort_keys=False, width=1000), end="")
        return 0
    address = ray_jobs.find_address(options.get("address"))
    job = ray_jobs.submit(config, overrides, address)
    there = f" address={address}" if "address" in options else ""
    print(
        f"job {job} at {address}\n  python main.py status {job}{there}\n  python main.py stop {job}{there}", flush=True
    )
    if given.no_follow:
        return 0
    try:
        state = ray_jobs.follow(job, address)
    except KeyboardInterrupt:
        print(f"the job goes on: python main.py status {job}{there}", file=sys.stderr)
        return 130
    message = "" if state == "SUCCEEDED" else f": {ray_jobs.status(job, address)['message']}"
    print(f"job {job} {state.lower()}{message}")
    return 0 if state == "SUCCEEDED" else 1


def _job_of(verb: str, what: str, arguments: list[str]) -> tuple[str, str]:
    """Read the words of a verb about one job: its id, and the address of its cluster."""
    parser = make_parser(verb, "JOB [address=http://HEAD:8265]", what)
    parser.add_argument("words", metavar="JOB [address=URL]", nargs="*", help="the id that submit printed")
    given = parser.parse_intermixed_args(arguments)
    from forgebook.launch.ray_jobs import find_address

    job, overrides, options = split(verb, "JOB: the id that submit printed", given.words, ("address",))
    only(verb, overrides, ("address",))
    return job, find_address(options.get("address"))


def status(arguments: list[str]) -> int:
    """Tell how a job is."""
    job, address = _job_of("status", "The state of a job.", arguments)
    from forgebook.launch.ray_jobs import status

    for name, value in status(job, address).items():
        if value is not None:
            print(f"{name:<11}{value}")
    return 0


def stop(arguments: list[str]) -> int:
    """Stop a job."""
    job, address = _job_of("stop", "Stop a job; what it has saved stays.", arguments)
    from forgebook.launch.ray_jobs import ENDED, stop

    found = stop(job, address)
    print(f"job {job} had {found.lower()} already" if found in ENDED else f"job {job} is asked to stop")
    return 0
