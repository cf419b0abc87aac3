"""Examples as the model will see them, tokens in the loss highlighted: before a GPU is paid for.

for example in preview_examples(config, 3): print_example(example, console)
show(encode(messages, tokenizer), tokenizer)        the same in a notebook
"""

from __future__ import annotations

import collections
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from forgebook.config.blocks import labels_of
from forgebook.config.parse import load_config
from forgebook.config.schema import FinetuneConfig
from forgebook.data import batching, readers, row_formats, tokenize
from forgebook.data.chat_template import shows_names
from forgebook.data.data_sources import find_sources
from forgebook.data.examples import read_examples
from forgebook.data.image_tokens import ImageTokens
from forgebook.data.images import IMAGES, thumbnail
from forgebook.data.masking import Encoded
from forgebook.data.row_formats import NAME_KEY, Example
from forgebook.data.special_tokens import special_ids, special_texts
from forgebook.data.token_store import Tokens
from forgebook.data.truncation import Truncation, fit_tokens
from forgebook.errors import DataError
from forgebook.models.processor import load_processor, processor_of, processor_source
from forgebook.models.tokenizer import load_tokenizer, locate, tokenizer_of

if TYPE_CHECKING:
    from IPython.display import HTML
    from transformers import PreTrainedTokenizerBase

    from forgebook.data.chat_template import Message

__all__ = [
    "PreviewedExample",
    "example_as_json",
    "ignored_keys",
    "pieces_of",
    "preview_examples",
    "print_example",
    "show",
    "show_example",
]

SUPERVISED, SPECIAL, PLAIN = "bold green", "dim cyan", "default"


@dataclass(frozen=True)
class PreviewedExample:
    """One encoded example.

    pieces: its text as of `pieces_of`.
    note:   what truncation does to it, and whether its texts hold special tokens; empty if neither.
    """

    where: str
    encoded: Encoded
    pieces: list[tuple[str, bool, bool]]
    note: str = ""


def preview_examples(config: FinetuneConfig, count: int = 3) -> list[PreviewedExample]:
    """Encode the first examples of the training data exactly as training would, truncation included.

    A pair gives both of its conversations; an example whose turns are expanded, one of each answer.
    Raises DataError for rows that cannot be used, unless `on_bad_rows` drops them.
    """
    assert config.task is not None  # filled in when the config is checked
    options = tokenize.encoding_options(config)
    # Rows first: what is wrong with them is reported before the tokenizer's library is imported.
    examples = read_examples(config.train_path, config.task, count, options.labels, config.on_bad_rows)
    tokenizer = tokenizer_of(config)
    processor = processor_of(config, tokenizer)
    images = None if processor is None else ImageTokens(processor)
    previewed: list[PreviewedExample] = []
    for example, encoded in zip(examples, tokenize.encode_examples(examples, tokenizer, options, images), strict=True):
        if isinstance(encoded, DataError):
            if config.on_bad_rows == "drop":
                continue
            raise encoded
        fitted = _fit(encoded, config.context_length, config.truncation, batching.group_size(config.task))
        answers = itertools.repeat("") if example.rejected is None else (", chosen", ", rejected")
        special = special_texts([example.messages, example.rejected, example.text], tokenizer)
        characters = "special tokens in its texts are characters" if special else ""
        for (one, note), answer in zip(fitted, answers, strict=False):
            notes = "; ".join(filter(None, (note, characters)))
            previewed.append(PreviewedExample(example.where + answer, one, pieces_of(one, tokenizer), notes))
    return previewed


def _thumbnails(example: Example) -> tuple[str, ...]:
    return tuple(thumbnail(image) for message in example.messages or () for image in message.get(IMAGES) or ())


def ignored_keys(config: FinetuneConfig, seconds: float = 2.0) -> str:
    """List the keys of the training rows that nothing reads, each with the rows that have it; empty if there are none.

    Reads for some seconds at most, and reports it if rows are left. Raises DataError or StorageError for a file
    that cannot be read.
    """
    assert config.task is not None  # filled in when the config is checked
    labels = labels_of(config.classifier_config)
    counts: collections.Counter[str] = collections.Counter()
    until, part = time.monotonic() + seconds, ""
    chunks = itertools.chain.from_iterable(map(readers.split_source, find_sources(config.train_path)))
    rows = (parsed for chunk in chunks for parsed in row_formats.parse_chunk(chunk, config.task or "", labels))
    for number, parsed in enumerate(rows, 1):
        if not isinstance(parsed, DataError):
            counts.update(parsed[1].ignored)
        if time.monotonic() > until:
            part = f" in the first {number:,} row{'s' * (number > 1)}"
            break
    is_shown = NAME_KEY in counts and config.generation_config.prompt_format is None
    if is_shown and shows_names(tokenizer_of(config)):
        del counts[NAME_KEY]
    listed = ", ".join(f"{key} ({count:,})" for key, count in sorted(counts.items()))
    return f"{listed}{part}" if listed else ""


def _fit(
    encoded: list[Encoded], context_length: int | None, truncation: Truncation, group: int
) -> list[tuple[Encoded, str]]:
    """Truncate the encodings of an example as training will, with a note of what happens to each.

    One that is dropped or stops the run is shown whole.
    """
    if context_length is None:
        return [(one, "") for one in encoded]
    fitted = fit_tokens(Tokens.from_encoded(encoded), context_length, truncation, group)
    shown, number = [], itertools.count()
    for one, stays, lost in zip(encoded, fitted.stays, fitted.lost, strict=True):
        length = len(one.input_ids)
        if stays:
            k = next(number)
            ids, mask = fitted.tokens.example(k)
            note = f"cut from {length} tokens, {lost} of them in the loss (truncation: {truncation})"
            left = Encoded(ids.tolist(), mask.tolist(), tuple(fitted.tokens.images_of(k)))
            shown.append((left, note if length > context_length else ""))
        elif truncation == "error" and lost:
            shown.append((one, f"longer than context_length {context_length}, so the run will stop with an error"))
        elif length > context_length:
            reason = "" if truncation == "drop" else ": truncation leaves no token of its loss"
            shown.append((one, f"dropped, longer than context_length {context_length}{reason}"))
        else:
            shown.append((one, "dropped with the other answer of its pair"))
    return shown


