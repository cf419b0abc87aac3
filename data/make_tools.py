"""Write raw conversations with tools, as somebody's log would have them: the text form of glaive-function-calling-v2.

    python data/make_tools.py data/tools

A row is {"system": the functions as text, "chat": the turns as text}. Three files:

    log.jsonl         what a model may learn from; about one row in fifteen is spoilt, each in one of seven ways
    new_words.jsonl   the log's tools; last names, animals, counts, minutes, sentences and half of the cities are new
    new_tools.jsonl   the same, and the thing of every tool is one that no tool of the log has, so its name is new too

A tool is a verb and a thing (rent_tent) and takes one to three arguments, drawn once for each tool.
"""

import argparse
import json
import random
from pathlib import Path

from make_quickstart import BEGINNINGS, ENDINGS, FIRST_NAMES, write_rows
from make_tiny_corpus import WORLD

WITH_TOOLS = "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n"
WITHOUT = "SYSTEM: You are a helpful assistant, with no access to external functions."
END = " <|endoftext|>"

# What each verb's users say; the log's, then the test's alone.
VERBS = {
    "rent": ["rent", "hire"],
    "repair": ["repair", "fix"],
    "order": ["order", "buy"],
    "clean": ["clean", "wash"],
    "send": ["send", "post"],
    "sell": ["sell"],
    "paint": ["paint"],
    "find": ["find", "look for"],
}
NEW_THINGS = "kettle drum violin helmet puzzle lantern vase hammock telescope radio".split()
# "a {thing}" stands in the sentences.
THINGS = [item for item in WORLD["items"] if item not in NEW_THINGS and item[0] not in "aeiou" and item[-1] != "s"]
NEW_CITIES = "Bremen Krakow Valencia Ghent Nantes Split Basel Aarhus Graz Derby".split()
# Of each argument: its JSON type, then phrases that name its value, the log's and the test's.
ARGUMENTS = {
    "name": ("string", ["for {}", "in the name of {}", "as a gift for {}"], ["on behalf of {}", "for my friend {}"]),
    "city": ("string", ["in {}", "near {}", "at my house in {}"], ["somewhere in {}", "at our office in {}"]),
    "day": ("string", ["on {}", "next {}", "by {}"], ["this coming {}", "on {} if you can"]),
    "time": ("string", ["at {}", "after {}", "before {}"], ["at about {}", "from {}"]),
    "count": ("integer", ["{} times", "in {} copies", "as {} items"], ["{} times in all", "in {} equal copies"]),
    "label": ("string", ["with the label {}", "marked {}", "under the title {}"], ["with the words {}", "labelled {}"]),
}
FRAMES = [
    ["Please {}.", "Can you {}?", "I want to {}.", "Could you {}?", "I would like to {}.", "Help me to {}.",
     "I have to {}.", "We need to {}, please."],
    ["Would you {}?", "My plan is to {}.", "You should {} now.", "Is it possible to {}?"],
]  # fmt: skip
SMALL_TALK = [
    {
        "Hello!": "Hello! How can I help you?",
        "Good morning!": "Good morning! What can I do for you?",
        "Thank you.": "You are welcome.",
        "Thanks, that is all.": "You are welcome. Have a nice day!",
        "Goodbye!": "Goodbye! Have a nice day.",
        "How are you?": "I am fine, thank you. How can I help you?",
        "I feel tired today.": "I am sorry to hear that. How can I help you?",
        "You are very kind.": "Thank you. What can I do for you?",
    },
    {
        "Hi there, how are you?": "I am fine, thank you. How can I help you?",
        "Thank you, goodbye!": "Goodbye! Have a nice day.",
        "Good evening!": "Good evening! What can I do for you?",
        "Thanks, you are very good.": "You are welcome.",
    },
]
REFUSAL = "I am sorry, I have no tool for that."

Row = dict[str, str]
Turns = list[tuple[str, str]]


def make_tools(things: list[str], rng: random.Random) -> dict[str, list[str]]:
    """Make a tool of every verb and thing: its name, and the names of its arguments."""
    return {
        f"{verb}_{thing}": rng.sample(sorted(ARGUMENTS), rng.choice((1, 2, 2, 3))) for verb in VERBS for thing in things
    }


def schema(name: str, arguments: list[str]) -> dict:
    """Describe a tool."""
    verb, thing = name.split("_")
    properties = {argument: {"type": ARGUMENTS[argument][0]} for argument in arguments}
    parameters = {"type": "object", "properties": properties, "required": arguments}
    return {"name": name, "description": f"{verb.capitalize()} a {thing}", "parameters": parameters}


def draw_values(arguments: list[str], rng: random.Random, test: bool) -> dict:
    """Draw the values of a call."""
    return {argument: draw_value(argument, rng, test) for argument in arguments}


def draw_value(argument: str, rng: random.Random, test: bool) -> str | int:
    """Draw an argument's value; the test's are not in the log, but for days and half of the cities."""
    if argument == "name":
        beginning = rng.randrange(len(BEGINNINGS))
        endings = [ending for k, ending in enumerate(ENDINGS) if ((k + beginning) % 5 == 0) == test]
        last = rng.choice(["", "", "", "", "O'"]) + BEGINNINGS[beginning] + rng.choice(endings)
        return f"{rng.choice(FIRST_NAMES)} {last}"
    if argument == "label":
        kinds = WORLD["animals"][9:] if test else WORLD["animals"][:9]
        return f"{rng.choice(FIRST_NAMES)}'s {rng.choice(kinds)}"
    if argument == "city":
        return rng.choice(NEW_CITIES if test and rng.random() < 0.5 else WORLD["cities"])
    if argument == "day":
        return rng.choice(WORLD["days"])
    if argument == "time":
        return f"{rng.randint(1, 12)}:{rng.choice(('05', '20', '50') if test else ('00', '15', '30', '45', '10'))}"
    return rng.choice([count for count in range(2, 100) if (count % 7 == 0) == test])


