"""Write the quickstart's rows: a customer's message and the JSON record that a shop wants from it.

    python data/make_quickstart.py data/quickstart

No last name and no order number of test.jsonl is in train.jsonl, and half of its things are new as well; its
sentences are put together from the same parts.
"""

import argparse
import json
import random
import re
from pathlib import Path

from make_tiny_corpus import WORLD

SYSTEM = "Turn the message of the customer into a record."
# First names, and the beginnings and endings of last names; which endings go with which beginning differs.
FIRST_NAMES = """Abigail Alastair Alfred Amelia Anders Angela Anita Annika Archie Ariel Audrey Bernard Bertha Bettina
Bridget Calvin Camille Caspar Cecilia Celia Clement Conrad Cordelia Cyril Damian Daphne Deborah Dennis Dominic Doris
Duncan Dylan Edmund Edwina Eleanor Elliot Elvira Erasmus Ernest Estelle Eugene Evelyn Ferdinand Florian Francesca
Gerald Gertrude Gilbert Giselle Gregory Gustav Harvey Heather Hilda Howard Humphrey Ignatius Irving Isabel Jerry Joshua
Judith Katrin Kenneth Lambert Leander Lorenzo Lucinda Malcolm Margaret Marvin Matilda Melvin Mildred Morgan Muriel
Nathan Neville Nicholas Norbert Ophelia Orlando Pamela Patrick Penelope Phoebe Raymond Rebecca Reginald Roderick Roland
Rosalind Rupert Samuel Sebastian Sheila Sylvester Terence Theodora Timothy Tobias Trevor Vanessa Vincent Vivian Wallace
Wilfred Yolanda""".split()
BEGINNINGS = """Al Bar Bel Bo Bran Bur Cal Car Chad Clay Cor Cran Cul Dar Den Dun El Far Fen Fitz Gal Gold Had Hal Hamp
Hol Hor Jo Kel Kir Lam Lang Lin Lo Mal Mar Mer Mor Nor Os Par Pel Ran Red Ro Rut San Sel Shel Stan Sul Tal Tor Tre Val
Wal War Wel Wes Wil Win""".split()
ENDINGS = """berg bert burn bury by dale den field ford gard ham hurst kin land ley lin man mer mond sen son ton ville
worth""".split()
NEW_ITEMS = """kettle carpet tablet monitor radio drill tent scarf ring flute helmet puzzle vase pan towel
lantern""".split()

REQUESTS = {
    "refund": ["give me my money back", "refund the price", "return my money"],
    "replacement": ["send me a new one", "replace it", "send a replacement"],
    "repair": ["fix it", "repair it", "have it repaired"],
    "cancel": ["cancel it", "cancel the order", "stop the order"],
}
FRAMES = [
    "Please {wish}.",
    "Can you {wish}?",
    "Could you {wish}, please?",
    "I want you to {wish}.",
    "Would you {wish}?",
    "I would like you to {wish}.",
    "Will you {wish} this week?",
    "I have to ask you to {wish}.",
    "It would be best to {wish}.",
    "You should {wish}, I think.",
]
FAULTS = [
    "arrived broken",
    "does not work",
    "stopped working",
    "has a scratch",
    "makes a loud noise",
    "is missing a part",
    "came in two pieces",
    "is too loud",
    "is dirty",
    "looks used",
    "broke after a week",
    "does not close",
]
DELAYS = [
    "has not come yet",
    "was ordered by mistake",
    "is not here yet",
    "takes too long",
    "is late",
    "was not sent",
    "should have come last week",
    "was a mistake",
]
SUBJECTS = [
    "The {item} from order {order} {fault}.",
    "My {item} {fault}. The order number is {order}.",
    "Order {order}: the {item} {fault}.",
    "It is about order {order}. The {item} {fault}.",
    "I bought a {item} and it {fault}. The order is {order}.",
    "The {item} {fault} (order {order}).",
    "I have a problem with order {order}: my {item} {fault}.",
    "In order {order} there was a {item}. It {fault}.",
    "The {item} that I ordered {fault}, order number {order}.",
    "Sadly the {item} of my order {order} {fault}.",
]
GREETINGS = [
    "Hi, this is {name}.",
    "Hello, my name is {name}.",
    "{name} here.",
    "Good morning, I am {name}.",
    "I am {name}.",
    "Hello, {name} here.",
    "Dear shop, this is {name}.",
    "Hi, {name} speaking.",
]
SIGNATURES = [
    "Thanks, {name}",
    "Best wishes, {name}",
    "{name}",
    "Yours, {name}",
    "Regards, {name}",
    "My name is {name}.",
    "Thank you. {name}",
    "Bye, {name}",
]


def make_row(rng: random.Random, order: str, test: bool) -> dict:
    """Make one message and its record."""
    # Each beginning has a few endings that occur in the test alone.
    beginning = rng.randrange(len(BEGINNINGS))
    endings = [ending for k, ending in enumerate(ENDINGS) if ((k + beginning) % 5 == 0) == test]
    # "a {item}" stands in the phrases, so no item may begin with a vowel.
    known_items = [item for item in WORLD["items"] if item not in NEW_ITEMS and item[0] not in "aeiou"]
    record = {
        "name": f"{rng.choice(FIRST_NAMES)} {BEGINNINGS[beginning]}{rng.choice(endings)}",
        "item": rng.choice(NEW_ITEMS if test and rng.random() < 0.5 else known_items),
        "order": order,
        "request": rng.choice(sorted(REQUESTS)),
    }
    fault = rng.choice(DELAYS if record["request"] == "cancel" else FAULTS)
    wish = rng.choice(REQUESTS[record["request"]])
    body = [rng.choice(SUBJECTS), rng.choice(FRAMES)]
    if rng.random() < 0.3:
        body.reverse()
    if rng.random() < 0.6:
        body.insert(0, rng.choice(GREETINGS))
    else:
        body.append(rng.choice(SIGNATURES))
    message = " ".join(body).format(fault=fault, wish=wish, **record)
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": message},
            {"role": "assistant", "content": json.dumps(record)},
        ]
    }


def make_rows(train_count: int, test_count: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Make the rows of both splits and check that the test can only be passed by reading."""
    rng = random.Random(seed)
    orders = [str(number) for number in rng.sample(range(10_000, 100_000), train_count + test_count)]
    train = [make_row(rng, order, test=False) for order in orders[:train_count]]
    test = [make_row(rng, order, test=True) for order in orders[train_count:]]
    seen = set(re.findall(r"\w+", " ".join(message["content"] for row in train for message in row["messages"])))
    for row in test:
        record = json.loads(row["messages"][-1]["content"])
        for word in (record["name"].split()[-1], record["order"]):
            assert word not in seen, f"{word} of the test is in a training row"
    return train, test


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=3_000)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train, test = make_rows(args.train, args.test, args.seed)
    args.folder.mkdir(parents=True, exist_ok=True)
    write_rows(args.folder / "train.jsonl", train)
    write_rows(args.folder / "test.jsonl", test)


if __name__ == "__main__":
    main()
