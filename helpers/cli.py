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
  python main.py generate RUN -p TEXT | data=FILE       answers, to the terminal or out=FILE
  python main.py chat RUN                               a conversation in the terminal
  python main.py evaluate RUN [data=FILE] [metric=...]  held-out rows before and after: how much better, how surely
  python main.py merge RUN OUT [checkpoint=NAME]        the adapter in its base, as a model that transformers loads
  python main.py serve RUN ... [port=8000]              an OpenAI-compatible endpoint

RUN is a run's folder, or its name under runs/. `python main.py VERB --help` tells a verb's options; the keys of a
config and their meaning: helpers/schema.py.

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
    parser.add_argument("--default", action="store_true", help="choose all that CONFIG leaves out")
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
_A_MODEL = "RUN: a run's folder or name, a checkpoint or model folder, or a hub id"
_A_RUN = "RUN: a run's folder, or its name under runs/"

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
        "hardware: as many of which GPU; mfu: the share of the peak taken to be reached;\n"
        "fit=true: write the fastest settings that fit as CONFIG-fit.yaml",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_intermixed_args(arguments)
    from helpers.catalog import hardware_of, shape_of
    from helpers.counting import count_data
    from helpers.errors import ConfigError
    from helpers.plan import MFU, hardware_in, plan
    from helpers.plan_text import as_json, plan_rows, price_rows, verdict

    config_path, overrides, options = _split("plan", _A_CONFIG, given.words, ("hardware", "mfu", "fit"))
    try:
        mfu = float(options.get("mfu", MFU))
    except ValueError:
        mfu = 0.0
    if not 0 < mfu <= 1:
        raise ConfigError(f"plan: mfu must be a share of the peak, above 0 and at most 1, got {options['mfu']!r}")
    if options.get("fit", "false") not in ("true", "false"):
        raise ConfigError(f"plan: fit must be true or false, got {options['fit']!r}")
    config = _load(config_path, overrides, given.default)
    hardware = hardware_of(options["hardware"]) if "hardware" in options else hardware_in(config)
    shape, data = shape_of(config), count_data(config)
    if options.get("fit") == "true":
        config = _fitted(config, shape, hardware, data)
    told = plan(config, shape, hardware, data, mfu=mfu)
    if given.json:
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


def _generate(arguments: list[str]) -> int:
    sampled = ("max_new_tokens", "temperature", "top_p", "seed", "batch_size")
    known = ("data", "out", "rows", "checkpoint", "engine", "num_devices", *sampled)
    parser = _parser(
        "generate", "RUN [data=FILE | -p TEXT ...] [out=FILE] [key=value ...]",
        "Answer prompts. RUN is a run (its best checkpoint, or checkpoint=epoch-2), a checkpoint or model folder, or\n"
        "a hub id. data: rows of messages; out: JSON lines, continued where they stopped; rows=N: the first N.\n"
        "temperature=0 (greedy) top_p=1 seed=0 max_new_tokens=128 batch_size=32\n"
        "engine=auto|transformers|vllm; num_devices=N: as many Ray workers.",
    )  # fmt: skip
    parser.add_argument("words", metavar="RUN [key=value ...]", nargs="*", help="what answers")
    parser.add_argument("-p", "--prompt", action="append", default=[], help="a prompt; may be repeated")
    given = parser.parse_intermixed_args(arguments)
    name, overrides, options = _split("generate", _A_MODEL, given.words, known)
    _only("generate", overrides, known)
    from helpers.errors import ConfigError

    if bool(given.prompt) == ("data" in options):
        raise ConfigError("generate needs prompts: data=FILE, or -p TEXT, not both")
    numbers = {key: _whole("generate", key, options[key]) for key in ("rows", "num_devices") if key in options}
    sampling = _sampling("generate", {key: options[key] for key in sampled if key in options})
    from pathlib import Path

    from helpers.console import counting, make_console
    from helpers.generate import find_model

    source = find_model(name, options.get("checkpoint"))
    from helpers.answers import Prompt, answer, choose_engine, read_prompts, write_answers

    alone = [Prompt(k, [{"role": "user", "content": text}]) for k, text in enumerate(given.prompt)]
    asked = alone or read_prompts(options["data"], numbers.get("rows"))
    engine = choose_engine(options.get("engine", "auto"), source, len(asked))
    using = {"engine": engine, "num_devices": numbers.get("num_devices", 0)}
    with _quiet(source, "generate") as output, counting(output, "answering") as tell:
        if "out" in options:
            tell_file = lambda done, total: tell("rows", done, total)  # noqa: E731
            new = write_answers(Path(options["out"]), source, asked, sampling, **using, on_progress=tell_file)
        else:
            answers = {}
            for number, text in answer(source, asked, sampling, **using):
                answers[number] = text
                tell("rows", len(answers), len(asked))
    output = make_console()
    if "out" in options:
        print(f"{new} of {len(asked)} prompts answered, {len(asked) - new} were there: {options['out']}")
    elif len(asked) == 1:
        print(answers[0])
    else:
        from helpers.console import table
        from helpers.findings import as_read

        output.print(table("", ["prompt", "answer"], [(as_read(one.messages), answers[one.number]) for one in asked]))
    return 0


