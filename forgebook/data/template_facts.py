"""What a chat template does with tools, reasoning and the end of a text: seen once, by rendering probes with it.

facts = template_facts(tokenizer, source, lists_tools)
facts.calls.write(messages)     calls in the form that the template reads; facts.calls is None if it reads none
facts.reasoning_key             the key under which it reads reasoning, if any
facts.reads_schemas             whether it fails on a tool without a schema of parameters, which OpenAI's form allows
facts.closing                   what it prints after a text's last answer that does not belong to the answer
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from forgebook.data.content_parts import in_parts, roles_of_parts
from forgebook.data.message_parts import missing_part, missing_tool
from forgebook.data.messages import REASONING_KEYS, Message
from forgebook.data.render_limits import within_limits
from forgebook.data.special_tokens import has_end
from forgebook.data.tools import name_results
from forgebook.errors import DataError, ForgebookError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PROBED_MESSAGES", "PROBED_TOOL", "CallForm", "TemplateFacts", "apply_template", "template_facts"]

# Whether a template reads tools shows in its source. DeepSeek's read calls and no list of tools.
READS_TOOLS = re.compile(r"\{[%{][^}]*\btool(?:s|_calls)\b")

PROBED_TOOL = {
    "type": "function",
    "function": {
        "name": "probed_tool",
        "description": "probed description",
        "parameters": {"type": "object", "properties": {"probed_key": {"type": "string", "description": "d"}}},
    },
}
PROBED_ARGUMENTS = {"probed_key": "probed value"}
# Named unlike the tool in the list, or its name would be seen there.
PROBED_CALL = {"type": "function", "function": {"name": "probed_call", "arguments": PROBED_ARGUMENTS}}
PROBED_MESSAGES: list[Message] = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "", "tool_calls": [PROBED_CALL]},
    {"role": "tool", "content": "probed result", "name": "probed_tool"},
]
PROBED_ANSWER, PROBED_THOUGHT = "Xq7AnswerXq7", "Xq7ThoughtXq7"


@dataclass(frozen=True)
class CallForm:
    """The form in which a template reads tool calls.

    arguments_as_text: JSON text instead of objects, which such templates print as Python or add to a text.
    ids: a pattern for new ids of calls, where a template accepts or shows no others; None leaves those of the data.
    names_results: a result without a name gets that of the function it comes from, where a template rejects it without.
    """

    arguments_as_text: bool = False
    ids: str | None = None
    names_results: bool = False

    def write(self, messages: list[Message]) -> list[Message]:
        """Write the calls of messages in this form, and the ids and names of their results alike."""
        numbers = itertools.count()
        renamed: dict[str | None, str] = {}
        unanswered: list[str] = []
        written = []
        for message in name_results(messages) if self.names_results else messages:
            if calls := message.get("tool_calls"):
                changed = [self._call(call, next(numbers)) for call in calls]
                message = message | {"tool_calls": changed}
                if self.ids:
                    renamed |= {old.get("id"): new["id"] for old, new in zip(calls, changed, strict=True)}
                    unanswered += [call["id"] for call in changed]
            elif message["role"] == "tool" and self.ids:
                old = message.get("tool_call_id")
                new = renamed[old] if old in renamed and old is not None else next(iter(unanswered), self._id("", 0))
                unanswered = [one for one in unanswered if one != new]
                message = message | {"tool_call_id": new}
            written.append(message)
        return written

    def _call(self, call: dict[str, Any], number: int) -> dict[str, Any]:
        function = call["function"]
        if self.arguments_as_text and not isinstance(function["arguments"], str):
            function = function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}
        return call | {"function": function} | ({"id": self._id(function["name"], number)} if self.ids else {})

    def _id(self, name: str, number: int) -> str:
        return (self.ids or "").format(name=name, number=number)


# Tried in this order. Mistral accepts ids of nine letters and digits alone; Kimi K2 names the function in the id.
CALL_FORMS = [
    CallForm(as_text, ids)
    for ids, as_text in itertools.product((None, "call{number:05}", "functions.{name}:{number}"), (False, True))
]


@dataclass(frozen=True)
class TemplateFacts:
    """What is known of a template; see the head of this file."""

    calls: CallForm | None
    reasoning_key: str | None
    closing: str
    reads_schemas: bool = False

    def write_tools(self, tools: list[dict] | None) -> list[dict] | None:
        """Write a list of tools in the form that the template reads."""
        if not self.reads_schemas:
            return tools
        return [tool | {"function": tool["function"] | _schema_of(tool["function"])} for tool in tools or []]


@functools.lru_cache(maxsize=64)
def template_facts(tokenizer: PreTrainedTokenizerBase, source: str, lists_tools: bool) -> TemplateFacts:
    """Probe a tokenizer's template, of this source, for conversations that list tools or do not."""
    tools = [PROBED_TOOL] if lists_tools else None
    calls = _call_form(tokenizer, tools) if READS_TOOLS.search(source) else None
    reads_schemas = bool(tools) and _reads_schemas(tokenizer)
    return TemplateFacts(calls, _reasoning_key(tokenizer, source, tools, calls), _closing(tokenizer), reads_schemas)


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[dict] | None,
    for_generation: bool,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Render messages by the tokenizer's chat template, within limits. Raises DataError if it fails."""
    messages = in_parts(messages, _roles_of_parts(tokenizer, str(tokenizer.chat_template)))
    return _applied(tokenizer, messages, tools, for_generation, settings)


