"""What a synthetic example must satisfy, checked in code: a JSON schema, the right final answer, a function of yours.

constraints = make_constraints(config.synthesis)
constraints.problem(messages, reference)       None, or why the example is rejected
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema

from forgebook.config.curation_blocks import SynthesisConfig
from forgebook.data.json_values import parse_json
from forgebook.data.messages import Message
from forgebook.errors import ConfigError, DataError, first_line, shown_value

__all__ = ["Constraints", "make_constraints"]

Verifier = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Constraints:
    """The checks of a config. name: of the verifier, for messages."""

    schema: jsonschema.protocols.Validator | None = None
    final_answer: re.Pattern[str] | None = None
    verifier: Verifier | None = None
    name: str = ""

    def problem(self, messages: list[Message], reference: str | None = None) -> str | None:
        """Say why an example is rejected. reference: the right answer, where it is known."""
        answer = str(messages[-1].get("content") or "")
        return (
            self._schema_problem(answer)
            or self._answer_problem(answer, reference)
            or self._verifier_problem({"messages": messages})
        )

    def _schema_problem(self, answer: str) -> str | None:
        if self.schema is None:
            return None
        try:
            value = parse_json(answer)
        except DataError:
            return "json_schema: the answer is no JSON"
        error = next(iter(self.schema.iter_errors(value)), None)
        return f"json_schema: {error.json_path}: {error.message[:200]}" if error else None

    def _answer_problem(self, answer: str, reference: str | None) -> str | None:
        if self.final_answer is None:
            return None
        got, right = self.last_answer(answer), self.last_answer(reference or "")
        if got is None:
            return "exact_match: no final answer"
        return None if got == right else f"exact_match: {got!r} instead of {right!r}"

    def last_answer(self, text: str) -> str | None:
        """Return the last final answer in a text, without the spaces around it."""
        matches = list(self.final_answer.finditer(text)) if self.final_answer else []
        return (matches[-1][matches[-1].re.groups] or "").strip() if matches else None

    def _verifier_problem(self, row: dict[str, Any]) -> str | None:
        if self.verifier is None:
            return None
        try:
            verdict = self.verifier(json.loads(json.dumps(row)))  # a copy, which it may change
        except Exception as error:
            kind = type(error).__name__
            raise ConfigError(
                f"synthesis.verifier: {self.name} raised {kind}: {first_line(error)}. Return false, or a text with the "
                "reason, to reject an example"
            ) from error
        if isinstance(verdict, str):
            return f"verifier: {verdict[:200]}"
        if not isinstance(verdict, bool):
            raise ConfigError(
                f"synthesis.verifier: {self.name} returned {shown_value(verdict)}, must be true, false or a text"
            )
        return None if verdict else "verifier: false"


def make_constraints(settings: SynthesisConfig) -> Constraints:
    """Make the checks of a config. Raises ConfigError for a schema or a verifier that cannot be used."""
    schema = None
    if settings.json_schema is not None:
        kind = jsonschema.validators.validator_for(settings.json_schema, jsonschema.Draft202012Validator)
        try:
            kind.check_schema(settings.json_schema)
        except jsonschema.SchemaError as error:
            raise ConfigError(f"synthesis.json_schema: {error.json_path}: {error.message}") from None
        schema = kind(settings.json_schema)
    final_answer = re.compile(settings.exact_match, re.DOTALL) if settings.exact_match is not None else None
    verifier = _load_verifier(settings.verifier) if settings.verifier is not None else None
    return Constraints(schema, final_answer, verifier, settings.verifier or "")


def _load_verifier(written: str) -> Verifier:
    """Import FILE.py:NAME: code of the user's, as the config names it."""
    file, _, name = written.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"synthesis.verifier: {path} does not exist (looked from {Path.cwd()})")
    spec = importlib.util.spec_from_file_location(f"verifier_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a .py file
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"synthesis.verifier: {path} raised {type(error).__name__}: {first_line(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"synthesis.verifier: {path} has no function {name}")
    return function
