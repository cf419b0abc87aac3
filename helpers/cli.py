"""The verbs of `main.py`. Each imports what it needs when it is called: `--help` answers at once."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence

__all__ = ["main"]

HELP = """\
Fine-tune a language model as CONFIG says, and look at what came of it.

  python main.py CONFIG [--default] [key=value ...]     fine-tune; CONFIG is a YAML file or an https:// address
  python main.py plan CONFIG [hardware=8xA100-80G]      memory, time and cost before the run; trains nothing
  python main.py preview CONFIG [n=3]                   rows as the model will see them, trained tokens marked
  python main.py evaluate RUN [data=FILE] [rows=N]      held-out prompts answered before and after, with accuracy
  python main.py models [show RUN | delete RUN]         what was fine-tuned, here or in a bucket
  python main.py push RUN OWNER/NAME [private=true]     the best checkpoint to the Hugging Face hub, with a card
  python main.py export MODEL OUT.gguf [type=q8_0]      full weights as a GGUF file, through llama.cpp
  python main.py tune CONFIG 'KEY=[A,B]' [samples=N]    a sweep: which values give the lowest evaluation loss
  python main.py submit CONFIG [address=URL]            the same run as a job on a Ray cluster (CLUSTERS.md)
  python main.py status JOB  ·  stop JOB                a job that was submitted

RUN is a run's folder or s3:// address, or its name under runs/. `python main.py VERB --help` tells a verb's options;
the keys of a config and their meaning: helpers/schema.py.

examples:
  python main.py training_configs/tiny/quickstart.yaml
  python main.py training_configs/tiny/quickstart.yaml learning_rate=3.0e-4 deepspeed=none run_name=try-2
  python main.py preview training_configs/tiny/quickstart.yaml n=1
  python main.py plan training_configs/tiny/quickstart.yaml hardware=1xT4
  python main.py evaluate quickstart rows=5
  python main.py tune training_configs/tiny/quickstart.yaml 'learning_rate=[1.0e-3,5.0e-3]' 'lora_config.r=[8,32]'
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0 for a result worth having, 2 for a user's mistake."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    named = next((argument for argument in arguments if not argument.startswith("-")), None)
    if named is None:
        _parser("", "[VERB] TARGET [key=value ...]", HELP).parse_args(arguments)  # --help, or a mistake
        print("usage: python main.py CONFIG, or a verb: python main.py --help", file=sys.stderr)
        return 2
    if named in VERBS:
        arguments.remove(named)
    from helpers.errors import ForgebookError

    try:
        return VERBS.get(named, _fine_tune)(arguments)
    except ForgebookError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command continues from the last complete state", file=sys.stderr)
        return 130


# What verbs share -------------------------------------------------------------------------------------


