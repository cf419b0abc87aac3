"""Texts -> token ids and the loss mask: the only place that decides which tokens are targets of the loss.

Training, evaluation, generation and serving call the same functions, so a prompt at inference is, token for
token, the prefix of the example that the model was trained on:

    encode(messages, tokenizer)          -> Encoded(input_ids, loss_mask)   a training example
    encode_prompt(messages, tokenizer)   -> [int, ...]                      the same example up to the answer
    encode_many(examples, tokenizer)     -> [[Encoded, ...] | DataError]    many examples, one call of the tokenizer

Where messages have images, `image_tokens` writes their tokens, which are never in the loss.

`chat_template.py` finds the characters of each assistant turn; here they become tokens. A pad token equal to the
end-of-turn token masks nothing, since no mask is read off token ids. Only the template writes special tokens: a
message that contains `<|eot_id|>` contains these characters, and ends no turn.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from forgebook.data.chat_template import (
    LossOn,
    RenderedText,
    RewrittenTurns,
    render_for_training,
    render_prompt,
)
from forgebook.data.conversation import Message, Span
from forgebook.data.image_tokens import ImageTokens, PlacedImage, files_of
from forgebook.data.special_tokens import end_ids, has_hidden, hide, literal_tokenizer, special_ids, to_literal_form
from forgebook.data.template_facts import PROBED_MESSAGES, PROBED_TOOL
from forgebook.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

    from forgebook.config.blocks import PromptFormat
    from forgebook.data.images import ImageFile

__all__ = ["Encoded", "encode", "encode_image_prompt", "encode_many", "encode_prompt", "encode_text", "end_of_turn"]

PROBED_ANSWER: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@dataclass(frozen=True)
class Encoded:
    """One example as the model sees it.

    input_ids: [tokens] ids.
    loss_mask: [tokens] True where the token is a target of the loss.
    images:    where its images are.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    images: tuple[PlacedImage, ...] = ()


def encode_prompt(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat | None = None,
    tools: list[dict] | None = None,
) -> list[int]:
    """Encode the conversation so far, up to where the assistant's answer begins."""
    return encode_image_prompt(messages, tokenizer, None, prompt_format, tools).input_ids


def encode_image_prompt(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    images: ImageTokens | None,
    prompt_format: PromptFormat | None = None,
    tools: list[dict] | None = None,
) -> Encoded:
    """Encode the conversation so far, as `encode_prompt`, with where its images are; nothing is in the loss.

    messages: with checked images.
    """
    rendered, files = render_prompt(messages, tokenizer, prompt_format, tools), files_of(messages)
    if images is not None:
        rendered = images.expanded(rendered, files)
    [tokenized] = _tokenize([rendered], tokenizer)
    return _mask(replace(rendered, in_loss=[False] * len(rendered.spans)), tokenized, tokenizer, files)


def encode(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat | None = None,
    *,
    loss_on: LossOn = "assistant",
    tools: list[dict] | None = None,
) -> Encoded:
    """Encode a conversation, with its loss mask.

    loss_on: "assistant": each assistant turn, except those of weight 0, from its first content token to its
             end-of-turn token; "last": only the last of them; "all": every token (causal language modeling).

    Raises DataError if the template rewrites earlier turns, so that no prefix of the text can be masked.
    """
    [encoded] = encode_many([(messages, tools)], tokenizer, prompt_format, loss_on=loss_on)
    if isinstance(encoded, DataError):
        raise encoded
    return encoded[0]


