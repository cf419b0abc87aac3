"""Messages -> token ids, and which of them are trained. The only place that renders and masks.

Training, evaluation, generation and serving call the same functions, so what a model is asked later is,
token for token, the prefix of what it was trained on:

    encode(messages, tokenizer)          -> Encoded(input_ids, trained)     a training row
    encode_prompt(messages, tokenizer)   -> [int, ...]                      the same row up to the answer
    encode_many(rows, tokenizer)         -> [[Encoded, ...] | DataError]    many rows, one call of the tokenizer
    show(encoded, tokenizer)                                                the row in a notebook, trained part marked

Masks come from rendered prefixes, never from token ids: an assistant turn begins where the prompt with its
generation header ends, so templates without `{% generation %}` tags work, and a pad token equal to the
end-of-turn token masks nothing. Only the template writes special tokens: a message that contains
`<|eot_id|>` contains these characters, and ends no turn.

Reasoning (`reasoning_content` of a message) is part of the answer and trained with it. A template that knows
the key renders it; for all others it stands before the content as `<think>\\n...\\n</think>\\n\\n`.
"""

from __future__ import annotations

import functools
import itertools
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from forgebook.data.prompt_formats import render_prompt_format
from forgebook.data.special_tokens import (
    has_marks,
    in_literal_form,
    literal_tokenizer,
    map_texts,
    mark,
    special_ids,
    unmarked,
    without_closing_token,
)
from forgebook.data.tool_text import speaks_of_tools, tools_as_text
from forgebook.errors import DataError
from forgebook.runs import run

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

    from forgebook.config.parse import PromptFormat

__all__ = ["Encoded", "Message", "encode", "encode_many", "encode_prompt", "encode_text", "pieces_of", "render", "show"]

Message = dict[str, Any]
Trained = Literal["assistant", "last", "all"]

# What a template reads shows in its source.
TAKES_TOOLS = re.compile(r"\{[%{][^}]*\btools\b")
TAKES_REASONING = re.compile(r"reasoning_content|\.thinking\b|[\"']thinking[\"']")


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
    row = _Row(messages, tools, tokenizer, prompt_format)
    return unmarked(row.render(row.messages, for_generation), tokenizer)


def encode_prompt(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat | None = None,
    tools: list[dict] | None = None,
) -> list[int]:
    """Encode the conversation so far, up to where the assistant's answer begins."""
    row = _Row(messages, tools, tokenizer, prompt_format)
    text = row.prompt(len(row.messages))
    return _tokenize([_Rendered(text, row.spans(text, len(row.messages)))], tokenizer)[0][1].ids


def encode(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat | None = None,
    *,
    trained: Trained = "assistant",
    tools: list[dict] | None = None,
) -> Encoded:
    """Encode a conversation and mark what is trained.

    trained: "assistant" marks each assistant turn, but those of weight 0, from its first content token to its
             end-of-turn token; "last" only the last of them; "all" every token (causal language modelling).

    Raises DataError if the template rewrites earlier turns, so that no prefix of the text can be marked.
    """
    [encoded] = encode_many([(messages, tools)], tokenizer, prompt_format, trained=trained)
    if isinstance(encoded, DataError):
        raise encoded
    return encoded[0]


