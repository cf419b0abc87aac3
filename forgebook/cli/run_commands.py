"""The verbs that take a RUN: ask it, measure it, merge and serve it.

Each takes its command-line words and returns an exit code; each imports what it needs when it is called.
"""

from __future__ import annotations

from forgebook.cli.options import A_MODEL, A_RUN, make_parser, only, split, whole

__all__ = ["chat", "evaluate", "generate", "merge", "serve"]


def generate(arguments: list[str]) -> int:
    """Answer prompts, to the terminal or to a file."""
    sampled = ("max_new_tokens", "temperature", "top_p", "seed", "batch_size")
    known = ("data", "out", "rows", "checkpoint", "engine", "num_devices", *sampled)
    parser = make_parser(
        "generate", "RUN [data=FILE | -p TEXT ...] [out=FILE] [key=value ...]",
        "Answer prompts. RUN is a run (its best checkpoint, or checkpoint=epoch-2), a checkpoint or model folder, or\n"
        "a hub id. data: rows of messages; out: JSON lines, continued where they stopped; rows=N: the first N.\n"
        "temperature=0 (greedy) top_p=1 seed=0 max_new_tokens=128 batch_size=32\n"
        "engine=auto|transformers|vllm; num_devices=N: as many Ray workers.",
    )  # fmt: skip
    parser.add_argument("words", metavar="RUN [key=value ...]", nargs="*", help="what answers")
    parser.add_argument("-p", "--prompt", action="append", default=[], help="a prompt; may be repeated")
    given = parser.parse_intermixed_args(arguments)
    name, overrides, options = split("generate", A_MODEL, given.words, known)
    only("generate", overrides, known)
    from forgebook.errors import ConfigError

    if bool(given.prompt) == ("data" in options):
        raise ConfigError("generate needs prompts: data=FILE, or -p TEXT, not both")
    numbers = {key: whole("generate", key, options[key]) for key in ("rows", "num_devices") if key in options}
    sampling = _sampling("generate", {key: options[key] for key in sampled if key in options})
    from pathlib import Path

    from forgebook.inference.generate import find_model
    from forgebook.reporting.console import make_console, progress_bar

    source = find_model(name, options.get("checkpoint"))
    from forgebook.inference.batch import Prompt, answer, engine_for, read_prompts, write_answers

    alone = [Prompt(k, [{"role": "user", "content": text}]) for k, text in enumerate(given.prompt)]
    asked = alone or read_prompts(options["data"], numbers.get("rows"))
    engine = engine_for(options.get("engine", "auto"), source, len(asked))
    using = {"engine": engine, "num_devices": numbers.get("num_devices", 0)}
    with _quiet(source, "generate") as output, progress_bar(output, "answering") as tell:
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
        from forgebook.evaluation.results import as_read
        from forgebook.reporting.console import table

        output.print(table("", ["prompt", "answer"], [(as_read(one.messages), answers[one.number]) for one in asked]))
    return 0


def chat(arguments: list[str]) -> int:
    """Hold a conversation in the terminal."""
    sampled = ("max_new_tokens", "temperature", "top_p", "seed")
    known = ("checkpoint", "system", *sampled)
    parser = make_parser(
        "chat", "RUN [checkpoint=epoch-2] [system=TEXT] [temperature=0.7] [top_p=0.9] [key=value ...]",
        "Talk with a model in the terminal. /reset forgets, /exit or Ctrl-D ends, Ctrl-C cuts an answer off.",
    )  # fmt: skip
    parser.add_argument("words", metavar="RUN [key=value ...]", nargs="*", help="a run, a folder or a hub id")
    name, overrides, options = split("chat", A_MODEL, parser.parse_intermixed_args(arguments).words, known)
    only("chat", overrides, known)
    chosen = {key: options[key] for key in sampled if key in options}
    sampling = _sampling("chat", {"max_new_tokens": "1024", **chosen})
    from forgebook.inference.generate import find_model, load_together

    source = find_model(name, options.get("checkpoint"))
    with _quiet(source, "chat"):
        [loaded] = load_together([source])
    from forgebook.inference.chat import chat

    chat(loaded, sampling, options.get("system"))
    return 0


def _sampling(verb: str, options: dict[str, str]):
    """Read sampling options."""
    from forgebook.errors import ConfigError
    from forgebook.inference.sampling import Sampling

    kinds = {"temperature": float, "top_p": float}
    try:
        return Sampling(**{key: kinds.get(key, int)(value) for key, value in options.items()})
    except ValueError as error:
        raise ConfigError(f"{verb}: not a number among {options}: {error}") from None


def _quiet(source: str, verb: str):
    """Send what libraries print to a log: of the run that a checkpoint lies in, else of the cache."""
    from pathlib import Path

    from forgebook.reporting.console import quiet_descriptors
    from forgebook.runs.download import cache_folder

    run = Path(source).parent.parent
    return quiet_descriptors((run if (run / "config.yaml").exists() else cache_folder()) / "logs" / f"{verb}.log")