def encode_many(
    examples: Sequence[tuple[list[Message], list[dict] | None]],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat | None = None,
    *,
    loss_on: LossOn = "assistant",
    rewritten_turns: RewrittenTurns = "refuse",
    images: ImageTokens | None = None,
) -> list[list[Encoded] | DataError]:
    """Encode examples of (messages, tools) with one call of the tokenizer.

    rewritten_turns: for an example whose template renders an earlier answer differently once later turns follow:
                     "refuse" makes it an error, "expand" encodes it once per answer, each ending with it.
    images:          of a model that reads images; those of the messages are checked already.

    Returns for each example a list of one Encoded (more, if expanded), or the DataError with what is wrong.
    """
    rendered: list[list[RenderedText] | DataError] = []
    for messages, tools in examples:
        try:
            texts = render_for_training(
                messages, tokenizer, prompt_format, tools, loss_on=loss_on, rewritten_turns=rewritten_turns
            )
            rendered.append([images.expanded(text, files_of(messages)) for text in texts] if images else texts)
        except DataError as error:
            rendered.append(error)
    # One call for the texts of all examples: the tokenizer spreads a batch over all cores.
    valid = [text for texts in rendered if not isinstance(texts, DataError) for text in texts]
    tokenized = iter(_tokenize(valid, tokenizer))
    return [
        texts
        if isinstance(texts, DataError)
        else [_mask(text, next(tokenized), tokenizer, files_of(messages)) for text in texts]
        for texts, (messages, _) in zip(rendered, examples, strict=True)
    ]


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Encode plain text for causal language modeling: at most one BOS before it, EOS after it, all in the loss."""
    hidden = hide(text, tokenizer)
    if has_hidden(hidden):
        ids = literal_tokenizer(tokenizer).encode(to_literal_form(hidden, tokenizer), add_special_tokens=False).ids
    else:
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    # Written here rather than by the tokenizer's post-processor, which in half of the families adds no EOS and in
    # some a second BOS.
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = [*([] if bos is None else [bos]), *ids, *([] if eos is None else [eos])]
    return Encoded(ids, [True] * len(ids))


def end_of_turn(tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat | None) -> tuple[str, list[int]]:
    """Find what ends an answer in training: a text, where a prompt format ends with one, or tokens.

    They are one or two: in some templates a turn that calls a tool ends with another token than an answer.
    """
    ids = []
    # Read off the mask of training, not off the tokenizer's EOS: generation must stop where the answers that the model
    # learned stopped, and several families end a turn with another token than their EOS.
    for messages, tools in ((PROBED_ANSWER, None), (PROBED_MESSAGES[:2], [PROBED_TOOL])):
        [encoded] = encode_many([(messages, tools)], tokenizer, prompt_format)
        if isinstance(encoded, DataError):  # no template, or one that rejects this conversation
            continue
        supervised = itertools.compress(encoded[0].input_ids, encoded[0].loss_mask)
        # A template may supervise white space after the end (a newline): the last visible token is what ends it.
        visible = [token for token in supervised if tokenizer.decode([token]).strip()]
        ids += [token for token in visible[-1:] if token in end_ids(tokenizer)]
    text = prompt_format.assistant.partition("{instruction}")[2].strip() if prompt_format and not ids else ""
    return text, list(dict.fromkeys(ids))


# Tokenizing -------------------------------------------------------------------------------------------


class _Tokens:
    """The tokens of a text. Where one starts is looked up when it is needed: few of an example's thousands are."""

    def __init__(self, ids: list[int], encoding: Encoding | None = None, starts: list[int] | None = None):
        self.ids, self._encoding, self._starts = ids, encoding, starts

    @classmethod
    def of(cls, texts: list[str], backend: Tokenizer) -> list[_Tokens]:
        """Tokenize texts in one call."""
        return [cls(one.ids, encoding=one) for one in backend.encode_batch(texts, add_special_tokens=False)]

    @property
    def starts(self) -> list[int]:
        """[tokens] the character where each starts."""
        if self._starts is None:
            assert self._encoding is not None
            self._starts = [start for start, _ in self._encoding.offsets]
        return self._starts

    def start(self, k: int) -> int:
        """Find the character where token k starts."""
        # One look-up in Rust instead of a Python list of all offsets: only a few are needed.
        if self._starts is None and self._encoding is not None:
            span = self._encoding.token_to_chars(k)
            if span is not None:
                return span[0]
        return self.starts[k]

    def first_from(self, character: int) -> int:
        """Find the first token that starts at a character or after it."""
        if self._starts is not None or self._encoding is None:
            return bisect_left(self.starts, character)
        k = self._encoding.char_to_token(character)
        if k is None:  # the end of the text, or a character that no token covers
            last = self._encoding.token_to_chars(len(self.ids) - 1) if self.ids else None
            is_end = last is not None and last[1] <= character
            return len(self.ids) if is_end else bisect_left(self.starts, character)
        # A token that covers the character but starts before it belongs to what precedes.
        return k if self.start(k) == character else k + 1


@dataclass(frozen=True)
class _TokenizedText:
    """A text as it was tokenized (in literal form, if it has special tokens as text), its tokens and its spans."""

    text: str
    tokens: _Tokens
    spans: list[Span]
    images: list[Span]


def _tokenize(rendered: list[RenderedText], tokenizer: PreTrainedTokenizerBase) -> list[_TokenizedText]:
    """Tokenize texts so that what precedes each assistant turn is tokenized as if nothing followed.

    At inference a prompt is tokenized alone. If its last token depended on the answer, the model would be trained
    on a prompt that it never sees; such an example is tokenized turn by turn.
    """
    usual = tokenizer.backend_tokenizer
    plain = iter(_Tokens.of([one.text for one in rendered if not has_hidden(one.text)], usual))
    tokenized = []
    for one in rendered:
        if has_hidden(one.text):
            text, spans, images = _literal_form(one, tokenizer)
            backend = literal_tokenizer(tokenizer)
            [tokens] = _Tokens.of([text], backend)
        else:
            text, spans, images, backend, tokens = one.text, one.spans, one.images, usual, next(plain)
        cuts = [start for start, _ in spans]
        if not all(_is_clean_cut(text, cut, tokens, tokenizer, backend) for cut in cuts):
            tokens = _turn_by_turn(text, cuts, backend)
        tokenized.append(_TokenizedText(text, tokens, spans, images))
    return tokenized


