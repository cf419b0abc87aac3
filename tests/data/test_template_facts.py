"""What probes see of a template: the form of its calls, its key of reasoning, and what it prints after an answer."""

import copy
import json

import pytest

from conftest import supervised_text
from forgebook.data.masking import encode, encode_prompt
from forgebook.data.template_facts import CallForm, template_facts
from forgebook.errors import DataError

LISTS = "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
TURN = LISTS + "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}CALLS<|end|>{% endfor %}" + PROMPT
CALLS = TURN.replace("CALLS", "{% for c in m.tool_calls or [] %}CALL{% endfor %}")
OBJECTS = CALLS.replace("CALL", "{{ c.function | tojson }}")
# DeepSeek, Apertus: a text is added to a text. InternLM: an object would be printed as Python.
ADDS = CALLS.replace("CALL", "{{ c.function.name + c.function.arguments }}")
PRINTS = CALLS.replace("CALL", "{{ c.function.name }}{{ c.function.arguments | string }}")
# Mistral: ids of nine letters and digits alone, in calls and results.
NINE = OBJECTS.replace(
    "<|{{ m.role }}|>",
    "{% for id in m.tool_calls | default([]) | map(attribute='id') %}{% if id | default('') | length != 9 %}"
    "{{ raise_exception('ids have length 9') }}{% endif %}{% endfor %}<|{{ m.role }}|>"
    "{% if m.role == 'tool' %}{{ raise_exception('no such id') if m.tool_call_id | default('') | length != 9 }}"
    "{{ m.tool_call_id }}{% endif %}",
)
# Kimi K2: the called function is named in the id alone.
NAMES = CALLS.replace("CALL", "{{ c.id }}{{ c.function.arguments | tojson }}")
SILENT = TURN.replace("CALLS", "")

TOOLS = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("read", "look")]


def calls(*named: tuple[str, str | None]) -> dict:
    made = [
        {"type": "function", "function": {"name": name, "arguments": {"place": "Oslo"}}} | ({"id": id} if id else {})
        for name, id in named
    ]
    return {"role": "assistant", "content": "", "tool_calls": made}


AGENT = [
    {"role": "user", "content": "How warm is it?"},
    calls(("read", "call_9aF31"), ("look", "call_77b20")),
    {"role": "tool", "content": "a city", "tool_call_id": "call_77b20"},
    {"role": "tool", "content": "4 degrees", "tool_call_id": "call_9aF31"},
    {"role": "assistant", "content": "Four."},
]


@pytest.mark.parametrize(
    ("template", "form", "shown"),
    [
        (OBJECTS, CallForm(), '{"name": "read", "arguments": {"place": "Oslo"}}'),
        (ADDS, CallForm(arguments_as_text=True), 'read{"place": "Oslo"}look{"place": "Oslo"}'),
        (PRINTS, CallForm(arguments_as_text=True), 'read{"place": "Oslo"}look{"place": "Oslo"}'),
        (NINE, CallForm(ids="call{number:05}"), '{"name": "look", "arguments": {"place": "Oslo"}}'),
        (NAMES, CallForm(ids="functions.{name}:{number}"), 'functions.read:0{"place": "Oslo"}functions.look:1'),
        (SILENT, None, '[TOOL_CALLS] [{"function": {"name": "read"'),
    ],
    ids="objects adds-text prints-python ids-of-nine names-in-ids none".split(),
)
def test_calls_are_written_in_the_form_that_the_template_reads(with_template, template, form, shown):
    tokenizer = with_template(template)
    assert template_facts(tokenizer, template, lists_tools=True).calls == form
    encoded = encode(AGENT, tokenizer, tools=TOOLS)
    assert shown in supervised_text(encoded, tokenizer) and "{'" not in tokenizer.decode(encoded.input_ids)
    prompt = encode_prompt(AGENT[:4], tokenizer, tools=TOOLS)
    assert encoded.input_ids[: len(prompt)] == prompt


UNLISTED = OBJECTS.replace(LISTS, "")
# R1: the content of a call that is not null is an answer of its own.
ANSWERS_TWICE = UNLISTED.replace("<|end|>", "<|end|>{% if m.tool_calls %}<|assistant|><|end|>{% endif %}")


@pytest.mark.parametrize(
    ("template", "as_text"),
    [(UNLISTED, False), (ANSWERS_TWICE, True), (SILENT, True)],
    ids="shown answered-twice silent".split(),
)
def test_calls_without_a_list_of_tools_are_those_of_the_template(with_template, template, as_text):
    """DeepSeek's templates read calls and no list of tools."""
    tokenizer = with_template(template)
    supervised = supervised_text(encode(AGENT, tokenizer), tokenizer)
    assert ("[TOOL_CALLS]" in supervised) == as_text and supervised.count("<|end|>") == 2
    # A list that the template does not show is written as text, and its calls are, too.
    assert "[TOOL_CALLS]" in supervised_text(encode(AGENT, tokenizer, tools=TOOLS), tokenizer)


def test_no_thought_follows_a_prompt_that_closes_it(with_template):
    closes = with_template(UNLISTED.replace("<|{{ m.role }}|>", "<|{{ m.role }}|></think>").replace(
        "<|assistant|>{% endif %}", "<|assistant|></think>{% endif %}"
    ))  # fmt: skip
    with pytest.raises(DataError, match="the generation prompt of the chat template closes the thought"):
        encode([AGENT[0], calls(("read", None)) | {"reasoning_content": "It must be read."}], closes)


