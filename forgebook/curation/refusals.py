"""Refusals of a language model in English, by the phrases with which they begin.

refusal_in("Sorry, but I can't help with that.")      the phrase; None for any other answer
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["refusal_in"]

START = 200  # characters: a refusal begins with its phrase; later it may be quoted
_CANNOT = r"(?:can(?:no|')t|can not|won't|will not)(?: and (?:will not|won't|cannot|can't))?(?: be able to)?"
_IS_NOT = r"(?:unable|not able|not allowed|not permitted|not comfortable|not programmed|not going)(?: to| with)?"
_NEGATED = rf"(?:{_CANNOT}|{_IS_NOT}|don't|do not|(?:must|have to) (?:decline|refuse))"
# What a model does for its user: "I can't wait" and "I cannot recommend it enough" refuse nothing.
_HELP = (
    r"(?:access|advise|answer|assist|browse|comment|comply|complete|continue|create|disclose|discuss|"
    r"do (?:that|this|it)|engag(?:e|ing)|form|fulfil|generate|"
    r"give (?:you )?(?:advice|medical|legal|financial|information)|help|look up|offer|open|participat(?:e|ing)|predict|"
    r"process|produce|provide|providing|respond|reveal|search|see (?:the |your )?(?:image|picture|file)|send|"
    r"shar(?:e|ing)|speculate|summari[sz]e|support|talk about|translate|verify|view|writ(?:e|ing)|"
    r"have (?:personal |real-time |access |information|feelings|opinions|the ability|enough information))"
)
_SORRY = r"(?:i(?:'m| am) (?:very |so |really |truly |deeply )?)?sorry"
_APOLOGY = (
    rf"(?:{_SORRY}|(?:my |our )?(?:sincere )?apologies|i apologi[sz]e|unfortunately|regrettably|i(?:'m| am) afraid|"
    r"i regret to (?:say|inform you))"
)
_MODEL = (
    r"an? (?:ai\b|artificial intelligence\b|(?:large )?language model\b)(?: language)?(?: model| assistant| system)?"
)
_PHRASES = (
    # It speaks of itself as a model, or of its rules.
    rf"^.{{0,60}}\bas {_MODEL},? (?:i|my)\b",
    rf"\bi(?:'m| am) (?:just |only )?{_MODEL}",
    r"\b(?:against|violates?|outside) my (?:\w+ )?(?:guidelines|policy|policies|programming|principles)",
    r"^it (?:is|would be|wouldn't be|would not be|is not) (?:not )?(?:in)?appropriate (?:for me|to)",
    r"\bmy (?:guidelines|policy|policies|programming) (?:do|does) not (?:allow|permit)",
    rf"^(?:{_SORRY},? (?:but )?)?(?:that|this)(?:'s| is) (?:not something i(?:'m| am| can)|something i can(?:no|')t)",
    # An apology, and then what it does not do.
    rf"^{_APOLOGY}(?: for [\w ]{{3,40}})?[,.:;!]?(?: but)?(?: that)?(?: as an? [\w ]{{2,30}},?)? "
    rf"i(?:'m| am)? (?:\w+ )?{_NEGATED} (?:[\w']+ ){{0,6}}?{_HELP}",
    rf"^{_SORRY},?(?: but)? i {_CANNOT} (?:be |do |tell )",
    rf"^i(?:'m| am) afraid (?:that )?i {_CANNOT} ",
    # The same without an apology.
    rf"^(?:well, )?i (?:simply |just )?{_CANNOT} (?:in good conscience |\w+ ){{0,2}}?{_HELP}",
    rf"^i(?:'m| am) {_IS_NOT} (?:\w+ )?{_HELP}",
    r"^i(?:'m going to| am going to| will|'ll) have to (?:decline|refuse)",
    r"^i (?:must|have to) (?:respectfully )?(?:decline|refuse)\b",
    r"^i(?:'d| would) rather not (?:answer|say|discuss)",
    r"^i (?:do not|don't) feel comfortable",
    r"^i (?:do not|don't) have (?:personal |real-time |feelings|opinions|enough information|the ability)",
    r"^i (?:do not|don't) have access to (?:[\w-]+ ){0,2}(?:information|data|internet)",
)
_REFUSAL = re.compile("|".join(_PHRASES), re.IGNORECASE | re.DOTALL)


def refusal_in(answer: str, more: Sequence[re.Pattern[str]] = ()) -> str | None:
    """Return the phrase with which an answer refuses; None if it does not. more: patterns of the user's."""
    start = answer.lstrip()[:START].replace("’", "'")
    return next((match[0] for one in (_REFUSAL, *more) if (match := one.search(start))), None)