def encode_many(
    rows: Sequence[tuple[list[Message], list[dict] | None]],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat | None = None,
    *,
    trained: Trained = "assistant",
    rewritten_turns: Literal["refuse", "expand"] = "refuse",
) -> list[list[Encoded] | DataError]:
    """Encode rows of (messages, tools) with one call of the tokenizer.

    rewritten_turns: what becomes of a row whose template shows an earlier answer otherwise once later turns
                     follow: an error, or one encoded row per trained answer, each ending with it.

    Returns for each row a list of one Encoded (more, if expanded), or the DataError that says what is wrong.
    """
    rendered: list[list[_Rendered] | DataError] = []
    for messages, tools in rows:
        try:
            rendered.append(_rendered(messages, tools, tokenizer, prompt_format, trained, rewritten_turns))
        except DataError as error:
            rendered.append(error)
    good = [piece for pieces in rendered if not isinstance(pieces, DataError) for piece in pieces]
    tokenized = iter(_tokenize(good, tokenizer))
    return [
        pieces if isinstance(pieces, DataError) else [_marked(piece, *next(tokenized), tokenizer) for piece in pieces]
        for pieces in rendered
    ]


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Encode plain text for causal language modelling: at most one BOS before it, EOS after it, all trained."""
    marked = mark(text, tokenizer)
    if has_marks(marked):
        ids = literal_tokenizer(tokenizer).encode(in_literal_form(marked, tokenizer), add_special_tokens=False).ids
    else:
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = [*([] if bos is None else [bos]), *ids, *([] if eos is None else [eos])]
    return Encoded(ids, [True] * len(ids))


def show(encoded: Encoded, tokenizer: PreTrainedTokenizerBase):
    """Show a row in a notebook: trained tokens on colour, special tokens framed. Returns an IPython HTML object."""
    from html import escape

    from IPython.display import HTML

    spans = []
    for text, is_trained, is_special in pieces_of(encoded, tokenizer):
        style = "background:#2e7d3244;" * is_trained + "border:1px solid #8888;border-radius:3px;" * is_special
        spans.append(f'<span style="{style}">{escape(text)}</span>' if style else escape(text))
    legend = f"{sum(encoded.trained[1:])} of {len(encoded.input_ids)} tokens are trained (on colour)"
    return HTML(f'<pre style="white-space:pre-wrap">{"".join(spans)}</pre><small>{legend}</small>')


def pieces_of(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool, bool]]:
    """Divide a row's text into (text, is trained, is special), tokens of a kind together."""
    special = special_ids(tokenizer)
    kinds = [(trained, i in special) for i, trained in zip(encoded.input_ids, encoded.trained, strict=True)]
    pieces, start = [], 0
    for k in range(1, len(kinds) + 1):
        # Special tokens stand alone; other tokens are decoded together: a character may take several of them.
        if k == len(kinds) or kinds[k] != kinds[start] or kinds[start][1]:
            pieces.append((tokenizer.decode(encoded.input_ids[start:k]), *kinds[start]))
            start = k
    return pieces


# Rendering --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rendered:
    """A text to tokenise. spans: the characters [start, end) of its assistant turns; which of them train."""

    text: str
    spans: list[tuple[int, int]]
    trains: list[bool] = field(default_factory=list)
    trains_all: bool = False


class _Row:
    """A conversation made ready for its template: tools and reasoning as the template takes them."""

    def __init__(self, messages, tools, tokenizer, prompt_format):
        self.tokenizer, self.prompt_format, self.tools = tokenizer, prompt_format, tools
        source = _template_source(tokenizer, tools) if prompt_format is None else ""
        self.called = [call["function"]["name"] for m in messages for call in m.get("tool_calls") or []]
        if speaks_of_tools(messages, tools) and not TAKES_TOOLS.search(source):
            messages, self.tools = tools_as_text(messages, tools), None
        if not TAKES_REASONING.search(source):
            messages = [_reasoning_in_content(message) for message in messages]
        marked = functools.partial(mark, tokenizer=tokenizer)
        self.messages = [map_texts(message, marked) for message in messages]
        self.tools = map_texts(self.tools, marked)
        self.answers = [k for k, message in enumerate(self.messages) if message["role"] == "assistant"]
        self._rendered: dict[tuple[int, bool], str] = {}

    def prompt(self, k: int) -> str:
        """Render what the model is given before it writes message k."""
        return self._render_first(k, for_generation=True)

    def through(self, k: int) -> str:
        """Render the conversation up to message k, with it."""
        return self._render_first(k + 1, for_generation=False)

    def turn(self, k: int, text: str) -> str:
        """Render up to message k as `text` goes on: without a token that only ends a text (Phi-3's eos)."""
        through = self.through(k)
        if text.startswith(through):
            return through
        open_ended = without_closing_token(through, self.tokenizer)
        goes_on = len(open_ended) > len(self.prompt(k)) and text.startswith(open_ended)
        return open_ended if goes_on else through

    def _render_first(self, count: int, for_generation: bool) -> str:
        key = count, for_generation
        if key not in self._rendered:
            self._rendered[key] = self.render(self.messages[:count], for_generation)
        return self._rendered[key]

    def render(self, messages: list[Message], for_generation: bool = False) -> str:
        """Render some of the row's messages; special tokens of messages are private characters."""
        if self.prompt_format is not None:
            return render_prompt_format(messages, self.prompt_format, for_generation)
        if not messages:
            raise DataError("the conversation begins with an assistant's turn, and chat templates need one before it")
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=self.tools, tokenize=False, add_generation_prompt=for_generation
            )
        except TemplateError as error:
            raise DataError(f"the chat template refuses these messages: {error}") from None
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise DataError(f"the chat template fails on these messages: {error}") from None

    def spans(self, text: str, count: int) -> list[tuple[int, int]]:
        """Find the characters [start, end) of each answer among the first `count` messages of a text.

        An answer that the text shows otherwise than when it was given has an empty span, where it begins.
        """
        found = []
        for k in [k for k in self.answers if k < count]:
            prompt = self.prompt(k)
            if text.startswith(prompt) and len(prompt) < len(text):
                end = self.turn(k, text) if text.startswith(self.turn(k, text)) else prompt
                found.append((len(prompt), max(len(prompt), len(end))))
        return found


