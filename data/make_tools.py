"""Write raw conversations with tools, as somebody's log would have them: the text form of glaive-function-calling-v2.

    python data/make_tools.py data/tools

A row is {"system": the functions as text, "chat": the turns as text}. Three files:

    log.jsonl         what a model may learn from; about one row in fifteen is spoilt, each in one of seven ways
    new_words.jsonl   the log's tools; last names, codes, times, labels and half of the cities are new, and no sentence
                      begins and ends as one of the log
    new_tools.jsonl   the same, and the thing of every tool is one that no tool of the log has, so its name is new too

A tool is a verb and a thing (rent_tent); what it takes depends on the verb.
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

# Of each verb: what its tools take, and what users say for it.
VERBS = {
    "rent": (["name", "day"], ["rent", "hire"]),
    "repair": (["label", "day"], ["repair", "fix"]),
    "order": (["city", "code"], ["order", "buy"]),
    "clean": (["day", "time"], ["clean", "wash"]),
    "send": (["name", "city"], ["send", "post"]),
    "sell": (["name", "code"], ["sell"]),
    "paint": (["label"], ["paint"]),
    "find": (["label", "city"], ["find", "look for"]),
}
# What no tool does.
OTHER_VERBS = ["hide", "draw", "burn", "test", "copy", "melt"]
NEW_THINGS = "kettle drum violin helmet puzzle lantern vase hammock telescope radio".split()
# "a {thing}" stands in the sentences.
THINGS = [item for item in WORLD["items"] if item not in NEW_THINGS and item[0] not in "aeiou" and item[-1] != "s"]
NEW_CITIES = "Bremen Krakow Valencia Ghent Nantes Split Basel Aarhus Graz Derby".split()
MORE_CITIES = """
Lyon Lille Bordeaux Toulouse Marseille Nice Cologne Dresden Leipzig Bonn Stuttgart Essen Linz Salzburg Bern Lucerne
Milan Genoa Verona Venice Pisa Palermo Bari Bologna Malaga Granada Bilbao Cordoba Zaragoza Murcia Braga Faro Cork
Galway Limerick Leeds Bristol Oxford Bath Durham Exeter Glasgow Dundee Cardiff Swansea Belfast Bergen Malmo Uppsala
Odense Tampere Turku Riga Vilnius Tallinn Gdansk Lodz Poznan Brno Bratislava Budapest Debrecen Zagreb Sarajevo Skopje
Sofia Varna Bucharest Cluj Izmir Ankara Bursa Haifa Amman Muscat Doha Karachi Lahore Pune Chennai Kolkata Dhaka Colombo
Yangon Bangkok Penang Cebu Nagoya Sapporo Kobe Busan Daegu Brisbane Hobart Cairns Darwin Dunedin Omaha Tulsa Memphis
Houston Phoenix Tucson Portland Oakland Fresno Tampa Miami Atlanta Raleigh Richmond Albany Buffalo Detroit Toledo
Dayton Quebec Calgary Regina Halifax Havana Caracas Medellin Cali Cusco Rosario Mendoza Recife Salvador Brasilia
""".split()
LOG_CITIES = [*WORLD["cities"], *MORE_CITIES]
# Syllables of invented towns: a first consonant, a vowel, a last consonant.
ONSETS = "b br c ch cl d dr f fl g gr h j k l m n p pl pr r s sh sl sp st t th tr v w z".split()
VOWELS = "a e i o u ai ea ie ou".split()
CODAS = "n r l s t m d rk nd st th".split()
# Of each argument: phrases that name its value.
ARGUMENTS = {
    "name": ["for {}", "in the name of {}", "as a gift for {}"],
    "city": ["in {}", "near {}", "at my house in {}"],
    "day": ["on {}", "next {}", "by {}"],
    "time": ["at {}", "after {}", "before {}"],
    "code": ["with the code {}", "as item {}", "under number {}"],
    "label": ["with the label {}", "marked {}", "under the title {}"],
}
BEFORE = ["Please", "Can you", "Could you", "Would you", "Will you", "I want to", "I would like to", "Help me to",
          "I have to", "We need to", "My plan is to", "You should", "It is time to", "Is it possible to"]  # fmt: skip
AFTER = [".", ", please.", " if you can.", " now.", " for me.", ", thank you.", " today."]
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


def schema(verb: str, thing: str) -> dict:
    """Describe a tool."""
    arguments, _ = VERBS[verb]
    properties = {argument: {"type": "string"} for argument in arguments}
    parameters = {"type": "object", "properties": properties}
    return {"name": f"{verb}_{thing}", "parameters": parameters}


def draw_values(verb: str, rng: random.Random, test: bool) -> dict:
    """Draw the values of a call."""
    return {argument: draw_value(argument, rng, test) for argument in VERBS[verb][0]}


def draw_value(argument: str, rng: random.Random, test: bool) -> str:
    """Draw an argument's value; the test's are not in the log, but for days and half of the cities."""
    if argument == "name":
        beginning = rng.randrange(len(BEGINNINGS))
        endings = [ending for k, ending in enumerate(ENDINGS) if ((k + beginning) % 5 == 0) == test]
        last = rng.choice(["", "", "", "", "O'"]) + BEGINNINGS[beginning] + rng.choice(endings)
        return f"{rng.choice(FIRST_NAMES)} {last}"
    if argument == "label":
        known = [*WORLD["animals"][:9], *THINGS]  # a mouse is a thing, too
        kinds = [kind for kind in WORLD["animals"] if kind not in known] if test else known
        return f"{rng.choice(FIRST_NAMES)}'s {rng.choice(kinds)}"
    if argument == "city":
        is_listed = rng.random() < 0.5
        if test:
            return rng.choice(LOG_CITIES if is_listed else NEW_CITIES)
        # An invented name occurs once: it cannot be memorized, it has to be copied.
        return rng.choice(LOG_CITIES) if is_listed else invent_town(rng)
    if argument == "day":
        return rng.choice(WORLD["days"])
    if argument == "time":
        hour, minute = divmod(rng.choice([time for time in range(60, 780) if (time % 7 == 0) == test]), 60)
        return f"{hour}:{minute:02}"
    return str(rng.choice([code for code in range(100, 1000) if (code % 7 == 0) == test]))


def invent_town(rng: random.Random) -> str:
    """Invent the name of a town, of one or two syllables."""
    syllables = [
        rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(["", *CODAS]) for _ in range(rng.choice([0, 1, 1]))
    ]
    return "".join([*syllables, rng.choice(ONSETS), rng.choice(VOWELS), rng.choice(CODAS)]).capitalize()


def ask(verb: str, thing: str, values: dict, rng: random.Random, test: bool) -> str:
    """Write what a user says who wants this done with these values."""
    phrases = [rng.choice(ARGUMENTS[argument]).format(value) for argument, value in values.items()]
    rng.shuffle(phrases)
    before, after = rng.randrange(len(BEFORE)), rng.randrange(len(AFTER))
    while ((before + after) % 4 == 0) != test:
        before, after = rng.randrange(len(BEFORE)), rng.randrange(len(AFTER))
    return " ".join([BEFORE[before], verb, "a", thing, *phrases]) + AFTER[after]


def call(name: str, values: dict, rng: random.Random) -> Turns:
    """Write a call as the log has it, arguments between single quotes; its result; what the assistant says then."""
    number = str(rng.randrange(1000, 10000))
    written = f'<functioncall> {{"name": "{name}", "arguments": \'{json.dumps(values)}\'}}'
    result = json.dumps({"status": "done", "number": number})
    return [("ASSISTANT", written), ("FUNCTION RESPONSE", result), ("ASSISTANT", f"Done. The number is {number}.")]


def make_turns(offered: list[tuple[str, str]], rng: random.Random, test: bool) -> Turns:
    """Write one conversation: some small talk, then one to four requests for one of the tools; in the test, one.

    A request that no tool can do may come before it, after which some users of the log give up.
    """
    said: Turns = []
    if rng.random() < 0.3:
        user, answer = rng.choice(sorted(SMALL_TALK[test].items()))
        said += [("USER", user), ("ASSISTANT", answer)]
    for _ in range(1 if test else rng.randint(1, 4)):
        verb, thing = rng.choice(offered)
        if rng.random() < 0.25:
            said += [("USER", ask(rng.choice(OTHER_VERBS), thing, {}, rng, test)), ("ASSISTANT", REFUSAL)]
            if not test and rng.random() < 0.15:
                break
        values, spoken = draw_values(verb, rng, test), rng.choice(VERBS[verb][1])
        said += [("USER", ask(spoken, thing, values, rng, test)), *call(f"{verb}_{thing}", values, rng)]
    return said


def make_row(things: list[str], rng: random.Random, test: bool) -> Row:
    """Make one conversation: two tools are offered that share their verb or their thing; rarely none."""
    if rng.random() < 0.04:
        user, answer = rng.choice(sorted(SMALL_TALK[test].items()))
        return {"system": WITHOUT, "chat": as_text([("USER", user), ("ASSISTANT", answer)])}
    verbs, (thing, other) = rng.sample(sorted(VERBS), 2), rng.sample(things, 2)
    offered = [(verbs[0], thing), rng.choice([(verbs[1], thing), (verbs[0], other)])]
    rng.shuffle(offered)
    functions = "\n".join(json.dumps(schema(*each)) for each in offered)
    return {"system": WITH_TOOLS + functions, "chat": as_text(make_turns(offered, rng, test))}


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
    parser.add_argument("--log", type=int, default=1_200)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    log = [make_row(THINGS, rng, test=False) for _ in range(args.log)]
    log = [spoil(row, rng) if rng.random() < 1 / 12 else row for row in log]
    args.folder.mkdir(parents=True, exist_ok=True)
    write_rows(args.folder / "log.jsonl", log)
    for name, things in (("new_words", THINGS), ("new_tools", NEW_THINGS)):
        write_rows(args.folder / f"{name}.jsonl", [make_row(things, rng, test=True) for _ in range(args.test)])


if __name__ == "__main__":
    main()
