"""LLMForge's prompt formats: a template for each role, filled with the content of each message."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from helpers.errors import DataError

if TYPE_CHECKING:
    from helpers.config import PromptFormat

__all__ = ["render_prompt_format"]

Message = dict[str, Any]


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
    """Put values into {instruction} and {system} in one pass; other braces (JSON, code) stay text."""
    return re.sub(r"\{(instruction|system)\}", lambda match: values.get(match[1], ""), template)


def _split_system(messages: list[Message], fmt: PromptFormat) -> tuple[str | None, list[Message]]:
    """Take the system message out of the turns; fall back on the format's default."""
    systems = [message["content"] for message in messages if message["role"] == "system"]
    if len(systems) > 1:
        raise DataError("only one system message can be given, got " + str(len(systems)))
    system = systems[0] if systems else fmt.default_system_message
    if fmt.strip_whitespace:
        system = system.strip()
    if not system and not fmt.add_system_tags_even_if_message_is_empty:
        system = None
    return system, [message for message in messages if message["role"] != "system"]
