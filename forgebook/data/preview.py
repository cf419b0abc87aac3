"""Rows as the model will see them, trained tokens marked: before a GPU is paid for.

for row in preview(config, 3): print_row(row, console)
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from forgebook.config.parse import FinetuneConfig
from forgebook.data import chat_template, tokenize
from forgebook.errors import DataError
from forgebook.models.tokenizer import tokenizer_of

__all__ = ["Preview", "as_json", "preview", "print_row"]

TRAINED, SPECIAL, PLAIN = "bold green", "dim cyan", "default"


@dataclass(frozen=True)
class Preview:
    """One encoded row. note: what happens to it beside being trained, empty if nothing."""

    where: str
    encoded: chat_template.Encoded
    pieces: list[tuple[str, bool, bool]]
    note: str = ""


def preview(config: FinetuneConfig, count: int = 3) -> list[Preview]:
    """Encode the first rows of the training data exactly as training would, truncation included.

    Raises DataError for rows that cannot be used, unless `on_bad_rows` drops them.
    """
    tokenizer = tokenizer_of(config)
    recipe = tokenize.Recipe.of(config)
    shown = []
    rows = tokenize.read_rows(config.train_path, config.task, count, recipe.labels, config.on_bad_rows)
    for row, encoded in zip(rows, tokenize.encode_rows(rows, tokenizer, recipe), strict=True):
        if isinstance(encoded, DataError):
            if config.on_bad_rows == "drop":
                continue
            raise encoded
        for one in encoded:
            one, note = _fitted(one, config)
            shown.append(Preview(row.where, one, chat_template.pieces_of(one, tokenizer), note))
    return shown[:count]


def _fitted(encoded: chat_template.Encoded, config: FinetuneConfig) -> tuple[chat_template.Encoded, str]:
    """Cut a row as the truncation policy would; say so."""
    length, limit = len(encoded.input_ids), config.context_length
    if limit is None or length <= limit:
        return encoded, ""
    keep = slice(length - limit, None) if config.truncation == "left" else slice(0, limit)
    kept = chat_template.Encoded(encoded.input_ids[keep], encoded.trained[keep])
    lost = sum(encoded.trained[1:]) - sum(kept.trained[1:])
    if config.truncation == "error" and lost:
        return encoded, f"{length} tokens: longer than context_length {limit}, so the run is refused"
    if config.truncation == "drop":
        return encoded, f"{length} tokens: longer than context_length {limit}, so the row is dropped"
    return kept, f"cut from {length} tokens, {lost} trained ones lost (truncation: {config.truncation})"


def print_row(row: Preview, console: Console) -> None:
    """Print a row: trained tokens green, special tokens in a colour of their own."""
    text = Text()
    for piece, is_trained, is_special in row.pieces:
        style = TRAINED if is_trained else SPECIAL if is_special else PLAIN
        if is_trained and not console.is_terminal:
            piece = f"⟦{piece}⟧"  # no colours in a file or a pipe
        text.append(piece, style + (" reverse" if is_special and is_trained else ""))
    trained = sum(row.encoded.trained[1:])
    note = f"; {row.note}" if row.note else ""
    console.rule(
        f"{row.where}: {len(row.encoded.input_ids)} tokens, {trained} trained{note}", align="left", style="dim"
    )
    console.print(text)


def as_json(row: Preview) -> str:
    """Write a row as one line of JSON: input_ids, labels (-100 where nothing is trained) and text."""
    ids = row.encoded.input_ids
    labels = [token if trained else -100 for token, trained in zip(ids, row.encoded.trained, strict=True)]
    text = "".join(piece for piece, _, _ in row.pieces)
    return json.dumps({"input_ids": ids, "labels": labels, "text": text}, ensure_ascii=False)
