"""Write the corpus that the tiny model is pre-trained on: one small, made-up, consistent world.

    python data/make_tiny_corpus.py data/corpus/train.jsonl --rows 50000 --seed 1
    python data/make_tiny_corpus.py data/corpus/valid.jsonl --rows 500 --seed 2

A row is {"text": ...} or a chat {"messages": [...]}, some with "tools"; its words are in tiny_world.json.
Much of the text says a detail (a name, a number, a word that nobody has seen before) and says it again in
another form: so a small model learns to copy, which every later fine-tune builds on. In chats the assistant
answers in polite sentences, so that a fine-tune has something to change.
"""

import argparse
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

WORLD = json.loads(Path(__file__).with_name("tiny_world.json").read_text(encoding="utf-8"))
FACTS = WORLD["facts"]
SLOT = re.compile(r"{\w+}")

Facts = dict[str, str]
Message = dict[str, object]


def made_up_word(rng: random.Random) -> str:
    """Make a word that can be spoken but means nothing, so that it can only be copied."""
    if rng.random() < 0.6:
        # The beginning of one name and the end of another: spelled as names that the model will meet are.
        names = WORLD["first_names"] + WORLD["last_names"] + WORLD["cities"]
        return (rng.choice(names)[: rng.randint(1, 4)] + rng.choice(names)[-rng.randint(2, 5) :]).lower()
    starts = "b br c ch d dr f g gr h j k l m n p pr qu r s sh st t th tr v w y z".split()
    vowels = "a e i o u ai ee ou".split()
    ends = ["", "", "n", "r", "l", "s", "m", "t", "ck", "nd", "x"]
    syllables = rng.choice((1, 2, 2))
    return "".join(rng.choice(starts) + rng.choice(vowels) + rng.choice(ends) for _ in range(syllables))


def digits(rng: random.Random, length: int) -> str:
    """Return a number of exactly that many digits, as text."""
    return str(rng.randrange(10 ** (length - 1), 10**length))


def code(rng: random.Random) -> str:
    """Return a word or two, or a mixture of letters and digits."""
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    forms = (
        made_up_word(rng),
        f"{made_up_word(rng)} {made_up_word(rng)}",
        f"{letters}-{digits(rng, rng.randint(2, 4))}",
        f"{digits(rng, 2)}{letters}{digits(rng, 1)}",
        f"{rng.choice(WORLD['adjectives'])} {rng.choice(WORLD['animals'])}",
        f"{rng.choice(WORLD['colors'])} {rng.choice(WORLD['items'])} {rng.randint(1, 99)}",
    )
    return rng.choice(forms)


def draw_facts(rng: random.Random) -> Facts:
    """Draw one person and everything around them: the values for all templates."""

    def word(kind: str) -> str:
        # Often a word of no language: a copy cannot then be guessed from what is usual.
        known, invented = rng.choice(WORLD[kind]), made_up_word(rng)
        if rng.random() < (0.9 if kind == "items" else 0.65):
            return known
        return invented.capitalize() if known[0].isupper() else invented

    first, last, wish = word("first_names"), word("last_names"), rng.choice(WORLD["wishes"])
    return {
        "first": first,
        "last": last,
        "name": f"{first} {last}",
        "friend": word("first_names"),
        "assistant": word("first_names"),
        "pet": word("first_names"),
        "animal": rng.choice(WORLD["animals"]),
        "city": word("cities"),
        "place": rng.choice(WORLD["places"]),
        "street": f"{rng.randint(1, 199)} {rng.choice(WORLD['streets'])} Street",
        "shop": rng.choice(WORLD["shops"]),
        "job": rng.choice(WORLD["jobs"]),
        "hobby": rng.choice(WORLD["hobbies"]),
        "age": str(rng.randint(5, 95)),
        "birthday": f"{rng.choice(WORLD['months'])} {rng.randint(1, 28)}",
        "day": rng.choice(WORLD["days"]),
        "time": f"{rng.randint(1, 12)}:{rng.choice('0134')}5",
        "item": word("items"),
        "color": rng.choice(WORLD["colors"]),
        "adjective": rng.choice(WORLD["adjectives"]),
        "price": f"{rng.randint(1, 99)}.{rng.choice('059')}0",
        "food": rng.choice(WORLD["foods"]),
        "other_food": rng.choice(WORLD["foods"]),
        "weather": rng.choice(WORLD["weather"]),
        "feeling": rng.choice(WORLD["feelings"]),
        "phone": f"{digits(rng, 3)} {digits(rng, 4)}",
        "order": digits(rng, rng.choice((4, 5, 5, 6))),
        "code": code(rng),
        "few": str(rng.randint(2, 12)),
        "problem": rng.choice(WORLD["problems"]),
        "wish": wish,
        "Wish": wish[0].upper() + wish[1:],
    }