def _parser(verb: str, usage: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog="main.py", usage=" ".join(f"python main.py {verb} {usage}".split()), description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def _config_parser(verb: str, usage: str, description: str) -> argparse.ArgumentParser:
    """Make the parser of a verb that takes a CONFIG and `key=value` overrides."""
    parser = _parser(verb, usage, description)
    parser.add_argument("words", metavar="CONFIG [key=value ...]", nargs="*", help="a YAML file or https:// address")
    parser.add_argument("--default", action="store_true", help="choose all that CONFIG leaves out, and say why")
    return parser


def _split(verb: str, what: str, words: Sequence[str], known: Sequence[str]) -> tuple[str, list[str], dict[str, str]]:
    """Part a verb's words into its target, the overrides, and the verb's own `key=value` options."""
    from helpers.errors import ConfigError

    own = [word for word in words if word.partition("=")[0] in known and "=" in word]
    target, *overrides = [word for word in words if word not in own] or [None]
    if target is None or "=" in target:
        raise ConfigError(f"{verb} needs a {what}")
    return target, overrides, dict(word.split("=", 1) for word in own)


def _only(verb: str, overrides: Sequence[str], known: Sequence[str]) -> None:
    """Refuse words that a verb without a config cannot use."""
    from helpers.errors import ConfigError

    if overrides:
        unknown = ", ".join(sorted(word.partition("=")[0] for word in overrides))
        raise ConfigError(f"{verb}: unknown option {unknown}: it takes {', '.join(f'{name}=' for name in known)}")


def _whole(verb: str, name: str, value: str) -> int:
    """Read a number of things, one or more."""
    from helpers.errors import ConfigError

    if not value.isdigit() or int(value) == 0:
        raise ConfigError(f"{verb}: {name} must be a whole number, 1 or more, got {value!r}")
    return int(value)


def _load(config_path: str, overrides: list[str], default: bool):
    """Load a config; tell of retired names on the error stream."""
    from helpers.config import load_config

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = load_config(config_path, overrides, default)
    for warning in caught:
        print(f"note: {warning.message}", file=sys.stderr)
    return config


_A_CONFIG = "CONFIG: a YAML file or an https:// address"
_A_RUN = "RUN: a run's folder or s3:// address, or its name under runs/"

# The verbs --------------------------------------------------------------------------------------------


def _fine_tune(arguments: list[str]) -> int:
    given = _config_parser("", "CONFIG [--default] [key=value ...]", HELP).parse_intermixed_args(arguments)
    config_path, *overrides = given.words
    config = _load(config_path, overrides, given.default)
    from helpers.launch import fine_tune

    fine_tune(config)
    return 0


def _plan(arguments: list[str]) -> int:
    parser = _config_parser(
        "plan", "CONFIG [hardware=8xA100-80G] [mfu=0.4] [fit=true] [--default] [--json] [key=value ...]",
        "Memory, time and cost before the run; trains nothing.\n"
        "hardware: as many of which GPU; mfu: the share of the peak taken to be reached (else as in past runs here);\n"
        "fit=true: write the fastest settings that fit as CONFIG-fit.yaml",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_intermixed_args(arguments)
    from helpers.catalog import shape_of
    from helpers.counting import count_data
    from helpers.errors import ConfigError
    from helpers.hardware import cpu_share, hardware_in, has_gpu
    from helpers.paces import past_paces
    from helpers.plan import plan
    from helpers.plan_text import as_json, in_short, plan_rows, price_rows, verdict

    config_path, overrides, options = _split("plan", _A_CONFIG, given.words, ("mfu", "fit"))
    try:
        mfu = float(options["mfu"]) if "mfu" in options else None
    except ValueError:
        mfu = 0.0
    if mfu is not None and not 0 < mfu <= 1:
        raise ConfigError(f"plan: mfu must be a share of the peak, above 0 and at most 1, got {options['mfu']!r}")
    if options.get("fit", "false") not in ("true", "false"):
        raise ConfigError(f"plan: fit must be true or false, got {options['fit']!r}")
    config = _load(config_path, overrides, given.default)
    choices = []
    if config.is_default:
        config, hardware, data, choices = _choose(config)
    else:
        hardware, data = hardware_in(config), count_data(config)
    shape = shape_of(config)
    if options.get("fit") == "true":
        config = _fitted(config, shape, hardware, data)
    paces, unread = past_paces()
    told = plan(config, shape, hardware, data, mfu=mfu, paces=paces)
    if given.json:
        import json

        print(json.dumps(as_json(told) | {"choices": [vars(choice) for choice in choices]}, indent=2))
        return 0
    from helpers.console import make_console, table

    output = make_console()
    if choices:
        from helpers.choices import choice_rows

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
    from helpers.counting import count_data, data_is_here
    from helpers.defaults import choose, choose_task, core_shape, first_rows
    from helpers.hardware import found_hardware, hardware_in

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

    from helpers.config import dump_config
    from helpers.errors import ConfigError, ResourceError
    from helpers.fitting import fit

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


def _preview(arguments: list[str]) -> int:
    parser = _config_parser(
        "preview", "CONFIG [n=3] [--json] [key=value ...]", "Rows as the model will see them, trained tokens marked."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per row")
    given = parser.parse_intermixed_args(arguments)
    config_path, overrides, options = _split("preview", _A_CONFIG, given.words, ("n",))
    count = _whole("preview", "n", options.get("n", "3"))
    config = _load(config_path, overrides, given.default)
    if config.is_default:
        from helpers.defaults import choose_task, first_rows

        config = choose_task(config, first_rows(config))
    from helpers.preview import as_json, preview, print_row

    rows = preview(config, count)
    if given.json:
        print("\n".join(map(as_json, rows)))
        return 0
    from helpers.console import make_console

    output = make_console()
    for row in rows:
        print_row(row, output)
    return 0


def _evaluate(arguments: list[str]) -> int:
    known = ("data", "rows")
    parser = _parser(
        "evaluate", "RUN [data=FILE] [rows=N]", "Held-out prompts answered before and after, with accuracy."
    )
    parser.add_argument("words", metavar="RUN [key=value ...]", nargs="*", help="a run's folder or name")
    given = parser.parse_intermixed_args(arguments)
    name, overrides, options = _split("evaluate", _A_RUN, given.words, known)
    _only("evaluate", overrides, known)
    rows = _whole("evaluate", "rows", options["rows"]) if "rows" in options else None
    from helpers.console import make_console, quiet_descriptors, table
    from helpers.storage import find_run, keep_json, shown

    run = find_run(name)
    with quiet_descriptors(run.logs / "evaluate.log") as output:
        output.print("loading the base model and the best checkpoint")
        from helpers.evaluate import compare_with_base

        compared = compare_with_base(run, options.get("data"), rows)
    output = make_console()
    answers = zip(compared.prompts, compared.base, compared.tuned, compared.references, strict=True)
    output.print(table("Held-out prompts", ["prompt", "base model", "tuned model", "reference"], list(answers)[:5]))
    before, after = compared.accuracy()
    output.print(f"exact match on {len(compared.references)} held-out rows: base {before:.1%}, tuned {after:.1%}")
    keep_json(run, "evaluation.json", compared.summary())
    output.print(f"run folder  {shown(run.folder)}\nloss curve  {shown(run.loss_curve)}")
    return 0


def _models(arguments: list[str]) -> int:
    parser = _parser(
        "models", "[STORAGE_PATH] [--json]  |  models show RUN [--json]  |  models delete RUN [--yes]",
        "What was fine-tuned under STORAGE_PATH (runs/, another folder, or s3://...): list it, show or delete one.\n"
        "delete asks, and keeps what other runs start from.",
    )  # fmt: skip
    parser.add_argument("words", metavar="WORD", nargs="*", help="a storage path; or show or delete, and a RUN")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--yes", action="store_true", help="delete without asking")
    given = parser.parse_intermixed_args(arguments)
    from dataclasses import asdict

    from helpers.errors import ConfigError
    from helpers.storage import delete_model, get_model, list_models

    action, *rest = given.words or ["runs"]
    if action not in ("show", "delete"):
        if rest:
            raise ConfigError(f"models takes a storage path, or show RUN, or delete RUN: got {' '.join(given.words)}")
        return _list_models(list_models(action), action, given.json)
    if len(rest) != 1:
        raise ConfigError(f"models {action} needs a {_A_RUN}")
    model = get_model(rest[0])
    if action == "delete":
        state = "" if model.is_complete else ", which is not complete and may be going on"
        if not given.yes and input(f"delete {model.storage_uri}{state}? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was deleted")
            return 0
        print(f"deleted {delete_model(rest[0]).storage_uri}")
        return 0
    import json

    if given.json:
        print(json.dumps(asdict(model), indent=2))
    for name, value in asdict(model).items() if not given.json else ():
        print(f"{name:18} {json.dumps(value) if isinstance(value, dict | list) else value}")
    return 0


def _list_models(models: list, place: str, as_object: bool) -> int:
    if as_object:
        import json
        from dataclasses import asdict

        print(json.dumps([asdict(model) for model in models], indent=2))
        return 0
    from helpers.console import make_console, table

    if not models:
        print(f"no models under {place}")
        return 0
    columns = ["id", "run", "base model", "trained", "evaluation loss", "created"]
    rows = []
    for model in models:
        loss = f"{model.figures['eval_loss']:.4f}" if "eval_loss" in model.figures else ""
        name, created = model.storage_uri.rpartition("/")[2], model.created_at[:16].replace("T", " ")
        state = loss if model.is_complete else "not complete"
        rows.append([model.id, name, model.base_model_id, model.ft_type, state, created])
    make_console().print(table(f"Models under {place}", columns, rows))
    return 0


def _push(arguments: list[str]) -> int:
    known = ("private", "base")
    parser = _parser(
        "push", "RUN OWNER/NAME [private=true] [base=OWNER/NAME]",
        "Upload a run's best checkpoint to the Hugging Face hub (HF_ENDPOINT), with a model card.\n"
        "base: the hub id of an adapter's base that was read from a folder. The token: HF_TOKEN.",
    )  # fmt: skip
    parser.add_argument("words", metavar="RUN OWNER/NAME [key=value ...]", nargs="*", help="a run; a repository")
    given = parser.parse_intermixed_args(arguments)
    name, rest, options = _split("push", _A_RUN, given.words, known)
    from helpers.errors import ConfigError
    from helpers.publish import push
    from helpers.storage import find_run

    if not rest or "=" in rest[0]:
        raise ConfigError("push needs a repository after the RUN: OWNER/NAME")
    _only("push", rest[1:], known)
    if options.get("private", "false") not in ("true", "false"):
        raise ConfigError(f"push: private must be true or false, got {options['private']!r}")
    print(f"pushed to {push(find_run(name), rest[0], options.get('private') == 'true', options.get('base'))}")
    return 0


def _export(arguments: list[str]) -> int:
    known = ("type",)
    parser = _parser(
        "export", "MODEL OUT.gguf [type=q8_0]",
        "Write full weights as a GGUF file with llama.cpp's converter, from $LLAMA_CPP or the PATH.\n"
        "MODEL: a folder that merge made, or a full-parameter RUN. type: f32, f16, bf16, q8_0, ...",
    )  # fmt: skip
    parser.add_argument("words", metavar="MODEL OUT.gguf [type=...]", nargs="*", help="a folder or run; a file")
    given = parser.parse_intermixed_args(arguments)
    source, rest, options = _split("export", "MODEL: a folder that merge made, or a RUN", given.words, known)
    from pathlib import Path

    from helpers.errors import ConfigError
    from helpers.publish import best_checkpoint, export_gguf
    from helpers.storage import find_run

    if not rest or "=" in rest[0]:
        raise ConfigError("export needs a file to write after the MODEL, such as model.gguf")
    _only("export", rest[1:], known)
    is_model = (Path(source) / "config.json").is_file()
    folder = Path(source) if is_model else best_checkpoint(find_run(source))
    print(f"wrote {export_gguf(folder, Path(rest[0]), options.get('type', 'q8_0'))}")


def _submit(arguments: list[str]) -> int:
    known = ("address", "image", "working_dir", "gpus_per_node", "max_retries", "secret")
    parser = _config_parser(
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
    from helpers import jobs
    from helpers.errors import ConfigError

    config_path, overrides, options = _split("submit", _A_CONFIG, given.words, known)
    config = _load(config_path, overrides, given.default)
    if given.default:
        overrides = ["--default", *overrides]
    unused = set(options) - ({"image", "working_dir", "max_retries"} if given.format else {"address"})
    if unused - ({"gpus_per_node", "secret"} if given.format == "kuberay" else set()):
        where = f"--format {given.format}" if given.format else "a job on a running cluster (see --format)"
        raise ConfigError(f"submit: {', '.join(sorted(unused))} means nothing for {where}")
    if given.format:
        import yaml

        numbers = ("gpus_per_node", "max_retries")
        values = {name: _whole("submit", name, options[name]) for name in numbers if options.get(name, "0") != "0"}
        values |= {name: 0 for name in ("max_retries",) if options.get(name) == "0"}
        values |= {name: value for name, value in options.items() if name not in numbers}
        if given.format == "kuberay" and "image" not in options:
            raise ConfigError("submit: --format kuberay needs image=, one with requirements.txt installed")
        values.setdefault("working_dir", "." if given.format == "anyscale" else "")
        write = jobs.kuberay_manifest if given.format == "kuberay" else jobs.anyscale_job
        print(yaml.safe_dump(write(config, overrides, **values), sort_keys=False, width=1000), end="")
        return 0
    address = jobs.find_address(options.get("address"))
    job = jobs.submit(config, overrides, address)
    there = f" address={address}" if "address" in options else ""
    print(
        f"job {job} at {address}\n  python main.py status {job}{there}\n  python main.py stop {job}{there}", flush=True
    )
    if given.no_follow:
        return 0
    try:
        state = jobs.follow(job, address)
    except KeyboardInterrupt:
        print(f"the job goes on: python main.py status {job}{there}", file=sys.stderr)
        return 130
    message = "" if state == "SUCCEEDED" else f": {jobs.status(job, address)['message']}"
    print(f"job {job} {state.lower()}{message}")
    return 0 if state == "SUCCEEDED" else 1


def _job_of(verb: str, what: str, arguments: list[str]) -> tuple[str, str]:
    """Read the words of a verb about one job: its id, and the address of its cluster."""
    parser = _parser(verb, "JOB [address=http://HEAD:8265]", what)
    parser.add_argument("words", metavar="JOB [address=URL]", nargs="*", help="the id that submit printed")
    given = parser.parse_intermixed_args(arguments)
    from helpers.jobs import find_address

    job, overrides, options = _split(verb, "JOB: the id that submit printed", given.words, ("address",))
    _only(verb, overrides, ("address",))
    return job, find_address(options.get("address"))


def _status(arguments: list[str]) -> int:
    job, address = _job_of("status", "The state of a job.", arguments)
    from helpers.jobs import status

    for name, value in status(job, address).items():
        if value is not None:
            print(f"{name:<11}{value}")
    return 0


def _stop(arguments: list[str]) -> int:
    job, address = _job_of("stop", "Stop a job; what it has saved stays.", arguments)
    from helpers.jobs import ENDED, stop

    found = stop(job, address)
    print(f"job {job} had {found.lower()} already" if found in ENDED else f"job {job} is asked to stop")
    return 0


def _tune(arguments: list[str]) -> int:
    parser = _config_parser(
        "tune", "CONFIG 'KEY=[A,B]' 'KEY=loguniform(LOW,HIGH)' [samples=N] [--default] [--json] [key=value ...]",
        "A sweep: one run for each combination of the values in lists, through Ray Tune; those with a worse\n"
        "evaluation loss than half of the others are stopped early (ASHA).\n"
        "'KEY=[A,B]': each of these; 'KEY=uniform(LOW,HIGH)', 'KEY=loguniform(LOW,HIGH)': drawn samples=N times.\n"
        "The same command again continues the sweep. A list as one value: 'KEY=[[a,b]]'.",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_intermixed_args(arguments)
    from helpers.tune import as_json, print_sweep, tune

    config_path, words, options = _split("tune", _A_CONFIG, given.words, ("samples",))
    samples = _whole("tune", "samples", options["samples"]) if "samples" in options else None
    sweep = tune(config_path, words, samples, given.default, silent=given.json)
    if given.json:
        import json

        print(json.dumps(as_json(sweep), indent=2))
    else:
        print_sweep(sweep)
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "plan": _plan,
    "preview": _preview,
    "evaluate": _evaluate,
    "models": _models,
    "push": _push,
    "export": _export,
    "tune": _tune,
    "submit": _submit,
    "status": _status,
    "stop": _stop,
}
