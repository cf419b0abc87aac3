"""Questions to the classes of a config's blocks: which blocks a type holds, which keys carry a mark."""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from forgebook.config.blocks import Mark

__all__ = ["marked_keys", "models_in"]


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the block classes inside a type, such as `LogprobProcessor | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


def marked_keys(model: type[BaseModel], mark: Mark, prefix: str = "") -> list[str]:
    """List the dotted keys of a block class, and of the blocks in it, that carry a mark; in the order of the class."""
    keys = []
    for name, field in model.model_fields.items():
        if mark in field.metadata:
            keys.append(f"{prefix}{name}")
        else:
            for block in models_in(field.annotation):
                keys += marked_keys(block, mark, f"{prefix}{name}.")
    return keys