# Documents --------------------------------------------------------------------------------------------


def story(rng: random.Random) -> str:
    """Tell a short story."""
    middles = rng.sample(WORLD["middles"], rng.randint(1, 3))
    sentences = [rng.choice(WORLD["openings"]), *middles, rng.choice(WORLD["endings"])]
    return " ".join(sentences).format(**draw_facts(rng))


def letter(rng: random.Random) -> str:
    """Write a letter, a note or a small advertisement."""
    return rng.choice(WORLD["letters"]).format(**draw_facts(rng))


def portrait(rng: random.Random, facts: Facts, keys: list[str]) -> str:
    """Describe a person in a paragraph."""
    said = [rng.choice(FACTS[key]["said"]) for key in keys]
    return " ".join([rng.choice(WORLD["portraits"]), *said]).format(**facts)


def introduction(rng: random.Random, facts: Facts, keys: list[str]) -> str:
    """Let a person tell of themselves."""
    told = [rng.choice(FACTS[key]["told"]) for key in keys]
    return " ".join([rng.choice(WORLD["introductions"]), *told]).format(**facts)


def questions(rng: random.Random) -> str:
    """Describe a person, then ask and answer questions about them."""
    facts, keys = draw_facts(rng), rng.sample(sorted(FACTS), rng.randint(3, 5))
    lines = [portrait(rng, facts, keys)]
    for key in rng.sample(keys, 2):
        asked, answered = rng.choice(FACTS[key]["asked"]), rng.choice(FACTS[key]["answered"])
        lines += [f"Question: {asked}", f"Answer: {answered}"]
    return "\n".join(lines).format(**facts)


def record(rng: random.Random) -> str:
    """Say the same about a person in sentences and in a record, in either order."""
    facts, keys = draw_facts(rng), rng.sample(sorted(FACTS), rng.randint(2, 5))
    prose = rng.choice((portrait, introduction))(rng, facts, keys)
    fields = ["name", *rng.sample(keys, rng.randint(1, len(keys)))]
    if rng.random() < 0.5:
        rng.shuffle(fields)
    written = {field: facts[field] for field in fields}
    as_json = json.dumps(written)
    as_lines = "\n".join(f"{key}: {value}" for key, value in written.items())
    in_one_line = ", ".join(f"{key}={value}" for key, value in written.items())
    both = [prose, rng.choice((as_json, as_json, as_lines, in_one_line))]
    return "\n".join(both if rng.random() < 0.8 else reversed(both))


def things(rng: random.Random, count: int) -> list[str]:
    """Return words, names and numbers that have nothing to do with each other."""
    kinds = ("first_names", "last_names", "cities", "items", "colors", "foods", "animals", "jobs", "days")
    drawn = []
    for _ in range(count):
        facts = draw_facts(rng)
        drawn.append(rng.choice((rng.choice(WORLD[rng.choice(kinds)]), facts[rng.choice(("code", "order", "name"))])))
    return drawn


def same_again(rng: random.Random) -> str:
    """Give a list and then the same list, most often in the same form."""
    listed = things(rng, rng.randint(4, 9))
    forms = [
        " ".join(listed),
        ", ".join(listed),
        json.dumps(listed),
        "\n".join(f"- {thing}" for thing in listed),
    ]
    one = rng.choice(forms)
    other = one if rng.random() < 0.6 else rng.choice(forms)
    title, again = rng.choice(("List", "Words", "First list")), rng.choice(("Again", "The same"))
    return f"{title}:\n{one}\n{again}:\n{other}"


