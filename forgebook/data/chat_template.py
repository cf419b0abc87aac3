"""Messages -> the text that a model sees, and the characters [start, end) of each assistant turn in it.

    render(messages, tokenizer)                          the text, to read
    render_prompt(messages, tokenizer)                   up to where the assistant's answer begins
    render_for_training(messages, tokenizer, ...)        the text of one example, and which turns are in the loss

Spans come from rendered prefixes, never from token ids: an assistant turn begins where the prompt with its
generation header ends, so templates without `{% generation %}` tags work. `masking.py` turns texts into tokens.

Reasoning (`reasoning_content` of a message) is part of the answer. A template that knows the key renders it; for
all others it precedes the content as `<think>\\n...\\n</think>\\n\\n`.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from forgebook.data.prompt_formats import render_prompt_format
from forgebook.data.render_limits import within_limits
from forgebook.data.special_tokens import hide, map_texts, restore, without_closing_token
from forgebook.data.tools import tools_as_text, uses_tools
from forgebook.errors import DataError
from forgebook.runs import run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from forgebook.config.blocks import PromptFormat

__all__ = ["Message", "RenderedText", "render", "render_for_training", "render_prompt"]

Message = dict[str, Any]
Span = tuple[int, int]
LossOn = Literal["assistant", "last", "all"]
RewrittenTurns = Literal["refuse", "expand"]

# Whether a template reads tools or reasoning shows in its source.
READS_TOOLS = re.compile(r"\{[%{][^}]*\btools\b")
READS_REASONING = re.compile(r"reasoning_content|\.thinking\b|[\"']thinking[\"']")


@dataclass(frozen=True)
class RenderedText:
    """A text to tokenize.

    spans:       characters [start, end) of each assistant turn.
    in_loss:     for each span, whether its tokens are targets of the loss.
    all_in_loss: every token is a target (causal language modeling).
    """

    text: str
    spans: list[Span]
    in_loss: list[bool] = field(default_factory=list)
    all_in_loss: bool = False


def render(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat | None = None,
    *,
    for_generation: bool = False,
    tools: list[dict] | None = None,
) -> str:
    """Render messages to text: by `prompt_format` if there is one, else by the tokenizer's chat template."""
    conversation = _Conversation(messages, tools, tokenizer, prompt_format)
    return restore(conversation.render(conversation.messages, for_generation), tokenizer)


def render_prompt(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat | None = None,
    tools: list[dict] | None = None,
) -> RenderedText:
    """Render the conversation so far, up to where the assistant's answer begins."""
    conversation = _Conversation(messages, tools, tokenizer, prompt_format)
    count = len(conversation.messages)  # not of `messages`: tools written as text may add one or join some
    text = conversation.prompt(count)
    return RenderedText(text, conversation.answer_spans(text, count))


def render_for_training(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat | None = None,
    tools: list[dict] | None = None,
    *,
    loss_on: LossOn = "assistant",
    rewritten_turns: RewrittenTurns = "refuse",
) -> list[RenderedText]:
    """Render an example and find its assistant turns.

    loss_on:         as of `masking.encode`.
    rewritten_turns: "expand" returns one text per answer where the template renders an earlier answer differently
                     once later turns follow; "refuse" raises DataError.
    """
    if prompt_format is not None and prompt_format.system_in_last_user and loss_on != "all":
        # Moving the system text into the last user turn is for inference alone: in training it would move
        # with every turn.
        prompt_format = prompt_format.model_copy(update={"system_in_last_user": False})
    conversation = _Conversation(messages, tools, tokenizer, prompt_format)
    count = len(conversation.messages)
    text = conversation.through(count - 1)
    _check_tool_calls(conversation, text)
    if loss_on == "all":
        return [RenderedText(text, [], all_in_loss=True)]
    targets = [k for k in conversation.answers if conversation.messages[k].get("weight") != 0]
    targets = targets[-1:] if loss_on == "last" else targets
    for k in targets:
        _check_answer(conversation, k)
    rewritten = [k for k in targets if not text.startswith(conversation.turn(k, text))]
    if not rewritten:
        return [_with_spans(conversation, text, count, targets)]
    if rewritten_turns == "refuse":
        raise DataError(
            f"messages[{rewritten[0]}]: the chat template renders this assistant turn differently once later turns "
            "follow (it may strip the thinking): set rewritten_turns: expand to train each answer as the model gave "
            "it, train_on: last to train only the last, or generation_config.prompt_format"
        )
    return [_with_spans(conversation, conversation.through(k), k + 1, [k]) for k in targets]