def _is_clean_cut(text: str, cut: int, tokens: _Tokens, tokenizer: PreTrainedTokenizerBase, backend: Tokenizer) -> bool:
    """Return whether the tokens before character `cut` equal those of the text before it alone."""
    end = tokens.first_from(cut)
    special = special_ids(tokenizer)
    # Special tokens divide a text: what follows the last one before the cut is tokenized independently, so only
    # these few characters need a second look, not the whole prompt.
    last = next((k for k in range(end - 1, -1, -1) if tokens.ids[k] in special), None)
    if last is None:
        return tokens.ids[:end] == _Tokens.of([text[:cut]], backend)[0].ids
    return tuple(tokens.ids[last:end]) == _tail_ids(text[tokens.start(last) : cut], backend)


# Cached, because most examples of a set share a few such tails (`<|start_header_id|>assistant...`).
@functools.lru_cache(maxsize=4096)
def _tail_ids(tail: str, backend: Tokenizer) -> tuple[int, ...]:
    """Tokenize the end of a prompt from its last special token on."""
    return tuple(backend.encode(tail, add_special_tokens=False).ids)


def _turn_by_turn(text: str, cuts: list[int], backend: Tokenizer) -> _Tokens:
    """Tokenize what is before, between and after the cuts independently."""
    ids: list[int] = []
    starts: list[int] = []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        [tokens] = _Tokens.of([text[begin:end]], backend)
        ids += tokens.ids
        starts += [begin + start for start in tokens.starts]
    return _Tokens(ids, starts=starts)


def _literal_form(rendered: RenderedText, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Span], list[Span]]:
    """Write a text for the literal tokenizer, with the spans of its turns and images moved along."""
    # Special tokens change their length in literal form, so the text is converted between the borders of spans.
    spans = [rendered.spans, rendered.images]
    borders = sorted({0, len(rendered.text), *(border for span in itertools.chain(*spans) for border in span)})
    text, moved = "", {0: 0}
    for begin, end in itertools.pairwise(borders):
        text += to_literal_form(rendered.text[begin:end], tokenizer)
        moved[end] = len(text)
    turns, images = ([(moved[start], moved[end]) for start, end in kind] for kind in spans)
    return text, turns, images


# The loss mask ----------------------------------------------------------------------------------------


def _mask(
    rendered: RenderedText,
    tokenized: _TokenizedText,
    tokenizer: PreTrainedTokenizerBase,
    files: Sequence[ImageFile] = (),
) -> Encoded:
    """Set the mask on the tokens of the turns in the loss, and find those of the images."""
    ids = tokenized.tokens.ids
    if rendered.all_in_loss:
        return Encoded(ids, [True] * len(ids))
    first_from = tokenized.tokens.first_from
    places = [(first_from(start), first_from(end)) for start, end in tokenized.images]
    images = tuple(PlacedImage(file, *place) for file, place in zip(files, places, strict=False))
    ends = end_ids(tokenizer) & special_ids(tokenizer)
    mask = [False] * len(ids)
    for (start, end), in_loss in zip(tokenized.spans, rendered.in_loss, strict=True):
        if not in_loss:
            continue
        first, stop = tokenized.tokens.first_from(start), tokenized.tokens.first_from(end)
        # The end-of-turn token is in the loss, or the model would never learn to stop. What a template prints after
        # it (a newline, the next BOS) is never generated, so it is not. A turn with no end-of-turn token of its own
        # (a prompt format that ends with "###") is in the loss as a whole.
        last = next((k for k in range(stop - 1, first - 1, -1) if ids[k] in ends), None)
        if last is not None and not _has_text_after(tokenized, last, stop, end, tokenizer):
            stop = last + 1
        mask[first:stop] = [True] * (stop - first)
    return Encoded(ids, mask, images)


def _has_text_after(
    tokenized: _TokenizedText, last: int, stop: int, end: int, tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Return whether anything but white space and a BOS is between token `last` and the end of the turn."""
    tokens = tokenized.tokens
    after = [k for k in range(last + 1, stop) if tokens.ids[k] != tokenizer.bos_token_id]
    return any(tokenized.text[tokens.start(k) : tokens.start(k + 1) if k + 1 < stop else end].strip() for k in after)
