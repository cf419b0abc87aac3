"""Write small sets for the other tasks, from the customers' messages of make_quickstart.py.

    python data/make_tasks.py data

    data/routing/      classification: which of four desks a message goes to; the answer is one label
    data/replies/      preference: of two replies, the one that names the person and the next step is chosen
    data/notes/        causal LM: the records as notes of the shop, a kind of text that the base model never saw

Test rows have names, order numbers and half of their things to themselves, and the replies of the test are put
together from phrases that no training reply has.
"""

import argparse
import json
import random
from pathlib import Path

from make_quickstart import make_rows, write_rows

LABELS = {"refund": "[[refund]]", "replacement": "[[replacement]]", "repair": "[[repair]]", "cancel": "[[cancel]]"}
STEPS = {
    "refund": ["we will return your money", "your money is on its way"],
    "replacement": ["we will send you a new one", "a new one is on its way"],
    "repair": ["we will repair it", "our workshop will see to it"],
    "cancel": ["we have stopped the order", "the order is stopped now"],
}
# Phrases of the training replies, then those of the test alone.
KIND = [
    ["Dear {first}, I am sorry about the {item}: {step}.", "Thank you, {first}. {Step}, for order {order}."],
    ["Sorry about your {item}, {first}. {Step}.", "Dear {first}, about order {order}: {step}."],
]
CURT = [
    ["We have read this.", "It may take a long time.", "Ask somebody else about the {item}.", "That is not our fault."],
    ["It is not our fault.", "Somebody else may have read this.", "This may take a long time."],
]


def routing(row: dict) -> dict:
    """Ask for the desk."""
    user, record = row["messages"][1], json.loads(row["messages"][2]["content"])
    return {"messages": [user, {"role": "assistant", "content": LABELS[record["request"]]}]}


def replies(row: dict, rng: random.Random, is_test: bool) -> dict:
    """Make a pair of replies."""
    user, record = row["messages"][1], json.loads(row["messages"][2]["content"])
    step = STEPS[record["request"]][is_test]
    values = record | {"first": record["name"].split()[0], "step": step, "Step": step[0].upper() + step[1:]}
    said = {}
    for name, phrases in (("chosen", KIND), ("rejected", CURT)):
        said[name] = rng.choice(phrases[is_test]).format(**values)
    return {name: [user, {"role": "assistant", "content": text}] for name, text in said.items()}


def notes(row: dict) -> dict:
    """Write a record as a line of the shop's own notes."""
    record = json.loads(row["messages"][2]["content"])
    return {"text": "{order} / {item} / {request} / {name}".format(**record)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    rng = random.Random(0)
    for split, rows in zip(("train", "test"), make_rows(800, 200, seed=7), strict=True):
        is_test = split == "test"
        for name, made in (
            ("routing", [routing(row) for row in rows]),
            ("replies", [replies(row, rng, is_test) for row in rows]),
            ("notes", [notes(row) for row in rows]),
        ):
            (folder / name).mkdir(exist_ok=True)
            write_rows(folder / name / f"{split}.jsonl", made)


if __name__ == "__main__":
    main()