@pytest.mark.parametrize("ids", [True, False], ids="with-ids without-ids".split())
def test_results_keep_their_calls(ids):
    agent = copy.deepcopy(AGENT)
    if not ids:
        agent[2], agent[3] = ({k: v for k, v in agent[k].items() if k != "tool_call_id"} for k in (3, 2))
        agent[1] = calls(("read", None), ("look", None))
    written = CallForm(ids="call{number:05}").write(agent)
    assert [call["id"] for call in written[1]["tool_calls"]] == ["call00000", "call00001"]
    results = {message["tool_call_id"]: message["content"] for message in written[2:4]}
    assert results == {"call00000": "4 degrees", "call00001": "a city"} and "9aF31" not in str(written)
    assert CallForm().write(agent) == agent


def test_two_calls_of_one_id_are_two_calls():
    """Some sets number the calls of every turn anew."""
    twice = [AGENT[0], calls(("read", "0")), {"role": "tool", "content": "4", "tool_call_id": "0"}] * 2
    written = CallForm(ids="functions.{name}:{number}").write(twice)
    assert [message.get("tool_call_id") for message in written if message["role"] == "tool"] == [
        "functions.read:0", "functions.read:1",
    ]  # fmt: skip


THINKS = SILENT.replace("{{ m.content }}", "{% if m.KEY %}<think>{{ m.KEY }}</think>{% endif %}{{ m.content }}")
# Ministral 3: blocks of a list are of type "thinking"; no key of a message is.
BLOCKS = SILENT.replace(
    "{{ m.content }}",
    "{% if m.content is string %}{{ m.content }}{% else %}{% for b in m.content %}{{ b['thinking'] }}{% endfor %}"
    "{% endif %}",
)
# Command R7B, Gemma 4: of calls alone.
OF_CALLS = OBJECTS.replace("{{ m.content }}", "{% if m.tool_calls %}{{ m.reasoning }}{% endif %}{{ m.content }}")


@pytest.mark.parametrize(
    ("template", "key"),
    [
        (THINKS.replace("KEY", "reasoning_content"), "reasoning_content"),
        (THINKS.replace("KEY", "thinking"), "thinking"),
        (THINKS.replace("m.KEY", "m.get('reasoning')"), "reasoning"),
        (BLOCKS, None),
        (OF_CALLS, "reasoning"),
        (SILENT, None),
    ],
    ids="reasoning_content thinking reasoning blocks of-calls none".split(),
)
def test_the_key_of_reasoning_is_the_one_that_is_shown(with_template, template, key):
    tokenizer = with_template(template)
    assert template_facts(tokenizer, template, lists_tools=True).reasoning_key == key


def test_thoughts_precede_calls(with_template):
    """Gemma 3 and 4 write contents after calls, and with them a thought that they do not read."""
    after = with_template(
        OBJECTS.replace("{{ m.content }}", "").replace("<|end|>{% endfor", "{{ m.content }}<|end|>{% endfor")
    )
    agent = [AGENT[0], calls(("read", None)) | {"reasoning_content": "It must be read."}]
    supervised = supervised_text(encode(agent, after, tools=TOOLS), after)
    assert supervised.startswith("<think>\nIt must be read.\n</think>\n\n{") and supervised.count("It must") == 1


@pytest.mark.parametrize(
    ("end", "closing"),
    [
        ("{% if not add_generation_prompt %}<|reserved_0|>{% endif %}", "<|reserved_0|>"),
        ("<|assistant|>", "<|assistant|>"),
        ("", ""),
    ],
    ids="phi3-eos command-r7b-header none".split(),
)
def test_what_closes_a_text_is_not_in_the_loss(with_template, end, closing):
    template = SILENT.removesuffix(PROMPT) + end
    template += "" if end == "<|assistant|>" else PROMPT
    tokenizer = with_template(template)
    assert template_facts(tokenizer, template, lists_tools=False).closing == closing
    messages = [AGENT[0], AGENT[4], AGENT[0], AGENT[4]]
    encoded = encode(messages, tokenizer)
    assert supervised_text(encoded, tokenizer) == "Four.<|end|>Four.<|end|>"
    assert encoded.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)


def test_a_second_call_that_a_template_leaves_out_gets_a_turn_of_its_own(with_template):
    one = with_template(OBJECTS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"))
    with pytest.raises(
        DataError, match=r"messages\[1\].tool_calls\[1\].*'look'.*give each call a turn of its own, or set"
    ):
        encode(AGENT, one, tools=TOOLS)


def test_a_list_of_tools_as_text_that_a_template_leaves_out_is_named(with_template):
    """The user's first message is a question, not the system message in which tools are written."""
    no_system = with_template(
        SILENT.replace("{{ m.content }}", "{{ m.content if m.role != 'system' }}").replace(LISTS, "")
    )
    with pytest.raises(DataError, match=r"^tools: .* system message"):
        encode(AGENT, no_system, tools=TOOLS)


READS_SCHEMAS = OBJECTS.replace(
    "{{ tools | tojson }}",
    "{% for t in tools %}{{ t.function.description }}{{ t.function.name }}("
    "{% for p in t.function.parameters.properties %}{{ p }}{% endfor %})"
    "{% endfor %}",
)


@pytest.mark.parametrize(
    ("schema", "shown"),
    [
        ({}, "read()"),
        ({"parameters": {}}, "read()"),
        ({"parameters": {"type": "object"}}, "read()"),
        ({"parameters": {"properties": {"place": {}}}}, "read(place)"),
    ],
)
def test_a_tool_without_arguments_needs_no_schema(with_template, tokenizer, schema, shown):
    """OpenAI's form allows it; templates that read `parameters.properties` would fail on the whole example."""
    tools = [{"type": "function", "function": {"name": "read", **schema}}]
    reading, printing = with_template(READS_SCHEMAS), with_template(OBJECTS)
    assert shown in reading.decode(encode(AGENT, reading, tools=tools).input_ids)
    assert json.dumps(tools) in printing.decode(encode(AGENT, printing, tools=tools).input_ids)
