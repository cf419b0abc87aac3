"""The blocks of train_path and valid_path: a path with its columns, mixtures, and a share that is held out."""

import string
from typing import Annotated, Any, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from forgebook.config.blocks import StrictBlock
from forgebook.config.values import Float, Int
from forgebook.errors import near_miss, shown_value

__all__ = [
    "COLUMN_ROLES",
    "DataPath",
    "DataSource",
    "HeldOut",
    "ValidPath",
    "as_written",
    "template_columns",
    "with_training_system",
]

# What a column may hold. Each line is one kind of example; those in the second part may stand beside it.
_SHAPES = (
    (("user", "assistant"), ("system", "tools", "images")),
    (("messages",), ("system", "tools", "images")),
    (("text", "label"), ("system",)),
    (("text",), ()),
    (("chosen", "rejected"), ("user", "system", "tools")),
)
COLUMN_ROLES = ("system", "user", "assistant", "messages", "tools", "text", "label", "chosen", "rejected", "images")


def as_written(value: object) -> str:
    """Write a value as YAML and JSON do."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def template_columns(template: str) -> list[str]:
    """List the columns that a value of `columns` reads: a name, or those in braces of a template.

    Raises ValueError for braces that are no column's.
    """
    if "{" not in template and "}" not in template:
        return [template]
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"got {shown_value(template)}: {error}; write {{{{ and }}}} for braces in the text") from None
    names = []
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if not name or form or conversion:
            raise ValueError(f"got {shown_value(template)}, must name a column in each pair of braces, as {{question}}")
        names.append(name)
    return names


class DataSource(StrictBlock):
    """The examples of one path, alone or in a mixture of several."""

    path: str
    """A path, glob, folder or URL, as in train_path."""
    weight: Annotated[Float, Field(gt=0)] = 1.0
    """How often each example is used per epoch: 2 is twice, 0.5 a random half of them (the same every epoch). Of a
    glob or folder, this is a share of all its files together."""
    columns: dict[str, str] | None = None
    """Which column holds what, as `{user: question, assistant: answer}`; or a template of columns, as
    `"{question}\\n\\nAnswer briefly."`. Of conversations user and assistant, or messages; of classification text and
    label; of preferences chosen, rejected and user; of task causal_lm text; beside them system and tools. A dot leads
    into a column: `answers.text.0`. None: the format is detected from the keys."""
    system: str | None = None
    """System message of every example that has none. An entry of valid_path without this key takes it from train_path
    if all entries there agree; an empty text means no system message."""
    labels: list[str] | dict[str | int | bool, str] | None = None
    """The labels that stand for the values of the column `label`: a list, for the numbers from 0, or
    `{spam: "[[1]]", ham: "[[2]]"}`. None: the names in a ClassLabel column of Parquet or the hub, else as they are."""
    revision: str | None = None
    """Branch, tag or commit of a data set of the hub. None: the main branch."""

    @field_validator("columns")
    @classmethod
    def _is_an_example(cls, columns: dict[str, str] | None) -> dict[str, str] | None:
        if columns is None:
            return None
        for role, template in columns.items():
            if role not in COLUMN_ROLES:
                known = ", ".join(COLUMN_ROLES)
                raise ValueError(f"unknown key {role!r}, must be one of {known}{near_miss(role, COLUMN_ROLES)}")
            if not template:
                raise ValueError(f"{role} is empty, must name a column")
            template_columns(template)
        keys = set(columns)
        if not any(set(needed) <= keys <= {*needed, *also} for needed, also in _SHAPES):
            shapes = "; ".join(" and ".join(needed) for needed, _ in _SHAPES)
            raise ValueError(
                f"got {', '.join(columns) or 'none'}, must name the columns of one kind of example: {shapes}"
            )
        return columns

    @field_validator("labels")
    @classmethod
    def _by_text(cls, labels: list[str] | dict[str | int | bool, str] | None) -> list[str] | dict[str, str] | None:
        # As text, because the config that a run stores has no other keys.
        return {as_written(key): label for key, label in labels.items()} if isinstance(labels, dict) else labels

    @model_validator(mode="after")
    def _labels_have_a_column(self) -> Self:
        if self.labels is not None and not {"label", "assistant"} & set(self.columns or ()):
            raise ValueError("labels: needs columns with a label, as {text: TEXT, label: LABEL}")
        return self


class HeldOut(StrictBlock):
    """A share of the training examples, held out for validation instead of trained."""

    split: Annotated[Float, Field(gt=0, lt=1)]
    """The share of the examples, as 0.05. Examples with the same first user message are held out together, and each
    distinct one once: none of them, nor a duplicate, is trained. If even the smallest such group is more than twice the
    share, the run stops: name a file of validation examples."""
    seed: Int = 0
    """Another seed holds out other examples. Not the run's `seed`: runs with several are compared on the same ones."""


_Entry = Annotated[
    Annotated[str, Tag("a path")] | Annotated[DataSource, Tag("a block")],
    Discriminator(lambda value: "a path" if isinstance(value, str) else "a block"),
]
_Entries = Annotated[list[_Entry], Tag("a list"), Field(min_length=1)]


def _form(value: object) -> str:
    if isinstance(value, list):
        return "a list"
    if isinstance(value, HeldOut) or (isinstance(value, dict) and "split" in value):
        return "a share"
    return "a block" if isinstance(value, dict | DataSource) else "a path"


# The tag makes an error describe the form that was written, not all.
DataPath = Annotated[
    Annotated[str, Tag("a path")] | Annotated[DataSource, Tag("a block")] | _Entries,
    Discriminator(lambda value: "a block" if isinstance(value, dict) else _form(value)),
]
ValidPath = Annotated[
    Annotated[str, Tag("a path")]
    | Annotated[DataSource, Tag("a block")]
    | _Entries
    | Annotated[HeldOut, Tag("a share")],
    Discriminator(_form),
]


def with_training_system(values: dict[str, Any]) -> dict[str, Any]:
    """Give validation entries without `system` the one on which all training entries agree.

    Without it, evaluation would measure prompts that training never shows. values: of a config, as written or checked.
    """
    train, valid = values.get("train_path"), values.get("valid_path")
    entries = train if isinstance(train, list) else [train]
    systems = [_settings(entry).get("system") for entry in entries]
    if not valid or not systems or not systems[0] or systems.count(systems[0]) < len(systems):
        return values
    if isinstance(valid, list):
        return values | {"valid_path": [_with_system(entry, systems[0]) for entry in valid]}
    return values | {"valid_path": _with_system(valid, systems[0])}


def _settings(entry: object) -> dict[str, Any]:
    """Return what an entry of train_path or valid_path sets."""
    if isinstance(entry, DataSource):
        return entry.model_dump(exclude_unset=True)
    return entry if isinstance(entry, dict) else {"path": entry}


def _with_system(entry: object, system: object) -> object:
    is_source = isinstance(entry, str | DataSource) or (isinstance(entry, dict) and "split" not in entry)
    settings = _settings(entry)
    return entry if not is_source or "system" in settings else settings | {"system": system}
