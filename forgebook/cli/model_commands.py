"""The commands that manage fine-tuned models: list, show, delete; push to the hub; export as GGUF.

Each takes its arguments and returns an exit code; each imports what it needs when it is called.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from forgebook.cli.arguments import flags_of, make_parser, parse_arguments
from forgebook.cli.mistakes import refuse_unknown_flags
from forgebook.cli.options import COMMANDS
from forgebook.errors import ConfigError, near_miss

if TYPE_CHECKING:
    from forgebook.runs.registry import Model

__all__ = ["export_command", "models_command", "push_command"]


def models_command(arguments: list[str]) -> int:
    """List the fine-tuned models; show or delete one."""
    command = COMMANDS["models"]
    refuse_unknown_flags("models", arguments, flags_of(command), ())
    flags = make_parser(command).parse_intermixed_args(arguments)
    from forgebook.runs.registry import delete_model, get_model, list_models

    action, *rest = flags.arguments or ["runs"]
    if action not in ("show", "delete"):
        if rest and (suggestion := near_miss(action, ("show", "delete"))):
            raise ConfigError(f"models: {action!r} is not a command{suggestion}")
        if not rest and action.startswith("storage_path="):
            raise ConfigError(f"models takes a storage path alone: write models {action.partition('=')[2]}")
        if rest:
            got = " ".join(flags.arguments)
            raise ConfigError(f"models takes a storage path, or show RUN, or delete RUN; got {got}")
        models = list_models(action, on_damaged=lambda reason: print(f"left out: {reason}", file=sys.stderr))
        _print_models(models, action, flags.json)
        return 0
    if len(rest) != 1:
        raise ConfigError(f"models {action} needs a {COMMANDS['models'].target}")
    model = get_model(rest[0])
    if action == "show":
        _print_model(model, flags.json)
        return 0
    state = "" if model.is_complete else ", which is not complete and may still be running"
    if not flags.yes and not _agrees(f"delete {model.storage_uri}{state}? [y/N] "):
        print("nothing was deleted")
        return 0
    delete_model(rest[0], on_kept=lambda names: print(f"kept, because no run wrote it: {', '.join(names)}"))
    print(f"deleted {model.storage_uri}")
    return 0


def _agrees(question: str) -> bool:
    """Ask on the terminal. Raises ConfigError where nobody can answer."""
    try:
        return input(question).strip().lower() in ("y", "yes")
    except (EOFError, RuntimeError):  # standard input is at its end, or closed
        raise ConfigError("models delete asks first, and there is no standard input: add --yes") from None


def _print_model(model: Model, as_object: bool) -> None:
    if as_object:
        print(json.dumps(asdict(model), indent=2))
        return
    for name, value in asdict(model).items():
        print(f"{name:18} {json.dumps(value) if isinstance(value, dict | list) else value}")


def _print_models(models: list[Model], place: str, as_object: bool) -> None:
    if as_object:
        print(json.dumps([asdict(model) for model in models], indent=2))
        return
    if not models:
        print(f"no models under {place}")
        return
    from forgebook.reporting.console import make_console, make_table

    columns = ["id", "run", "base model", "method", "evaluation loss", "created"]
    rows = []
    for model in models:
        loss = f"{model.figures['eval_loss']:.4f}" if "eval_loss" in model.figures else ""
        name, created = model.storage_uri.rpartition("/")[2], model.created_at[:16].replace("T", " ")
        state = loss if model.is_complete else "not complete"
        rows.append([model.id, name, model.base_model_id, model.ft_type, state, created])
    make_console().print(make_table(f"Models under {place}", columns, rows))


def push_command(arguments: list[str]) -> int:
    """Upload a run's best checkpoint to the hub."""
    parsed = parse_arguments("push", arguments, extra=["a repository after the RUN: OWNER/NAME"])
    from forgebook.export.hub import push_to_hub
    from forgebook.runs.run import find_run

    url = push_to_hub(find_run(parsed.target), parsed.rest[0], parsed.options["private"], parsed.options.get("base"))
    print(f"pushed to {url}")
    return 0


def export_command(arguments: list[str]) -> int:
    """Write a GGUF file, and a Modelfile for Ollama."""
    parsed = parse_arguments("export", arguments, extra=["a file to write after the MODEL, such as model.gguf"])
    if parsed.target.endswith(".gguf"):
        raise ConfigError(f"export: the MODEL comes first: export {parsed.rest[0]} {parsed.target}")
    from pathlib import Path

    from forgebook.catalog import model_folder
    from forgebook.export.gguf import check_exportable, export_gguf
    from forgebook.reporting.console import quiet_descriptors, show_stages
    from forgebook.runs.atomic import atomic_file
    from forgebook.runs.download import cache_folder
    from forgebook.runs.run import display_path, find_checkpoint

    folder, out, kind = model_folder(parsed.target), Path(parsed.rest[0]), parsed.options["type"]
    if "checkpoint" in parsed.options or not (folder / "config.json").is_file():
        folder = find_checkpoint(parsed.target, parsed.options.get("checkpoint"))
    check_exportable(folder, out, kind)
    modelfile = None
    if parsed.options["ollama"]:
        from forgebook.export.ollama import read_modelfile

        # Before minutes of converting: it is refused where Ollama cannot write the model's prompts.
        modelfile = read_modelfile(folder, out.name)
    with (
        quiet_descriptors(cache_folder() / "export.log") as output,
        show_stages(output, f"converting {display_path(folder)}") as show,
    ):
        written = export_gguf(folder, out, kind, on_stage=show)
    print(f"wrote {written}")
    if modelfile is not None:
        path = out.with_suffix(".Modelfile")
        with atomic_file(path) as temporary:
            temporary.write_text(modelfile, encoding="utf-8")
        print(f"wrote {path}: ollama create NAME -f {path}")
    return 0
