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

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from forgebook.data.conversation import Conversation, Message, Span
from forgebook.data.special_tokens import restore
from forgebook.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from forgebook.config.blocks import PromptFormat

__all__ = ["Message", "RenderedText", "render", "render_for_training", "render_prompt", "shows_names"]

PROBED_NAME = "Xq7NameXq7"
LossOn = Literal["assistant", "last", "all"]
RewrittenTurns = Literal["refuse", "expand"]


@dataclass(frozen=True)
class RenderedText:
    """A text to tokenize.

    spans:       characters [start, end) of each assistant turn.
    in_loss:     for each span, whether its tokens are targets of the loss.
    all_in_loss: every token is a target (causal language modeling).
    images:      characters [start, end) of the tokens of each image, once they are all written.
    is_beginning: it ends before the last message, and may leave images out.
    """

    text: str
    spans: list[Span]
    in_loss: list[bool] = field(default_factory=list)
    all_in_loss: bool = False
    images: list[Span] = field(default_factory=list)
    is_beginning: bool = False


def render(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat | None = None,
    *,
    for_generation: bool = False,
    tools: list[dict] | None = None,
) -> str:
    """Render messages to text: by `prompt_format` if there is one, else by the tokenizer's chat template."""
    conversation = Conversation(messages, tools, tokenizer, prompt_format)
    return restore(conversation.render(conversation.messages, for_generation), tokenizer)


def shows_names(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template shows the `name` of a message that is no tool's result, as Kimi K2's does."""
    try:
        return PROBED_NAME in render([{"role": "user", "content": "a", "name": PROBED_NAME}], tokenizer)
    except DataError:
        return False


def render_prompt(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat | None = None,
    tools: list[dict] | None = None,
) -> RenderedText:
    """Render the conversation so far, up to where the assistant's answer begins."""
    conversation = Conversation(messages, tools, tokenizer, prompt_format)
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
    conversation = Conversation(messages, tools, tokenizer, prompt_format)
    count = len(conversation.messages)
    if loss_on == "all":
        text = conversation.through(count - 1)
        conversation.check_shown(range(count), text)
        if conversation.answers and 0 < conversation.answers[-1] == count - 1:
            text += conversation.end_after(count - 1) + conversation.closing
        return [RenderedText(text, [], all_in_loss=True)]
    targets = [k for k in conversation.answers if conversation.messages[k].get("weight") != 0]
    targets = targets[-1:] if loss_on == "last" else targets
    text, rewritten = conversation.joined(targets)
    conversation.check_context()
    if not rewritten:
        return [_with_spans(conversation, text, count, targets)]
    if rewritten_turns == "refuse":
        raise DataError(_rewriting_error(conversation, rewritten[0], text, targets))
    return [_with_spans(conversation, conversation.answered(k), k + 1, [k]) for k in targets]


def _rewriting_error(conversation: Conversation, k: int, text: str, targets: list[int]) -> str:
    """Explain what later turns do to answer k, and what to set."""
    what, other = (
        "the chat template renders this assistant turn differently once later turns follow (it may strip the thinking)",
        "generation_config.prompt_format",
    )
    if text.startswith(conversation.turn(k)):
        what = "no token ends this assistant turn when another turn follows, so the model would not learn to stop"
        if conversation.prompt_format is not None:
            other += ".assistant to a template that ends with such a token"
    setting = conversation.helpful_setting(lambda other: not other.joined(targets)[1])
    return (
        f"messages[{k}]: {what}: set rewritten_turns: expand to train each answer as the model gave it, "
        f"train_on: last to train only the last, {setting and setting + ', '}or {other}"
    )


def _with_spans(conversation: Conversation, text: str, count: int, targets: list[int]) -> RenderedText:
    """Make the text of an example, each turn in the loss with the token that ends it."""
    ends = {len(conversation.prompt(k)): conversation.end_after(k) for k in targets}
    if targets and targets[-1] == count - 1:
        text += conversation.end_after(count - 1)
    spans = []
    for start, end in conversation.answer_spans(text, count):
        token = ends.get(start, "")
        spans.append((start, end + len(token)))
    closing = conversation.closing if count - 1 in conversation.answers else ""
    is_beginning = count < len(conversation.messages)
    return RenderedText(text + closing, spans, [start in ends for start, _ in spans], is_beginning=is_beginning)