def lookups(rng: random.Random) -> str:
    """Give a table of people and what belongs to them, then look some of them up."""
    people, key = [draw_facts(rng) for _ in range(4)], rng.choice(("order", "city", "code", "item", "phone"))
    table = [f"{person['name']}: {person[key]}" for person in people]
    asked = [f"{key} of {person['name']}? {person[key]}" for person in rng.sample(people, 2)]
    return "\n".join([f"Name and {key}", *table, *asked])


def bill(rng: random.Random) -> str:
    """Write a bill with a total."""
    prices = [rng.randint(1, 40) for _ in range(rng.randint(2, 3))]
    lines = [f"{rng.randint(1, 9)} x {rng.choice(WORLD['items'] + WORLD['foods'])}: {price}" for price in prices]
    return "\n".join([f"Bill for {draw_facts(rng)['name']}", *lines, f"Total: {sum(prices)}"])


def sum_of_two(rng: random.Random) -> tuple[str, str]:
    """Return a small problem of arithmetic and its result."""
    small, large = sorted((rng.randint(0, 30), rng.randint(0, 30)))
    return rng.choice(((f"{small} + {large}", str(small + large)), (f"{large} - {small}", str(large - small))))


def arithmetic(rng: random.Random) -> str:
    """Write some lines of arithmetic."""
    return "\n".join("{} = {}".format(*sum_of_two(rng)) for _ in range(rng.randint(2, 4)))


def news(rng: random.Random) -> str:
    """Report on a topic and name it."""
    topic = rng.choice(sorted(WORLD["topics"]))
    body = " ".join(rng.sample(WORLD["topics"][topic], 2)).format(**draw_facts(rng))
    return f"Topic: {topic}\n{body}" if rng.random() < 0.5 else f"{body}\nTopic: {topic}"


# Chats ------------------------------------------------------------------------------------------------


