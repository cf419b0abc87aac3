"""Write arithmetic word problems in GSM8K's form: the working with its <<sums>>, then #### and the number.

    python data/make_word_problems.py data/word_problems

One or two steps, each of which adds or takes away a number of one digit; no number is above 50. They are far easier
than GSM8K's problems, and none of those is among them.

Held out for test.jsonl: sums (where 17 + 8 is asked in the test, no training row has 17 + 8, 8 + 17, 25 - 8 or
25 - 17), the people's names, half of the things, and every sentence that says what happened. Words are not held
out: a new sentence is put together from words that training sentences have.
"""

import argparse
import random
from pathlib import Path

from make_quickstart import write_rows
from make_tiny_corpus import WORLD

SMALLEST, LARGEST = 2, 50
ONE_DIGIT = 9
# One in so many sums is the test's.
HELD_OUT = 8

THINGS = """apples books stamps marbles cards shells coins pencils stickers buttons eggs oranges plants flowers tickets
stones balls cakes pens cups""".split()
NEW_THINGS = "boxes photos keys candles pears bottles letters toys".split()
# What happens: the sentences of the training rows, then those of the test alone. {b} is the number.
START = [
    ["{name} has {a} {things}.", "There are {a} {things} in the bag of {name}.", "At first {name} has {a} {things}.",
     "{name} owns {a} {things}.", "In the morning {name} has {a} {things} in a bag.",
     "At first there are {a} {things} with {name}.", "In the bag of {name} there are {a} {things}.",
     "In the morning there are {a} {things} in a bag. It is the bag of {name}.", "At first {name} owns {a} {things}.",
     "On {day} {name} owns {a} {things}.", "On {day} there are {a} {things} in the bag of {name}.",
     "{a} {things} are in the bag of {name}."],
    ["At first there are {a} {things} in the bag of {name}.", "In the morning {name} owns {a} {things}."],
]  # fmt: skip
GAIN = [
    ["{name} buys {b} more.", "{friend} gives {name} {b} more.", "Then {name} finds {b} more {things}.",
     "{name} gets {b} more {things} from {friend}.", "Later {friend} brings {b} more.",
     "On {day} {name} makes {b} more {things}.", "Later {friend} gives {name} {b} more {things}.",
     "On {day} {name} finds {b} more.", "Then {friend} brings {name} {b} more {things}.",
     "Later {name} buys {b} more {things}.", "On {day} {name} gets {b} more from {friend}.",
     "Then {name} makes {b} more."],
    ["On {day} {friend} gives {name} {b} more {things}.", "Later {name} finds {b} more.",
     "Then {name} buys {b} more {things} from {friend}."],
]  # fmt: skip
LOSS = [
    ["{name} gives {b} of them to {friend}.", "{name} loses {b} of the {things}.",
     "Then {friend} takes {b} of them away.",
     "{name} sells {b} of them on {day}.", "Later {b} of the {things} are lost.",
     "On {day} {name} gives {b} {things} away.", "Then {name} loses {b} of them.",
     "On {day} {name} sells {b} of the {things} to {friend}.", "Later {name} gives {b} of the {things} away.",
     "On {day} {friend} takes {b} of the {things}.", "Later {name} gives {friend} {b} of them.",
     "Then {name} sells {b} {things} to {friend}."],
    ["On {day} {name} loses {b} of them.", "Later {name} sells {b} of the {things} to {friend}.",
     "Then {name} gives {b} of them away."],
]  # fmt: skip
NOW = [
    ["How many {things} does {name} have now?", "How many {things} are left with {name}?",
     "How many does {name} have in the end?", "What number of {things} does {name} have now?",
     "What number of them does {name} have in the end?", "How many of the {things} are left now?",
     "What number of {things} does {name} own in the end?", "How many {things} are with {name} in the end?"],
    ["How many {things} does {name} have in the end?", "What number of {things} are left with {name}?"],
]  # fmt: skip
OTHER = [
    ["{friend} has {b} {things}.", "There are {b} {things} in the bag of {friend}.", "{friend} owns {b}.",
     "In the bag of {friend} there are {b}.", "There are {b} with {friend}.", "{friend} has {b} of them in a bag.",
     "With {friend} there are {b} {things}."],
    ["{friend} owns {b} {things}.", "There are {b} in the bag of {friend}."],
]  # fmt: skip
MORE = [
    ["{friend} has {b} more than {name}.", "{friend} owns {b} {things} more than {name}.",
     "In the bag of {friend} there are {b} more than {name} has.",
     "There are {b} {things} more in the bag of {friend} than {name} has.",
     "With {friend} there are {b} more than with {name}.",
     "{friend} has {b} of them more than {name} has.", "{friend} owns {b} {things} more than {name} owns."],
    ["{friend} owns {b} more than {name}.", "{friend} has {b} {things} more than {name}."],
]  # fmt: skip
BOTH = [
    ["How many {things} do {name} and {friend} have together?", "How many {things} do they have together?",
     "How many do both have together?", "How many do both of them have together?",
     "What number of {things} do they have together?", "What number do {name} and {friend} have together?",
     "How many {things} do {name} and {friend} own together?"],
    ["How many do {name} and {friend} have together?", "How many {things} do both have together?"],
]  # fmt: skip
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
# What happens in a problem, and its steps: of the numbers so far, which are added (+) or taken away (-).
KINDS = {
    "gain": ((START, GAIN, NOW), ["+"]),
    "loss": ((START, LOSS, NOW), ["-"]),
    "together": ((START, OTHER, BOTH), ["+"]),
    "gain, then loss": ((START, GAIN, LOSS, NOW), ["+", "-"]),
    "loss, then gain": ((START, LOSS, GAIN, NOW), ["-", "+"]),
    "more, together": ((START, MORE, BOTH), ["+", "again"]),
}


