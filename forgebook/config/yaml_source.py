"""The text of a config, from a file, a URL and overrides, and the line of every key."""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from forgebook.config.block_keys import prefixes
from forgebook.config.blocks import SHARDING_KEYS
from forgebook.config.legacy_keys import translate_retired
from forgebook.errors import ConfigError

__all__ = ["Locations", "apply_override", "location_of", "parse_yaml", "read_text"]

URL_TIMEOUT = 20  # seconds
# A config is far smaller; a data file or an alias of aliases of aliases is not.
LARGEST_TEXT, MOST_VALUES, DEEPEST = 2**20, 20_000, 40
TOO_DEEP = f"nested more than {DEEPEST} levels deep"

NO_TEXT = re.compile(r"[\0\ud800-\udfff]")  # YAML can write these as escapes; no path or file can hold them
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
OTHER_BASE = re.compile(r"[-+]?(0[0-7_]+$|\d+:\d)")  # 010 and 1:30, which YAML 1.1 reads as 8 and 90
MERGE = "tag:yaml.org,2002:merge"

# Where a dotted key was written: its line in the file, or the override.
Locations = dict[str, int | str]


class _Loader(yaml.SafeLoader):
    """Leave dates as text: `run_name: 2024-06-01` is a name. Report a value that is not of its tag with its line."""

    depth = 0

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # of `!!int abc`, by its tag
            problem = f"{node.value!r:.80} is not of the type {node.tag.rpartition(':')[2]}"
            raise ConstructorError(None, None, problem, node.start_mark) from None
        if node.tag in NUMBERS and OTHER_BASE.match(node.value):
            problem = f"{node.value} is {value} in YAML, in base 8 or 60: write it in base 10, or quote a text"
            raise ConstructorError(None, None, problem, node.start_mark)
        return value

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Count levels while they are read: deep ones would end in Python's recursion limit, wherever that stands."""
        self.depth += 1
        if self.depth > DEEPEST + 1:
            raise ConstructorError(None, None, TOO_DEEP, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_text(source: str) -> str:
    """Read a local file or an https:// URL."""
    if "://" in source:
        return _download(source)
    try:
        with open(Path(source).expanduser(), "rb") as file:
            content = file.read(LARGEST_TEXT + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {source:.200}: {error.strerror}") from None
    except (RuntimeError, ValueError):  # `~nobody`; a name with a zero byte
        raise ConfigError(f"cannot read {source!r:.200}: not the name of a file, must be a YAML file") from None
    if len(content) > LARGEST_TEXT:
        raise ConfigError(f"cannot read {source}: more than {LARGEST_TEXT:,} bytes, must be a YAML file of keys")
    return _decoded(content, source)


def _decoded(content: bytes, source: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{source}:{line}: not UTF-8 text, must be a YAML file") from None


def _download(url: str) -> str:
    from http.client import HTTPException  # a fifth of this module's import time, and rarely needed
    from urllib.request import urlopen

    if not url.startswith("https://"):
        raise ConfigError(f"cannot read {url}: a config is a local file or an https:// URL")
    try:
        with urlopen(url, timeout=URL_TIMEOUT) as response:
            return _decoded(response.read(), url)
    except (OSError, HTTPException) as error:  # a 404 and a timeout are OSErrors
        raise ConfigError(f"cannot download {url}: {error}") from None


def parse_yaml(text: str, source: str) -> tuple[Any, Locations]:
    """Parse YAML and note the line of every key; warn of a key that is set twice."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        _check_tree(node)
        locations: Locations = dict(_key_lines(node, source))
        return loader.construct_document(node), locations
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{source}:{line}: not valid YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{source}:{line}: not valid YAML: U+{error.character:04X} is not allowed in it") from None


def _check_tree(node: yaml.Node, above: tuple[yaml.Node, ...] = ()) -> int:
    """Count the values under a node, an alias as a copy; raise YAMLError for what cannot be copied or written."""
    problem, count = "", 1
    if any(node is parent for parent in above):
        problem = "an anchor holds an alias of itself"
    elif len(above) > DEEPEST:
        problem = TOO_DEEP  # by aliases of aliases
    elif isinstance(node, yaml.ScalarNode):
        problem = "a text holds a zero byte or half of a character" if NO_TEXT.search(node.value) else ""
    else:
        pairs = isinstance(node, yaml.MappingNode)
        for child in (part for pair in node.value for part in pair) if pairs else node.value:
            count += _check_tree(child, (*above, node))
            if count > MOST_VALUES:
                problem = f"more than {MOST_VALUES:,} values, each alias counted as what it stands for"
                break
    if problem:
        raise ConstructorError(None, None, problem, node.start_mark)
    return count


def _key_lines(node: yaml.Node, source: str, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield each dotted key and its line; warn where YAML takes the last of two values."""
    if not isinstance(node, yaml.MappingNode):
        return
    last: dict[str, tuple[int, yaml.Node]] = {}
    for key, value in node.value:
        dotted, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if dotted in last and key.tag != MERGE:  # two merges are both read
            before_line, before = last[dotted]
            # Some published configs repeat a line, which does no harm.
            if yaml.serialize(before) != yaml.serialize(value):
                note = f"its value in line {before_line} is ignored"
                warnings.warn(f"{source}:{line}: key {dotted!r} is set a second time: {note}", stacklevel=2)
        last[dotted] = line, value
    for dotted, (line, value) in last.items():
        yield dotted, line
        yield from _key_lines(value, source, f"{dotted}.")


def apply_override(override: str, values: dict[str, Any], locations: Locations) -> tuple[list[str], list[str]]:
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
        # A copy: an alias in the file gives other keys the same block, which keep theirs.
        block[part] = dict(block[part]) if isinstance(block.get(part), dict) else {}
        block = block[part]
    block[written[-1]] = tree
    dotted = ".".join(written)
    for replaced in [location for location in locations if dotted in prefixes(location)]:
        del locations[replaced]
    locations[dotted] = f"override {override}"
    if written[0] in SHARDING_KEYS:  # two ways to say the same, of which the file may use the other
        for other in SHARDING_KEYS - {written[0]}:
            values.pop(other, None)
            for location in [location for location in locations if location.split(".")[0] == other]:
                del locations[location]
    return notes, problems


def location_of(key: str, locations: Locations) -> int | str | None:
    """Return where a dotted key, or the nearest block around it, was written."""
    return next((locations[prefix] for prefix in prefixes(key) if prefix in locations), None)
