"""Contents as lists of parts: for messages with images, and for templates that read no plain text.

Most templates of models that read images take a text or a list; SmolVLM's takes lists alone, Pixtral's takes lists of a
user alone. What a template takes is seen by rendering each role with both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from forgebook.data.images import IMAGE

__all__ = ["in_parts", "roles_of_parts"]

Message = dict[str, Any]

# What a template that expects a text makes of a list.
PRINTED = "{'type':"
PROBES = {role: f"Xq7{role.title()}Xq7" for role in ("system", "user", "assistant")}


def in_parts(messages: list[Message], roles: Collection[str]) -> list[Message]:
    """Write contents that have images, and those of some roles, as lists of parts."""
    if not roles and not any(IMAGE in (message.get("content") or "") for message in messages):
        return messages
    return [_in_parts(message, roles) for message in messages]


def _in_parts(message: Message, roles: Collection[str]) -> Message:
    content = message.get("content") or ""
    if not content or not (IMAGE in content or message["role"] in roles):
        return message
    parts: list[dict[str, str]] = []
    for number, text in enumerate(content.split(IMAGE)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": text}] if text else []
    return message | {"content": parts}


def roles_of_parts(render: Callable[[list[Message]], str]) -> frozenset[str]:
    """List the roles whose contents a template shows only as parts. render: empty where the template fails."""
    system, user, answer = ({"role": role, "content": text} for role, text in PROBES.items())
    for whole in ([system, user, answer], [user, answer]):
        text = render(whole)
        if all(message["content"] in text for message in whole):
            return frozenset()
    roles = set[str]()
    for messages in ([user], [user, answer], [system, user]):
        for probed in messages:
            role, text = probed["role"], probed["content"]
            if role in roles or text in render(in_parts(messages, roles)):
                continue
            shown = render(in_parts(messages, roles | {role}))
            if text in shown and PRINTED not in shown:
                roles.add(role)
    return frozenset(roles)
