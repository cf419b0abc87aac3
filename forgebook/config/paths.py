"""`${NAME}` and `~` in the values of a config or a command, and paths that no file system takes.

expand_values({"train_path": "${DATA}/a.jsonl"})    the environment's value, or the reason why there is none
expand_path("~/runs")                               one path of a command
"""

import os
import re
from collections.abc import Callable
from typing import Any

from forgebook.errors import ConfigError

__all__ = ["expand_path", "expand_values"]

# Keys whose values are paths, in any block: `~`, and `$NAME` without braces, are expanded in them.
PATH_KEYS = frozenset(
    """
    config_path deepspeed initial_adapter_model_ckpt_path initial_base_model_ckpt_path model_id path repo_id run_name
    storage_path train_path valid_path
    """.split()
)
# Blocks of texts that a model reads or writes: what looks like a variable in them is text.
TEXT_BLOCKS = ("classifier_config", "generation_config")
TEXT_KEYS = frozenset(("columns", "labels", "system"))  # the same, of blocks inside others
LONGEST_NAME, LONGEST_PATH = 255, 4096  # bytes, of Linux
SCHEMES = ("https://", "s3://", "gs://", "hf://")

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BRACED = re.compile(r"\$\{([^}]*)\}?")
_BARE = re.compile(r"(?<![^/])\$([A-Za-z_]\w*)")  # at the start of a path or of one of its folders
_VARIABLE = re.compile(r"([A-Za-z_]\w*)(?::-(.*))?", re.DOTALL)
_SWITCHES = {"true": True, "false": False}


def expand_values(values: dict[str, Any], where: Callable[[str], str]) -> tuple[dict[str, Any], list[str]]:
    """Expand the texts of a config; return the values and what cannot be expanded or cannot be a path.

    where: returns where a dotted key was set.
    """
    problems: list[str] = []

    def expanded(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: expanded(item, f"{key}.{name}") for name, item in value.items()}
        if isinstance(value, list):
            return [expanded(item, key) for item in value]
        if not isinstance(value, str) or not TEXT_KEYS.isdisjoint(key.split(".")):
            return value
        try:
            if not PATH_KEYS.isdisjoint(key.split(".")):
                return expand_path(value)
            text = _expand_variables(value)
        except ConfigError as error:
            problems.append(f"{key}: {error} ({where(key)})")
            return value
        return _SWITCHES.get(text, text) if text != value else value

    return {key: value if key in TEXT_BLOCKS else expanded(value, str(key)) for key, value in values.items()}, problems


def expand_path(text: str) -> str:
    """Expand `${NAME}`, `$NAME` and `~` in a path or URI; raise ConfigError for what cannot be a path.

    That is one with a variable without a value, an address that nothing reads or writes, and one that is too long.
    """
    path = _expand_variables(_BARE.sub(r"${\1}", text))
    if re.match(r"~[\w.-]*(/|$)", path):
        path = os.path.expanduser(path)
        if path.startswith("~"):
            raise ConfigError(f"{text!r} starts with the home folder of a user who does not exist: write it out")
    scheme = _SCHEME.match(path)
    if scheme and scheme[0] not in SCHEMES:  # a folder of that name would be made
        raise ConfigError(f"{text!r}: {scheme[0]} is not supported: use {', '.join(SCHEMES)} or a path on this machine")
    if scheme is None:
        longest = max(len(os.fsencode(name)) for name in path.split("/"))
        if longest > LONGEST_NAME or len(os.fsencode(path)) > LONGEST_PATH:
            most = f"{LONGEST_NAME} bytes for a name, {LONGEST_PATH} in all"
            raise ConfigError(f"{text[:40]!r}... is longer than a path can be: {most}")
    return path


def _expand_variables(text: str) -> str:
    def value_of(match: re.Match) -> str:
        variable = _VARIABLE.fullmatch(match[1])
        if variable is None:
            raise ConfigError(
                f"{match[0]!r} cannot be expanded: only environment variables are, as ${{NAME}} or ${{NAME:-default}}"
            )
        name, default = variable.groups()
        value = os.environ.get(name) or default
        if value is None:
            raise ConfigError(
                f"{text!r} needs the environment variable {name}, which is not set: set it before the run"
            )
        return value

    return _BRACED.sub(value_of, text)
