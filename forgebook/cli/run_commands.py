"""The commands that use a fine-tuned model: evaluate, generate, chat, merge, serve.

Each takes its arguments and returns an exit code; each imports what it needs when it is called.
"""

from __future__ import annotations

import functools
import os
import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from forgebook.cli.arguments import Arguments, parse_arguments
from forgebook.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from forgebook.evaluation.results import Evaluation
    from forgebook.inference.sampling import Sampling
    from forgebook.runs.run import Run

__all__ = ["chat_command", "evaluate_command", "generate_command", "merge_command", "serve_command"]

LONGEST_KEY = 4096


def generate_command(arguments: list[str]) -> int:
    """Answer prompts, to the terminal or to a file."""
    parsed = parse_arguments("generate", arguments)
    options, texts = parsed.options, parsed.flags.prompt
    if bool(texts) == ("data" in options):
        raise ConfigError("generate needs prompts: data=FILE or -p TEXT, one of the two")
    _refuse_rest("generate", parsed)
    _note_loading(parsed.target)
    sampling = _sampling(parsed)
    from pathlib import Path

    from forgebook.inference.loading import find_model
    from forgebook.reporting.console import make_console, make_table, progress_bar

    source = find_model(parsed.target, options.get("checkpoint"))
    from forgebook.inference.batch import Prompt, answer, engine_for, read_prompts, write_answers

    prompts = [Prompt(k, [{"role": "user", "content": text}]) for k, text in enumerate(texts)]
    prompts = prompts or read_prompts(options["data"], options.get("rows"))
    engine, workers = engine_for(options.get("engine", "auto"), source, len(prompts)), options.get("num_devices", 0)
    answers: dict[int, str] = {}
    with _quiet(source, "generate") as output, progress_bar(output, "answering") as show:
        if "out" in options:
            count = write_answers(
                Path(options["out"]), source, prompts, sampling, engine=engine, num_devices=workers,
                on_progress=functools.partial(show, "prompts"),
            )  # fmt: skip
        else:

            def on_progress(done: int, tokens: int, begun: float) -> None:
                if output.is_terminal:  # the answers alone go to a pipe or a file
                    show("prompts", done, len(prompts), tokens, begun)

            answers = dict(
                answer(source, prompts, sampling, engine=engine, num_devices=workers, on_progress=on_progress)
            )
    if "out" in options:
        print(
            f"{count} of {len(prompts)} prompts answered, {len(prompts) - count} already in the file: {options['out']}"
        )
    elif len(prompts) == 1:
        print(answers[0])
    else:
        from forgebook.evaluation.results import conversation_text

        rows = [(conversation_text(prompt.messages), answers[prompt.number]) for prompt in prompts]
        make_console().print(make_table("", ["prompt", "answer"], rows))
    return 0


def chat_command(arguments: list[str]) -> int:
    """Hold a conversation in the terminal."""
    parsed = parse_arguments("chat", arguments)
    _refuse_rest("chat", parsed)
    _note_loading(parsed.target)
    sampling = _sampling(parsed)
    from forgebook.inference.loading import find_model, load_together

    source = find_model(parsed.target, parsed.options.get("checkpoint"))
    with _quiet(source, "chat"):
        [loaded] = load_together([source])
    from forgebook.inference.chat import chat

    chat(loaded, sampling, parsed.options.get("system"))
    return 0


def _note_loading(name: str) -> None:
    """Name what is being loaded, in a terminal: to a pipe or a file go the answers alone."""
    if sys.stdout.isatty():
        print(f"loading {name}", flush=True)


def _sampling(parsed: Arguments) -> Sampling:
    """Make the sampling settings from a command's options."""
    from forgebook.inference.sampling import Sampling

    return Sampling(**parsed.get("max_new_tokens", "temperature", "top_p", "seed", "batch_size"))


def _refuse_rest(name: str, parsed: Arguments) -> None:
    """Raise ConfigError if a command with one target got more arguments."""
    if parsed.rest:
        raise ConfigError(f"{name} takes one RUN: {parsed.rest[0]!r} is one argument too many")


def _quiet(source: str, name: str) -> AbstractContextManager[Console]:
    """Send what libraries print to a log: of the run that a checkpoint belongs to, else of the cache."""
    from pathlib import Path

    from forgebook.reporting.console import quiet_descriptors
    from forgebook.runs.download import cache_folder

    run = Path(source).parent.parent
    return quiet_descriptors((run if (run / "config.yaml").exists() else cache_folder()) / "logs" / f"{name}.log")


def evaluate_command(arguments: list[str]) -> int:
    """Compare a run with its base model on held-out examples."""
    parsed = parse_arguments("evaluate", arguments)
    options = parsed.options
    _refuse_rest("evaluate", parsed)
    from forgebook.reporting.console import progress_bar, quiet_descriptors
    from forgebook.runs.run import find_run

    run = find_run(parsed.target)
    with quiet_descriptors(run.logs / "evaluate.log") as output, progress_bar(output, "evaluating") as show:
        output.print(f"loading the base model and the {options.get('checkpoint', 'best')} checkpoint")
        if "lm_eval" in options:
            _run_lm_eval(run, options, output)
            return 0
        from forgebook.evaluation.evaluate import evaluate
        from forgebook.evaluation.judge import Judge

        evaluation = evaluate(
            run, path=options.get("data"), on_progress=show, on_note=output.print,
            judge=Judge(options["judge"], options.get("base_url")) if "judge" in options else None,
            **parsed.get("metric", "rows", "max_new_tokens", "checkpoint", "engine"),
        )  # fmt: skip
    _print_evaluation(run, evaluation)
    return 0