@functools.lru_cache(maxsize=64)
def _roles_of_parts(tokenizer: PreTrainedTokenizerBase, source: str) -> frozenset[str]:
    def render(messages: list[Message]) -> str:
        try:
            return _applied(tokenizer, messages, None, False, None)
        except DataError:
            return ""

    return roles_of_parts(render)


def _applied(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[dict] | None,
    for_generation: bool,
    settings: Mapping[str, Any] | None,
) -> str:
    from jinja2 import TemplateError

    try:
        apply = functools.partial(
            tokenizer.apply_chat_template, messages, tools=tools, tokenize=False, **settings or {}
        )
        return within_limits(lambda: apply(add_generation_prompt=for_generation), tokenizer.name_or_path)
    except TemplateError as error:
        raise DataError(f"the chat template rejects these messages: {error}") from None
    except ForgebookError:
        raise
    except Exception as error:  # a template is a program
        raise DataError(f"the chat template fails on these messages: {error}") from None


def _rendered(tokenizer, messages: list[Message], tools: list[dict] | None = None, prompt: bool = False) -> str:
    """Render a probe; empty if the template rejects it."""
    try:
        return apply_template(tokenizer, messages, tools, prompt)
    except DataError:
        return ""


def _call_form(tokenizer, tools: list[dict] | None) -> CallForm | None:
    """Find the first form in which the template shows the tools, a call and its result; None if it shows none."""
    texts = {form: _rendered(tokenizer, form.write(PROBED_MESSAGES), tools, True) for form in CALL_FORMS}
    if not any(texts.values()):  # what it wants is not known; examples are checked one by one
        return CALL_FORMS[0]
    shown = (form for form, text in texts.items() if text and _shows_calls(text, form, tools))
    form = next((form for form in shown if _ends_calls_once(texts[form], tokenizer.eos_token)), None)
    return form and replace(form, names_results=_needs_names(tokenizer, form, tools))


def _needs_names(tokenizer, form: CallForm, tools: list[dict] | None) -> bool:
    """Return whether the template rejects a result without the name of its function."""
    *before, result = form.write(PROBED_MESSAGES)
    return not _rendered(tokenizer, [*before, {key: result[key] for key in result if key != "name"}], tools, True)


def _ends_calls_once(text: str, eos: str | None) -> bool:
    """Return whether a call has no empty answer behind it, as R1's template prints for a content that is not null."""
    after_call = text.partition(PROBED_MESSAGES[2]["content"])[0].rpartition(next(iter(PROBED_ARGUMENTS.values())))[2]
    return not eos or after_call.count(eos) < 2


def _shows_calls(text: str, form: CallForm, tools: list[dict] | None) -> bool:
    shown = missing_tool(tools or [], text) is None
    return (
        shown
        and str(PROBED_ARGUMENTS) not in text
        and all(missing_part(m, text) is None for m in form.write(PROBED_MESSAGES))
    )


def _schema_of(function: dict[str, Any]) -> dict[str, Any]:
    """Return a function's schema under its key, with what templates read of one that takes no arguments."""
    return {"parameters": {"type": "object", "properties": {}} | (function.get("parameters") or {})}


def _reads_schemas(tokenizer) -> bool:
    """Return whether the template shows a tool without parameters only if it has an empty schema."""
    function = {"name": "probed_tool", "description": "probed description"}
    bare, filled = ({"type": "function", "function": one} for one in (function, function | _schema_of({})))
    shown, shown_filled = (_rendered(tokenizer, PROBED_MESSAGES[:1], [tool]) for tool in (bare, filled))
    return bool(shown_filled) and not shown


def _reasoning_key(tokenizer, source: str, tools: list[dict] | None, calls: CallForm | None) -> str | None:
    """Find the key of which the template shows the reasoning of an answer, or else of a call."""
    answer = {"role": "assistant", "content": PROBED_ANSWER}
    probes = [[PROBED_MESSAGES[0], answer]] + ([calls.write(PROBED_MESSAGES[:2])] if calls else [])
    keys = [key for key in REASONING_KEYS if key in source]
    for *before, last in probes:
        for key in keys:
            if PROBED_THOUGHT in _rendered(tokenizer, [*before, last | {key: PROBED_THOUGHT}], tools):
                return key
    return None


def _closing(tokenizer) -> str:
    """Find what the template prints after a text's last answer and not before a next turn: Phi 3's eos, a header."""
    messages = [PROBED_MESSAGES[0], {"role": "assistant", "content": PROBED_ANSWER}]
    alone, followed = (_rendered(tokenizer, [*messages, *more]) for more in ([], PROBED_MESSAGES[:1]))
    before, answer, rest = alone.rpartition(PROBED_ANSWER)
    if not answer or followed.startswith(alone) or not followed.startswith(before + answer):
        return ""
    pairs = zip(rest, followed[len(before + answer) :], strict=False)
    shared = "".join(one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    eos = tokenizer.eos_token
    if eos and eos in shared:  # what follows it begins the next turn
        return rest[shared.rindex(eos) + len(eos) :]
    lengths = range(len(shared), 0, -1)
    return next((rest[length:] for length in lengths if has_end(shared[:length], tokenizer)), "")
