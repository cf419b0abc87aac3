"""A conversation as its chat template renders it: prompts, and the answers that continue them with nothing lost.

    conversation = Conversation(messages, tools, tokenizer, prompt_format)
    conversation.prompt(k)         what the model reads before it writes message k
    conversation.answered(k)       the prompt and answer k

An answer continues its generation prompt and holds all that its message says. Where the template's own text does not,
the answer is the generation prompt and what the message adds to it, with a thought that the template would cut out of
the content; else the example is rejected with the reason.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from forgebook.data.generation_prompt import (
    added_to_prompt,
    begins_with_empty_thought,
    closes_thought,
    fill_thought,
    opened_thought,
)
from forgebook.data.images import IMAGES
from forgebook.data.message_parts import follows_call, missing_part, missing_tool
from forgebook.data.messages import REASONING_KEYS, Message, split_thought
from forgebook.data.prompt_formats import render_prompt_format
from forgebook.data.special_tokens import has_end, hide, leading_token, map_texts
from forgebook.data.template_facts import TemplateFacts, apply_template, template_facts
from forgebook.data.tools import tools_as_text, uses_tools
from forgebook.errors import DataError
from forgebook.models.template_settings import template_defaults, template_variables
from forgebook.runs import run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from forgebook.config.blocks import PromptFormat

__all__ = ["Conversation", "Message", "Span"]

Span = tuple[int, int]

# Stand-ins inside messages: the end of one message, the beginning of the next one's content, the tags of a thought. The
# tags are private characters that no message may contain.
PROBED_RESULT = {"name": "probed_tool", "tool_call_id": "call00000"}
END_MARK, CONTENT_MARK = "Xq7EndOfMessageXq7", "Xq7ContentXq7"
HIDDEN_TAGS = {"<think>": "\U000ffff0", "</think>": "\U000ffff1"}
NO_TEMPLATE = TemplateFacts(None, None, "")
OTHER_FORMAT = "set generation_config.prompt_format"


class Conversation:
    """A conversation ready for its template: tools and reasoning in the form that the template reads."""

    def __init__(
        self,
        messages: list[Message],
        tools: list[dict] | None,
        tokenizer: PreTrainedTokenizerBase,
        prompt_format: PromptFormat | None,
        settings: Mapping[str, bool] | None = None,
    ):
        self.tokenizer, self.prompt_format, self.settings = tokenizer, prompt_format, settings or {}
        self.written = messages, tools
        # A content says where its images stand; which images these are is nothing for the template.
        messages = [{key: value for key, value in one.items() if key != IMAGES} for one in messages]
        self.source = source = _template_source(tokenizer, tools) if prompt_format is None else ""
        facts = template_facts(tokenizer, source, bool(tools)) if source else NO_TEMPLATE
        self.closing = facts.closing
        if uses_tools(messages, tools):
            if facts.calls is None:
                messages, tools = tools_as_text(messages, tools), None
            else:
                messages, tools = facts.calls.write(messages), facts.write_tools(tools)
        messages = [_with_reasoning(message, facts.reasoning_key) for message in messages]
        hidden = functools.partial(hide, tokenizer=tokenizer)
        self.messages: list[Message] = [map_texts(message, hidden) for message in messages]
        self.tools: list[dict] | None = map_texts(tools, hidden)
        self.answers = [k for k, message in enumerate(self.messages) if message["role"] == "assistant"]
        self._rendered: dict[tuple[int, bool], str] = {}
        self._answered: dict[int, str] = {}

    def prompt(self, k: int) -> str:
        """Render what the model reads before it writes message k."""
        return self._render_first(k, for_generation=True)

    def through(self, k: int) -> str:
        """Render the conversation up to message k, inclusive."""
        return self._render_first(k + 1, for_generation=False)

    def answered(self, k: int) -> str:
        """Render up to answer k as it continues its prompt, with all that the message says.

        Raises DataError if the template renders it in no such way.
        """
        if k not in self._answered:
            text = next((text for text in self._possible_answers(k) if self._lacks(k, text) is None), None)
            if text is None:
                raise DataError(f"messages[{k}]{self._reason_against(k)}")
            self._answered[k] = text
        return self._answered[k]

    def end_after(self, k: int) -> str:
        """Return what ends answer k, where its own text has no token that does; empty where it has one.

        That is the token with which the next turn begins (GLM 4.5), else the tokenizer's EOS. Raises DataError if
        there is none.
        """
        turn = self.turn(k)[len(self.prompt(k)) :]
        has_own_text = self.prompt_format is not None and not self.prompt_format.assistant.rstrip().endswith(
            "{instruction}"
        )
        if has_own_text or has_end(turn, self.tokenizer):
            return ""
        calls = self.messages[k].get("tool_calls")
        follows = {"role": "tool", "content": "a", **PROBED_RESULT} if calls else {"role": "user", "content": "a"}
        with contextlib.suppress(DataError):
            # Without thoughts, which many templates do not show once a question follows.
            turns = [_without_thought(m) if m["role"] == "assistant" else m for m in self.messages[: k + 1]]
            through, later = self._unclosed(turns), self._unclosed([*turns, follows])
            token = leading_token(later.removeprefix(through), self.tokenizer) if later.startswith(through) else ""
            if has_end(token, self.tokenizer):
                return token
        if self.tokenizer.eos_token is None:
            raise DataError(
                f"messages[{k}]: no token ends this assistant turn, so the model would not stop: {OTHER_FORMAT}"
            )
        return self.tokenizer.eos_token

    def is_plain(self, k: int) -> bool:
        """Return whether answer k can be trained and begins outside of a thought."""
        return not opened_thought(self.prompt(k)) and bool(self.answered(k))

    def joined(self, targets: list[int]) -> tuple[str, list[int]]:
        """Render the conversation; also list the targets that it renders differently than when they were given.

        One with no end of its own, which the next turn does not give it, is one of them.
        """
        answered = [self.answered(k) for k in targets]
        last = len(self.messages) - 1
        text = answered[-1] if last in targets else self.through(last)
        turns = {k: self.turn(k) + (self.end_after(k) if k != last else "") for k in targets}
        return text, [k for k, turn in turns.items() if not text.startswith(turn)]

    def helpful_setting(self, helps: Callable[[Conversation], bool]) -> str:
        """Name a setting of this very template with which something holds, first another value of one that is set.

        Returns an empty text if there is none.
        """
        if self.settings or self.prompt_format is not None:
            return ""
        is_set = template_defaults(self.source)
        for name in sorted(template_variables(self.source), key=lambda name: (name not in is_set, name)):
            for value in (False, True):
                with contextlib.suppress(DataError):
                    if helps(Conversation(*self.written, self.tokenizer, None, {name: value})):
                        return f"generation_config.chat_template_kwargs: {{{name}: {str(value).lower()}}}"
        return ""

    def turn(self, k: int) -> str:
        """Render up to message k: as `answered` did, if it was called."""
        return self._answered.get(k) or self.through(k)

    def check_context(self) -> None:
        """Raise DataError unless the tools and all messages but the answers in the loss are shown."""
        before, start = "", 0
        for k in [*self.answers, len(self.messages)]:
            if start < k:
                text = self.prompt(k) if k < len(self.messages) else self.through(k - 1)
                if self.tools and start == 0 and (path := missing_tool(self.tools, text)):
                    raise DataError(f"{path}: the chat template does not show it: {OTHER_FORMAT}")
                self.check_shown(range(start, k), text[len(before) :] if text.startswith(before) else text)
            if k < len(self.messages):
                before, start = self.through(k), k + 1
                if self._answered.get(k) == before:  # checked whole
                    continue
                # Thoughts of earlier turns are not shown by many templates.
                shown = before.removeprefix(self.prompt(k))
                others = {key: value for key, value in self.messages[k].items() if key not in REASONING_KEYS}
                self._check_shown(k, others | {"content": split_thought(others["content"])[1]}, shown)

    def check_shown(self, numbers: Iterable[int], text: str) -> None:
        """Raise DataError unless all of some messages is in a text."""
        for k in numbers:
            self._check_shown(k, self.messages[k], text)

    def _check_shown(self, k: int, message: Message, text: str) -> None:
        if path := missing_part(message, text):
            if message["role"] == "system" and self.written[1] and self.tools is None:
                shown = "the chat template shows no system message, in which they are written as text"
                raise DataError(f"tools: {shown}: {OTHER_FORMAT}")
            raise DataError(f"messages[{k}].{self._described(k, path)}: {OTHER_FORMAT}")

    def _described(self, k: int, path: str) -> str:
        """Describe a part of a message that is not in the text."""
        if not path.startswith("tool_calls"):
            return f"{path}: the chat template does not show it unchanged"
        name = self.messages[k]["tool_calls"][int(path[11 : path.index("]")])]["function"]["name"]
        return f"{path}: the chat template leaves out the call of {name!r} or a part of it"

    def _lacks(self, k: int, text: str) -> str | None:
        """Name what an answer lacks in a text; an empty name if the text does not continue the answer's prompt."""
        prompt = self.prompt(k)
        if not text.startswith(prompt):
            return ""
        turn, thought = text[len(prompt) :], _thought_of(self.messages[k])[0]
        if thought and (begins_with_empty_thought(turn) or follows_call(thought, self.messages[k], turn)):
            return "reasoning"
        return missing_part(self.messages[k], turn)

    def _possible_answers(self, k: int) -> Iterator[str]:
        """Yield ways to render up to answer k: the template's own text, then what the message adds to the prompt."""
        prompt, message = self.prompt(k), self.messages[k]
        reasoning, rest = _thought_of(message)
        if self.prompt_format is None and reasoning and closes_thought(prompt):
            return
        yield self.through(k)
        if self.prompt_format is not None:
            return
        silent = _without_thought(message)
        forms = [message]
        if reasoning:
            forms.append(silent | {"content": _with_hidden_tags(_thought_as_text(reasoning, rest))})
            yield _with_shown_tags(self._unclosed([*self.messages[:k], forms[-1]]))
        elif opened_thought(prompt) and (setting := self.helpful_setting(lambda other: other.is_plain(k))):
            raise DataError(
                f"messages[{k}]: the generation prompt of the chat template opens a thought, and this turn has no "
                f"reasoning: set {setting}, or add reasoning_content"
            )
        # The turn alone, since templates may render what precedes an answer differently once it is there.
        before = [
            *self.messages[: k - 1],
            self.messages[k - 1] | {"content": self.messages[k - 1]["content"] + END_MARK},
        ]
        begin = self._after_mark(before, for_generation=True)
        turns = [self._after_mark([*before, form]) for form in forms]
        yield from (prompt + turn[len(begin) :] for turn in turns if turn.startswith(begin))
        header = self._after_mark([*before, silent | {"content": CONTENT_MARK}]).partition(CONTENT_MARK)[0]
        added = added_to_prompt(begin, header, self._after_mark([*before, silent]), reasoning)
        yield prompt + fill_thought(added, reasoning)
        yield prompt + added
        if reasoning and not opened_thought(prompt):  # templates may write contents, and thoughts in them, after calls
            yield prompt + _thought_as_text(reasoning, added)

    def _after_mark(self, messages: list[Message], for_generation: bool = False) -> str:
        """Render messages; return what follows the one whose end is marked."""
        text = self._unclosed(messages, for_generation)
        return _with_shown_tags(text.rpartition(END_MARK)[2])

    def _reason_against(self, k: int) -> str:
        """Explain why answer k cannot be trained, and what to set."""
        prompt, through = self.prompt(k), self.through(k)
        setting = self.helpful_setting(lambda other: bool(other.answered(k)))
        fix = f"set {setting}" if setting else OTHER_FORMAT
        if _thought_of(self.messages[k])[0] and closes_thought(prompt):
            return f": it has reasoning, but the generation prompt of the chat template closes the thought: {fix}"
        if path := missing_part(self.messages[k], through.removeprefix(prompt)):
            if path.startswith("tool_calls") and not path.startswith("tool_calls[0]"):
                fix = f"give each call a turn of its own, or {fix}"
            return f".{self._described(k, path)}: {fix}"
        return (
            ": the chat template does not continue its own generation prompt with this assistant turn, so no prompt "
            f"would lead to it: {fix}"
        )

    def _render_first(self, count: int, for_generation: bool) -> str:
        key = count, for_generation
        if key not in self._rendered:
            self._rendered[key] = self._unclosed(self.messages[:count], for_generation)
        return self._rendered[key]

    def render(self, messages: list[Message], for_generation: bool = False) -> str:
        """Render some of the conversation's messages; special tokens inside messages are private characters."""
        if self.prompt_format is not None:
            return render_prompt_format(messages, self.prompt_format, for_generation)
        if not messages:
            raise DataError(
                "the conversation begins with an assistant turn, but chat templates need a message before it"
            )
        return apply_template(self.tokenizer, messages, self.tools, for_generation, self.settings)

    def _unclosed(self, messages: list[Message], for_generation: bool = False) -> str:
        """Render messages without what the template prints after the last turn's own end."""
        text = self.render(messages, for_generation)
        return text if for_generation else text.removesuffix(self.closing)

    def answer_spans(self, text: str, count: int) -> list[Span]:
        """Find the characters [start, end) of each answer among the first `count` messages of a text.

        An answer that the text renders differently than when it was given has an empty span, where it begins.
        """
        spans = []
        for k in [k for k in self.answers if k < count]:
            prompt = self.prompt(k)
            if text.startswith(prompt) and len(prompt) < len(text):
                turn = self.turn(k)
                end = len(turn) if text.startswith(turn) else len(prompt)
                spans.append((len(prompt), max(len(prompt), end)))
        return spans