def _print_evaluation(run: Run, evaluation: Evaluation) -> None:
    """Save an evaluation; print some answers, the figures and where everything is."""
    from forgebook.evaluation.results import figure_lines, save
    from forgebook.reporting.console import make_console, make_table
    from forgebook.runs.run import display_path

    output, compared = make_console(), evaluation.comparison
    answers = zip(compared.prompts, compared.base, compared.tuned, compared.references, strict=True)
    columns = ["prompt", "base model", "tuned model", "reference"]
    output.print(make_table("Held-out prompts", columns, list(answers)[:3]))
    if evaluation.kinds:
        kinds = [(kind, str(before), str(after)) for kind, (before, after) in evaluation.kinds.items()]
        output.print(make_table("Mistakes", ["kind", "base model", "tuned model"], kinds))
    output.print("\n".join(figure_lines(evaluation)))
    save(evaluation, run)
    output.print(f"mistakes    {display_path(run.folder / 'evaluation' / 'mistakes.jsonl')}")
    output.print(f"run folder  {display_path(run.folder)}\nloss curve  {display_path(run.loss_curve)}")


def _run_lm_eval(run: Run, options: dict[str, Any], output: Console) -> None:
    """Run tasks of lm-eval on both models; print and save their scores."""
    from dataclasses import asdict

    from forgebook.evaluation.evaluate import both_models
    from forgebook.evaluation.lm_eval_tasks import run_tasks
    from forgebook.evaluation.results import score_lines
    from forgebook.runs.run import save_json

    models = both_models(run, options.get("checkpoint"))
    scores = run_tasks(models, options["lm_eval"].split(","), options.get("lm_eval_folder"), options.get("rows"))
    output.print("\n".join(line for score in scores for line in score_lines(score, "lm-eval's examples")))
    save_json(run, "evaluation/lm_eval.json", [asdict(score) for score in scores])


def merge_command(arguments: list[str]) -> int:
    """Merge an adapter into its base."""
    parsed = parse_arguments("merge", arguments, extra=["OUT: a folder that does not exist yet"])
    from forgebook.reporting.console import make_console, quiet_descriptors, show_stages
    from forgebook.runs.download import cache_folder

    with (
        quiet_descriptors(cache_folder() / "merge.log") as output,
        show_stages(output, "merging, then loading the merged model for the comparison") as show,
    ):
        from forgebook.export.merge import merge_run, report_lines

        merged = merge_run(parsed.target, parsed.rest[0], parsed.options.get("checkpoint"), on_stage=show)
    make_console().print("\n".join(report_lines(merged)))
    return 0


def serve_command(arguments: list[str]) -> int:
    """Serve runs at an OpenAI-compatible endpoint."""
    parsed = parse_arguments("serve", arguments)
    options = parsed.options
    if {"key", "key_file"} <= options.keys():
        raise ConfigError("serve: key and key_file are both there: keep key_file")
    _hide_key(options.get("key", ""))
    key = _read_key(options["key_file"]) if "key_file" in options else options.get("key")
    print(f"loading {', '.join([parsed.target, *parsed.rest])}", flush=True)
    from forgebook.inference.server import clean_key, serve

    key = clean_key(key) or os.environ.get("FORGEBOOK_API_KEY")
    serve([parsed.target, *parsed.rest], key=key, ui=parsed.flags.ui, **parsed.get("port", "host", "engine", "dtype"))
    return 0


def _hide_key(key: str) -> None:
    """Start this process again with the key in its environment: a process's arguments can be read by every user."""
    arguments = [argument for argument in sys.orig_argv if not argument.startswith("key=")]
    if key.strip() and f"key={key}" in sys.orig_argv:
        fix = "set FORGEBOOK_API_KEY, or key_file= to a file of mode 600"
        print(
            f"note: key= could be read by other users until now, and is in your shell's history: {fix}", file=sys.stderr
        )
        sys.stderr.flush()
        os.execve(sys.executable, arguments, {**os.environ, "FORGEBOOK_API_KEY": key})


def _read_key(path: str) -> str:
    """Read a key from a file; raise ConfigError if others can read it, too, or it holds none."""
    try:
        mode = os.stat(path).st_mode
        with open(path, encoding="utf-8") as file:
            key = file.read(LONGEST_KEY + 1).strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"serve: key_file {path} cannot be read: {getattr(error, 'strerror', error)}") from None
    if mode & 0o077:
        raise ConfigError(
            f"serve: key_file {path} has mode {mode & 0o777:o}, so that others can use it: chmod 600 {path}"
        )
    if not key or len(key) > LONGEST_KEY:
        raise ConfigError(f"serve: key_file {path} must hold the key alone, of at most {LONGEST_KEY:,} characters")
    return key
