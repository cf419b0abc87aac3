"""Messages -> token ids, and which of them are trained. The only place that renders and masks.

Training, evaluation, generation and serving call the same two functions, so what a model is asked later is,
token for token, the prefix of what it was trained on:

    encode(messages, tokenizer)          -> Encoded(input_ids, trained)     a training row
    encode_prompt(messages, tokenizer)   -> [int, ...]                      the same row up to the answer

Masks come from rendered prefixes, never from token ids: an assistant turn begins where the prompt with its
generation header ends, so templates without `{% generation %}` tags work, and a pad token equal to the
end-of-turn token masks nothing.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from helpers.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from helpers.config import PromptFormat

__all__ = ["Encoded", "Message", "encode", "encode_prompt", "encode_text", "render"]

Message = dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """One row as the model sees it.

    input_ids: [tokens] ids.
    trained:   [tokens] True where the token is a target of the loss.
    """

    input_ids: list[int]
    trained: list[bool]


def render(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat | None = None,
    *,
    for_generation: bool = False,
    tools: list[dict] | None = None,
) -> str:
    """Render messages to text: by `prompt_format` if one is given, else by the tokenizer's chat template."""
    if prompt_format is not None:
        return _render_prompt_format(messages, prompt_format, for_generation)
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: "
            "set generation_config.prompt_format in the config"
        )
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=for_generation
        )
    except TemplateError as error:
        raise DataError(f"the chat template refuses these messages: {error}") from None


def encode_prompt(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat | None = None,
    tools: list[dict] | None = None,
) -> list[int]:
    """Encode the conversation so far, up to where the assistant's answer begins."""
    text = render(messages, tokenizer, prompt_format, for_generation=True, tools=tools)
    answers = [len(_prompt_before(k, messages, tokenizer, prompt_format, tools)) for k in _answers(messages)]
    return _tokenize(text, [cut for cut in answers if cut < len(text)], tokenizer)[0]


def encode(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat | None = None,
    *,
    trained: Literal["assistant", "all"] = "assistant",
    tools: list[dict] | None = None,
) -> Encoded:
    """Encode a conversation and mark what is trained.

    trained: "assistant" marks each assistant turn from its first content token to its end-of-turn token;
             "all" marks every token (causal language modelling).

    Raises DataError if the template rewrites earlier turns, so that no prefix of the text can be marked.
    """
    text = render(messages, tokenizer, prompt_format, tools=tools)
    if trained == "all":
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return Encoded(ids, [True] * len(ids))

    spans = _assistant_spans(messages, text, tokenizer, prompt_format, tools)
    ids, starts = _tokenize(text, [start for start, _ in spans], tokenizer)
    mask = [False] * len(ids)
    special = set(tokenizer.all_special_ids)
    for start, end in spans:
        turn = [k for k, at in enumerate(starts) if start <= at < end]
        # What a template prints after the end-of-turn token (a newline, say) is never generated: not trained.
        last = max((k for k in turn if ids[k] in special), default=turn[-1] if turn else -1)
        for k in turn:
            mask[k] = k <= last
    return Encoded(ids, mask)


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Encode plain text for causal language modelling: at most one BOS before it, EOS after it, all trained."""
    ids = tokenizer(text)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:1] != [bos]:
        ids = [bos, *ids]
    if eos is not None and ids[-1:] != [eos]:
        ids = [*ids, eos]
    return Encoded(ids, [True] * len(ids))


def _answers(messages: list[Message]) -> list[int]:
    return [k for k, message in enumerate(messages) if message["role"] == "assistant"]


def _prompt_before(k: int, messages: list[Message], tokenizer, prompt_format, tools) -> str:
    """Render what the model is given before it writes messages[k]."""
    return render(messages[:k], tokenizer, prompt_format, for_generation=True, tools=tools)


def _assistant_spans(messages, text, tokenizer, prompt_format, tools) -> list[tuple[int, int]]:
    """Find the characters [start, end) of each assistant turn in the rendered text."""
    if prompt_format is not None:
        # Moving the system text into the last user turn is for inference alone: in training it would move
        # with every turn.
        prompt_format = prompt_format.model_copy(update={"system_in_last_user": False})
    spans = []
    for k in _answers(messages):
        prompt = _prompt_before(k, messages, tokenizer, prompt_format, tools)
        through = render(messages[: k + 1], tokenizer, prompt_format, tools=tools)
        if not (through.startswith(prompt) and text.startswith(through)):
            raise DataError(
                f"messages[{k}]: the chat template renders this assistant turn differently once later turns "
                "follow, or does not continue its own generation prompt: keep only the last assistant turn of "
                "the row, or set generation_config.prompt_format"
            )
        spans.append((len(prompt), len(through)))
    return spans


def _tokenize(text: str, cuts: list[int], tokenizer) -> tuple[list[int], list[int]]:
    """Tokenise text so that what lies before each cut is tokenised as if nothing followed.

    Returns ids and the character where each token starts. A prompt is tokenised alone when a model answers;
    were its last token to depend on the answer, the model would be trained on what it never sees. Such a row
    is tokenised piece by piece.
    """
    ids, starts = _with_starts(text, tokenizer)
    if all(ids[: bisect_left(starts, cut)] == _with_starts(text[:cut], tokenizer)[0] for cut in cuts):
        return ids, starts
    ids, starts = [], []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        piece_ids, piece_starts = _with_starts(text[begin:end], tokenizer)
        ids += piece_ids
        starts += [begin + start for start in piece_starts]
    return ids, starts


def _with_starts(text: str, tokenizer) -> tuple[list[int], list[int]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]]


def _render_prompt_format(messages: list[Message], fmt: PromptFormat, for_generation: bool) -> str:
    """Render by an LLMForge prompt format: bos, then each message in its role's template."""
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
