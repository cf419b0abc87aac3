"""Dotted keys of nested blocks, and questions to their classes: which blocks a type holds, which keys carry a mark."""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from forgebook.config.blocks import Mark

__all__ = ["flatten", "marked_keys", "models_in", "prefixes"]


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


def flatten(block: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name every value of a nested block by its dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in block.items():
        dotted = f"{prefix}{key}"
        leaves |= flatten(value, f"{dotted}.") if isinstance(value, dict) and value else {dotted: value}
    return leaves


def prefixes(key: str) -> list[str]:
    """List a dotted key and the blocks around it, innermost first."""
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
