"""Only templates write special tokens: the same characters in a message are text, and end no turn.

    hide(text)               before rendering: special tokens inside a message become private characters
    restore(text)            after rendering, to be read: they are themselves again
    to_literal_form(text),   after rendering, to be tokenized: the template's tokens are private characters now,
    literal_tokenizer()      known to a copy of the tokenizer, to which the usual names are plain text

Examples without such text, nearly all, are tokenized as they are.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from forgebook.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "end_ids",
    "has_end",
    "has_hidden",
    "hide",
    "leading_token",
    "literal_tokenizer",
    "map_texts",
    "restore",
    "special_ids",
    "special_texts",
    "to_literal_form",
]

# While a template runs, special tokens inside messages are these characters, one per token; for the tokenizer of
# such an example the template's own tokens are. Private use: no text has a reason to contain them.
_IN_MESSAGE, _OF_TEMPLATE = 0xF0000, 0x100000
_HIDDEN = re.compile(f"[{chr(_IN_MESSAGE)}-{chr(_OF_TEMPLATE - 1)}]")
_PRIVATE = re.compile(f"[{chr(_IN_MESSAGE)}-\U0010ffff]")


@functools.lru_cache(maxsize=64)
def _special_tokens(tokenizer) -> tuple[dict[str, int], re.Pattern]:
    """List the tokenizer's special tokens, numbered, and a pattern that finds any of them."""
    contents = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted(contents, key=lambda text: (-len(text), text))
    pattern = "|".join(map(re.escape, longest_first)) or "(?!)"
    return {text: k for k, text in enumerate(longest_first)}, re.compile(pattern)


@functools.lru_cache(maxsize=64)
def special_ids(tokenizer) -> frozenset[int]:
    """List the ids of the tokenizer's special tokens."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def hide(text: str, tokenizer) -> str:
    """Replace special tokens inside a message by private characters."""
    if not text.isascii() and _PRIVATE.search(text):
        raise DataError("a message contains a character of the private planes (U+F0000 and above): remove it")
    numbers, pattern = _special_tokens(tokenizer)
    return pattern.sub(lambda match: chr(_IN_MESSAGE + numbers[match[0]]), text)


def special_texts(value: Any, tokenizer) -> set[str]:
    """Name the special tokens that stand in the texts of a value, where they are characters as any other."""
    pattern, found = _special_tokens(tokenizer)[1], set[str]()

    def look(text: str) -> str:
        found.update(pattern.findall(text))
        return text

    map_texts(value, look)
    return found


def leading_token(text: str, tokenizer) -> str:
    """Return the special token with which a text begins, with white space before it; empty if it begins otherwise."""
    match = re.match(rf"\s*(?:{_special_tokens(tokenizer)[1].pattern})", text)
    return match[0] if match else ""


@functools.lru_cache(maxsize=64)
def end_ids(tokenizer) -> frozenset[int]:
    """List the ids of tokens that can end a turn: special ones, and added ones except closing tags (`</tool_call>`)."""
    added = {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.content[:2] not in ("</", "[/")
    }
    ends = added | special_ids(tokenizer)
    # A BOS after a turn begins the next text. Where one token is both (GPT-2's <|endoftext|>), it ends the turn.
    return frozenset(ends if tokenizer.bos_token_id == tokenizer.eos_token_id else ends - {tokenizer.bos_token_id})


@functools.lru_cache(maxsize=64)
def _ends(tokenizer) -> tuple[tuple[str, ...], str | None]:
    """List the tokens that can end a turn, and the BOS that may follow one."""
    return tuple(tokenizer.convert_ids_to_tokens(sorted(end_ids(tokenizer)))), tokenizer.bos_token


def has_end(turn: str, tokenizer) -> bool:
    """Return whether a turn ends with a token of its own; white space and the next text's BOS may follow it."""
    (ends, bos), turn = _ends(tokenizer), turn.rstrip()
    while not turn.endswith(ends):
        if not bos or not turn.endswith(bos):
            return False
        turn = turn.removesuffix(bos).rstrip()
    return True


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Change every text inside a value; keys stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: map_texts(item, change) for key, item in value.items()}
    return [map_texts(item, change) for item in value] if isinstance(value, list) else value


def restore(text: str, tokenizer) -> str:
    """Restore the special tokens inside messages, as text."""
    if text.isascii():
        return text
    names = list(_special_tokens(tokenizer)[0])
    return _HIDDEN.sub(lambda match: names[ord(match[0]) - _IN_MESSAGE], text)


def has_hidden(text: str) -> bool:
    """Return whether a rendered text contains special tokens of a message."""
    return not text.isascii() and _HIDDEN.search(text) is not None


@functools.lru_cache(maxsize=64)
def literal_tokenizer(tokenizer) -> Tokenizer:
    """Copy the tokenizer, its special tokens renamed to private characters: their usual names are plain text to it."""
    from tokenizers import Tokenizer

    numbers, _ = _special_tokens(tokenizer)
    renamed = {text: chr(_OF_TEMPLATE + k) for text, k in numbers.items()}
    config = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in config["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    vocabulary = config["model"]["vocab"]
    if isinstance(vocabulary, dict):
        config["model"]["vocab"] = {renamed.get(text, text): number for text, number in vocabulary.items()}
    else:
        config["model"]["vocab"] = [[renamed.get(text, text), score] for text, score in vocabulary]
    if config["model"].get("unk_token") in renamed:
        config["model"]["unk_token"] = renamed[config["model"]["unk_token"]]
    config["post_processor"] = config["padding"] = config["truncation"] = None
    return Tokenizer.from_str(json.dumps(config))


def to_literal_form(text: str, tokenizer) -> str:
    """Convert a text for the literal tokenizer: the template's special tokens private, those of messages plain."""
    numbers, pattern = _special_tokens(tokenizer)
    return restore(pattern.sub(lambda match: chr(_OF_TEMPLATE + numbers[match[0]]), text), tokenizer)