def _chat(arguments: list[str]) -> int:
    sampled = ("max_new_tokens", "temperature", "top_p", "seed")
    known = ("checkpoint", "system", *sampled)
    parser = _parser(
        "chat", "RUN [checkpoint=epoch-2] [system=TEXT] [temperature=0.7] [top_p=0.9] [key=value ...]",
        "Talk with a model in the terminal. /reset forgets, /exit or Ctrl-D ends, Ctrl-C cuts an answer off.",
    )  # fmt: skip
    parser.add_argument("words", metavar="RUN [key=value ...]", nargs="*", help="a run, a folder or a hub id")
    name, overrides, options = _split("chat", _A_MODEL, parser.parse_intermixed_args(arguments).words, known)
    _only("chat", overrides, known)
    chosen = {key: options[key] for key in sampled if key in options}
    sampling = _sampling("chat", {"max_new_tokens": "1024", **chosen})
    from helpers.generate import find_model, load_together

    source = find_model(name, options.get("checkpoint"))
    with _quiet(source, "chat"):
        [speaker] = load_together([source])
    from helpers.chat import chat

    chat(speaker, sampling, options.get("system"))
    return 0


def _sampling(verb: str, options: dict[str, str]):
    """Read sampling options."""
    from helpers.errors import ConfigError
    from helpers.generate import Sampling

    kinds = {"temperature": float, "top_p": float}
    try:
        return Sampling(**{key: kinds.get(key, int)(value) for key, value in options.items()})
    except ValueError as error:
        raise ConfigError(f"{verb}: not a number among {options}: {error}") from None


def _quiet(source: str, verb: str):
    """Send what libraries print to a log: of the run that a checkpoint lies in, else of the cache."""
    from pathlib import Path

    from helpers.console import quiet_descriptors
    from helpers.storage import cache_folder

    run = Path(source).parent.parent
    return quiet_descriptors((run if (run / "config.yaml").exists() else cache_folder()) / "logs" / f"{verb}.log")


def _evaluate(arguments: list[str]) -> int:
    known = (
        "data", "rows", "metric", "checkpoint", "max_new_tokens", "judge", "base_url", "lm_eval", "lm_eval_folder",
    )  # fmt: skip
    parser = _parser(
        "evaluate", "RUN [data=FILE] [metric=NAME] [rows=N] [checkpoint=epoch-2]",
        "Held-out rows before and after: figures with 95 % intervals, a paired test, the mistakes in a file to read.\n"
        "metric: exact_match, gsm8k, tool_calls, classification, preference, perplexity; or judge, with judge=MODEL\n"
        "and base_url=URL of an OpenAI-compatible endpoint. lm_eval=gsm8k,...: tasks of lm-eval instead;\n"
        "lm_eval_folder: holds tasks of your own.",
    )  # fmt: skip
    parser.add_argument("words", metavar="RUN [key=value ...]", nargs="*", help="a run's folder or name")
    name, overrides, options = _split("evaluate", _A_RUN, parser.parse_intermixed_args(arguments).words, known)
    _only("evaluate", overrides, known)
    rows, longest = (
        _whole("evaluate", key, options[key]) if key in options else None for key in ("rows", "max_new_tokens")
    )
    from helpers.console import counting, make_console, quiet_descriptors, table
    from helpers.storage import find_run, shown

    run = find_run(name)
    with quiet_descriptors(run.logs / "evaluate.log") as output, counting(output, "asking") as tell:
        output.print(f"loading the base model and the {options.get('checkpoint', 'best')} checkpoint")
        if "lm_eval" in options:
            return _lm_eval(run, options, rows, output)
        from helpers.evaluate import evaluate
        from helpers.judge import Judge

        found = evaluate(
            run, path=options.get("data"), metric=options.get("metric"), rows=rows, max_new_tokens=longest,
            checkpoint=options.get("checkpoint"), on_progress=tell,
            judge=Judge(options["judge"], options.get("base_url")) if "judge" in options else None,
        )  # fmt: skip
    from helpers.findings import figure_lines, save

    output, compared = make_console(), found.comparison
    answers = zip(compared.prompts, compared.base, compared.tuned, compared.references, strict=True)
    output.print(table("Held-out prompts", ["prompt", "base model", "tuned model", "reference"], list(answers)[:5]))
    if found.kinds:
        kinds = [(kind, str(before), str(after)) for kind, (before, after) in found.kinds.items()]
        output.print(table("Mistakes", ["kind", "base model", "tuned model"], kinds))
    output.print("\n".join(figure_lines(found)))
    save(found, run)
    output.print(f"mistakes    {shown(run.folder / 'evaluation' / 'mistakes.jsonl')}")
    output.print(f"run folder  {shown(run.folder)}\nloss curve  {shown(run.loss_curve)}")
    return 0


