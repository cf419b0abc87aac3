"""Settings that a chat template reads as variables: enable_thinking, reasoning_effort, ...

A setting becomes a default of the template itself, and so reaches everything that renders it: training, preview,
generation and serving here, and every program that loads the checkpoint's chat_template.jinja.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from forgebook.errors import ConfigError, first_line, near_miss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["set_template_defaults", "template_defaults", "template_variables"]

KEY = "generation_config.chat_template_kwargs"
# What every template is called with.
ARGUMENTS = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
DEFAULT = "{{%- if {0} is not defined -%}}{{%- set {0} = {1} -%}}{{%- endif -%}}"
DEFAULTS = re.compile(r"\{%- if (\w+) is not defined -%\}\{%- set \1 = ")


def set_template_defaults(tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]) -> None:
    """Make settings the defaults of a tokenizer's chat template. Raises ConfigError for one that it does not read."""
    if not settings:
        return
    templates = tokenizer.chat_template
    if not templates:
        raise ConfigError(f"{KEY}: {tokenizer.name_or_path!r} has no chat template that could read it: remove it")
    sources = templates if isinstance(templates, dict) else {"default": templates}
    known = sorted(set().union(*map(template_variables, sources.values())))
    for name in settings:
        if name not in known:
            listed = f"it reads {', '.join(known)}" if known else "it reads none"
            raise ConfigError(
                f"{KEY}: the chat template of {tokenizer.name_or_path!r} reads no {name!r}"
                f"{near_miss(name, known)}; {listed}"
            )
    header = "".join(DEFAULT.format(name, _literal(value)) for name, value in settings.items())
    changed = {name: f"{header}\n{source}" for name, source in sources.items()}
    tokenizer.chat_template = changed if isinstance(templates, dict) else changed["default"]


def template_variables(source: str) -> set[str]:
    """List the variables that a chat template reads beside messages and tools. Raises ConfigError if it is invalid."""
    from jinja2 import TemplateError, meta
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        environment = _compile_jinja_template(source).environment
        read = meta.find_undeclared_variables(environment.parse(source))
    except TemplateError as error:
        raise ConfigError(f"the chat template is not valid: {first_line(error)}") from None
    return {name for name in read - set(environment.globals) - ARGUMENTS if not name.endswith("_token")}


def template_defaults(source: str) -> set[str]:
    """List the variables for which a chat template has a default from `set_template_defaults`."""
    return set(DEFAULTS.findall(source))


def _literal(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
