"""What the verbs of `main.py` share: their parsers, and words parted into a target, overrides and options."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

__all__ = ["A_CONFIG", "A_MODEL", "A_RUN", "load", "make_config_parser", "make_parser", "only", "split", "whole"]

A_CONFIG = "CONFIG: a YAML file or an https:// address"
A_RUN = "RUN: a run's folder or s3:// address, or its name under runs/"
A_MODEL = "RUN: a run's folder or name, a checkpoint or model folder, or a hub id"


def make_parser(verb: str, usage: str, description: str) -> argparse.ArgumentParser:
    """Make the parser of a verb, whose --help prints its usage and description."""
    return argparse.ArgumentParser(
        prog="main.py", usage=" ".join(f"python main.py {verb} {usage}".split()), description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def make_config_parser(verb: str, usage: str, description: str) -> argparse.ArgumentParser:
    """Make the parser of a verb that takes a CONFIG and `key=value` overrides."""
    parser = make_parser(verb, usage, description)
    parser.add_argument("words", metavar="CONFIG [key=value ...]", nargs="*", help="a YAML file or https:// address")
    parser.add_argument("--default", action="store_true", help="choose all that CONFIG leaves out, and say why")
    return parser


def split(verb: str, what: str, words: Sequence[str], known: Sequence[str]) -> tuple[str, list[str], dict[str, str]]:
    """Part a verb's words into its target, the overrides, and the verb's own `key=value` options."""
    from forgebook.errors import ConfigError

    own = [word for word in words if word.partition("=")[0] in known and "=" in word]
    target, *overrides = [word for word in words if word not in own] or [None]
    if target is None or "=" in target:
        raise ConfigError(f"{verb} needs a {what}")
    return target, overrides, dict(word.split("=", 1) for word in own)


def only(verb: str, overrides: Sequence[str], known: Sequence[str]) -> None:
    """Refuse words that a verb without a config cannot use."""
    from forgebook.errors import ConfigError

    if overrides:
        unknown = ", ".join(sorted(word.partition("=")[0] for word in overrides))
        raise ConfigError(f"{verb}: unknown option {unknown}: it takes {', '.join(f'{name}=' for name in known)}")


def whole(verb: str, name: str, value: str) -> int:
    """Read a number of things, one or more."""
    from forgebook.errors import ConfigError

    if not value.isdigit() or int(value) == 0:
        raise ConfigError(f"{verb}: {name} must be a whole number, 1 or more, got {value!r}")
    return int(value)


def load(config_path: str, overrides: list[str], default: bool):
    """Load a config; tell of retired names on the error stream."""
    from forgebook.config.parse import load_config

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = load_config(config_path, overrides, default)
    for warning in caught:
        print(f"note: {warning.message}", file=sys.stderr)
    return config