def _template_source(tokenizer, tools) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"the tokenizer of {run.display_path(Path(tokenizer.name_or_path))!r} has no chat template: "
            "set generation_config.prompt_format in the config"
        )
    return tokenizer.get_chat_template(None, tools)


def _reasoning_in_content(message: Message) -> Message:
    if message.get("reasoning_content") is None:
        return message
    kept = {key: value for key, value in message.items() if key != "reasoning_content"}
    return kept | {"content": f"<think>\n{message['reasoning_content']}\n</think>\n\n{message['content']}"}


def _rendered(messages, tools, tokenizer, prompt_format, trained: Trained, rewritten_turns: str) -> list[_Rendered]:
    """Render a row and find its assistant turns; several texts where earlier turns are rewritten and expanded."""
    if prompt_format is not None and prompt_format.system_in_last_user and trained != "all":
        # Moving the system text into the last user turn is for inference alone: in training it would move
        # with every turn.
        prompt_format = prompt_format.model_copy(update={"system_in_last_user": False})
    row = _Row(messages, tools, tokenizer, prompt_format)
    count = len(row.messages)
    text = row.through(count - 1)
    _check_calls(row, text)
    if trained == "all":
        return [_Rendered(text, [], trains_all=True)]
    wanted = [k for k in row.answers if row.messages[k].get("weight") != 0]
    wanted = wanted[-1:] if trained == "last" else wanted
    for k in wanted:
        _check_answer(row, k)
    rewritten = [k for k in wanted if not text.startswith(row.turn(k, text))]
    if not rewritten:
        return [_with_spans(row, text, count, wanted)]
    if rewritten_turns == "refuse":
        raise DataError(
            f"messages[{rewritten[0]}]: the chat template renders this assistant turn differently once later turns "
            "follow (it strips the thinking, say): set rewritten_turns: expand to train each answer as it was given, "
            "train_on: last to train only the last, or generation_config.prompt_format"
        )
    return [_with_spans(row, row.through(k), k + 1, [k]) for k in wanted]


def _with_spans(row: _Row, text: str, count: int, wanted: list[int]) -> _Rendered:
    starts = {len(row.prompt(k)) for k in wanted}
    spans = row.spans(text, count)
    return _Rendered(text, spans, [start in starts for start, _ in spans])


def _check_calls(row: _Row, text: str) -> None:
    missing = [name for name in row.called if name not in text]
    if missing:
        raise DataError(
            f"the chat template leaves out the call of {missing[0]!r}: set generation_config.prompt_format, which "
            "writes tools as text"
        )


def _check_answer(row: _Row, k: int) -> None:
    """Raise DataError unless an answer continues its prompt and holds all that the message says."""
    prompt, through, message = row.prompt(k), row.through(k), row.messages[k]
    if not through.startswith(prompt):
        raise DataError(
            f"messages[{k}]: the chat template does not continue its own generation prompt with this assistant "
            "turn, so no prompt would lead to it: set generation_config.prompt_format"
        )
    for key in ("reasoning_content", "content"):
        said = (message.get(key) or "").strip()
        # A template that parses thinking out of the content may put other white space around it.
        if said not in through[len(prompt) :] and "</think>" not in said:
            raise DataError(
                f"messages[{k}].{key}: the chat template does not show it as it is, so it would not be trained: "
                "set generation_config.prompt_format"
            )


# Tokenising and marking -------------------------------------------------------------------------------


class _Tokenized:
    """The tokens of a text. Where they start is looked up, not listed: a row asks for a few of thousands."""

    def __init__(self, ids: list[int], encoding: Encoding | None = None, starts: list[int] | None = None):
        self.ids, self._encoding, self._starts = ids, encoding, starts

    @classmethod
    def of(cls, texts: list[str], backend: Tokenizer) -> list[_Tokenized]:
        return [cls(one.ids, encoding=one) for one in backend.encode_batch(texts, add_special_tokens=False)]

    @property
    def starts(self) -> list[int]:
        """[tokens] the character where each starts."""
        if self._starts is None:
            self._starts = [start for start, _ in self._encoding.offsets]
        return self._starts

    def start(self, k: int) -> int:
        """Find the character where token k starts."""
        return self._encoding.token_to_chars(k)[0] if self._starts is None else self._starts[k]

    def first_from(self, character: int) -> int:
        """Find the first token that starts at a character or behind it."""
        k = self._encoding.char_to_token(character) if self._starts is None else None
        if k is None:  # the end of the text, or a character that no token has
            return bisect_left(self.starts, character)
        return k if self.start(k) == character else k + 1