def pieces_of(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool, bool]]:
    """Divide an example's text into (text, is in the loss, is special), adjacent tokens of a kind together.

    The tokens of an image are one piece, which says how many they are.
    """
    pieces, begin = [], 0
    for number, image in enumerate(encoded.images, 1):
        pieces += _pieces(encoded, tokenizer, begin, image.start)
        size = f"{image.file.width} x {image.file.height} pixels"
        pieces.append((f"[image {number}: {size}, {image.stop - image.start} tokens]", False, True))
        begin = image.stop
    return pieces + _pieces(encoded, tokenizer, begin, len(encoded.input_ids))


def _pieces(encoded: Encoded, tokenizer: PreTrainedTokenizerBase, begin: int, end: int) -> list[tuple[str, bool, bool]]:
    """Divide the tokens from `begin` to `end`."""
    special = special_ids(tokenizer)
    ids, mask = encoded.input_ids[begin:end], encoded.loss_mask[begin:end]
    kinds = [(in_loss, i in special) for i, in_loss in zip(ids, mask, strict=True)]
    pieces, start = [], 0
    for k in range(1, len(kinds) + 1) if kinds else ():
        # Special tokens are pieces of their own; others are decoded together: a character may take several of them.
        if k == len(kinds) or kinds[k] != kinds[start] or kinds[start][1]:
            pieces.append((tokenizer.decode(ids[start:k]), *kinds[start]))
            start = k
    return pieces


def show(encoded: Encoded, tokenizer: PreTrainedTokenizerBase, thumbnails: Sequence[str] = ()) -> HTML:
    """Show an example in a notebook: tokens in the loss highlighted, special tokens as code, small images.

    thumbnails: of its images, as data URIs.
    """
    from html import escape

    from IPython.display import HTML

    # GitHub drops styles and keeps elements: <mark>, <code> and <br> show there what the styles refine in Jupyter.
    parts, small = [], iter(thumbnails)
    for text, in_loss, is_special in pieces_of(encoded, tokenizer):
        part = escape(text).replace("\n", "<br>")
        if is_special and not text.isspace():
            part = f"<code>{part}</code>"
        if text.startswith("[image ") and is_special and (source := next(small, None)):
            part = f'<img src="{source}" alt="{escape(text)}"> {part}'
        parts.append(f'<mark style="background:#b7e1bd;color:#102a13">{part}</mark>' if in_loss else part)
    legend = f"{sum(encoded.loss_mask[1:])} of {len(encoded.input_ids)} tokens are in the loss (highlighted)"
    return HTML(f'<p style="font-family:monospace;white-space:pre-wrap">{"".join(parts)}</p><small>{legend}</small>')


def show_example(messages: list[Message], source: str | Path, tools: list[dict] | None = None) -> HTML:
    """Show a conversation in a notebook as a config file (`*.yaml`) or a model (a folder, a hub id, `tiny`) has it.

    source: a config's task, `train_on` and labels decide which tokens are in the loss; a model's are those of
            instruction tuning. Raises DataError for a conversation that cannot be trained.
    """
    options = tokenize.EncodingOptions()
    if str(source).endswith(".yaml"):
        config = load_config(source)
        tokenizer, model = tokenizer_of(config), processor_source(config)
        options = tokenize.encoding_options(config)
    else:
        model = locate(str(source))
        tokenizer = load_tokenizer(model)
    example, images, small = Example("messages:0", messages, tools=tools), None, list[str]()
    if any(isinstance(message["content"], list) for message in messages):
        row = {"messages": messages}
        example, _ = row_formats.parse_row(row, example.where, "vision_language", base=str(Path.cwd()))
        images, small = ImageTokens(load_processor(model, tokenizer)), list(_thumbnails(example))
    [encoded] = tokenize.encode_examples([example], tokenizer, options, images)
    if isinstance(encoded, DataError):
        raise encoded
    return show(encoded[-1], tokenizer, small)


def print_example(example: PreviewedExample, console: Console) -> None:
    """Print an example: tokens in the loss green, special tokens in a color of their own."""
    text = Text()
    for piece, in_loss, is_special in example.pieces:
        style = SUPERVISED if in_loss else SPECIAL if is_special else PLAIN
        if in_loss and not console.is_terminal:
            piece = f"⟦{piece}⟧"  # no colors in a file or a pipe
        text.append(piece, style + (" reverse" if is_special and in_loss else ""))
    supervised = sum(example.encoded.loss_mask[1:])
    note = f"; {example.note}" if example.note else ""
    title = f"{example.where}: {len(example.encoded.input_ids)} tokens, {supervised} in the loss{note}"
    console.rule(Text(title), align="left", style="dim")
    console.print(text)


def example_as_json(example: PreviewedExample) -> str:
    """Write an example as one line of JSON: input_ids, labels (-100 outside the loss) and text."""
    ids = example.encoded.input_ids
    labels = [
        token if in_loss else batching.IGNORED for token, in_loss in zip(ids, example.encoded.loss_mask, strict=True)
    ]
    text = "".join(piece for piece, _, _ in example.pieces)
    return json.dumps({"input_ids": ids, "labels": labels, "text": text}, ensure_ascii=False)
