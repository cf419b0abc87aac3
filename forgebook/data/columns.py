"""Columns of any name -> the keys of a format: what `columns`, `system` and `labels` of a config's data path say.

mapping = ColumnMapping.of({"user": "question", "assistant": "answer"}, system=None, labels=None)
row = map_row({"question": "2 + 2?", "answer": "4"}, mapping)      {"messages": [...]}
mapping_text(["question", "answer"], "a.jsonl", "train_path")      the YAML to write, with a guess
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forgebook.config.data_block import as_written, template_columns
from forgebook.data.json_values import brief
from forgebook.errors import DataError, near_miss

__all__ = ["ColumnMapping", "MappedRow", "map_row", "mapping_text"]

OPTIONAL = ("system", "tools")
# The names that data sets give these columns, the most telling first.
QUESTIONS = """
    question prompt instruction query user input problem request source text utterance sentence dialogue document
    article context title
""".split()
ANSWERS = """
    answer response output completion assistant target reply solution summary chosen_response ground_truth label
    translation result
""".split()
BETTER, WORSE = "chosen better win preferred positive good".split(), "rejected worse lose negative bad".split()
TEXTS = "text sentence content sms message comment review tweet document body title question input".split()
LABELS = "label labels category class intent target sentiment answer output".split()


@dataclass(frozen=True)
class ColumnMapping:
    """Which columns hold what. columns: (role, column or template); labels: (value as text, label).

    system: of conversations that have no system message. by_number: labels stand for numbers, even where a column has
    names for them.
    """

    columns: tuple[tuple[str, str], ...] = ()
    system: str | None = None
    labels: tuple[tuple[str, str], ...] = ()
    by_number: bool = False

    @classmethod
    def of(
        cls,
        columns: Mapping[str, str] | None,
        system: str | None,
        labels: Sequence[str] | Mapping[str | int | bool, str] | None,
    ) -> ColumnMapping | None:
        """Make the mapping of a config's data path; None where it says nothing about its rows."""
        if columns is None and not system:
            return None
        pairs: Iterable[tuple[Any, str]] = labels.items() if isinstance(labels, Mapping) else enumerate(labels or ())
        written = tuple((as_written(key), label) for key, label in pairs)
        return cls(tuple((columns or {}).items()), system or None, written, not isinstance(labels, Mapping))


class MappedRow(dict):
    """A row in the keys of a format. unused: the columns that no role reads, and those that a role does not find."""

    unused: tuple[str, ...] = ()


def map_row(raw: Any, mapping: ColumnMapping) -> Any:
    """Give the columns of a row the keys of the format that they make up; leave out the others.

    Raises DataError for a column that is missing, empty or not text.
    """
    if not isinstance(raw, dict):
        return raw  # row_formats says what it should be
    if not mapping.columns:
        return raw
    values = {role: _value(raw, role, template) for role, template in mapping.columns}
    if mapping.labels:
        key = "label" if "label" in values else "assistant"
        values[key] = _label(values[key], mapping)
    row = MappedRow({key: value for key, value in _as_format(values).items() if value is not None})
    used = {name.split(".")[0] for _, template in mapping.columns for name in template_columns(template)}
    used |= {name for _, template in mapping.columns for name in template_columns(template)}
    absent = [(role, name) for role, template in mapping.columns if role in OPTIONAL for name in _absent(raw, template)]
    row.unused = (
        *(key for key, value in raw.items() if key not in used and _has_value(value)),
        *(f"columns.{role}: no column {name!r}" for role, name in absent),
    )
    return row


def _as_format(values: dict[str, Any]) -> dict[str, Any]:
    """Turn the values of roles into the keys that `row_formats` reads."""
    beside = {key: values.get(key) for key in ("system", "tools", "images")}
    if "messages" in values:
        return {"messages": values["messages"], **beside}
    if "chosen" in values:
        return {"prompt": values.get("user"), "chosen": values["chosen"], "rejected": values["rejected"], **beside}
    if "label" in values or "assistant" in values:
        question, answer = values.get("user", values.get("text")), values.get("assistant", values.get("label"))
        return {"messages": [_message("user", question), _message("assistant", answer)], **beside}
    return {"text": _text(values["text"], "text")}


def _message(role: str, value: Any) -> dict[str, str]:
    return {"role": role, "content": _text(value, role)}