def _tokenize(pieces: list[_Rendered], tokenizer) -> list[tuple[str, _Tokenized, list[tuple[int, int]]]]:
    """Tokenise texts so that what lies before each assistant turn is tokenised as if nothing followed.

    Returns for each the text that was tokenised, its tokens, and the spans. A prompt is tokenised alone when a
    model answers; were its last token to depend on the answer, the model would be trained on what it never sees.
    Such a row is tokenised turn by turn.
    """
    usual = tokenizer.backend_tokenizer
    plain = iter(_Tokenized.of([piece.text for piece in pieces if not has_marks(piece.text)], usual))
    done = []
    for piece in pieces:
        if has_marks(piece.text):
            text, spans = _literal_piece(piece, tokenizer)
            backend = literal_tokenizer(tokenizer)
            [made] = _Tokenized.of([text], backend)
        else:
            text, spans, backend, made = piece.text, piece.spans, usual, next(plain)
        cuts = [start for start, _ in spans]
        if not all(_is_clean_cut(text, cut, made, tokenizer, backend) for cut in cuts):
            made = _turn_by_turn(text, cuts, backend)
        done.append((text, made, spans))
    return done


def _is_clean_cut(text: str, cut: int, made: _Tokenized, tokenizer, backend: Tokenizer) -> bool:
    """Tell whether the tokens before `cut` are those of the text before it alone."""
    end = made.first_from(cut)
    special = special_ids(tokenizer)
    # Special tokens divide a text: what follows the last one before the cut is tokenised on its own.
    last = next((k for k in range(end - 1, -1, -1) if made.ids[k] in special), None)
    if last is None:
        return made.ids[:end] == _Tokenized.of([text[:cut]], backend)[0].ids
    return tuple(made.ids[last:end]) == _tail_ids(text[made.start(last) : cut], backend)


@functools.lru_cache(maxsize=4096)
def _tail_ids(tail: str, backend: Tokenizer) -> tuple[int, ...]:
    """Tokenise the end of a prompt from its last special token on; most rows share a few such ends."""
    return tuple(backend.encode(tail, add_special_tokens=False).ids)


def _turn_by_turn(text: str, cuts: list[int], backend: Tokenizer) -> _Tokenized:
    ids, starts = [], []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        [piece] = _Tokenized.of([text[begin:end]], backend)
        ids += piece.ids
        starts += [begin + start for start in piece.starts]
    return _Tokenized(ids, starts=starts)


def _marked(piece: _Rendered, text: str, made: _Tokenized, spans: list[tuple[int, int]], tokenizer) -> Encoded:
    """Mark the tokens of the trained turns."""
    ids = made.ids
    if piece.trains_all:
        return Encoded(ids, [True] * len(ids))
    ends = special_ids(tokenizer)
    if tokenizer.bos_token_id != tokenizer.eos_token_id:
        ends -= {tokenizer.bos_token_id}
    mask = [False] * len(ids)
    for (start, end), trains in zip(spans, piece.trains, strict=True):
        if not trains:
            continue
        first, stop = made.first_from(start), made.first_from(end)
        # What a template prints after the end-of-turn token (a newline, the next BOS) is never generated: it is
        # not trained. A turn that ends otherwise is trained whole.
        last = next((k for k in range(stop - 1, first - 1, -1) if ids[k] in ends), None)
        if last is not None and not _said_after(text, made, last, stop, end, tokenizer):
            stop = last + 1
        mask[first:stop] = [True] * (stop - first)
    return Encoded(ids, mask)


def _said_after(text: str, made: _Tokenized, last: int, stop: int, end: int, tokenizer) -> bool:
    """Tell whether anything but white space and a BOS stands between token `last` and the turn's end."""
    after = [k for k in range(last + 1, stop) if made.ids[k] != tokenizer.bos_token_id]
    return any(text[made.start(k) : made.start(k + 1) if k + 1 < stop else end].strip() for k in after)


def _literal_piece(piece: _Rendered, tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """Write a piece for the literal tokenizer, its spans moved along."""
    places = sorted({0, len(piece.text), *(place for span in piece.spans for place in span)})
    text, moved = "", {0: 0}
    for begin, end in itertools.pairwise(places):
        text += in_literal_form(piece.text[begin:end], tokenizer)
        moved[end] = len(text)
    return text, [(moved[start], moved[end]) for start, end in piece.spans]
