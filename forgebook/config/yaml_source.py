"""The text of a config, from a file, a URL and overrides, and the line of every key."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from forgebook.config.legacy_keys import translate_retired
from forgebook.config.schema import prefixes
from forgebook.errors import ConfigError

__all__ = ["Places", "apply_override", "parse_yaml", "place_of", "read_text"]

URL_TIMEOUT = 20  # seconds

# Where a dotted key was written: its line in the file, or the override.
Places = dict[str, int | str]


class _Loader(yaml.SafeLoader):
    """Leave dates as text: `run_name: 2024-06-01` is a name."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_text(source: str) -> str:
    """Read a local file or an https:// URL."""
    if "://" in source:
        return _download(source)
    try:
        return Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {source}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"cannot read {source}: it is not text, must be a YAML file") from None


def _download(url: str) -> str:
    from http.client import HTTPException  # a fifth of this module's import time, and rarely needed
    from urllib.request import urlopen

    if not url.startswith("https://"):
        raise ConfigError(f"cannot read {url}: a config is a local file or an https:// URL")
    try:
        with urlopen(url, timeout=URL_TIMEOUT) as response:
            return response.read().decode("utf-8")
    except (OSError, HTTPException, UnicodeDecodeError) as error:  # a 404 and a timeout are OSErrors
        raise ConfigError(f"cannot download {url}: {error}") from None


def parse_yaml(text: str, source: str) -> tuple[Any, Places]:
    """Parse YAML and note the line of every key."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        places: Places = dict(_key_lines(node, source))
        return None if node is None else loader.construct_document(node), places
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{source}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ConfigError(f"{source}: not valid YAML: {error}") from None


def _key_lines(node: yaml.Node | None, source: str, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield each dotted key and its line; reject a key with two values, of which YAML would drop one."""
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, yaml.Node] = {}
    for key, value in node.value:
        dotted, line = f"{prefix}{key.value}", key.start_mark.line + 1
        before = first.setdefault(dotted, value)
        # Some published configs repeat a line, which does no harm.
        if before is not value and yaml.serialize(before) != yaml.serialize(value):
            raise ConfigError(f"{source}:{line}: key {dotted!r} has another value in line {before.start_mark.line + 1}")
        yield dotted, line
        yield from _key_lines(value, source, f"{dotted}.")


def apply_override(override: str, values: dict[str, Any], places: Places) -> tuple[list[str], list[str]]:
    """Set the value of `key=value` in place; return the notes and problems of `translate_retired`."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not text.strip() or not all(path):
        raise ConfigError(f"override {override!r} must be key=value, such as num_epochs=3 or lora_config.r=16")
    tree, _ = parse_yaml(text, f"override {override!r}")
    for part in reversed(path):
        tree = {part: tree}
    notes, problems = translate_retired(tree, values.get("num_epochs"))
    if not tree:
        return notes, problems
    written: list[str] = []
    for _ in path:  # along the tree, not the path: a retired name is another key by now
        [(part, tree)] = tree.items()
        written.append(part)
    block = values
    for part in written[:-1]:
        if not isinstance(block.get(part), dict):
            block[part] = {}
        block = block[part]
    block[written[-1]] = tree
    dotted = ".".join(written)
    for replaced in [place for place in places if dotted in prefixes(place)]:
        del places[replaced]
    places[dotted] = f"override {override}"
    return notes, problems


def place_of(key: str, places: Places) -> int | str | None:
    """Return where a dotted key, or the nearest block around it, was written."""
    return next((places[prefix] for prefix in prefixes(key) if prefix in places), None)
