"""What is wrong with one example by its text alone: short, long, truncated or refusing answers, languages, PII.

checks = TextChecks(min_answer_characters=1, max_characters=None, refusals=())
for number, example in enumerate(examples):
    for finding in checks.find(number, example): ...
more = checks.unfinished()        once all examples were seen: whether answers usually end with a full stop
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from forgebook.curation.languages import language_of
from forgebook.curation.refusals import refusal_in
from forgebook.data.messages import texts_of
from forgebook.data.row_formats import Example

__all__ = ["Finding", "TextChecks", "answers_of", "mask_personal_data"]

# An answer without a full stop is truncated only where nearly all others of the data have one.
USUAL_SHARE, FEWEST_ANSWERS, FEWEST_WORDS = 0.9, 20, 8
FULL_STOPS = tuple(".!?:。！？…)]}>\"'`”’»*|=;")
_OPEN_END = re.compile(r"[,\-–—(\[{]$|\b(?:and|or|but|the|an?|of|to|with|for|in|by|that|which|because|is|are)$")

# -- personal data

_PERSONAL = {
    "email address": re.compile(r"[\w.+%-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"),
    "key": re.compile(
        r"\b(?:sk-[A-Za-z0-9_-]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,}|"
        r"xox[abprs]-[A-Za-z0-9-]{10,}|AIza[A-Za-z0-9_-]{35}|hf_[A-Za-z0-9]{30,}|glpat-[A-Za-z0-9_-]{20,}|"
        r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,})|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"
    ),
    "card number": re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d.])"),
    "phone number": re.compile(
        r"(?<![\w.+])(?:\+\d{1,3}[ .-]?(?:\(?\d{1,4}\)?[ .-]?){2,5}\d{2,4}|\(\d{3}\) ?\d{3}[ .-]\d{4}|"
        r"\d{3}[.-]\d{3}[.-]\d{4})(?![\w-])"
    ),
}


@dataclass(frozen=True)
class Finding:
    """A reason to drop or report an example. number: of the example, in the order read. of: the one that it repeats."""

    number: int
    reason: str
    detail: str
    of: int | None = None


def answers_of(example: Example) -> list[str]:
    """List what an example teaches: the assistant's texts in the loss; of a pair the chosen ones; else the text."""
    if example.messages is None:
        return [example.text or ""]
    return [
        str(message.get("content") or "")
        for message in example.messages
        if message["role"] == "assistant" and message.get("weight") != 0 and not message.get("tool_calls")
    ]


class TextChecks:
    """Checks of single examples; it also counts how answers end."""

    def __init__(
        self,
        min_answer_characters: int = 1,
        max_characters: int | None = None,
        refusals: Sequence[str] = (),
        has_labels: bool = False,
    ):
        """Take the settings. has_labels: answers are labels, of which only personal data and length are checked."""
        self._shortest, self._longest, self._has_labels = min_answer_characters, max_characters, has_labels
        self._refusals = [re.compile(one, re.IGNORECASE) for one in refusals]
        self._long_answers = self._stopped = 0
        self._unfinished: list[int] = []

    def find(self, number: int, example: Example) -> Iterator[Finding]:
        """Yield what is wrong with an example."""
        answers, texts = answers_of(example), _texts(example)
        size = sum(map(len, texts))
        if self._longest is not None and size > self._longest:
            yield Finding(number, "too_long", f"{size:,} characters")
        if personal := _personal_data(texts):
            yield Finding(number, "personal_data", ", ".join(personal))
        if self._has_labels:
            return
        if answers and min(map(_characters, answers)) < self._shortest:
            yield Finding(number, "empty_answer", f"{min(map(_characters, answers))} letters and digits")
            return
        if example.messages is not None:
            if phrase := next(filter(None, (refusal_in(answer, self._refusals) for answer in answers)), None):
                yield Finding(number, "refusal", phrase)
            if languages := _mixed_languages(example, answers):
                yield Finding(number, "mixed_languages", languages)
        if answers and (detail := self._truncation(number, answers[-1], is_text=example.messages is None)):
            yield Finding(number, "truncated", detail)

    def unfinished(self) -> list[Finding]:
        """List the answers without a full stop, where nearly all long ones of the data have one."""
        if self._long_answers < FEWEST_ANSWERS or self._stopped < USUAL_SHARE * self._long_answers:
            return []
        share = self._stopped / self._long_answers
        detail = f"no full stop at its end, as {share:.0%} of the answers have"
        return [Finding(number, "truncated", detail) for number in self._unfinished]

    def _truncation(self, number: int, answer: str, is_text: bool) -> str | None:
        answer = answer.rstrip()
        if answer.count("```") % 2:
            return "a block of code that does not end"
        if answer[:1] in ("{", "[") and answer[1:2] != "[" and not _is_json(answer) and _opens_json(answer):
            return "JSON that does not end"
        if is_text:
            return None  # plain text may be a part of a longer one
        if len(answer.split()) >= FEWEST_WORDS:
            if match := _OPEN_END.search(answer.lower()):
                return f"it ends with {match[0]!r}"
            self._long_answers += 1
            if answer.endswith(FULL_STOPS) or not answer[-1].isalpha():
                self._stopped += 1
            else:
                self._unfinished.append(number)
        return None


def mask_personal_data(text: str) -> str:
    """Replace personal data, all but its first characters: a report is passed on more readily than its data."""
    for name, pattern in _PERSONAL.items():
        text = pattern.sub(lambda match, name=name: _masked(match[0], name), text)  # type: ignore[misc]
    return text


def _masked(found: str, name: str) -> str:
    return found if name == "card number" and not _passes_luhn(found) else f"{found[:3]}[{name}]"


def _texts(example: Example) -> list[str]:
    messages = [*(example.messages or ()), *(example.rejected or ())[-1:]]
    return [text for message in messages for text in texts_of(message)] or [example.text or ""]


def _characters(text: str) -> int:
    return sum(map(str.isalnum, text))


def _personal_data(texts: list[str]) -> list[str]:
    text = "\n".join(texts)
    found = []
    for name, pattern in _PERSONAL.items():
        hits = {match[0] for match in pattern.finditer(text)}
        hits = {hit for hit in hits if name != "card number" or _passes_luhn(hit)}
        if hits:
            plural = "es" if name.endswith("s") else "s"
            found.append(f"{len(hits)} {name}{plural * (len(hits) > 1)}")
    return found


def _passes_luhn(number: str) -> bool:
    """Check the last digit of a card number."""
    digits = [int(sign) for sign in reversed(number) if sign.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _opens_json(text: str) -> bool:
    """Report whether a text begins like JSON and has more brackets opened than closed."""
    opened = text.count("{") + text.count("[") - text.count("}") - text.count("]")
    return opened > 0 and re.match(r'[{\[]\s*["{\[\d]', text) is not None


def _mixed_languages(example: Example, answers: list[str]) -> str | None:
    """Say in which languages the first question and the answers are, if these differ."""
    question = next((str(m.get("content") or "") for m in example.conversation if m["role"] == "user"), "")
    (script, language), (other_script, other) = (language_of(text) for text in (question, "\n".join(answers)))
    if script and other_script and script != other_script:
        return f"question in {language or script}, answer in {other or other_script}"
    return f"question in {language}, answer in {other}" if language and other and language != other else None
