"""LLMForge's prompt formats: a template for each role, filled with the content of each message."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from forgebook.config.blocks import PromptFormat
from forgebook.data.messages import Message
from forgebook.errors import DataError

__all__ = ["as_chat_template", "read_prompt_format", "render_prompt_format"]


def read_prompt_format(folder: str | Path) -> PromptFormat | None:
    """Read the prompt format that a checkpoint or model was trained with; None if it uses its chat template."""
    path = Path(folder) / "prompt_format.yaml"
    return PromptFormat(**yaml.safe_load(path.read_text())) if path.exists() else None


def render_prompt_format(messages: list[Message], fmt: PromptFormat, for_generation: bool) -> str:
    """Render by a prompt format: bos, then each message in its role's template.

    Raises DataError for a second system message.
    """
    system, turns = _split_system(messages, fmt)
    rendered = []
    if system is not None and not fmt.system_in_user:
        rendered.append(_fill(fmt.system, instruction=system))
    in_user = _fill(fmt.system, instruction=system) if system is not None and fmt.system_in_user else ""
    users = [k for k, message in enumerate(turns) if message["role"] == "user"]
    carrier = users[-1 if fmt.system_in_last_user and for_generation else 0] if users else None
    for k, message in enumerate(turns):
        content = message["content"].strip() if fmt.strip_whitespace else message["content"]
        if message["role"] == "user":
            rendered.append(_fill(fmt.user, instruction=content, system=in_user if k == carrier else ""))
        else:
            rendered.append(_fill(fmt.assistant, instruction=content))
    return fmt.bos + "".join(rendered) + (fmt.trailing_assistant if for_generation else "")


def _fill(template: str, **values: str) -> str:
    """Fill {instruction} and {system} in one pass; other braces (JSON, code) stay text."""
    return re.sub(r"\{(instruction|system)\}", lambda match: values.get(match[1], ""), template)


def _split_system(messages: list[Message], fmt: PromptFormat) -> tuple[str | None, list[Message]]:
    """Separate the system message from the turns; fall back on the format's default."""
    systems = [message["content"] for message in messages if message["role"] == "system"]
    if len(systems) > 1:
        raise DataError(f"there are {len(systems)} system messages; expected one at most")
    system = systems[0] if systems else fmt.default_system_message
    if fmt.strip_whitespace:
        system = system.strip()
    if not system and not fmt.add_system_tags_even_if_message_is_empty:
        system = None
    return system, [message for message in messages if message["role"] != "system"]


# As a chat template -----------------------------------------------------------------------------------


def as_chat_template(fmt: PromptFormat) -> str:
    """Write a prompt format as a Jinja chat template, for servers that read nothing else.

    It renders what `render_prompt_format` does, and raises an error for conversations with tools, which this project
    writes as text before they are rendered.
    """
    trim = " | trim" if fmt.strip_whitespace else ""
    has_system = "true" if fmt.add_system_tags_even_if_message_is_empty else "system"
    in_system = _expression(fmt.system, instruction="system") if fmt.system_in_user else '""'
    last = "add_generation_prompt" if fmt.system_in_last_user else "false"
    statements = [
        '{%- if messages and messages[0].role == "system" -%}',
        f"{{%- set system = messages[0].content{trim} -%}}{{%- set turns = messages[1:] -%}}",
        "{%- else -%}",
        f"{{%- set system = {_literal(fmt.default_system_message)}{trim} -%}}{{%- set turns = messages -%}}",
        "{%- endif -%}",
        "{%- set carrier = namespace(at=-1) -%}",
        "{%- for message in turns -%}",
        '{%- if tools or message.tool_calls or message.role not in ["user", "assistant"] -%}',
        '{{- raise_exception("this prompt format takes one system message, users and assistants, and no tools") -}}',
        "{%- endif -%}",
        f'{{%- if message.role == "user" and (carrier.at < 0 or {last}) -%}}',
        "{%- set carrier.at = loop.index0 -%}",
        "{%- endif -%}",
        "{%- endfor -%}",
        f"{{{{- {_literal(fmt.bos)} -}}}}",
    ]
    if not fmt.system_in_user:
        written = _expression(fmt.system, instruction="system")
        statements.append(f"{{%- if {has_system} -%}}{{{{- {written} -}}}}{{%- endif -%}}")
    statements += [
        "{%- for message in turns -%}",
        f"{{%- set content = message.content{trim} -%}}",
        f'{{%- set in_user = ({in_system}) if loop.index0 == carrier.at and {has_system} else "" -%}}',
        '{%- if message.role == "user" -%}',
        f"{{{{- {_expression(fmt.user, instruction='content', system='in_user')} -}}}}",
        "{%- else -%}",
        f"{{{{- {_expression(fmt.assistant, instruction='content')} -}}}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{{{{- {_literal(fmt.trailing_assistant)} -}}}}{{%- endif -%}}",
    ]
    return "\n".join(statements)


def _expression(template: str, **names: str) -> str:
    """Write a role's template as a Jinja expression over variables."""
    parts = re.split(r"\{(instruction|system)\}", template)
    texts = [_literal(text) for text in parts[::2]]
    variables = [names.get(name, '""') for name in parts[1::2]]
    return " ~ ".join([texts[0], *(part for pair in zip(variables, texts[1:], strict=True) for part in pair)])


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