def _template_source(tokenizer: PreTrainedTokenizerBase, tools: list[dict] | None) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"the tokenizer of {run.display_path(Path(tokenizer.name_or_path))!r} has no chat template: "
            "set generation_config.prompt_format in the config"
        )
    return tokenizer.get_chat_template(None, tools)


def _with_reasoning(message: Message, key: str | None) -> Message:
    """Write an assistant's reasoning under the key that the template reads, or into the content."""
    others = {name: value for name, value in message.items() if name != "reasoning_content"}
    reasoning = message.get("reasoning_content") or ""
    if message["role"] != "assistant" or not reasoning.strip():
        return others
    return others | ({key: reasoning} if key else {"content": _thought_as_text(reasoning, message["content"])})


def _thought_of(message: Message) -> tuple[str, str]:
    """Return an answer's reasoning, from its own key or from the content, and the rest of the content."""
    separate = next((message[key] for key in REASONING_KEYS if message.get(key)), "")
    return (separate, message["content"]) if separate else split_thought(message["content"])


def _without_thought(message: Message) -> Message:
    others = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    return others | {"content": _thought_of(message)[1]}


def _thought_as_text(reasoning: str, content: str) -> str:
    return f"<think>\n{reasoning}\n</think>\n\n{content}"


def _with_hidden_tags(text: str) -> str:
    for tag, character in HIDDEN_TAGS.items():
        text = text.replace(tag, character)
    return text


def _with_shown_tags(text: str) -> str:
    for tag, character in HIDDEN_TAGS.items():
        text = text.replace(character, tag)
    return text
