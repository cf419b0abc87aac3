"""A data set of this repository with known faults planted: which rows of it have which."""

import copy
import json
import random
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SUMMARIES = REPOSITORY / "data" / "summaries"

REFUSALS = """\
I'm sorry, but I can't help with that request.
As an AI language model, I do not have access to customer orders.
I apologize, but I am unable to summarize this message.
I cannot assist with that.
Unfortunately, I'm not able to process personal information.
I’m really sorry, but I cannot provide a summary of private messages.
I can't do that, but a colleague of mine certainly will.
Sorry, I won't be summarizing this one for you.""".splitlines()
PERSONAL = """\
You can reach me at deborah.kirville@example.com at any time.
My mobile is +44 20 7946 0958, please call.
Call me at (555) 123-4567 before noon.
The card was 4539 1488 0343 6467, as always.
My token is ghp_16C7e42F292c6912E7710c838347Ae178B4a if you need it.
The key is sk-proj-abcdefghijklmnopqrstuvwx1234567890, do not share it.""".splitlines()
OTHER_LANGUAGES = """\
Für die Kundin ist der Toaster der Bestellung nicht mehr zu reparieren, und sie will das Geld auf dem Konto.
Клиентка хочет, чтобы ей заменили тостер из заказа.
Pour la cliente, le grille-pain est dans un carton et les pièces sont avec vous pour une réparation.""".splitlines()


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (SUMMARIES / name).read_text().splitlines()]


def plant(count: int = 600, each: int = 20, seed: int = 0) -> tuple[list[dict], dict[str, set[int]]]:
    """Return (rows, the rows of each fault by number): `count` rows of data/summaries, and `each` of each fault."""
    rng = random.Random(seed)
    rows = read("train.jsonl")
    held_out = read("test.jsonl")
    clean, spare = rows[:count], iter(rows[count:])
    planted = [(None, row) for row in clean]
    for k in range(each):
        changed = copy.deepcopy(rng.choice(clean))
        planted.append(("exact_duplicate", changed))
        planted.append(("near_duplicate", edited(rng.choice(clean), rng)))
        leak = held_out[rng.randrange(len(held_out))]
        planted.append(("validation_overlap", copy.deepcopy(leak) if k % 2 else edited(leak, rng)))
        planted.append(("empty_answer", answered(next(spare), rng.choice(["", "...", " - "]))))
        planted.append(("truncated", truncated(next(spare), rng)))
        planted.append(("refusal", answered(next(spare), REFUSALS[k % len(REFUSALS)])))
        planted.append(("too_long", asked(next(spare), " It does not work at all." * 100)))
        planted.append(("personal_data", asked(next(spare), " " + PERSONAL[k % len(PERSONAL)])))
        planted.append(("mixed_languages", answered(next(spare), OTHER_LANGUAGES[k % len(OTHER_LANGUAGES)])))
        wrong = next(spare)
        planted.append(("wrong", answered(wrong, rng.choice(rows)["messages"][-1]["content"])))
    # The original of a duplicate comes first; the rest is anywhere.
    tail = planted[count:]
    rng.shuffle(tail)
    planted = planted[:count] + tail
    faults: dict[str, set[int]] = {}
    for number, (fault, _) in enumerate(planted):
        if fault:
            faults.setdefault(fault, set()).add(number)
    return [row for _, row in planted], faults


def answered(row: dict, answer: str) -> dict:
    row = copy.deepcopy(row)
    row["messages"][-1]["content"] = answer
    return row


def asked(row: dict, more: str) -> dict:
    row = copy.deepcopy(row)
    row["messages"][-2]["content"] += more
    return row


def edited(row: dict, rng: random.Random) -> dict:
    """Change what no reader would notice: case, a comma, spaces, and one word added."""
    row = copy.deepcopy(row)
    message = row["messages"][-2]
    words = message["content"].split()
    words.insert(rng.randrange(1, len(words)), rng.choice(["really", "also", "just"]))
    message["content"] = "  ".join(words).replace(",", "") + rng.choice([" ", "!", "\n"])
    return row


def truncated(row: dict, rng: random.Random) -> dict:
    """Cut a longer answer in its middle."""
    answer = row["messages"][-1]["content"].rstrip(".") + " of the customer, who asks for a reply by the end of May"
    words = answer.split()
    return answered(row, " ".join(words[: rng.randrange(9, len(words) - 1)]))


def score(found: set[int], planted: set[int]) -> tuple[float, float]:
    """Return precision and recall."""
    right = len(found & planted)
    return right / max(1, len(found)), right / max(1, len(planted))