def _merge(arguments: list[str]) -> int:
    parser = _parser(
        "merge", "RUN OUT [checkpoint=NAME]",
        "Merge a run's adapter into its 16-bit base, write the model to the folder OUT, and compare it there with\n"
        "adapter and base. checkpoint: one of the run's, not its best. RUN may also be a checkpoint's folder.",
    )  # fmt: skip
    parser.add_argument("words", metavar="RUN OUT [checkpoint=NAME]", nargs="*", help="a run, and a folder to make")
    given = parser.parse_intermixed_args(arguments)
    from helpers.errors import ConfigError

    name, rest, options = _split("merge", _A_RUN, given.words, ("checkpoint",))
    if not rest or "=" in rest[0]:
        raise ConfigError("merge needs OUT: a folder that does not exist yet")
    out, *overrides = rest
    _only("merge", overrides, ("checkpoint",))
    from helpers.console import make_console, quiet_descriptors
    from helpers.storage import cache_folder

    with quiet_descriptors(cache_folder() / "merge.log") as output:
        output.print("merging, and loading what was merged for the comparison")
        from helpers.merge import merge_run, tell

        merged = merge_run(name, out, options.get("checkpoint"))
    make_console().print("\n".join(tell(merged)))
    return 0


def _serve(arguments: list[str]) -> int:
    known = ("port", "host", "key", "engine", "dtype")
    parser = _parser(
        "serve", "RUN [RUN ...] [port=8000] [host=127.0.0.1] [key=...] [engine=auto] [dtype=float32]",
        "An OpenAI-compatible endpoint over one or more runs; a request's model is a run's name.\n"
        "key: what clients must send; better kept in the environment, as FORGEBOOK_API_KEY. Needed for any host but\n"
        "this machine. engine: transformers, vllm, or auto: vLLM where it is installed and can.\n"
        "dtype: float32, bfloat16 or float16; the run's own if left out.",
    )  # fmt: skip
    parser.add_argument("words", metavar="RUN [key=value ...]", nargs="*", help="runs' folders or names")
    given = parser.parse_intermixed_args(arguments)
    import os

    from helpers.errors import ConfigError

    first, rest, options = _split("serve", _A_RUN, given.words, known)
    _only("serve", [word for word in rest if "=" in word], known)
    port = options.get("port", "8000")
    if not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"serve: port must be a number up to 65535, got {port!r}")
    if options.get("dtype", "float32") not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"serve: dtype must be float32, bfloat16 or float16, got {options['dtype']!r}")
    from helpers.serve import serve

    serve(
        [first, *rest], port=int(port), host=options.get("host", "127.0.0.1"), engine=options.get("engine", "auto"),
        key=options.get("key") or os.environ.get("FORGEBOOK_API_KEY") or None,
        dtype=options.get("dtype"),
    )  # fmt: skip
    return 0


def _lm_eval(run, options: dict[str, str], rows: int | None, output) -> int:
    from helpers.evaluate import both_models
    from helpers.findings import score_lines
    from helpers.harness import run_tasks
    from helpers.storage import write_json

    told = both_models(run, options.get("checkpoint"))
    made = run_tasks(told, options["lm_eval"].split(","), options.get("lm_eval_folder"), rows)
    output.print("\n".join(line for score in made for line in score_lines(score, "lm-eval's rows")))
    from dataclasses import asdict

    write_json(run.folder / "evaluation" / "lm_eval.json", [asdict(score) for score in made])
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "plan": _plan,
    "preview": _preview,
    "generate": _generate,
    "chat": _chat,
    "evaluate": _evaluate,
    "merge": _merge,
    "serve": _serve,
}
