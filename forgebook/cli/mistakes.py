"""Typos, and flags of other programs, among the arguments: the error says what to write instead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from forgebook.errors import ConfigError, near_miss

__all__ = ["refuse_typo", "refuse_unknown_flags"]

# Verbs of other programs for what has none here.
FINE_TUNING = {"train", "training", "finetune", "fine-tune", "fine_tune", "sft", "run", "start", "launch", "resume"}


def refuse_typo(name: str, commands: Iterable[str]) -> None:
    """Raise ConfigError for a first argument that is neither a command nor a file, unless it may be a path."""
    commands = list(commands)
    suggestion = near_miss(name.lower(), commands)
    if name.lower() in FINE_TUNING:
        suggestion = ": to fine-tune, give the config file alone, python main.py CONFIG"
    elif not suggestion and re.fullmatch(r"[A-Za-z_-]+", name):
        suggestion = f" (commands: {', '.join(commands)})"
    if suggestion and "://" not in name and not Path(name[:255]).exists():
        raise ConfigError(f"{name!r} is neither a command nor a config file{suggestion}")


def refuse_unknown_flags(
    command: str, arguments: Sequence[str], flags: Iterable[str], options: Iterable[str] | None
) -> None:
    """Raise ConfigError for `--num_epochs 3`, as other programs have it: here it is `num_epochs=3`.

    options: the names that the command takes as `key=value`; None if it takes all keys of a config.
    """
    flags = set(flags)
    for k, argument in enumerate(arguments):
        sign, equals, value = argument.partition("=")
        if argument == "--":
            return
        if not re.fullmatch(r"--?[A-Za-z][\w.-]*", sign) or sign in flags or (sign[1] != "-" and sign[:2] in flags):
            continue
        key = sign.lstrip("-").replace("-", "_")
        following = next(iter(arguments[k + 1 : k + 2]), "")
        value = value if equals else "" if following.startswith("-") else following
        suggestion = near_miss(sign, flags)
        if key in ("config", "config_file", "config_path") and value:
            suggestion = f": write the path alone, {value}"
        elif not suggestion and (options is None or key in options):
            suggestion = f": write {key}={value or 'VALUE'}"
        raise ConfigError(f"{command or 'main.py'} has no flag {sign}{suggestion}")
