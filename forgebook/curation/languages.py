"""The language of a text: by its script, and of Latin scripts by the commonest words of some languages.

language_of("Where is my parcel?")      ("Latin", "English"); None where it does not show
"""

from __future__ import annotations

import collections
import re

__all__ = ["language_of"]

_SCRIPTS = {
    "Latin": "A-Za-z\u00c0-\u024f",
    "Cyrillic": "\u0400-\u04ff",
    "Greek": "\u0370-\u03ff",
    "Arabic": "\u0600-\u06ff",
    "Hebrew": "\u0590-\u05ff",
    "Devanagari": "\u0900-\u097f",
    "Thai": "\u0e00-\u0e7f",
    "Japanese": "\u3040-\u30ff",
    "Chinese": "\u3400-\u9fff",
    "Korean": "\uac00-\ud7af",
}
_LETTERS = {name: re.compile(f"[{ranges}]") for name, ranges in _SCRIPTS.items()}
# Words that most sentences of a language have one of. One that several have is listed for each, and votes for each.
_COMMON = {
    "English": """
        a about after all am an and any are as at back be because been before but by can could did do does each for from
        get give had has have he her here him his how i if in into is it its just let like make me more must my new no
        not now of off on one only or our out over please she should so some such than that the their them then there
        these they this to two under up us use very want was we were what when where which while who why will with would
        write you your""",
    "German": """
        aber alle als am an auch auf aus bei bin bis bitte da damit dann das dass dem den der des die dies diese dieser
        doch du durch ein eine einem einen einer es für haben habe hat hier ich ihr ihre im immer in ist ja jetzt kann
        kein keine kommt können machen man mehr mein meine meinen mich mir mit muss nach nicht nie noch nur oder schon
        sehr sein sich sie sind so soll über um und uns unter vom von vor war warum was wenn werden wie wieder wird wo
        wohin zu zum zur zwei zwischen""",
    "French": """
        a ai alors au aussi aux avant avec avez avoir bien c ce ces cette chez comme comment d dans de des deux doit
        dois du elle elles en est et être eu faire fait il ils j je jusqu l la le les leur lui m ma mais me mes moi mon
        n ne non nos notre nous on ont ou où par pas peut plus pour pourquoi pouvez puis qu quand que quel quelle qui s
        sa sans se ses si son sont sous sur t ta tout toute très tu un une vos votre vous y""",
    "Spanish": """
        a ahora al algo antes aquí así aunque cada como cómo con cual cuando cuándo de del desde donde dónde dos el él
        ella ellos en entre era es esta está estas este estos estoy favor fue ha hacer hasta hay he la las le les lo los
        más me mi mientras mis muy nada ni no nos nosotros nuestro nunca o otro para pero por porque puede puedo que qué
        quién se ser si sí sin sobre son su sus también te tiene todo todos tu tus un una uno unos usted ustedes y ya
        yo""",
    "Italian": """
        a adesso ai al alla alle anche ancora che chi ci come con cosa così da dal dalla degli dei del della delle di
        dopo dove due e è ed era essere fa fare favore fra gli ha hanno ho i il in io la le lei li lo loro lui ma mai me
        mi mia mie mio molto nel nella no noi non nostro o ogni ora per perché più poi possiate quale quando quella
        questa questo qui se sei senza si solo sono sopra sotto sua sue sul sulla sulle suo ti tra tu tutti tutto un una
        uno vi voi""",
    "Portuguese": """
        a ainda algo antes ao aos aqui as assim até cada com como da das de dela dele depois devo do dois dos duas e é
        ela elas ele eles em então era essa esse esta está este eu faz fazer favor foi há isso isto já lhe mais mas me
        mesmo meu meus minha minhas muito na não nas nem no nos nós nossa nunca o onde os ou outro para pela pelo pode
        podem por porque posso quando que quem se sem ser seu sobre são só sua também te tem ter toda todo tudo um uma
        vai você vocês""",
    "Dutch": """
        aan al alle als alstublieft altijd bij ben bent daar dan dat de deze die dit doen doet door dus een en er gaan
        geef geen had hebben hebt heb heeft het hier hij hoe ik in is ja je jij jullie kan kunnen kunt maar maken me
        meer met mij mijn moet mogen na naar naartoe niet nog nooit nu of om omdat onder ons ook op over te tegen terug
        toen tot twee u uit uw van veel voor waar waarom wanneer wat we weer wel werd wie wij wil worden wordt zal ze
        zeer zich zij zijn zo zodat zonder zou""",
}
_LANGUAGES_OF: dict[str, list[str]] = {}
for _language, _words in _COMMON.items():
    for _word in _words.split():
        _LANGUAGES_OF.setdefault(_word, []).append(_language)
# Signs that only one of these languages has.
_SIGNS = {"ß": "German", "ñ": "Spanish", "¿": "Spanish", "¡": "Spanish", "ã": "Portuguese", "õ": "Portuguese"}
_LATIN_WORD = re.compile(r"[A-Za-z\u00c0-\u024f]+")
FEWEST_LETTERS = 12
EXAMINED = 4_000  # characters: the language of a longer text shows in its beginning
MOST_OF_ONE_WORD = 3  # a word that a text repeats for another reason does not decide
FEWEST_VOTES, MARGIN = 1.5, 1.7  # a word of k languages is 1/k of a vote


def language_of(text: str) -> tuple[str | None, str | None]:
    """Name the script of a text, and of Latin ones the language; None where it does not show."""
    text = text[:EXAMINED]
    counts = {name: len(pattern.findall(text)) for name, pattern in _LETTERS.items()}
    if counts["Japanese"]:
        counts["Japanese"] += counts.pop("Chinese")  # kanji
    script, most = max(counts.items(), key=lambda one: one[1])
    if most < FEWEST_LETTERS or most < 0.8 * sum(counts.values()):
        return None, None
    if script != "Latin":
        return script, None
    votes = dict.fromkeys(_COMMON, 0.0)
    text = text.lower()
    for word, count in collections.Counter(_LATIN_WORD.findall(text)).items():
        languages = _LANGUAGES_OF.get(word, ())
        for language in languages:
            votes[language] += min(count, MOST_OF_ONE_WORD) / len(languages)
    for sign, language in _SIGNS.items():
        votes[language] += sign in text
    (first, most_votes), (_, second) = sorted(votes.items(), key=lambda one: -one[1])[:2]
    return script, first if most_votes >= FEWEST_VOTES and most_votes >= MARGIN * second else None
