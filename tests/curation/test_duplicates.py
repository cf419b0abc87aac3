"""Near duplicates, compared with the similarity of all pairs; and what is no duplicate however alike it is."""

import itertools
import random

import pytest

from conftest import chat
from forgebook.curation.duplicates import DuplicateIndex, rows_per_band
from forgebook.data.row_formats import parse_row

LETTERS, VOWELS = "abcdefghijklmnopqrstuvwxyz", "aeiou"
MADE_UP = [LETTERS[k % 26] + VOWELS[k % 5] + LETTERS[k // 7 % 26] for k in range(900)]
# Not these: examples that differ in a negation or a number are never near duplicates.
WORDS = [word for word in MADE_UP if word not in ("not", "six", "ten")]


def example(question: str, answer: str = "It is on the table.", system: str | None = None, **more):
    row = chat(question, answer, system) | more
    return parse_row(row, "a.jsonl:1", "instruction_tuning")[0]


def found_in(examples, similarity=0.8, validation=()):
    index = DuplicateIndex(similarity)
    for one in validation:
        index.add(one, is_validation=True)
    for one in examples:
        index.add(one)
    return {(one.example - len(validation), one.kind) for one in index.find()}


def pairs_of(text: str) -> set:
    words = [word.strip(".?") for word in text.lower().split()]
    return set(itertools.pairwise(words))


def test_the_pairs_found_are_those_of_all_pairs_compared():
    """Independently: every pair of texts, by the Jaccard similarity of their word pairs."""
    rng = random.Random(3)
    texts = [" ".join(rng.choices(WORDS, k=40)) for _ in range(120)]
    for text in texts[:90]:
        words = text.split()
        for place in rng.sample(range(40), rng.randrange(1, 8)):
            words[place] = rng.choice(WORDS)
        texts.append(" ".join(words))
    sets = [pairs_of(f"{text} It") for text in texts]  # the rest of the answer is boilerplate
    kept, right = [], set()
    for k, one in enumerate(sets):
        if any(len(one & sets[j]) / len(one | sets[j]) >= 0.6 for j in kept):
            right.add(k)
        else:
            kept.append(k)
    assert 20 < len(right) < 85
    found = {k for k, _ in found_in([example(text) for text in texts], 0.6)}
    assert found == right


LONG = "please tell me where the old lamp of my aunt is, which she lost in the garden of the big house by the sea"


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        ({"question": LONG}, "exact_duplicate"),
        ({"question": LONG.replace(" ", "  ") + "\n"}, "exact_duplicate"),
        ({"question": LONG.upper().replace(",", ";")}, "near_duplicate"),
        ({"question": LONG.replace("old ", "")}, "near_duplicate"),
        ({"question": LONG, "answer": "In the cellar."}, None),
        ({"question": LONG, "system": "Answer in French."}, None),
        ({"question": LONG + " and order 72"}, None),
        ({"question": LONG + " if a < b"}, None),
        ({"question": LONG + " is of type GX5"}, None),
        ({"question": LONG.replace("the old lamp", "seven old lamps")}, None),
        ({"question": LONG.replace("which she lost", "which she didn't lose")}, None),
        ({"question": LONG + "! It is urgent - thanks!"}, "near_duplicate"),
        ({"question": "where is the key of the door that leads to the cellar of the other house"}, None),
    ],
)
def test_what_is_a_duplicate(other, kind):
    found = found_in([example(LONG), example(**other)])
    assert found == ({(1, kind)} if kind else set())


def test_a_question_of_the_validation_examples_is_a_leak_whatever_its_answer():
    validation = [example(LONG)]
    asked = [
        example(LONG, "No."),
        example(LONG.replace("old ", "")),
        example(LONG.replace("lamp", "lamp 2")),
    ]
    assert found_in(asked, validation=validation) == {(0, "validation_overlap"), (1, "validation_overlap")}


def test_a_chain_of_small_changes_is_not_one_duplicate():
    """The second is like the first, the third like the second alone: it stays."""
    words = WORDS[:40]
    texts = [" ".join([*WORDS[200 : 200 + 4 * k], *words[4 * k :]]) for k in range(3)]
    assert found_in([example(text) for text in texts], 0.75) == {(1, "near_duplicate")}


def test_boilerplate_makes_no_duplicates():
    policy = "you are asked to say whether the message below is safe, by these rules: " + " ".join(WORDS[:60])
    questions = [f"{policy} message: {' '.join(random.Random(k).choices(WORDS, k=6))}" for k in range(60)]
    assert found_in([example(question) for question in questions]) == set()


def test_many_copies_of_one_text_are_found_quickly():
    found = found_in([example(f"{LONG} {'!' * k}") for k in range(400)])
    assert {k for k, _ in found} == set(range(1, 400))


def test_characters_of_scripts_without_spaces_are_words():
    question = "请告诉我昨天在花园里丢失的那盏旧灯现在在哪里因为我的姑妈正在到处寻找它"
    assert found_in([example(question), example(question + "了")]) == {(1, "near_duplicate")}


def test_opposite_programs_and_other_thoughts_are_no_duplicates():
    def written(code):
        return example(LONG, f"Here is what you asked for, in one line: {code}")

    signs = ["return a < b", "return a >= b", "return a + b", "return a - b"]
    assert found_in(map(written, signs)) == set()

    def thinking(thought):
        answer = {"role": "assistant", "content": "In the garden.", "reasoning_content": thought}
        row = {"messages": [{"role": "user", "content": LONG}, answer]}
        return parse_row(row, "a.jsonl:1", "instruction_tuning")[0]

    assert found_in([thinking(" ".join(WORDS[:30])), thinking(" ".join(WORDS[30:60]))]) == set()


def test_calls_count_as_text():
    def calling(city):
        call = {"type": "function", "id": "a", "function": {"name": "f", "arguments": f'{{"city": "{city}"}}'}}
        tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
        messages = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        return parse_row({"messages": messages, "tools": tools}, "a.jsonl:1", "instruction_tuning")[0]

    assert found_in([calling("Rome"), calling("Oslo"), calling("Rome")]) == {(2, "exact_duplicate")}


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.8, 0.9, 1.0])
def test_bands_find_pairs_at_the_threshold(similarity):
    rows = rows_per_band(similarity)
    assert 1 - (1 - similarity**rows) ** (128 // rows) >= 0.99
    assert rows == 16 or 1 - (1 - similarity ** (rows + 1)) ** (128 // (rows + 1)) < 0.99 or similarity == 1
