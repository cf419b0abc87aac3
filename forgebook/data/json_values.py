"""JSON as rows of data hold it: parsed, and refused where it could not be written again.

parse_json(text)                 one value, or a DataError without a place
check_value(value, text)         the same checks, for what another decoder parsed
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterable
from typing import Any

from forgebook.errors import DataError

__all__ = ["brief", "check_unique", "check_value", "parse_json", "unique_keys", "without_nulls"]

LONGEST_SHOWN = 60
DEEPEST = 100  # levels; templates and writers recurse
HALF_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str) -> Any:
    """Parse one JSON value; raise DataError, without a place, for what is not one that can be written again."""
    try:
        return check_value(json.loads(text, object_pairs_hook=unique_keys), text)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON ({error})") from None


def check_value(value: Any, text: str) -> Any:
    """Return a value that `text` holds; raise DataError for half characters and endless nesting."""
    if HALF_SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DataError(
                "half of a surrogate pair (\\ud800 to \\udfff), which is not a character: remove it"
            ) from None
    if text.count("[") + text.count("{") > DEEPEST:
        level = [value]
        for _ in range(DEEPEST):
            level = [child for item in level for child in _children(item)]
        if level:
            raise DataError(f"JSON nested more than {DEEPEST} levels deep: flatten it")
    return value


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of the pairs of one JSON object. Raises ValueError for a key that is repeated."""
    value = dict(pairs)
    if len(value) < len(pairs):
        try:
            check_unique([key for key, _ in pairs], "key")
        except DataError as error:
            raise ValueError(f"{error} in one object") from None
    return value


def check_unique(names: Iterable[str], kind: str) -> None:
    """Raise DataError for a name that occurs twice: only one of its values would be read."""
    repeated = [name for name, count in collections.Counter(names).items() if count > 1]
    if repeated:
        raise DataError(f"the {kind} {repeated[0]!r} is repeated")


def without_nulls(value: Any, kept: tuple[str, ...] = ()) -> Any:
    """Leave out keys without a value: a column type gives every row the keys of all rows."""
    if isinstance(value, dict):
        return {key: without_nulls(item, kept) for key, item in value.items() if item is not None or key in kept}
    return [without_nulls(item, kept) for item in value] if isinstance(value, list) else value


def brief(value: Any) -> str:
    """Write a value for a message, cut to LONGEST_SHOWN characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."
