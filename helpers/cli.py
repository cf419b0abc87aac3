"""The verbs of `main.py`. Each imports what it needs when it is called: `--help` answers at once."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

__all__ = ["main"]

HELP = """\
Fine-tune a language model as CONFIG says, and look at what came of it.

  python main.py CONFIG [--default] [key=value ...]     fine-tune; CONFIG is a YAML file or an https:// address
  python main.py plan CONFIG [hardware=8xA100-80G] [mfu=0.4] [fit=true] [--json]
                                                        memory, time and cost before the run; trains nothing.
                                                        fit: write the fastest settings that fit as CONFIG-fit.yaml
  python main.py preview CONFIG [n=3] [--json]          rows as the model will see them, trained tokens marked
  python main.py evaluate RUN [data=FILE] [rows=N]      held-out prompts answered before and after, with accuracy

RUN is a run's folder, or its name under runs/. Keys and their meaning: helpers/schema.py.

examples:
  python main.py training_configs/tiny/quickstart.yaml
  python main.py training_configs/tiny/quickstart.yaml learning_rate=3.0e-4 deepspeed=none run_name=try-2
  python main.py preview training_configs/tiny/quickstart.yaml n=1
  python main.py plan training_configs/tiny/quickstart.yaml hardware=1xT4
  python main.py evaluate quickstart rows=5
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0 for a result worth having, 2 for a user's mistake."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="main.py", usage="python main.py [VERB] TARGET [key=value ...]", description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("target", metavar="CONFIG | VERB RUN", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument(
        "--default", action="store_true", help="choose what CONFIG leaves out: LoRA, rank 8, all layers"
    )
    parser.add_argument("--json", action="store_true", help="plan: one JSON object; preview: one per row")
    given = parser.parse_intermixed_args(arguments)
    from helpers.errors import ForgebookError

    try:
        verb, *rest = given.target
        if verb == "evaluate":
            return _evaluate(rest)
        if verb == "plan":
            return _plan(rest, given.default, given.json)
        if verb == "preview":
            return _preview(rest, given.default, given.json)
        return _fine_tune(verb, rest, given.default)
    except ForgebookError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command continues from the last complete state", file=sys.stderr)
        return 130


def _fine_tune(config_path: str, overrides: list[str], default: bool) -> int:
    config = _load(config_path, overrides, default)
    from helpers.launch import fine_tune

    fine_tune(config)
    return 0


def _load(config_path: str, overrides: list[str], default: bool):
    """Load a config; tell of retired names on the error stream."""
    from helpers.config import load_config

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = load_config(config_path, overrides, default)
    for warning in caught:
        print(f"note: {warning.message}", file=sys.stderr)
    return config


def _plan(arguments: list[str], default: bool, as_object: bool) -> int:
    from helpers.catalog import hardware_of, shape_of
    from helpers.errors import ConfigError
    from helpers.plan import MFU, as_json, count_data, hardware_in, plan, plan_rows, price_rows, verdict

    own = [argument for argument in arguments if argument.startswith(("hardware=", "mfu=", "fit="))]
    options = dict(argument.split("=", 1) for argument in own)
    config_path, *overrides = [argument for argument in arguments if argument not in own] or [None]
    if config_path is None:
        raise ConfigError("plan needs a CONFIG: a YAML file or an https:// address")
    try:
        mfu = float(options.get("mfu", MFU))
    except ValueError:
        mfu = 0.0
    if not 0 < mfu <= 1:
        raise ConfigError(f"plan: mfu must be a share of the peak, above 0 and at most 1, got {options['mfu']!r}")
    config = _load(config_path, overrides, default)
    hardware = hardware_of(options["hardware"]) if "hardware" in options else hardware_in(config)
    shape, data = shape_of(config), count_data(config)
    if options.get("fit", "false") not in ("true", "false"):
        raise ConfigError(f"plan: fit must be true or false, got {options['fit']!r}")
    if options.get("fit") == "true":
        config = _fitted(config, shape, hardware, data)
    told = plan(config, shape, hardware, data, mfu=mfu)
    if as_object:
        import json

        print(json.dumps(as_json(told), indent=2))
        return 0
    from helpers.console import make_console, table

    output = make_console()
    output.print(table(f"Plan of {config.run_name}: {told.model_id}", ["", "", ""], plan_rows(told)))
    columns = ["hardware", "fits", "time", "cost", "per million tokens"]
    output.print(table(f"Time and cost at {mfu:.0%} MFU; {told.priced}", columns, price_rows(told)))
    for note in told.notes:
        output.print(f"note: {note}")
    output.print(f"[bold]{verdict(told)}[/bold]")
    return 0


def _fitted(config, shape, hardware, data):
    """Write the fastest settings that fit the hardware beside the config, under a name of their own."""
    from pathlib import Path

    from helpers.config import dump_config
    from helpers.errors import ConfigError, ResourceError
    from helpers.plan import fit

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


def _preview(arguments: list[str], default: bool, as_lines: bool) -> int:
    from helpers.errors import ConfigError

    counts = [argument for argument in arguments if argument.startswith("n=")]
    config_path, *overrides = [argument for argument in arguments if argument not in counts] or [None]
    if config_path is None:
        raise ConfigError("preview needs a CONFIG: a YAML file or an https:// address")
    count = counts[-1].removeprefix("n=") if counts else "3"
    if not count.isdigit() or count == "0":
        raise ConfigError(f"preview: n must be a number of rows, got {count!r}")
    config = _load(config_path, overrides, default)
    from helpers.preview import as_json, preview, print_row

    rows = preview(config, int(count))
    if as_lines:
        print("\n".join(map(as_json, rows)))
        return 0
    from helpers.console import make_console

    output = make_console()
    for row in rows:
        print_row(row, output)
    return 0


def _evaluate(arguments: list[str]) -> int:
    from helpers.console import make_console, quiet_descriptors, table
    from helpers.errors import ConfigError
    from helpers.storage import find_run, shown, write_json

    if not arguments:
        raise ConfigError("evaluate needs a RUN: a run's folder, or its name under runs/")
    options = dict(argument.partition("=")[::2] for argument in arguments[1:])
    if unknown := set(options) - {"data", "rows"}:
        raise ConfigError(f"evaluate: unknown option {', '.join(sorted(unknown))}: it takes data=FILE and rows=N")
    if not options.get("rows", "1").isdigit():
        raise ConfigError(f"evaluate: rows must be a number, got {options['rows']!r}")
    run = find_run(arguments[0])
    with quiet_descriptors(run.logs / "evaluate.log") as output:
        output.print("loading the base model and the best checkpoint")
        from helpers.evaluate import compare_with_base

        compared = compare_with_base(run, options.get("data"), int(options["rows"]) if "rows" in options else None)
    output = make_console()
    answers = zip(compared.prompts, compared.base, compared.tuned, compared.references, strict=True)
    output.print(table("Held-out prompts", ["prompt", "base model", "tuned model", "reference"], list(answers)[:5]))
    before, after = compared.accuracy()
    output.print(f"exact match on {len(compared.references)} held-out rows: base {before:.1%}, tuned {after:.1%}")
    write_json(run.folder / "evaluation.json", compared.summary())
    output.print(f"run folder  {shown(run.folder)}\nloss curve  {shown(run.loss_curve)}")
    return 0