def ask(name: str, values: dict, rng: random.Random, test: bool) -> str:
    """Write what a user says who wants a tool called with these values."""
    verb, thing = name.split("_")
    phrases = [rng.choice(ARGUMENTS[argument][1 + test]).format(value) for argument, value in values.items()]
    rng.shuffle(phrases)
    return rng.choice(FRAMES[test]).format(" ".join([rng.choice(VERBS[verb]), "a", thing, *phrases]))


def call(name: str, values: dict, rng: random.Random) -> Turns:
    """Write a call as the log has it, arguments between single quotes; its result; what the assistant says then."""
    number = str(rng.randrange(1000, 10000))
    written = f'<functioncall> {{"name": "{name}", "arguments": \'{json.dumps(values)}\'}}'
    result = json.dumps({"status": "done", "number": number})
    return [("ASSISTANT", written), ("FUNCTION RESPONSE", result), ("ASSISTANT", f"Done. The number is {number}.")]


def make_turns(name: str, wish: str | None, tools: dict, rng: random.Random, test: bool) -> Turns:
    """Write one conversation: some small talk, a wish that no tool can fulfil, a tool that is wanted, in this order.

    wish: a tool that is not offered, or None.
    """
    said: Turns = []
    if rng.random() < 0.3:
        user, answer = rng.choice(sorted(SMALL_TALK[test].items()))
        said += [("USER", user), ("ASSISTANT", answer)]
    if wish:
        said += [("USER", ask(wish, draw_values(tools[wish], rng, test), rng, test)), ("ASSISTANT", REFUSAL)]
        if rng.random() < 0.3:
            return said
    values = draw_values(tools[name], rng, test)
    if rng.random() < 0.2:  # the values come when they are asked for
        said += [("USER", ask(name, {}, rng, test))]
        said += [("ASSISTANT", f"Please tell me the {' and the '.join(values)}."), ("USER", told(values, rng, test))]
    else:
        said += [("USER", ask(name, values, rng, test))]
    return said + call(name, values, rng)


def told(values: dict, rng: random.Random, test: bool) -> str:
    """Write what a user says who was asked for values."""
    phrases = [f"the {argument} is {value}" for argument, value in values.items()]
    rng.shuffle(phrases)
    return ("That is easy: {}." if test else rng.choice(["{}.", "Yes, {}.", "Well, {}."])).format(", ".join(phrases))


def make_row(tools: dict[str, list[str]], rng: random.Random, test: bool) -> Row:
    """Make one conversation: two tools are offered that share their verb or their thing; rarely none."""
    if rng.random() < 0.04:
        user, answer = rng.choice(sorted(SMALL_TALK[test].items()))
        return {"system": WITHOUT, "chat": as_text([("USER", user), ("ASSISTANT", answer)])}
    name = rng.choice(sorted(tools))
    verb, thing = name.split("_")
    same_thing = rng.sample([f"{other}_{thing}" for other in VERBS if other != verb], 2)
    same_verb = rng.choice([other for other in sorted(tools) if other.startswith(verb) and other != name])
    # What is refused is another verb with a thing that a tool has.
    wish = same_thing[1] if rng.random() < 0.25 else None
    offered = [name, rng.choice((same_thing[0], same_verb))]
    rng.shuffle(offered)
    functions = "\n".join(json.dumps(schema(each, tools[each])) for each in offered)
    chat = as_text(make_turns(name, wish, tools, rng, test))
    return {"system": WITH_TOOLS + functions, "chat": chat}


def as_text(turns: Turns) -> str:
    """Write turns as the log does."""
    return "\n\n\n".join(f"{who}: {text}{END if who == 'ASSISTANT' else ''}" for who, text in turns)


def spoil(row: Row, rng: random.Random) -> Row:
    """Spoil a row as real logs are spoilt."""
    system, chat = row["system"], row["chat"]
    ways = [
        lambda: (system.replace(" with access to the following functions. Use them if required -", "."), chat),
        lambda: (system.replace('"}', '"', 1), chat),  # a schema that cannot be read
        lambda: (system, chat.replace("}'}", "'}", 1)),  # arguments that cannot be read
        lambda: (system, chat.replace("\n\n\nASSISTANT", " ASSISTANT")),  # line ends lost
        lambda: (system, chat.replace("USER: ", "USER: Hello?\n\n\nUSER: ", 1)),
        lambda: (system, chat.replace('<functioncall> {"name": "', '<functioncall> {"name": "my_')),
        lambda: (system, chat.replace("'{", '\'{"please": true, ')),
    ]
    spoilt = rng.choice(ways)()
    return dict(zip(("system", "chat"), spoilt, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--log", type=int, default=2_400)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    tools, new = make_tools(THINGS, rng), make_tools(NEW_THINGS, rng)
    log = [make_row(tools, rng, test=False) for _ in range(args.log)]
    log = [spoil(row, rng) if rng.random() < 1 / 12 else row for row in log]
    args.folder.mkdir(parents=True, exist_ok=True)
    write_rows(args.folder / "log.jsonl", log)
    for name, offered in (("new_words", tools), ("new_tools", new)):
        write_rows(args.folder / f"{name}.jsonl", [make_row(offered, rng, test=True) for _ in range(args.test)])


if __name__ == "__main__":
    main()
