"""Write a log of questions that a weak and a strong model have both answered, with a judge's score of each answer.

    python data/make_router.py data/router

The questions are of seven kinds, with up to two conditions; each kind and each condition makes a question harder.
The two models and the judge are simulated: the weak model's score falls fast with the difficulty, the strong one's
slowly, both with noise, so that no router can be right every time. Scores go from 1 to 5; at 4 an answer will do.

The test has things, frames and forms of words to itself: half of its frames and things, and each kind's last form,
which half of its rows have, occur in no row of train.jsonl and valid.jsonl.
"""

import argparse
import random
from pathlib import Path

from make_quickstart import NEW_ITEMS, WORLD, write_rows

# kind: (difficulty, how often it is asked)
KINDS = {
    "greet": (0.0, 14),
    "look up": (0.4, 24),
    "list": (0.9, 20),
    "write": (1.5, 16),
    "compare": (2.2, 10),
    "plan": (2.8, 9),
    "work out": (3.4, 7),
}
# Each kind's last form is the test's alone.
FORMS = {
    "greet": [
        "say hello to {name}", "say good night to {name}", "say good morning to {name}", "say goodbye to {name}",
        "say thank you to {name}",
    ],
    "look up": [
        "tell me the price of a {item}", "find the price of the {item}", "tell me what a {item} costs",
        "find out what the {item} costs", "look for the price of a {item}",
    ],
    "list": [
        "name three colors of a {item}", "list the parts of a {item}", "list three uses of the {item}",
        "name the parts of the {item}", "list some colors of the {item}",
    ],
    "write": [
        "write a letter about a {item}", "write {name} a note", "write a note about the {item}",
        "write a song for {name}", "write a story about {name}",
    ],
    "compare": [
        "compare a {item} with a {other}", "compare the {item} and the {other}",
        "compare the prices of a {item} and a {other}", "compare this {item} with that {other}", "compare two {item}s",
    ],
    "plan": [
        "plan a week with {name}", "make a plan to repair a {item}", "plan how to move a {item}",
        "make a plan for {name}", "plan how to sell a {item}",
    ],
    "work out": [
        "work out how a {item} works", "explain why a {item} stopped", "work out why the {item} stopped",
        "explain how the {item} works", "work out why the {item} is late",
    ],
}  # fmt: skip
CONDITIONS = ["in one sentence", "without the word {word}", "as a table", "with a reason for each step"]
HARDER = 0.5  # by each condition
FRAMES = [
    "Please {ask}.",
    "Can you {ask}?",
    "I want you to {ask}.",
    "Hello, {ask}.",
    "Would you {ask}?",
    "It is late, but {ask}.",
]
TEST_FRAMES = ["Could you {ask}, please?", "My question: {ask}.", "One more thing: {ask}.", "{ask}, thank you."]


def score(rng: random.Random, mean: float) -> int:
    """Judge an answer: a whole number from 1 to 5 near `mean`."""
    return min(5, max(1, round(rng.gauss(mean, 0.45))))


def make_row(rng: random.Random, is_test: bool) -> dict:
    """Ask one question of both models."""
    kind = rng.choices(list(KINDS), [often for _, often in KINDS.values()])[0]
    difficulty, forms = KINDS[kind][0], FORMS[kind]
    items = [item for item in WORLD["items"] if item not in NEW_ITEMS and item[0] not in "aeiou"]
    items = NEW_ITEMS if is_test and rng.random() < 0.5 else items
    item, other = rng.sample(items, 2)
    conditions = rng.sample(CONDITIONS, rng.choices((0, 1, 2), (5, 4, 2))[0])
    form = forms[-1] if is_test and rng.random() < 0.5 else rng.choice(forms[:-1])
    ask = " ".join([form, *conditions])
    frame = rng.choice(TEST_FRAMES if is_test and rng.random() < 0.5 else FRAMES)
    names = {"name": rng.choice(WORLD["first_names"]), "word": rng.choice(WORLD["adjectives"])}
    query = frame.format(ask=ask).format(item=item, other=other, **names)
    difficulty += HARDER * len(conditions)
    weak, strong = score(rng, 5.6 - difficulty), score(rng, 5.3 - 0.2 * difficulty)
    return {"query": query[0].upper() + query[1:], "weak": weak, "strong": strong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for split, count in {"train": 2_400, "valid": 400, "test": 600}.items():
        write_rows(folder / f"{split}.jsonl", [make_row(rng, split == "test") for _ in range(count)])


if __name__ == "__main__":
    main()
