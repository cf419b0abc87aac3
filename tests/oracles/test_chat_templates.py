"""Chat templates of public families x shapes of examples: each pair is right, right with a key, or refused with cause.

The templates are chat_templates.yaml. What is right is decided here from what plain transformers renders: the prompt
before each answer is the template's own, the answer holds all that its message says, in order, and ends with a token
that stops; nothing else is in the loss. Each reason for a refusal is checked against the template too. The outcome is
the table chat_templates.md; `python tests/oracles/test_chat_templates.py` writes it anew.
"""

import copy
import functools
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from forgebook.data.row_formats import parse_row
from forgebook.data.tokenize import EncodingOptions, encode_examples
from forgebook.errors import DataError
from forgebook.models.template_settings import set_template_defaults

FOLDER = Path(__file__).parent
FAMILIES = {one["family"]: one for one in yaml.safe_load((FOLDER / "chat_templates.yaml").read_text("utf-8"))}
TABLE = FOLDER / "chat_templates.md"
INTRODUCTION = """# Chat templates of public families x shapes of examples

Written by test_chat_templates.py, which also defines "right". `+` right; `+ key` right once the error's own fix
is set; a letter: refused, for the reason below, which the test checks against the template.
"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
    for name, description in (("read_sensor", "Reads a sensor."), ("look_up", "Looks up a place."))
]
SYSTEM = {"role": "system", "content": "Be short."}
ASK, ASK_AGAIN = ({"role": "user", "content": text} for text in ("How warm is Oslo?", "And Rome?"))
ANSWER, SECOND = ({"role": "assistant", "content": text} for text in ("Four degrees.", "Nineteen degrees."))
THINKS, THINKS_AGAIN = {"reasoning_content": "Oslo is cold."}, {"reasoning_content": "Rome is warmer."}


def call(name: str, number: int = 0, **arguments) -> dict:
    ids = {"id": f"call_{number}a8f3b0c51e"} if number else {}
    return {"type": "function", **ids, "function": {"name": name, "arguments": json.dumps(arguments)}}


ONE_CALL = {"role": "assistant", "content": None, "tool_calls": [call("read_sensor", place="Oslo", days=2)]}
RESULT = {"role": "tool", "content": '{"degrees": 4}'}
TWO_CALLS = ONE_CALL | {"tool_calls": [call("read_sensor", 1, place="Oslo"), call("look_up", 2, place="Rome")]}
RESULTS = [RESULT | {"tool_call_id": "call_1a8f3b0c51e"}, RESULT | {"tool_call_id": "call_2a8f3b0c51e"}]
RESULTS[1]["content"] = "a city"

# As users write them: arguments as JSON text, ids of other tools or none, contents as null or as lists of parts.
SHAPES = {
    "one turn": {"messages": [ASK, ANSWER]},
    "system": {"messages": [SYSTEM, ASK, ANSWER]},
    "two turns": {"messages": [ASK, ANSWER, ASK_AGAIN, SECOND]},
    "ends on user": {"messages": [ASK, ANSWER, ASK_AGAIN]},
    "begins with assistant": {"messages": [ANSWER, ASK_AGAIN, SECOND]},
    "two user turns in a row": {"messages": [ASK, ASK_AGAIN, SECOND]},
    "tool list": {"messages": [ASK, ANSWER], "tools": TOOLS},
    "one call": {"messages": [ASK, ONE_CALL], "tools": TOOLS},
    "call, result, answer": {"messages": [SYSTEM, ASK, ONE_CALL, RESULT, ANSWER], "tools": TOOLS},
    "parallel calls": {"messages": [ASK, TWO_CALLS, *RESULTS, ANSWER], "tools": TOOLS},
    "call with text": {"messages": [ASK, ONE_CALL | {"content": "I look."}, RESULT, ANSWER], "tools": TOOLS},
    "reasoning": {"messages": [ASK, ANSWER | THINKS]},
    "reasoning, two turns": {"messages": [ASK, ANSWER | THINKS, ASK_AGAIN, SECOND | THINKS_AGAIN]},
    "empty reasoning": {"messages": [ASK, ANSWER | {"reasoning_content": ""}]},
    "reasoning agent": {"messages": [ASK, ONE_CALL | THINKS, RESULT, ANSWER | THINKS_AGAIN], "tools": TOOLS},
    "special tokens in texts": {"messages": [ASK, {"role": "assistant", "content": "It writes EOS, then stops."}]},
    "parts, margins, unicode": {
        "messages": [
            ASK | {"content": [{"type": "text", "text": "  How warm "}, {"type": "text", "text": "is Oslo?\n"}]},
            ANSWER | {"content": "\n 4 °C – <b>frisch</b> & „kühl“ ☃ "},
        ]
    },
}
# Tools, calls and results in the text form that messages.py documents, for templates without them.
LISTED = {"role": "system", "content": f"[TOOL_LIST] {json.dumps(TOOLS)} [/TOOL_LIST]"}
ONE_AS_TEXT = (
    '[TOOL_CALLS] [{"function": {"name": "read_sensor", "arguments": "{\\"place\\": \\"Oslo\\", \\"days\\": 2}"}, '
    '"type": "function"}] [/TOOL_CALLS]'
)
TWO_AS_TEXT = (
    '[TOOL_CALLS] [{"function": {"name": "read_sensor", "arguments": "{\\"place\\": \\"Oslo\\"}"}, "type": '
    '"function"}, {"function": {"name": "look_up", "arguments": "{\\"place\\": \\"Rome\\"}"}, "type": "function"}] '
    "[/TOOL_CALLS]"
)
RESULT_AS_TEXT = {
    "role": "user",
    "content": '[TOOL_RESULT] {"name": "read_sensor", "content": "{\\"degrees\\": 4}"} [/TOOL_RESULT]',
}
RESULTS_AS_TEXT = {
    "role": "user",
    "content": '[TOOL_RESULT] {"name": "read_sensor", "content": "{\\"degrees\\": 4}", "tool_call_id": '
    '"call_1a8f3b0c51e"} [/TOOL_RESULT][TOOL_RESULT] {"name": "look_up", "content": "a city", "tool_call_id": '
    '"call_2a8f3b0c51e"} [/TOOL_RESULT]',
}
CALLED = {"role": "assistant", "content": ONE_AS_TEXT}
AS_TEXT = {
    "tool list": [LISTED, ASK, ANSWER],
    "one call": [LISTED, ASK, CALLED],
    "call, result, answer": [
        LISTED | {"content": SYSTEM["content"] + LISTED["content"]}, ASK, CALLED, RESULT_AS_TEXT, ANSWER,
    ],
    "parallel calls": [LISTED, ASK, CALLED | {"content": TWO_AS_TEXT}, RESULTS_AS_TEXT, ANSWER],
    "call with text": [LISTED, ASK, CALLED | {"content": "I look." + ONE_AS_TEXT}, RESULT_AS_TEXT, ANSWER],
    "reasoning agent": [LISTED, ASK, CALLED | THINKS, RESULT_AS_TEXT, ANSWER | THINKS_AGAIN],
}  # fmt: skip
KEYS = ("reasoning_content", "reasoning", "thinking")
REASONS = {
    "A": ("the conversation begins with an assistant turn", "an assistant turn without anything before it"),
    "B": ("the chat template rejects these messages", "the template itself raises an error"),
    "C": ("closes the thought", "reasoning, but the generation prompt closes the thought before the answer"),
    "D": ("the chat template leaves out the call", "the template leaves out a call or a part of it"),
    "E": (
        "the chat template (does not show it|shows no system message)",
        "the template leaves out or changes a part of a message",
    ),
}


@functools.cache
def tiny():
    from conftest import TINY_MODEL
    from forgebook.models.tokenizer import load_tokenizer

    return load_tokenizer(str(TINY_MODEL))


@functools.cache
def tokenizer_of(family: str):
    return tokenizer_with(FAMILIES[family])


def tokenizer_with(one: dict):
    """The tiny tokenizer with the template and special tokens of a family."""
    tokenizer = copy.deepcopy(tiny())
    named = [one[key] for key in ("bos", "eos") if key in one]
    tokenizer.add_tokens([*named, *one.get("special", ())], special_tokens=True)
    tokenizer.bos_token, tokenizer.eos_token = one.get("bos"), one["eos"]
    tokenizer.chat_template = one["template"]
    return tokenizer


def row_of(shape: str, eos: str) -> dict:
    return json.loads(json.dumps(SHAPES[shape]).replace("writes EOS", f"writes {eos}"))


# What plain transformers renders ------------------------------------------------------------------------


def plain(tokenizer, messages: list[dict], tools: list[dict] | None, prompt: bool) -> str | None:
    """Render with the template alone; None if it raises."""
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)
    except Exception:
        return None


def readings(shape: str, row: dict) -> list[tuple[list[dict], list[dict] | None]]:
    """List the ways to hand an example to a template: by OpenAI's keys, with arguments and ids in several forms and
    results with and without names, and its tools as text; reasoning by key and in the content."""
    ways = []
    for arguments, ids in itertools.product((json.loads, str), ("own", "nine", "functions")):
        way = [_message(m, arguments, ids, k, row["messages"]) for k, m in enumerate(row["messages"])]
        called = iter([one["function"]["name"] for m in way for one in m.get("tool_calls", [])])
        ways += [(way, True), ([m | {"name": next(called)} if m["role"] == "tool" else m for m in way], True)]
    if shape in AS_TEXT:
        ways.append((AS_TEXT[shape], False))
    listed = [(messages, row.get("tools") if native else None) for messages, native in ways]
    unlike = []
    for (messages, tools), keys in itertools.product(listed, (True, False)):
        way = [_with_thought(m, keys) for m in messages], tools
        unlike += [] if way in unlike else [way]
    return unlike


def _message(message: dict, arguments, ids: str, k: int, messages: list[dict]) -> dict:
    content = message["content"] or ""
    content = content if isinstance(content, str) else "".join(part["text"] for part in content)
    message = message | {"content": content}
    before = sum(1 for m in messages[:k] if m["role"] == "tool")
    names = [c["function"]["name"] for m in messages for c in m.get("tool_calls", [])]

    def numbered(number: int) -> str:
        return f"call{number:05}" if ids == "nine" else f"functions.{names[number]}:{number}"

    if message["role"] == "tool" and ids != "own":
        return message | {"tool_call_id": numbered(before)}
    if "tool_calls" in message:
        calls = copy.deepcopy(message["tool_calls"])
        for number, one in enumerate(calls):
            one["function"]["arguments"] = arguments(one["function"]["arguments"])
            own = one.pop("id", None)
            one |= {"id": numbered(number)} if ids != "own" else {"id": own} if own else {}
        message |= {"tool_calls": calls}
    return message


def _with_thought(message: dict, keys: bool) -> dict:
    thought = message.get("reasoning_content")
    others = {key: value for key, value in message.items() if key not in KEYS}
    if not thought:
        return others
    if keys:
        return others | dict.fromkeys(KEYS, thought)
    return others | {"content": f"<think>\n{thought}\n</think>\n\n{message['content']}"}


def parts(message: dict) -> list[str]:
    """List what a message says, in the order in which it must stand."""
    content = message["content"] or ""
    content = content if isinstance(content, str) else "".join(part["text"] for part in content)
    calls = [one["function"] for one in message.get("tool_calls", [])]
    given = [
        one | {"arguments": json.loads(one["arguments"])} if isinstance(one["arguments"], str) else one for one in calls
    ]
    values = [str(v) for one in given for v in (one["name"], *one["arguments"].values())]
    return [message.get("reasoning_content") or "", content.strip(), *values]


def shows(text: str, part: str) -> bool:
    return part in text or json.dumps(part)[1:-1] in text or json.dumps(part, ensure_ascii=False)[1:-1] in text


# Right ---------------------------------------------------------------------------------------------------


def assert_right(tokenizer, ends: list[str], shape: str, row: dict, encodings: list) -> None:
    ways = readings(shape, row)
    targets = [k for k, m in enumerate(row["messages"]) if m["role"] == "assistant"]
    runs = [(one, *run) for one in encodings for run in _runs(one.loss_mask)]
    assert len(runs) == len(targets), f"{len(runs)} answers in the loss"
    texts = AS_TEXT.get(shape, [])
    # Results of parallel calls are one message in the text form, and the list of tools may be one.
    in_text = [k for k, m in enumerate(texts) if m["role"] == "assistant"]
    for number, (one, start, end) in enumerate(runs):
        before, said = tokenizer.decode(one.input_ids[:start]), tokenizer.decode(one.input_ids[start:end])
        message = row["messages"][targets[number]]
        prompts = [
            plain(tokenizer, way[: (in_text if tools is None and texts else targets)[number]], tools, True)
            for way, tools in ways
        ]
        assert before in prompts, f"the prompt is not the template's: {before[-150:]!r}"
        for context in row["messages"][: targets[number]]:
            if context["role"] == "system":  # Mistral v3 shows it in the last message alone, if that is a question
                assert any(shows(tokenizer.decode(one.input_ids), SYSTEM["content"]) for one in encodings)
            elif context["role"] != "assistant":
                assert all(shows(before, part) for part in parts(context)), f"not in the prompt: {context}"
        for tool in row.get("tools", []):
            assert tool["function"]["name"] in before and tool["function"]["description"] in before, "a tool is lost"
        position = 0
        thought, content, *values = parts(message)
        for part in (thought, content):
            at = next((said.find(form, position) for form in (part, json.dumps(part)[1:-1]) if form in said), -1)
            assert at >= 0, f"{part!r} is not in {said!r}, or not in order"
            position = at if part else position
        assert said.count("</think>") <= 1, f"two thoughts: {said!r}"
        assert all(said.count(value) >= values.count(value) for value in values), f"a call is cut in {said!r}"
        first = min([said.find(value) for value in values], default=position)
        assert said.find(thought) <= first, f"the thought follows a call: {said!r}"
        last = tokenizer.convert_ids_to_tokens(one.input_ids[end - 1])
        assert last in ends, f"ends with {last!r}"
        others = [m["content"] for m in row["messages"] if m["role"] == "user" and isinstance(m["content"], str)]
        assert not any(other in said for other in others), "a question is in the loss"
        assert "_{" not in said and "{'" not in said, f"Python in the answer: {said!r}"
    if shape == "special tokens in texts":
        usual = row_of(shape, "a word")
        [same] = encode(tokenizer, usual)
        special = set(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids(tokenizer.eos_token)}
        assert [i for i in same.input_ids if i in special] == [i for i in runs[0][0].input_ids if i in special]


def _runs(mask: list[bool]) -> list[tuple[int, int]]:
    runs, position = [], 0
    for in_loss, group in itertools.groupby(mask):
        length = len(list(group))
        runs += [(position, position + length)] if in_loss else []
        position += length
    return runs


def encode(tokenizer, row: dict, **options) -> list:
    example, _ = parse_row(row, "rows.jsonl:1", "instruction_tuning")
    [encoded] = encode_examples([example], tokenizer, EncodingOptions(**options))
    if isinstance(encoded, DataError):
        raise encoded
    return encoded


# Refused -------------------------------------------------------------------------------------------------


def assert_refused_for_a_true_reason(tokenizer, shape: str, row: dict, error: str) -> str:
    """Return the letter of the reason."""
    [letter] = [letter for letter, (words, _) in REASONS.items() if re.search(words, error)][:1] or [error]
    ways = readings(shape, row)
    prefixes = [(way[:k], tools) for way, tools in ways for k in range(1, len(way) + 1)]
    if letter == "A":
        assert row["messages"][0]["role"] == "assistant"
    elif letter == "C":
        prompts = [plain(tokenizer, way, tools, True) for way, tools in prefixes if way[-1]["role"] != "assistant"]
        assert "reasoning_content" in str(row)
        assert any(prompt and re.search(r"(/think(ing)?>|<channel\|>)\s*$", prompt) for prompt in prompts), error
    else:
        # A template that writes calls itself trains none as text: a set would hold calls of two kinds.
        native = any(_shows_all(tokenizer, *way) for way in readings("one call", row_of("one call", "")) if way[1])
        native_ways = [way for way in ways if way[1] or not native or "tools" not in row]
        possible = [way for way, tools in native_ways if _shows_all(tokenizer, way, tools)]
        assert letter in REASONS and not possible, f"{error}; the template can show {possible}"
    if letter == "B":
        said = error.partition("rejects these messages: ")[2]
        assert any(_raises(tokenizer, way, tools) == said for way, tools in prefixes), error
    return letter


def _shows_all(tokenizer, messages: list[dict], tools: list[dict] | None) -> bool:
    """Return whether the template renders each prefix of a conversation with all that its last message says."""
    for k, message in enumerate(messages, 1):
        text = plain(tokenizer, messages[:k], tools, message["role"] != "assistant")
        said = [part for part in parts(message) if part]
        if text is None or not all(shows(text, part) and text.count(part) >= said.count(part) for part in said):
            return False
    names = [tool["function"][key] for tool in tools or [] for key in ("name", "description")]
    return all(name in text for name in names)


def _raises(tokenizer, messages: list[dict], tools: list[dict] | None) -> str:
    try:
        tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        return str(error)
    return ""


# The table -----------------------------------------------------------------------------------------------


def outcome(family: str, shape: str) -> str:
    """Try a pair; return what the table says of it. Raises AssertionError if it is neither right nor truly refused."""
    one, tokenizer = FAMILIES[family], tokenizer_of(family)
    ends, row = one.get("ends", [one["eos"]]), row_of(shape, one["eos"])
    keys, options = [], {}
    while True:
        try:
            encodings = encode(tokenizer, row, **options)
        except DataError as error:
            setting = re.search(r"chat_template_kwargs: \{(\w+): (\w+)\}", str(error))
            if "rewritten_turns: expand" in str(error) and not options:
                options = {"rewritten_turns": "expand"}
                keys.append("`rewritten_turns: expand`")
            elif setting and setting[0] not in str(keys):
                tokenizer = copy.deepcopy(tokenizer)
                set_template_defaults(tokenizer, {setting[1]: setting[2] == "true"})
                keys.append(f"`{setting[0].partition(': ')[2]}`")
            else:
                return assert_refused_for_a_true_reason(tokenizer, shape, row, str(error))
            continue
        assert_right(tokenizer, ends, shape, row, encodings)
        return " ".join(["+", *keys])


def table(outcomes: dict[tuple[str, str], str]) -> str:
    lines = [INTRODUCTION, *(f"- {letter}: {what}" for letter, (_, what) in REASONS.items()), ""]
    lines += ["| family | " + " | ".join(SHAPES) + " |", "|---" * (len(SHAPES) + 1) + "|"]
    for family in FAMILIES:
        lines.append(f"| {family} | " + " | ".join(outcomes[family, shape] for shape in SHAPES) + " |")
    return "\n".join([*lines, "", "Where each behavior is shown:", "", *_sources(), ""])


def _sources() -> list[str]:
    return [f"- {family}: {one['shown_in']}" for family, one in FAMILIES.items()]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_shape_is_right_or_refused_for_a_true_reason(family):
    outcomes = {(family, shape): outcome(family, shape) for shape in SHAPES}
    [line] = [line for line in TABLE.read_text("utf-8").splitlines() if line.startswith(f"| {family} |")]
    assert line == f"| {family} | " + " | ".join(outcomes[family, shape] for shape in SHAPES) + " |"


def test_the_table_holds_every_family_and_source():
    written = TABLE.read_text("utf-8").splitlines()
    assert len(FAMILIES) >= 60 and len(SHAPES) >= 15
    assert [line for line in written if line.startswith("- ")][len(REASONS) :] == _sources()
    assert f"| family | {' | '.join(SHAPES)} |" in written


if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parent))
    wrong, outcomes = 0, {}
    for pair in itertools.product(FAMILIES, SHAPES):
        try:
            outcomes[pair] = outcome(*pair)
        except Exception as problem:
            wrong += 1
            outcomes[pair] = "?"
            print(*pair, ":", type(problem).__name__, (str(problem).splitlines() or [""])[0][:400])
    print(wrong, "wrong")
    if not wrong or "--force" in sys.argv:
        TABLE.write_text(table(outcomes), encoding="utf-8")