class _Conversation:
    """A conversation ready for its template: tools and reasoning in the form that the template reads."""

    def __init__(
        self,
        messages: list[Message],
        tools: list[dict] | None,
        tokenizer: PreTrainedTokenizerBase,
        prompt_format: PromptFormat | None,
    ):
        self.tokenizer, self.prompt_format = tokenizer, prompt_format
        source = _template_source(tokenizer, tools) if prompt_format is None else ""
        self.called = [call["function"]["name"] for m in messages for call in m.get("tool_calls") or []]
        if uses_tools(messages, tools) and not READS_TOOLS.search(source):
            messages, tools = tools_as_text(messages, tools), None
        if not READS_REASONING.search(source):
            messages = [_reasoning_in_content(message) for message in messages]
        hidden = functools.partial(hide, tokenizer=tokenizer)
        self.messages: list[Message] = [map_texts(message, hidden) for message in messages]
        self.tools: list[dict] | None = map_texts(tools, hidden)
        self.answers = [k for k, message in enumerate(self.messages) if message["role"] == "assistant"]
        self._rendered: dict[tuple[int, bool], str] = {}

    def prompt(self, k: int) -> str:
        """Render what the model reads before it writes message k."""
        return self._render_first(k, for_generation=True)

    def through(self, k: int) -> str:
        """Render the conversation up to message k, inclusive."""
        return self._render_first(k + 1, for_generation=False)

    def turn(self, k: int, text: str) -> str:
        """Render up to message k as `text` continues: without a token that only ends a text (Phi-3's eos)."""
        through = self.through(k)
        if text.startswith(through):
            return through
        open_ended = without_closing_token(through, self.tokenizer)
        continues = len(open_ended) > len(self.prompt(k)) and text.startswith(open_ended)
        return open_ended if continues else through

    def _render_first(self, count: int, for_generation: bool) -> str:
        key = count, for_generation
        if key not in self._rendered:
            self._rendered[key] = self.render(self.messages[:count], for_generation)
        return self._rendered[key]

    def render(self, messages: list[Message], for_generation: bool = False) -> str:
        """Render some of the conversation's messages; special tokens inside messages are private characters."""
        if self.prompt_format is not None:
            return render_prompt_format(messages, self.prompt_format, for_generation)
        if not messages:
            raise DataError(
                "the conversation begins with an assistant turn, but chat templates need a message before it"
            )
        from jinja2 import TemplateError

        try:
            apply = functools.partial(self.tokenizer.apply_chat_template, messages, tools=self.tools, tokenize=False)
            return within_limits(lambda: apply(add_generation_prompt=for_generation), self.tokenizer.name_or_path)
        except TemplateError as error:
            raise DataError(f"the chat template rejects these messages: {error}") from None
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise DataError(f"the chat template fails on these messages: {error}") from None

    def answer_spans(self, text: str, count: int) -> list[Span]:
        """Find the characters [start, end) of each answer among the first `count` messages of a text.

        An answer that the text renders differently than when it was given has an empty span, where it begins.
        """
        spans = []
        for k in [k for k in self.answers if k < count]:
            prompt = self.prompt(k)
            if text.startswith(prompt) and len(prompt) < len(text):
                turn = self.turn(k, text)
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


def _reasoning_in_content(message: Message) -> Message:
    if message.get("reasoning_content") is None:
        return message
    others = {key: value for key, value in message.items() if key != "reasoning_content"}
    return others | {"content": f"<think>\n{message['reasoning_content']}\n</think>\n\n{message['content']}"}


def _with_spans(conversation: _Conversation, text: str, count: int, targets: list[int]) -> RenderedText:
    starts = {len(conversation.prompt(k)) for k in targets}
    spans = conversation.answer_spans(text, count)
    return RenderedText(text, spans, [start in starts for start, _ in spans])


def _check_tool_calls(conversation: _Conversation, text: str) -> None:
    missing = [name for name in conversation.called if name not in text]
    if missing:
        raise DataError(
            f"the chat template leaves out the call of {missing[0]!r}: set generation_config.prompt_format, which "
            "writes tools as text"
        )


def _check_answer(conversation: _Conversation, k: int) -> None:
    """Raise DataError unless an answer continues its prompt and contains all that the message says."""
    prompt, through, message = conversation.prompt(k), conversation.through(k), conversation.messages[k]
    if not through.startswith(prompt):
        raise DataError(
            f"messages[{k}]: the chat template does not continue its own generation prompt with this assistant "
            "turn, so no prompt would lead to it: set generation_config.prompt_format"
        )
    for key in ("reasoning_content", "content"):
        content = (message.get(key) or "").strip()
        # A template that parses thinking out of the content may put other white space around it.
        if content not in through[len(prompt) :] and "</think>" not in content:
            raise DataError(
                f"messages[{k}].{key}: the chat template does not render it unchanged, so it would not be in the "
                "loss: set generation_config.prompt_format"
            )
