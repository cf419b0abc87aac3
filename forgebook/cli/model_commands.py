"""The verbs that keep and hand on what was fine-tuned: list, show, delete; to the hub; as a GGUF file.

Each takes its command-line words and returns an exit code; each imports what it needs when it is called.
"""

from __future__ import annotations

from forgebook.cli.options import A_RUN, make_parser, only, split

__all__ = ["export", "models", "push"]


def models(arguments: list[str]) -> int:
    """List what was fine-tuned; show or delete one."""
    parser = make_parser(
        "models", "[STORAGE_PATH] [--json]  |  models show RUN [--json]  |  models delete RUN [--yes]",
        "What was fine-tuned under STORAGE_PATH (runs/, another folder, or s3://...): list it, show or delete one.\n"
        "delete asks, and keeps what other runs start from.",
    )  # fmt: skip
    parser.add_argument("words", metavar="WORD", nargs="*", help="a storage path; or show or delete, and a RUN")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--yes", action="store_true", help="delete without asking")
    given = parser.parse_intermixed_args(arguments)
    from dataclasses import asdict

    from forgebook.errors import ConfigError
    from forgebook.runs.registry import delete_model, get_model, list_models

    action, *rest = given.words or ["runs"]
    if action not in ("show", "delete"):
        if rest:
            raise ConfigError(f"models takes a storage path, or show RUN, or delete RUN: got {' '.join(given.words)}")
        return _list_models(list_models(action), action, given.json)
    if len(rest) != 1:
        raise ConfigError(f"models {action} needs a {A_RUN}")
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
    from forgebook.reporting.console import make_console, table

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


def push(arguments: list[str]) -> int:
    """Upload a checkpoint to the hub."""
    known = ("private", "base")
    parser = make_parser(
        "push", "RUN OWNER/NAME [private=true] [base=OWNER/NAME]",
        "Upload a run's best checkpoint to the Hugging Face hub (HF_ENDPOINT), with a model card.\n"
        "base: the hub id of an adapter's base that was read from a folder. The token: HF_TOKEN.",
    )  # fmt: skip
    parser.add_argument("words", metavar="RUN OWNER/NAME [key=value ...]", nargs="*", help="a run; a repository")
    given = parser.parse_intermixed_args(arguments)
    name, rest, options = split("push", A_RUN, given.words, known)
    from forgebook.errors import ConfigError
    from forgebook.export.hub import push_to_hub
    from forgebook.runs.run import find_run

    if not rest or "=" in rest[0]:
        raise ConfigError("push needs a repository after the RUN: OWNER/NAME")
    only("push", rest[1:], known)
    if options.get("private", "false") not in ("true", "false"):
        raise ConfigError(f"push: private must be true or false, got {options['private']!r}")
    print(f"pushed to {push_to_hub(find_run(name), rest[0], options.get('private') == 'true', options.get('base'))}")
    return 0


def export(arguments: list[str]) -> int:
    """Write a GGUF file."""
    known = ("type",)
    parser = make_parser(
        "export", "MODEL OUT.gguf [type=q8_0]",
        "Write full weights as a GGUF file with llama.cpp's converter, from $LLAMA_CPP or the PATH.\n"
        "MODEL: a folder that merge made, or a full-parameter RUN. type: f32, f16, bf16, q8_0, ...",
    )  # fmt: skip
    parser.add_argument("words", metavar="MODEL OUT.gguf [type=...]", nargs="*", help="a folder or run; a file")
    given = parser.parse_intermixed_args(arguments)
    source, rest, options = split("export", "MODEL: a folder that merge made, or a RUN", given.words, known)
    from pathlib import Path

    from forgebook.errors import ConfigError
    from forgebook.export.gguf import export_gguf
    from forgebook.runs.run import best_checkpoint, find_run

    if not rest or "=" in rest[0]:
        raise ConfigError("export needs a file to write after the MODEL, such as model.gguf")
    only("export", rest[1:], known)
    is_model = (Path(source) / "config.json").is_file()
    folder = Path(source) if is_model else best_checkpoint(find_run(source))
    print(f"wrote {export_gguf(folder, Path(rest[0]), options.get('type', 'q8_0'))}")
    return 0