def evaluate(arguments: list[str]) -> int:
    """Compare a run with what it began from, on held-out rows."""
    known = (
        "data", "rows", "metric", "checkpoint", "max_new_tokens", "judge", "base_url", "lm_eval", "lm_eval_folder",
    )  # fmt: skip
    parser = make_parser(
        "evaluate", "RUN [data=FILE] [metric=NAME] [rows=N] [checkpoint=epoch-2]",
        "Held-out rows before and after: figures with 95 % intervals, a paired test, the mistakes in a file to read.\n"
        "metric: exact_match, gsm8k, tool_calls, classification, preference, perplexity; or judge, with judge=MODEL\n"
        "and base_url=URL of an OpenAI-compatible endpoint. lm_eval=gsm8k,...: tasks of lm-eval instead;\n"
        "lm_eval_folder: holds tasks of your own.",
    )  # fmt: skip
    parser.add_argument("words", metavar="RUN [key=value ...]", nargs="*", help="a run's folder or name")
    name, overrides, options = split("evaluate", A_RUN, parser.parse_intermixed_args(arguments).words, known)
    only("evaluate", overrides, known)
    rows, longest = (
        whole("evaluate", key, options[key]) if key in options else None for key in ("rows", "max_new_tokens")
    )
    from forgebook.reporting.console import make_console, progress_bar, quiet_descriptors, table
    from forgebook.runs.run import display_path, find_run

    run = find_run(name)
    with quiet_descriptors(run.logs / "evaluate.log") as output, progress_bar(output, "asking") as tell:
        output.print(f"loading the base model and the {options.get('checkpoint', 'best')} checkpoint")
        if "lm_eval" in options:
            return _lm_eval(run, options, rows, output)
        from forgebook.evaluation.evaluate import evaluate
        from forgebook.evaluation.judge import Judge

        found = evaluate(
            run, path=options.get("data"), metric=options.get("metric"), rows=rows, max_new_tokens=longest,
            checkpoint=options.get("checkpoint"), on_progress=tell,
            judge=Judge(options["judge"], options.get("base_url")) if "judge" in options else None,
        )  # fmt: skip
    from forgebook.evaluation.results import figure_lines, save

    output, compared = make_console(), found.comparison
    answers = zip(compared.prompts, compared.base, compared.tuned, compared.references, strict=True)
    output.print(table("Held-out prompts", ["prompt", "base model", "tuned model", "reference"], list(answers)[:3]))
    if found.kinds:
        kinds = [(kind, str(before), str(after)) for kind, (before, after) in found.kinds.items()]
        output.print(table("Mistakes", ["kind", "base model", "tuned model"], kinds))
    output.print("\n".join(figure_lines(found)))
    save(found, run)
    output.print(f"mistakes    {display_path(run.folder / 'evaluation' / 'mistakes.jsonl')}")
    output.print(f"run folder  {display_path(run.folder)}\nloss curve  {display_path(run.loss_curve)}")
    return 0


def _lm_eval(run, options: dict[str, str], rows: int | None, output) -> int:
    from forgebook.evaluation.evaluate import both_models
    from forgebook.evaluation.lm_eval_tasks import run_tasks
    from forgebook.evaluation.results import score_lines
    from forgebook.runs.run import save_json

    told = both_models(run, options.get("checkpoint"))
    made = run_tasks(told, options["lm_eval"].split(","), options.get("lm_eval_folder"), rows)
    output.print("\n".join(line for score in made for line in score_lines(score, "lm-eval's rows")))
    from dataclasses import asdict

    save_json(run, "evaluation/lm_eval.json", [asdict(score) for score in made])
    return 0


def merge(arguments: list[str]) -> int:
    """Merge an adapter into its base."""
    parser = make_parser(
        "merge", "RUN OUT [checkpoint=NAME]",
        "Merge a run's adapter into its 16-bit base, write the model to the folder OUT, and compare it there with\n"
        "adapter and base. checkpoint: one of the run's, not its best. RUN may also be a checkpoint's folder.",
    )  # fmt: skip
    parser.add_argument("words", metavar="RUN OUT [checkpoint=NAME]", nargs="*", help="a run, and a folder to make")
    given = parser.parse_intermixed_args(arguments)
    from forgebook.errors import ConfigError

    name, rest, options = split("merge", A_RUN, given.words, ("checkpoint",))
    if not rest or "=" in rest[0]:
        raise ConfigError("merge needs OUT: a folder that does not exist yet")
    out, *overrides = rest
    only("merge", overrides, ("checkpoint",))
    from forgebook.reporting.console import make_console, quiet_descriptors
    from forgebook.runs.download import cache_folder

    with quiet_descriptors(cache_folder() / "merge.log") as output:
        output.print("merging, and loading what was merged for the comparison")
        from forgebook.export.merge import merge_run, tell

        merged = merge_run(name, out, options.get("checkpoint"))
    make_console().print("\n".join(tell(merged)))
    return 0


def serve(arguments: list[str]) -> int:
    """Serve runs at an OpenAI-compatible endpoint."""
    known = ("port", "host", "key", "engine", "dtype")
    parser = make_parser(
        "serve", "RUN [RUN ...] [port=8000] [host=127.0.0.1] [key=...] [engine=auto] [dtype=float32]",
        "An OpenAI-compatible endpoint over one or more runs; a request's model is a run's name.\n"
        "key: what clients must send; better kept in the environment, as FORGEBOOK_API_KEY. Needed for any host but\n"
        "this machine. engine: transformers, vllm, or auto: vLLM where it is installed and can.\n"
        "dtype: float32, bfloat16 or float16; the run's own if left out.",
    )  # fmt: skip
    parser.add_argument("words", metavar="RUN [key=value ...]", nargs="*", help="runs' folders or names")
    given = parser.parse_intermixed_args(arguments)
    import os

    from forgebook.errors import ConfigError

    first, rest, options = split("serve", A_RUN, given.words, known)
    only("serve", [word for word in rest if "=" in word], known)
    port = options.get("port", "8000")
    if not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"serve: port must be a number up to 65535, got {port!r}")
    if options.get("dtype", "float32") not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"serve: dtype must be float32, bfloat16 or float16, got {options['dtype']!r}")
    from forgebook.inference.server import serve

    serve(
        [first, *rest], port=int(port), host=options.get("host", "127.0.0.1"), engine=options.get("engine", "auto"),
        key=options.get("key") or os.environ.get("FORGEBOOK_API_KEY") or None,
        dtype=options.get("dtype"),
    )  # fmt: skip
    return 0