def _value(raw: dict[str, Any], role: str, template: str) -> Any:
    """Return what a role's column or template holds; None for an optional one without a value."""
    if "{" not in template and "}" not in template:
        value = _column(raw, template)
        if not _has_value(value):
            if role not in OPTIONAL:
                _refuse_missing(raw, role, template)
            return None
        return (
            value
            if role in ("messages", "chosen", "rejected", "user", "tools", "label", "images")
            else _text(value, template)
        )
    parts = [(literal, name) for literal, name, _, _ in string.Formatter().parse(template)]
    cells = {name: _column(raw, name) for _, name in parts if name}
    # An empty cell is an empty part of the text; a text of empty cells alone is missing.
    missing = _absent(raw, template) or ([] if any(map(_has_value, cells.values())) else list(cells))
    if missing and role not in OPTIONAL:
        _refuse_missing(raw, role, missing[0])
    return None if missing else "".join(text + (_text(cells[name], name) if name else "") for text, name in parts)


def _absent(raw: dict[str, Any], template: str) -> list[str]:
    """List the columns of a template that a row does not have, not even empty."""
    return [name for name in template_columns(template) if name not in raw and name.split(".")[0] not in raw]


def _has_value(value: Any) -> bool:
    return value not in (None, "", [], {})


def _column(raw: dict[str, Any], name: str) -> Any:
    """Return a column's value; a dot leads into it. None if there is none: pandas writes an empty cell as NaN."""
    value = _nested(raw, name)
    return None if isinstance(value, float) and math.isnan(value) else value


def _nested(raw: dict[str, Any], name: str) -> Any:
    if name in raw:
        return raw[name]
    value: Any = raw
    for part in name.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _refuse_missing(raw: dict[str, Any], role: str, name: str) -> None:
    if name in raw:
        raise DataError(f"the column {name!r}, which columns.{role} reads, is empty: remove the row")
    keys = ", ".join(map(str, raw)) or "none"
    raise DataError(
        f"no column {name!r}, which columns.{role} reads (its keys: {keys[:300]}){near_miss(name, map(str, raw))}"
    )


def _text(value: Any, name: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int | float):
        return as_written(value)
    raise DataError(f"the column {name!r} is {brief(value)}; expected text (a dot leads into it: {name}.KEY)")


def _label(value: Any, mapping: ColumnMapping) -> str:
    if mapping.by_number:
        value = getattr(value, "number", value)  # of a name
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as pandas writes it beside an empty cell
    labels, written = dict(mapping.labels), as_written(value)
    if written in labels:
        return labels[written]
    if written in labels.values() and all(key.isdigit() for key in labels):  # a list of names, and their name
        return written
    known = ", ".join(f"{key}: {label}" for key, label in mapping.labels)
    raise DataError(f"the label is {brief(value)}, which `labels` does not have ({known}): add it")


# The mapping to write ---------------------------------------------------------------------------------


def mapping_text(keys: Sequence[str], path: str, key: str, task: str = "instruction_tuning") -> str:
    """Write the mapping that a file's columns probably need, as YAML to paste.

    keys: the columns of a row. key: train_path or valid_path.
    """
    import yaml

    columns = _guess(list(keys), task)
    block = {key: {"path": path, "columns": columns}}
    return yaml.safe_dump(block, sort_keys=False, allow_unicode=True, width=float("inf")).rstrip()


def _guess(keys: list[str], task: str) -> dict[str, str]:
    """Guess which columns hold what: by their names, else the first and the last one."""
    if task == "causal_lm":
        return {"text": _named_like(keys, TEXTS) or keys[0]}
    if task == "classification":
        label = _named_like(keys, LABELS) or keys[-1]
        return {"text": _named_like([k for k in keys if k != label], TEXTS) or keys[0], "label": label}
    if task == "preference_tuning":
        rejected = _named_like(keys, WORSE) or keys[-1]
        rest = [k for k in keys if k != rejected]
        chosen = _named_like(rest, BETTER) or rest[-1]
        others = [k for k in rest if k != chosen]
        asked = _named_like(others, QUESTIONS) or (others[0] if len(others) == 1 else None)
        return ({"user": asked} if asked else {}) | {"chosen": chosen, "rejected": rejected}
    system = next((k for k in keys if k.lower() in ("system", "system_prompt")), None)
    keys = [k for k in keys if k != system] or keys
    answer = _named_like(keys, ANSWERS) or keys[-1]
    rest = [k for k in keys if k != answer] or keys
    guess = {"user": _named_like(rest, QUESTIONS) or rest[0], "assistant": answer}
    return ({"system": system} if system else {}) | guess


def _named_like(keys: Iterable[str], names: Sequence[str]) -> str | None:
    """Return the key that has one of these names, else one that holds such a name; the first name counts most."""
    keys = list(keys)
    exact = next((k for name in names for k in keys if k.lower() == name), None)
    return exact or next((k for name in names for k in keys if name in k.lower()), None)
