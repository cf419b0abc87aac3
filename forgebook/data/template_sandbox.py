"""Chat templates in jinja's sandbox with a limit on what one operation makes, which no clock can interrupt.

limit_operations()      from now on transformers compiles chat templates so

`'x' * 10**10`, `10**10**9`, a padding to a billion characters, a list that holds itself twice, thirty levels deep, and
then printed or compared: each is one operation in C. What it would make is computed before. Every value that a template
can hold has at most LARGEST characters, counted as it would be written out, so that what is done with it ends soon.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from forgebook.data.render_limits import LargeOperationError

__all__ = ["limit_operations"]

LARGEST = 1 << 26  # characters
ITEM = 256  # characters that an item of a list or of a mapping counts as
LARGEST_INTEGER = 1 << 17  # bits
SLOW_TEXT = 100_000  # characters, for filters that take the square of their number
CHECK = "value within limits"  # the name of a filter that no template can write

# A width in a format that is large, or that is an argument.
_WIDE = {"%": re.compile(r"%[^a-zA-Z%]*?(\d{6}|\*)"), "{": re.compile(r"\{[^{}]*(:[^{}]*\d{6}|\{)")}
_PADDING = {"center", "ljust", "rjust", "zfill", "to_bytes"}


def limit_operations() -> None:
    """Make transformers compile chat templates with these limits."""
    from transformers.utils import chat_template_utils

    if chat_template_utils.ImmutableSandboxedEnvironment is not LimitedEnvironment:
        chat_template_utils.ImmutableSandboxedEnvironment = LimitedEnvironment
        chat_template_utils._compile_jinja_template.cache_clear()


def _refuse_above(limit: float, size: float, operation: str) -> None:
    if size > limit:
        raise LargeOperationError(f"too much in one operation ({operation})")


def _size(value: Any, operation: str = "a list") -> int:
    """Count the characters of a value as if it were written out. Raises LargeOperationError above LARGEST."""
    total, rest = 0, [value]
    while rest:
        one = rest.pop()
        if isinstance(one, str | bytes):
            total += len(one)
        elif isinstance(one, int):
            total += one.bit_length() // 3
        elif isinstance(one, dict | list | tuple | set | frozenset):
            total += ITEM * len(one)
            if total <= LARGEST:
                rest += one if not isinstance(one, dict) else [*one, *one.values()]
        elif type(one).__name__ == "TemplateNamespace":  # of transformers, inside one of its functions
            rest.append(one._Namespace__attrs)
        _refuse_above(LARGEST, total, operation)
    return total


def _checked(value: Any) -> Any:
    if isinstance(value, dict | list | tuple):
        _size(value)
    return value


# -- operators


def _multiply(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _refuse_above(LARGEST_INTEGER, left.bit_length() + right.bit_length(), "*")
    else:
        for many, number in ((left, right), (right, left)):
            if isinstance(many, str | bytes | list | tuple) and isinstance(number, int):
                _refuse_above(LARGEST, _size(many, "*") * number, "*")
    return left * right


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _refuse_above(LARGEST_INTEGER, left.bit_length() * abs(right), "**")
    return left**right


def _remainder(left: Any, right: Any) -> Any:
    if isinstance(left, str | bytes):
        _check_format(left, "%", [right])
    return left % right


def _check_format(text: str | bytes, sign: str, values: Iterable[Any]) -> None:
    written = str(text)
    if _WIDE[sign].search(written):
        raise LargeOperationError("too much in one operation (a width in a format)")
    _refuse_above(LARGEST, written.count(sign) * sum(_size(value, "format") for value in values), "format")


# -- methods and filters: arguments, before they are called


def _check_method(method: Any, arguments: tuple, named: dict[str, Any]) -> None:
    method = getattr(method, "__wrapped__", method)  # the sandbox has its own str.format
    name, owner = getattr(method, "__name__", ""), getattr(method, "__self__", None)
    values = [*arguments, *named.values()]
    if name in _PADDING and isinstance(owner, str | bytes | int):
        _refuse_above(LARGEST, max([one for one in values if isinstance(one, int)], default=0), name)
    if not isinstance(owner, str | bytes):
        return
    if name == "expandtabs":
        _refuse_above(LARGEST, len(owner) * max([8, *(one for one in values if isinstance(one, int))]), name)
    elif name in ("format", "format_map"):
        _check_format(owner, "{", values)
    elif name == "replace" and len(arguments) > 1:
        _check_replace(owner, arguments[0], arguments[1])
    elif name == "join" and arguments and isinstance(arguments[0], list | tuple | dict):
        _refuse_above(LARGEST, _size(arguments[0], name) + len(owner) * len(arguments[0]), name)
    elif name == "translate":
        longest = max((len(one) for one in dict(*arguments).values() if isinstance(one, str)), default=1)
        _refuse_above(LARGEST, len(owner) * longest, name)


def _check_replace(text: Any, old: Any, new: Any) -> None:
    if all(isinstance(one, str) for one in (text, old, new)):
        _refuse_above(LARGEST, len(text) + text.count(old) * len(new), "replace")


def _before_filter(name: str, arguments: list[Any], named: dict[str, Any]) -> None:
    """Check the arguments of a filter, the filtered value first; a generator that has to be counted becomes a list."""
    value, *others = arguments
    values = [*others, *named.values()]
    if name in ("center", "indent", "tojson", "batch", "slice", "round"):
        number = max([one for one in values if isinstance(one, int)], default=0)
        if not number:
            return
        lines = str(value).count("\n") + 1 if name == "indent" else _size(value, name) if name == "tojson" else ITEM
        _refuse_above(LARGEST, number * lines, name)
    elif name == "format":
        _check_format(str(value), "%", values)
    elif name == "replace" and len(others) > 1:
        _check_replace(str(value), *map(str, others[:2]))
    elif name in ("join", "sum"):
        arguments[0] = value = value if isinstance(value, dict | str) else list(value)
        separator = max((len(one) for one in values if isinstance(one, str)), default=0)
        _refuse_above(LARGEST, _size(value, name) + separator * len(value), name)
        if name == "sum" and any(isinstance(one, list | tuple) for one in values):
            _refuse_above(LARGEST, ITEM * len(value) ** 2, name)
    elif name in ("urlize", "striptags", "wordwrap"):
        _refuse_above(SLOW_TEXT, len(str(value)), name)


class _Filters(dict):
    """Filters by name, each with its check."""

    def __init__(self, filters: dict[str, Callable]):
        super().__init__()
        for name, function in filters.items():
            self[name] = function

    def __setitem__(self, name: str, function: Callable) -> None:
        first = 1 if getattr(function, "jinja_pass_arg", None) else 0  # the context comes before the value

        @functools.wraps(function)
        def checked(*arguments: Any, **named: Any) -> Any:
            passed = list(arguments[first:])
            _before_filter(name, passed, named)
            return _checked(function(*arguments[:first], *passed, **named))

        super().__setitem__(name, checked)


# -- the environment


class _Checks(NodeTransformer):
    """Puts a check around each list, tuple and mapping that a template writes, and each sum that may be of lists."""

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        return self._around(node, node.items)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        return self._around(node, node.items) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        return self._around(node, [pair.value for pair in node.items])

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        return self.generic_visit(node) if _is_text(node) else self._around(node, [node.left, node.right])

    def _around(self, node: nodes.Expr, items: list[nodes.Expr]) -> nodes.Expr:
        is_constant = all(isinstance(item, nodes.Const) for item in items)
        self.generic_visit(node)
        return node if is_constant else nodes.Filter(node, CHECK, [], [], None, None, lineno=node.lineno)


def _is_text(node: nodes.Expr) -> bool:
    """Return whether a sum has a text in it, so that it is a text."""
    if isinstance(node, nodes.Add):
        return _is_text(node.left) or _is_text(node.right)
    return isinstance(node, nodes.Const | nodes.Concat)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers' chat templates with limits on single operations."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.binop_table |= {"*": _multiply, "**": _power, "%": _remainder}
        self.filters = _Filters(self.filters)
        dict.__setitem__(self.filters, CHECK, _checked)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Checks().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def call(__self, __context: Any, __obj: Any, *arguments: Any, **named: Any) -> Any:
        """Call a function or method of a template, as the sandbox does, if it does not make too much."""
        _check_method(__obj, arguments, named)
        return _checked(super().call(__context, __obj, *arguments, **named))
