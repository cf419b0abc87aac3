"""The command: its verbs, help and exit codes. What a verb does is in `train_verbs`, `model_verbs`, `keep_verbs`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from forgebook.cli import config_commands, model_commands, run_commands
from forgebook.cli.options import make_parser

__all__ = ["main"]

HELP = """\
Fine-tune a language model as CONFIG says, and look at what came of it.

before and during a run
  python main.py CONFIG [--default] [key=value ...]     fine-tune; CONFIG is a YAML file or an https:// address
  python main.py plan CONFIG [hardware=8xA100-80G]      memory, time and cost before the run; trains nothing
  python main.py preview CONFIG [n=3]                   rows as the model will see them, trained tokens marked
  python main.py tune CONFIG 'KEY=[A,B]' [samples=N]    a sweep: which values give the lowest evaluation loss
  python main.py submit CONFIG [address=URL]            the same run as a job on a Ray cluster (CLUSTERS.md)
  python main.py status JOB  ·  stop JOB                a job that was submitted

after it
  python main.py evaluate RUN [data=FILE] [metric=...]  held-out rows before and after: how much better, how surely
  python main.py generate RUN -p TEXT | data=FILE       answers, to the terminal or out=FILE
  python main.py chat RUN                               a conversation in the terminal
  python main.py merge RUN OUT [checkpoint=NAME]        the adapter in its base, as a model that transformers loads
  python main.py serve RUN ... [port=8000]              an OpenAI-compatible endpoint
  python main.py models [show RUN | delete RUN]         what was fine-tuned, here or in a bucket
  python main.py push RUN OWNER/NAME [private=true]     the best checkpoint to the Hugging Face hub, with a card
  python main.py export MODEL OUT.gguf [type=q8_0]      full weights as a GGUF file, through llama.cpp

RUN is a run's folder or s3:// address, or its name under runs/. `python main.py VERB --help` tells a verb's options;
the keys of a config and their meaning: forgebook/config/schema.py.

examples:
  python main.py training_configs/tiny/quickstart.yaml
  python main.py training_configs/tiny/quickstart.yaml learning_rate=3.0e-4 deepspeed=none run_name=try-2
  python main.py preview training_configs/tiny/quickstart.yaml n=1
  python main.py plan training_configs/tiny/quickstart.yaml hardware=1xT4
  python main.py tune training_configs/tiny/quickstart.yaml 'learning_rate=[1.0e-3,5.0e-3]' 'lora_config.r=[8,32]'
  python main.py evaluate quickstart rows=5
"""

VERBS: dict[str, Callable[[list[str]], int]] = {
    "plan": config_commands.plan,
    "preview": config_commands.preview,
    "tune": config_commands.tune,
    "submit": config_commands.submit,
    "status": config_commands.status,
    "stop": config_commands.stop,
    "evaluate": run_commands.evaluate,
    "generate": run_commands.generate,
    "chat": run_commands.chat,
    "merge": run_commands.merge,
    "serve": run_commands.serve,
    "models": model_commands.models,
    "push": model_commands.push,
    "export": model_commands.export,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0 for a result worth having, 2 for a user's mistake."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    named = next((argument for argument in arguments if not argument.startswith("-")), None)
    if named is None:
        make_parser("", "[VERB] TARGET [key=value ...]", HELP).parse_args(arguments)  # --help, or a mistake
        print("usage: python main.py CONFIG, or a verb: python main.py --help", file=sys.stderr)
        return 2
    if named in VERBS:
        arguments.remove(named)
    from forgebook.errors import ForgebookError

    try:
        return VERBS.get(named, config_commands.fine_tune)(arguments)
    except ForgebookError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command continues from the last complete state", file=sys.stderr)
        return 130