def exchange(user: str, assistant: str) -> list[Message]:
    """Return one question and its answer as messages."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def chat_about_me(rng: random.Random, facts: Facts) -> list[Message]:
    """Let the user tell some details and ask for one of them, at once or later."""
    keys = rng.sample(sorted(FACTS), rng.randint(1, 3))
    told = introduction(rng, facts, keys)
    key = rng.choice(keys)
    asked, answer = (rng.choice(FACTS[key][part]).format(**facts) for part in ("ask_me", "answer_me"))
    if rng.random() < 0.6:
        return exchange(f"{told} {asked}", answer)
    return exchange(told, "Thank you, I will remember it.") + exchange(asked, answer)


def chat_about_text(rng: random.Random, facts: Facts) -> list[Message]:
    """Let the user show a paragraph about somebody else and ask about it."""
    other, keys = draw_facts(rng), rng.sample(sorted(FACTS), rng.randint(2, 4))
    key = rng.choice(keys)
    asked, answer = (rng.choice(FACTS[key][part]).format(**other) for part in ("asked", "answered"))
    paragraph = portrait(rng, other, keys)
    return exchange(rng.choice((f"{paragraph} {asked}", f"{asked}\n{paragraph}")), answer)


def chat_complaint(rng: random.Random, facts: Facts) -> list[Message]:
    """Let a customer complain and get a polite answer."""
    complaint = rng.choice(WORLD["complaints"])
    # An answer may only repeat what the customer said; whoever gives a name gives a first name.
    told = set(SLOT.findall(complaint.replace("{name}", "{name} {first}")))
    fitting = [answer for answer in WORLD["apologies"] if set(SLOT.findall(answer)) <= told]
    return exchange(complaint.format(**facts), rng.choice(fitting).format(**facts))


def chat_repeat(rng: random.Random, facts: Facts) -> list[Message]:
    """Let the user ask to say something again."""
    said = " ".join(things(rng, rng.randint(1, 4)))
    asked = rng.choice(("Please repeat: {}", "Say {} again.", 'How do you write "{}"?', "Repeat after me: {}"))
    return exchange(asked.format(said), rng.choice(("You said {}.", 'It is "{}".')).format(said))


def chat_arithmetic(rng: random.Random, facts: Facts) -> list[Message]:
    """Let the user ask for a sum."""
    problem, result = sum_of_two(rng)
    asked = rng.choice(("What is {}?", "How much is {}?")).format(problem)
    return exchange(asked, f"The result is {result}.")


def chat_small_talk(rng: random.Random, facts: Facts) -> list[Message]:
    """Greet, thank, or talk about nothing much."""
    return exchange(*(text.format(**facts) for text in rng.choice(WORLD["small_talk"])))


# Rows -------------------------------------------------------------------------------------------------

# What is written, and how often.
DOCUMENTS = {
    story: 10,
    letter: 10,
    questions: 20,
    record: 40,
    same_again: 30,
    lookups: 10,
    bill: 5,
    arithmetic: 3,
    news: 7,
}
CHATS = {
    chat_about_me: 30,
    chat_about_text: 15,
    chat_complaint: 20,
    chat_repeat: 20,
    chat_arithmetic: 5,
    chat_small_talk: 10,
}


def draw(rng: random.Random, makers: dict[Callable, int]) -> Callable:
    """Draw one maker, each as often as its weight says."""
    return rng.choices(list(makers), list(makers.values()))[0]


def text_row(rng: random.Random, length: int) -> dict:
    """Put documents together, up to that many characters."""
    documents = [draw(rng, DOCUMENTS)(rng)]
    while sum(map(len, documents)) < length:
        documents.append(draw(rng, DOCUMENTS)(rng))
    # The last document is the one that went over the length.
    return {"text": "\n\n".join(documents[:-1] or documents)}


def chat_row(rng: random.Random, length: int) -> dict:
    """Let one user chat, up to that many characters."""
    facts = draw_facts(rng)
    system = [{"role": "system", "content": rng.choice(WORLD["system_prompts"]).format(**facts)}]
    turns = draw(rng, CHATS)(rng, facts)
    left = length
    while left > 0:
        more = draw(rng, CHATS)(rng, facts)
        left -= sum(len(turn["content"]) + 8 for turn in more)
        if left > 0:
            turns += more
    return {"messages": (system if rng.random() < 0.6 else []) + turns}


def tool_schema(tool: dict) -> dict:
    """Describe a tool as OpenAI's API does."""
    properties = {
        name: {"type": "string", "description": argument["description"]} for name, argument in tool["arguments"].items()
    }
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": tool["name"], "description": tool["description"], "parameters": parameters}
    return {"type": "function", "function": function}


def tool_row(rng: random.Random, length: int) -> dict:
    """Write a chat in which the assistant calls one of the tools that it is given."""
    facts, offered = draw_facts(rng), rng.sample(WORLD["tools"], 2)
    tool = rng.choice(offered)
    arguments = {name: facts[argument["fact"]] for name, argument in tool["arguments"].items()}
    call = {
        "id": "1",
        "type": "function",
        "function": {"name": tool["name"], "arguments": json.dumps(arguments)},
    }
    result = json.dumps({key: value.format(**facts) for key, value in tool["result"].items()})
    messages = [
        {"role": "user", "content": rng.choice(tool["requests"]).format(**facts)},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": result},
        {"role": "assistant", "content": tool["answer"].format(**facts)},
    ]
    return {"messages": messages, "tools": [tool_schema(each) for each in offered]}


def make_rows(count: int, seed: int, length: int = 560) -> list[dict]:
    """Make the rows of the corpus, the same ones for the same seed."""
    rng = random.Random(seed)
    makers = rng.choices((text_row, chat_row, tool_row), weights=(50, 44, 6), k=count)
    return [make(rng, length) for make in makers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.path.parent.mkdir(parents=True, exist_ok=True)
    with args.path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows(args.rows, args.seed))


if __name__ == "__main__":
    main()
