"""The command: its help, dispatch and exit codes. What each command does is in the `*_commands` files."""

from __future__ import annotations

import argparse
import atexit
import os
import select
import sys
from collections.abc import Callable, Sequence

from forgebook.cli import config_commands, curation_commands, doctor_command, model_commands, run_commands
from forgebook.cli.mistakes import refuse_typo
from forgebook.errors import ForgebookError

__all__ = ["main"]

HELP = """\
Fine-tune a language model as CONFIG says; evaluate, serve and share the result.

before and during a run
  python main.py CONFIG [--default] [key=value ...]     fine-tune; CONFIG is a YAML file or an https:// URL
  python main.py plan CONFIG [hardware=8xA100-80G]      memory, time and cost; trains nothing
  python main.py preview CONFIG [n=3]                   examples as the model will see them, the loss highlighted
  python main.py curate CONFIG out=FILE.jsonl           duplicates, leaks, broken answers: a filtered file, a report
  python main.py synthesize CONFIG out=FILE.jsonl       new examples from a teacher, checked, none of them a repetition
  python main.py tune CONFIG 'KEY=[A,B]' [samples=N]    a sweep: which values give the lowest evaluation loss
  python main.py submit CONFIG [address=URL]            the same run as a job on a Ray cluster (CLUSTERS.md)
  python main.py status JOB  ·  stop JOB                a submitted job
  python main.py doctor [CONFIG]                        check this machine; with a config, the next debugging step
  python main.py schema                                 the JSON schema of a config, for editors (CONFIG.md)

after a run
  python main.py evaluate RUN [data=FILE] [metric=...]  the base and the tuned model on the same data, with intervals
  python main.py generate RUN -p TEXT | data=FILE       answers, to the terminal or out=FILE
  python main.py chat RUN                               a conversation in the terminal
  python main.py merge RUN OUT [checkpoint=NAME]        the adapter merged into its base, for transformers
  python main.py serve RUN ... [--ui] [port=8000]       an OpenAI-compatible endpoint; --ui: with a chat page
  python main.py models [show RUN | delete RUN]         the fine-tuned models, here or in a bucket
  python main.py push RUN OWNER/NAME [private=true]     the best checkpoint to the Hugging Face hub, with a card
  python main.py export RUN OUT.gguf [type=q8_0]        a GGUF file for llama.cpp (ollama=true: and a Modelfile)

RUN is a run's folder or s3:// URI, or its name under runs/. `python main.py COMMAND --help` lists a command's options;
CONFIG.md describes the keys of a config.

examples:
  python main.py training_configs/tiny/quickstart.yaml
  python main.py training_configs/tiny/quickstart.yaml learning_rate=3.0e-4 deepspeed=none run_name=try-2
  python main.py preview training_configs/tiny/quickstart.yaml n=1
  python main.py plan training_configs/tiny/quickstart.yaml hardware=1xT4
  python main.py tune training_configs/tiny/quickstart.yaml 'learning_rate=[1.0e-3,5.0e-3]' 'lora_config.r=[8,32]'
  python main.py evaluate quickstart rows=5
"""

RUNNERS: dict[str, Callable[[list[str]], int]] = {
    "plan": config_commands.plan_command,
    "preview": config_commands.preview_command,
    "tune": config_commands.tune_command,
    "doctor": doctor_command.doctor_command,
    "schema": config_commands.schema_command,
    "curate": curation_commands.curate_command,
    "synthesize": curation_commands.synthesize_command,
    "submit": config_commands.submit_command,
    "status": config_commands.status_command,
    "stop": config_commands.stop_command,
    "evaluate": run_commands.evaluate_command,
    "generate": run_commands.generate_command,
    "chat": run_commands.chat_command,
    "merge": run_commands.merge_command,
    "serve": run_commands.serve_command,
    "models": model_commands.models_command,
    "push": model_commands.push_command,
    "export": model_commands.export_command,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0 for a result worth having, 2 for a user's mistake."""
    try:
        return _run(arguments)
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 141  # what a shell reports of a program that a closed pipe ends


def _reader_is_gone() -> bool:
    """Return whether nobody reads the output any more, as after `| head`; if so, drop the rest of it."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not output.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _run(arguments: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    if name is None:
        _print_help(arguments)
        return 2
    run = RUNNERS.get(name, config_commands.fine_tune_command)
    if name in RUNNERS:
        arguments.remove(name)
    try:
        if name not in RUNNERS:
            refuse_typo(name, RUNNERS)
        return run(arguments)
    except ForgebookError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped; the same command resumes from the last complete state", file=sys.stderr)
        return 130
    finally:
        if colorama := sys.modules.get("colorama"):  # Ray's, which ends whatever a terminal shows with an escape code
            atexit.unregister(colorama.initialise.reset_all)


def _print_help(arguments: Sequence[str]) -> None:
    """Print the help and exit if --help is among the arguments; reject other flags; else point to the help."""
    argparse.ArgumentParser(
        prog="main.py",
        usage="python main.py [COMMAND] TARGET [key=value ...]",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(arguments)
    print("usage: python main.py CONFIG; all commands: python main.py --help", file=sys.stderr)
