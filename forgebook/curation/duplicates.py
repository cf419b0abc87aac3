"""Exact and near duplicates, and overlap with the validation examples.

    index = DuplicateIndex(similarity=0.8)
    index.add(example, is_validation=False)          for every example, validation examples first
    for pair in index.find(): ...                    Duplicate(example=12, of=3, kind="near_duplicate", similarity=0.86)

Near duplicates by MinHash: datasketch makes the signatures, and examples whose signatures agree in a band are compared
word pair by word pair, so that the similarity is exact. The bands are sorted as arrays: datasketch's own index is a
dictionary per band, which takes several times the memory.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import re
import zlib
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasketch import MinHash, MinHashLSH

from forgebook.data.messages import texts_of
from forgebook.data.row_formats import Example
from forgebook.data.split import as_row, group_of

__all__ = ["Duplicate", "DuplicateIndex", "SeenExamples", "compared_text"]

PERMUTATIONS = 128
LEAST_RECALL = 0.99  # of pairs that are exactly as similar as required
# Boilerplate: word pairs in more than this share of the first examples say nothing about which ones are alike.
COMMON_SHARE, SAMPLE = 0.2, 2_000
FEWEST_OF_SAMPLE = 50
SHORT_ANSWER = 5  # words; a short answer is a label or a result, and examples with different ones are different
NEIGHBORS = 8  # how many examples before it in its band each one is compared with
PAIRS_AT_ONCE = 2**18
# Scripts without spaces between words: each character is a word.
_CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
# What turns a sentence or a line of code into another: numbers, comparisons, operators between two operands; in English
# also numbers in words, and negations.
_NUMBERS = """
    zero two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
    nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion
"""
_VALUE = re.compile(
    r"\d+|[<>=!]=|[<>%^&|]|(?<=[\w)\]] )[+*/=](?= [\w(\[])"
    rf"|(?i:\b(?:not|never|cannot|without|{'|'.join(_NUMBERS.split())})\b|n['’]t\b)"
)


@dataclass(frozen=True)
class Duplicate:
    """An example that repeats another one. example, of: their numbers, in the order of `add`.

    kind: exact_duplicate, near_duplicate or validation_overlap. similarity: of their word pairs (Jaccard);
    is_cosine: of their embeddings.
    """

    example: int
    of: int
    kind: str
    similarity: float
    is_cosine: bool = False


def compared_text(example: Example) -> str:
    """Return the text by which examples are compared: all but the system message, which many share."""
    if example.messages is None:
        return example.text or ""
    messages = [*example.messages, *(example.rejected or ())[-1:]]
    return "\n".join(" ".join(texts_of(message)) for message in messages if message["role"] != "system")


class DuplicateIndex:
    """What is needed of each example to find the ones that repeat it: about 1 KB for a short one."""

    def __init__(self, similarity: float = 0.8, permutations: int = PERMUTATIONS):
        self._similarity = similarity
        self._empty = MinHash(num_perm=permutations, hashfunc=int)
        self._rows_per_band = rows_per_band(similarity, permutations)
        # 64-bit hashes: of all content; of the words alone; of the question; of what duplicates have in common.
        self._exact, self._words, self._groups, self._settings, self._values = (array("Q") for _ in range(5))
        self._is_validation: list[bool] = []
        self._pairs: list[np.ndarray] = []  # [word pairs] of each example: sorted hashes
        self._signatures: list[np.ndarray] = []
        self._common: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._exact)

    def add(self, example: Example, is_validation: bool = False) -> None:
        """Add an example. The first of several that are alike is the one to keep."""
        text = compared_text(example)
        words, values = _WORD.findall(text.lower()), " ".join(_VALUE.findall(text))
        self._exact.append(_hash(_content_text(example)))
        self._words.append(_hash(" ".join([*words, values, _settings_text(example)])))
        self._groups.append(group_of(example))
        self._values.append(_hash(values))
        self._settings.append(_hash(_settings_text(example)))
        self._is_validation.append(is_validation)
        self._pairs.append(_word_pairs(words))
        if self._common is not None:
            self._sign(len(self._pairs) - 1)
        elif len(self._pairs) == SAMPLE:
            self._sign_sample()

    def find(
        self, left_out: Collection[int] = (), by_embeddings: Iterable[tuple[int, int, float]] = ()
    ) -> Iterator[Duplicate]:
        """Yield the examples that repeat an earlier one that is kept, each once, in their order.

        left_out: examples that are dropped for another reason: they are no duplicates, and nothing is one of theirs.
        by_embeddings: more pairs, as (left, right, cosine) with left < right.
        """
        if self._common is None:
            self._sign_sample()
        dropped: dict[int, Duplicate] = self._find_exact(left_out)
        near: dict[int, list[tuple[int, float, bool]]] = collections.defaultdict(list)
        for left, right, similarity in self._similar_pairs():
            near[right].append((left, similarity, False))
        for left, right, similarity in by_embeddings:
            if self._may_repeat(left, right):
                near[right].append((left, similarity, True))
        for example in sorted(near):
            kept = [one for one in near[example] if one[0] not in dropped and one[0] not in left_out]
            if example in dropped or example in left_out or not kept:
                continue
            leaks = [one for one in kept if self._is_validation[one[0]]]
            of, similarity, is_cosine = max(leaks or kept, key=lambda one: (not one[2], one[1]))  # words show why
            kind = "validation_overlap" if leaks else "near_duplicate"
            dropped[example] = Duplicate(example, of, kind, similarity, is_cosine)
        yield from (dropped[example] for example in sorted(dropped))

    def _may_repeat(self, left: int, right: int) -> bool:
        """Check what near duplicates have in common, whatever their words."""
        is_same_kind = self._settings[left] == self._settings[right] or self._is_validation[left]
        return is_same_kind and self._values[left] == self._values[right] and not self._is_validation[right]

    def _find_exact(self, left_out: Collection[int]) -> dict[int, Duplicate]:
        """Find examples that are the same as an earlier one, or ask the same question as a validation example."""
        first: dict[int, int] = {}
        worded: dict[int, int] = {}
        asked: dict[int, int] = {}
        found = {}
        for number, (content, group) in enumerate(zip(self._exact, self._groups, strict=True)):
            if number in left_out:
                continue
            if self._is_validation[number]:
                asked.setdefault(group, number)
            elif group in asked:
                found[number] = Duplicate(number, asked[group], "validation_overlap", 1.0)
            elif content in first:
                found[number] = Duplicate(number, first[content], "exact_duplicate", 1.0)
            elif self._words[number] in worded:
                found[number] = Duplicate(number, worded[self._words[number]], "near_duplicate", 1.0)
            else:
                first[content] = worded[self._words[number]] = number
        return found

    def _sign_sample(self) -> None:
        """Learn which word pairs are boilerplate from the examples so far, then sign these."""
        count = len(self._pairs)
        distinct = list(dict(zip(self._words, self._pairs, strict=True)).values())
        pairs, counts = np.unique(np.concatenate([*distinct, np.empty(0, np.uint32)]), return_counts=True)
        is_enough = len(distinct) >= FEWEST_OF_SAMPLE
        is_common = (counts > COMMON_SHARE * len(distinct)) & is_enough
        self._common = pairs[is_common]
        for number in range(count):
            self._sign(number)

    def _sign(self, number: int) -> None:
        if self._common is not None and len(self._common):
            rest = np.setdiff1d(self._pairs[number], self._common, assume_unique=True)
            self._pairs[number] = rest if len(rest) else self._pairs[number]
        signature = self._empty.copy()
        signature.update_batch(self._pairs[number].tolist())
        self._signatures.append(signature.hashvalues.astype(np.uint32))

    def _similar_pairs(self) -> Iterator[tuple[int, int, float]]:
        """Yield (left, right, similarity) of training examples with an earlier example, if similar enough."""
        signatures = np.array(self._signatures)
        has_words = np.array([len(pairs) > 0 for pairs in self._pairs], bool)
        settings, numbers = np.array(self._settings, np.uint64), np.array(self._values, np.uint64)
        is_validation = np.array(self._is_validation, bool)
        seen: list[np.ndarray] = []
        for start in range(0, signatures.shape[1] - self._rows_per_band + 1, self._rows_per_band):
            pairs = _neighbors(signatures[:, start : start + self._rows_per_band], has_words)
            left, right = pairs // np.uint64(2**32), pairs % np.uint64(2**32)
            left, right = left.astype(np.int64), right.astype(np.int64)
            is_same_kind = (settings[left] == settings[right]) | is_validation[left]
            stays = is_same_kind & (numbers[left] == numbers[right]) & ~is_validation[right]
            seen.append(pairs[stays])
        candidates = np.unique(np.concatenate(seen)) if seen else np.empty(0, np.uint64)
        for start in range(0, len(candidates), PAIRS_AT_ONCE):
            part = candidates[start : start + PAIRS_AT_ONCE]
            left, right = (part // np.uint64(2**32)).astype(np.int64), (part % np.uint64(2**32)).astype(np.int64)
            # The signatures' agreement has a standard deviation of 0.04 around the similarity.
            is_near = (signatures[left] == signatures[right]).mean(axis=1) >= self._similarity - 0.15
            for one, other in zip(left[is_near].tolist(), right[is_near].tolist(), strict=True):
                similarity = _jaccard(self._pairs[one], self._pairs[other])
                if similarity >= self._similarity:
                    yield one, other, similarity


class SeenExamples:
    """Examples that a new one may not repeat: for the few that are made one by one.

    Repeated is the question of another example, or `similarity` of its word pairs with the same numbers.
    """

    def __init__(self, similarity: float = 0.8):
        self._similarity = similarity
        rows = rows_per_band(similarity)
        self._index = MinHashLSH(num_perm=PERMUTATIONS, params=(PERMUTATIONS // rows, rows))
        self._empty = MinHash(num_perm=PERMUTATIONS, hashfunc=int)
        self._where: list[str] = []
        self._pairs: list[np.ndarray] = []
        self._values = array("Q")
        self._asked: dict[int, str] = {}

    def add(self, example: Example) -> None:
        """Add an example."""
        pairs, numbers = _words_of(example)
        self._asked.setdefault(group_of(example), example.where)
        self._index.insert(len(self._where), self._signed(pairs))
        self._where.append(example.where)
        self._pairs.append(pairs)
        self._values.append(numbers)

    def find(self, example: Example) -> str | None:
        """Return the file:line of an example that this one repeats; None if it is new."""
        if (where := self._asked.get(group_of(example))) is not None:
            return where
        pairs, numbers = _words_of(example)
        for number in sorted(self._index.query(self._signed(pairs))):
            if self._values[number] == numbers and _jaccard(self._pairs[number], pairs) >= self._similarity:
                return self._where[number]
        return None

    def _signed(self, pairs: np.ndarray) -> MinHash:
        signature = self._empty.copy()
        signature.update_batch(pairs.tolist())
        return signature


def _words_of(example: Example) -> tuple[np.ndarray, int]:
    """Return the word pairs of an example, and a hash of its numbers and operators."""
    text = compared_text(example)
    return _word_pairs(_WORD.findall(text.lower())), _hash(" ".join(_VALUE.findall(text)))


def rows_per_band(similarity: float, permutations: int = PERMUTATIONS) -> int:
    """Return the most rows of a band with which pairs of this similarity are found with LEAST_RECALL."""
    fits = [
        rows for rows in range(1, 17) if 1 - (1 - similarity**rows) ** (permutations // rows) >= LEAST_RECALL
    ]  # 1 row always does
    return max(fits, default=1)


def _neighbors(band: np.ndarray, has_words: np.ndarray) -> np.ndarray:
    """List pairs of examples whose rows of a band are equal, as left * 2**32 + right with left < right.

    Each example is paired with the first of its group and with the NEIGHBORS before it, so that ten thousand copies
    of one text make no fifty million pairs.
    """
    numbers = np.flatnonzero(has_words)
    keys = band[numbers].astype(np.uint64)
    mixed = np.zeros(len(numbers), np.uint64)
    for column in range(keys.shape[1]):
        mixed = (mixed ^ keys[:, column]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    order = np.argsort(mixed, kind="stable")  # within a group in the order of the examples
    keys, numbers = mixed[order], numbers[order].astype(np.uint64)
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else np.empty(0, np.int64)
    first = np.repeat(starts, np.diff(np.r_[starts, len(keys)]))
    places = np.arange(len(keys))
    pairs = [(first, places, first < places)]
    for distance in range(1, NEIGHBORS + 1):
        pairs.append((places - distance, places, places - distance > first))
    return np.concatenate(
        [numbers[left[chosen]] * np.uint64(2**32) + numbers[right[chosen]] for left, right, chosen in pairs]
    )


def _jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """Return the shared part of two sorted sets."""
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / (len(left) + len(right) - shared)


def _word_pairs(words: Sequence[str]) -> np.ndarray:
    """Hash the pairs of adjacent words; a text of one word has that word."""
    texts = {f"{one} {other}" for one, other in itertools.pairwise(words)} or set(words)
    return np.unique(np.array([zlib.crc32(text.encode()) for text in texts], np.uint32))


def _content_text(example: Example) -> str:
    """Return all of an example as text, spaces and line ends made one space."""
    return json.dumps(_with_single_spaces(as_row(example)), ensure_ascii=False)


def _with_single_spaces(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, dict):
        return {key: _with_single_spaces(item) for key, item in value.items()}
    return [_with_single_spaces(item) for item in value] if isinstance(value, list) else value


def _settings_text(example: Example) -> str:
    """Return what near duplicates must have in common: system message, tools and a short last answer."""
    if example.messages is None:
        return ""
    systems = [str(message["content"]) for message in example.messages if message["role"] == "system"]
    answer = _WORD.findall(str(example.messages[-1].get("content") or "").lower())
    short = " ".join(answer) if len(answer) <= SHORT_ANSWER else ""
    return "\0".join([*systems, repr(example.tools), short])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