def fact(a: int, sign: str, b: int) -> tuple[int, int]:
    """Name the sum that a step stands on: 25 - 8 and 25 - 17 stand on 8 + 17."""
    return tuple(sorted((a, b) if sign == "+" else (b, a - b)))


def draw_steps(rng: random.Random, signs: list[str]) -> list[tuple[int, str, int]]:
    """Draw numbers; each step begins with the result of the one before."""
    a, steps = rng.randint(SMALLEST, LARGEST), []
    first = a
    for sign in signs:
        b = first if sign == "again" else rng.randint(SMALLEST, LARGEST)
        steps.append((a, "-" if sign == "-" else "+", b))
        a = a - b if sign == "-" else a + b
    return steps


def is_drawn_for(steps: list[tuple[int, str, int]], held_out: set[tuple[int, int]], is_test: bool) -> bool:
    """Tell whether the numbers are small enough, and all sums are of the test or none is."""
    results = [a - b if sign == "-" else a + b for a, sign, b in steps]
    is_small = all(SMALLEST <= number <= LARGEST for number in results)
    is_easy = all((b if sign == "-" else min(a, b)) <= ONE_DIGIT for a, sign, b in steps)
    return is_small and is_easy and all((fact(*step) in held_out) == is_test for step in steps)


def make_row(rng: random.Random, held_out: set[tuple[int, int]], is_test: bool) -> dict:
    """Make one problem with its worked answer."""
    phrases, signs = KINDS[rng.choice(list(KINDS))]
    steps = draw_steps(rng, signs)
    while not is_drawn_for(steps, held_out, is_test):
        steps = draw_steps(rng, signs)
    mine = [name for k, name in enumerate(WORLD["first_names"]) if (k % 5 == 0) == is_test]
    name, friend = rng.sample(mine, 2)
    things = rng.choice(NEW_THINGS if is_test and rng.random() < 0.5 else THINGS)
    words = {"name": name, "friend": friend, "things": things, "day": rng.choice(DAYS), "a": steps[0][0]}
    numbers = iter(step[2] for step in steps)
    sentences = []
    for kind in phrases:
        sentence = rng.choice(kind[is_test])
        sentences.append(sentence.format(**words, **({"b": next(numbers)} if "{b}" in sentence else {})))
    lines = []
    for a, sign, b in steps:
        result = a - b if sign == "-" else a + b
        lines.append(f"{a} {sign} {b} = <<{a}{sign}{b}={result}>>{result}")
    return {
        "messages": [
            {"role": "user", "content": " ".join(sentences)},
            {"role": "assistant", "content": "\n".join([*lines, f"#### {result}"])},
        ]
    }


def make_rows(train_count: int, test_count: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Make the rows of both splits."""
    rng = random.Random(seed)
    numbers = range(SMALLEST, LARGEST + 1)
    sums = [(a, b) for a in numbers for b in numbers if a <= b and a + b <= LARGEST]  # as `fact` names them
    held_out = set(rng.sample(sums, len(sums) // HELD_OUT))
    train = [make_row(rng, held_out, is_test=False) for _ in range(train_count)]
    return train, [make_row(rng, held_out, is_test=True) for _ in range(test_count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=3_000)
    parser.add_argument("--test", type=int, default=200)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "test"), make_rows(args.train, args.test, seed=0), strict=True):
        write_rows(args.folder / f"{name}.jsonl", rows)


if __name__ == "__main__":
    main()
