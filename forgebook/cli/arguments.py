"""The arguments of a command: its target, options and flags, parsed by the table in `options`."""

from __future__ import annotations

import argparse
import sys
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forgebook.cli.mistakes import refuse_unknown_flags
from forgebook.cli.options import COMMANDS, Command
from forgebook.config.paths import expand_path
from forgebook.errors import ConfigError, near_miss

if TYPE_CHECKING:
    from forgebook.config.schema import FinetuneConfig

__all__ = ["Arguments", "flags_of", "load_noting_retired", "make_parser", "parse_arguments"]


@dataclass(frozen=True)
class Arguments:
    """What a command was called with.

    target: empty where none was given to a command that needs none.
    rest: the arguments after the target that are none of its options. options: by name, read. flags: argparse's.
    """

    target: str
    rest: list[str]
    options: dict[str, Any]
    flags: argparse.Namespace

    def get(self, *names: str) -> dict[str, Any]:
        """Pick those of some options that have a value."""
        return {name: self.options[name] for name in names if name in self.options}


def parse_arguments(name: str, arguments: Sequence[str], *, extra: Sequence[str] = ()) -> Arguments:
    """Parse a command's arguments: its target, its options and flags, and the rest.

    extra: what the arguments after the target are, one each; () where any number may follow.

    Raises ConfigError for a missing argument, an unknown option or a value that an option cannot have.
    """
    command = COMMANDS[name]
    own = {option.name: option for option in command.options}
    refuse_unknown_flags(name, arguments, flags_of(command), None if command.takes_config_keys else own)
    flags = make_parser(command).parse_intermixed_args(arguments)
    options = {key: option.read(option.default) for key, option in own.items() if option.default is not None}
    others: list[str] = []
    for argument in flags.arguments:
        key, sign, text = argument.partition("=")
        if not sign or key not in own:
            others.append(argument)
            continue
        try:
            options[key] = own[key].read(text)
        except ValueError as error:
            raise ConfigError(f"{name}: {key} must be {error}, got {text!r}") from None
    plain = [argument for argument in others if command.takes_config_keys or "=" not in argument]
    unknown = [argument.partition("=")[0] for argument in others if argument not in plain]
    if not plain or "=" in plain[0]:
        if command.needs_target or plain:
            raise ConfigError(f"{name or 'main.py'} needs a {command.target}")
        plain = [""]
    elif not command.target:
        raise ConfigError(f"{name} takes no argument, got {plain[0]!r}")
    if unknown:
        choices = ", ".join(f"{key}=" for key in own) or "none"
        raise ConfigError(
            f"{name}: unknown option {unknown[0]}{near_miss(unknown[0], own)} (options: {choices}); usage: "
            f"{name} {command.usage}"
        )
    target, rest = expand_path(plain[0]), plain[1:]
    misplaced = next((argument for argument in rest if argument in COMMANDS), None)
    if misplaced and command.takes_config_keys:
        raise ConfigError(f"the command comes first: python main.py {misplaced} {target}")
    if len(rest) < len(extra):
        raise ConfigError(f"{name} needs {extra[len(rest)]}")
    if extra and len(rest) > len(extra):
        raise ConfigError(f"{name}: {rest[len(extra)]!r} is one argument too many; usage: {name} {command.usage}")
    return Arguments(target, rest, options, flags)


def flags_of(command: Command) -> set[str]:
    """List the flags of a command, --help included."""
    return {"-h", "--help", *(name for flag in command.flags for name in flag.names)}


def make_parser(command: Command) -> argparse.ArgumentParser:
    """Make the argparse parser of a command; its --help lists the options of the table."""
    width = max((len(option.name) for option in command.options), default=0) + 3
    rows = [
        textwrap.fill(
            f"{option.name + '=':<{width}}{option.help}",
            width=100,
            initial_indent="  ",
            subsequent_indent=" " * (width + 2),
        )
        for option in command.options
    ]
    parser = argparse.ArgumentParser(
        prog="main.py",
        usage=" ".join(f"python main.py {command.name} {command.usage}".split()),
        description=f"{textwrap.fill(command.summary, 100)}\n{command.target}".rstrip(),
        epilog="key=value options:\n" + "\n".join(rows) if rows else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    for flag in command.flags:
        parser.add_argument(*flag.names, help=flag.help, **dict(flag.settings))
    return parser


def load_noting_retired(config_path: str, overrides: Sequence[str], default: bool) -> FinetuneConfig:
    """Load a config; note its retired keys on the error stream."""
    from forgebook.config.parse import load_config

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = load_config(config_path, list(overrides), default)
    for warning in caught:
        print(f"note: {warning.message}", file=sys.stderr)
    return config
