"""Write small sets for the other tasks, from the customers' messages of make_quickstart.py.

    python data/make_tasks.py data

    data/routing/      classification: which of four desks a message goes to; the answer is one label
    data/replies/      preference: of two replies, the one that names the person and the next step is chosen
    data/notes/        causal LM: the records as notes of the shop, a kind of text that the base model never saw
    data/summaries/    summaries for the desk, by writers of four kinds (train.jsonl), and messages alone, their
                       records beside them, to write candidates for (prompts.jsonl) and to judge on (test.jsonl)

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

SUMMARY = "Summarize the message of the customer for the desk."
# Four kinds of writers: long and complete, without the order, without the name, short and complete.
WRITERS = [
    ["The customer {name} writes to us about the order with the number {order}. It is about the {item}, and what the "
     "customer would like from us is this: {request}.",
     "We have a message from a customer whose name is {name}. The number of the order is {order}, the thing is the "
     "{item}, and the customer asks for one thing: {request}."],
    ["A customer, {name}, is not happy with the {item} and wants this: {request}.",
     "{name} writes about the {item}: {request}."],
    ["Order {order}, {item}: {request}.", "Somebody wrote about order {order}, the {item}: {request}."],
    ["{name}, order {order}, {item}: {request}.", "For {name}, the {item} of order {order}: {request}."],
]  # fmt: skip


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


def summary(row: dict, rng: random.Random) -> dict:
    """Summarize a message as one of the writers does."""
    user, record = row["messages"][1], json.loads(row["messages"][2]["content"])
    text = rng.choice(rng.choice(WRITERS)).format(**record)
    return {"messages": [{"role": "system", "content": SUMMARY}, user, {"role": "assistant", "content": text}]}


def asked(row: dict) -> dict:
    """Ask for a summary; the record is what a judge compares with."""
    return {"messages": [{"role": "system", "content": SUMMARY}, *row["messages"][1:]]}


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
    train, test = make_rows(2_100, 200, seed=11)
    (folder / "summaries").mkdir(exist_ok=True)
    write_rows(folder / "summaries" / "train.jsonl", [summary(row, rng) for row in train[:1_800]])
    write_rows(folder / "summaries" / "prompts.jsonl", [asked(row) for row in train[1_800:]])
    write_rows(folder / "summaries" / "test.jsonl", [asked(row) for row in test])


if __name__ == "__main__":
    main()
