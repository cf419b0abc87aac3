"""Answers that continue their prompts with all that their messages say, in templates that make this hard."""

import re

import pytest

from conftest import supervised_text
from forgebook.config.blocks import PromptFormat
from forgebook.data.chat_template import render
from forgebook.data.masking import encode, encode_many, encode_prompt, end_of_turn
from forgebook.data.row_formats import parse_row
from forgebook.errors import DataError
from forgebook.models.template_settings import set_template_defaults

PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
LISTS_TOOLS = "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
# LFM2, Falcon-H1: the tools are listed and no call is written.
NO_CALLS = LISTS_TOOLS + "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}" + PROMPT
# DeepSeek-R1-Distill, Qwen: of an answer only what follows its thinking.
CUTS_THOUGHT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] if m.role == 'assistant' else "
    "m.content }}<|end|>{% endfor %}" + PROMPT
)
FIRST_CALL_ONLY = (
    LISTS_TOOLS + "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.tool_calls %}"
    "{{ m.tool_calls[0].function.name }}{{ m.tool_calls[0].function.arguments | tojson }}{% endif %}<|end|>{% endfor %}"
    + PROMPT
)
# Gemma 4 31B, Nemotron 3: an empty thought in the generation prompt alone, unless thinking is on.
PROMPT_WITH_THOUGHT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}"
    "<|assistant|>{% if enable_thinking is defined and enable_thinking %}<think>\n{% else %}<think></think>{% endif %}"
    "{% endif %}"
)
# gpt-oss: thinking and call, result, thinking and answer; thinking is forgotten once an answer follows.
HARMONY = LISTS_TOOLS + (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set later = namespace(final=false) %}"
    "{% for n in messages[loop.index:] if n.role == 'assistant' and not n.tool_calls %}{% set later.final = true %}"
    "{% endfor %}{% if m.thinking and (not later.final if m.tool_calls else loop.last) %}"
    "<|assistant|>[analysis]{{ m.thinking }}<|end|>{% endif %}"
    "{% if m.tool_calls %}<|assistant|>[call]{{ m.tool_calls[0].function.name }}"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|end|>{% else %}<|assistant|>[final]{{ m.content }}<|end|>"
    "{% endif %}{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}" + PROMPT
)

QUESTION = {"role": "user", "content": "How warm is it in Oslo?"}
TOOLS = [
    {"type": "function", "function": {"name": "read", "parameters": {"type": "object", "properties": {"place": {}}}}}
]


def calls(*places: str) -> dict:
    made = [{"type": "function", "function": {"name": "read", "arguments": {"place": place}}} for place in places]
    return {"role": "assistant", "content": "", "tool_calls": made}


AGENT = [
    QUESTION,
    calls("Oslo") | {"reasoning_content": "I have to read the sensor."},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "Four degrees.", "reasoning_content": "It says 4."},
]


def test_a_template_that_writes_no_calls_gets_tools_as_text(with_template):
    silent = with_template(NO_CALLS)
    [encoded] = encode_many([([QUESTION, calls("Oslo")], TOOLS)], silent)[0]
    assert supervised_text(encoded, silent).startswith('[TOOL_CALLS] [{"function": {"name": "read", "arguments":')
    prompt = encode_prompt([QUESTION], silent, tools=TOOLS)
    assert encoded.input_ids[: len(prompt)] == prompt and "[TOOL_LIST]" in silent.decode(prompt)


SHORT = [QUESTION, {"role": "assistant", "content": "4"}]
LOSING = {
    "second call": (
        FIRST_CALL_ONLY,
        [QUESTION, calls("Oslo", "Rome")],
        r"tool_calls\[1\].*leaves out the call of 'read'",
    ),
    "system": (
        NO_CALLS.replace("m.content }}", "m.content if m.role != 'system' }}"),
        [{"role": "system", "content": "Be short."}, *SHORT],
        r"messages\[0\].content: the chat template does not show it",
    ),
    "user": (
        NO_CALLS.replace("m.content }}", "m.content[:5] if m.role == 'user' else m.content }}"),
        SHORT,
        r"messages\[0\].content: the chat template does not show it",
    ),
}


@pytest.mark.parametrize(("template", "messages", "path"), LOSING.values(), ids=LOSING.keys())
@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
def test_what_a_template_leaves_out_is_an_error(with_template, template, messages, path, loss_on):
    tools = TOOLS if messages[-1].get("tool_calls") else None
    with pytest.raises(DataError, match=path):
        encode(messages, with_template(template), tools=tools, loss_on=loss_on)


@pytest.mark.parametrize(
    "answer",
    [{"content": "Four.", "reasoning_content": "It says 4."}, {"content": "<think>\nIt says 4.\n</think>\n\nFour."}],
    ids="beside inside".split(),
)
def test_a_thought_that_the_template_cuts_is_trained_as_text(with_template, answer):
    cutting, messages = with_template(CUTS_THOUGHT), [QUESTION, {"role": "assistant", **answer}]
    assert supervised_text(encode(messages, cutting), cutting) == "<think>\nIt says 4.\n</think>\n\nFour.<|end|>"
    later = [*messages, QUESTION, {"role": "assistant", "content": "Five."}]
    with pytest.raises(DataError, match=r"messages\[1\]: .* set rewritten_turns: expand"):
        encode(later, cutting)
    [rows] = encode_many([(later, None)], cutting, rewritten_turns="expand")
    assert supervised_text(rows[1], cutting) == "Five.<|end|>" and "It says 4." not in cutting.decode(rows[1].input_ids)


def test_empty_reasoning_is_no_reasoning(tokenizer):
    row = {"messages": [QUESTION | {"reasoning_content": ""}, {"role": "assistant", "content": "4", "thinking": " "}]}
    row["messages"][1]["reasoning_content"] = ""
    example, notes = parse_row(row, "rows:1", "instruction_tuning")
    assert "think" not in render(example.messages, tokenizer) and notes.ignored == ()


def test_a_user_does_not_reason(tokenizer):
    row = {"messages": [QUESTION | {"reasoning_content": "Hm."}, {"role": "assistant", "content": "4"}]}
    example, notes = parse_row(row, "rows:1", "instruction_tuning")
    assert "Hm." not in render(example.messages, tokenizer) and notes.ignored == ("messages[].reasoning_content",)


def test_an_answer_continues_a_thought_of_the_generation_prompt(with_template):
    tokenizer = with_template(PROMPT_WITH_THOUGHT)
    messages = [QUESTION, {"role": "assistant", "content": "Four."}]
    encoded = encode(messages, tokenizer)
    assert supervised_text(encoded, tokenizer) == "Four.<|end|>"
    prompt = encode_prompt(messages[:1], tokenizer)
    assert encoded.input_ids[: len(prompt)] == prompt and tokenizer.decode(prompt).endswith("<think></think>")
    with pytest.raises(
        DataError, match=r"messages\[1\]: it has reasoning, but the generation prompt .* closes the thought"
    ):
        encode([QUESTION, {"role": "assistant", "content": "Four.", "reasoning_content": "It says 4."}], tokenizer)


def test_an_answer_closes_a_thought_that_the_prompt_opens(with_template):
    tokenizer = with_template(CUTS_THOUGHT.replace("%}<|assistant|>{% endif", "%}<|assistant|><think>\n{% endif"))
    reasoned = {"role": "assistant", "content": "Four.", "reasoning_content": "It says 4."}
    assert supervised_text(encode([QUESTION, reasoned], tokenizer), tokenizer) == "It says 4.\n</think>\n\nFour.<|end|>"
    plain = {"role": "assistant", "content": "Four."}
    assert supervised_text(encode([QUESTION, plain], tokenizer), tokenizer) == "\n</think>\n\nFour.<|end|>"


@pytest.mark.parametrize("loss_on", ["assistant", "last"])
def test_harmony_trains_thinking_call_and_answer(with_template, loss_on):
    harmony = with_template(HARMONY)
    encoded = encode(AGENT, harmony, tools=TOOLS, loss_on=loss_on)
    call = '<|assistant|>[analysis]I have to read the sensor.<|end|><|assistant|>[call]read{"place": "Oslo"}<|end|>'
    answer = "[analysis]It says 4.<|end|><|assistant|>[final]Four degrees.<|end|>"
    supervised = supervised_text(encoded, harmony)
    assert supervised == (call.removeprefix("<|assistant|>") if loss_on == "assistant" else "") + answer
    assert call in harmony.decode(encoded.input_ids)
    prompt = encode_prompt(AGENT[:3], harmony, tools=TOOLS)
    assert encoded.input_ids[: len(prompt)] == prompt


OPENS_BY_DEFAULT = PROMPT_WITH_THOUGHT.replace(
    "enable_thinking is defined and enable_thinking", "enable_thinking is not defined or enable_thinking"
)
KEEPS_BY_SETTING = CUTS_THOUGHT.replace("if m.role == 'assistant'", "if m.role == 'assistant' and not keep_thoughts")
REASONED = {"role": "assistant", "content": "Four.", "reasoning_content": "It says 4."}


@pytest.mark.parametrize("is_set", [False, True], ids=["unset", "set otherwise"])
@pytest.mark.parametrize(
    ("template", "messages", "setting"),
    [
        (PROMPT_WITH_THOUGHT, [QUESTION, REASONED], {"enable_thinking": True}),
        (OPENS_BY_DEFAULT, SHORT, {"enable_thinking": False}),
        (KEEPS_BY_SETTING, [QUESTION, REASONED, *SHORT], {"keep_thoughts": True}),
    ],
    ids="closed-thought open-thought forgotten-thought".split(),
)
def test_the_error_names_the_setting_of_this_template_that_helps(with_template, template, messages, setting, is_set):
    tokenizer = with_template(template)
    [(name, value)] = setting.items()
    if is_set:
        set_template_defaults(tokenizer, {name: not value})
    with pytest.raises(DataError, match=rf"generation_config.chat_template_kwargs: {{{name}: {str(value).lower()}}}"):
        encode(messages, tokenizer)
    set_template_defaults(tokenizer, setting)
    supervised = supervised_text(encode(messages, tokenizer), tokenizer)
    assert supervised.endswith(messages[-1]["content"] + "<|end|>") and supervised.count("</think>") == len(
        [message for message in messages if "reasoning_content" in message]
    )


def test_harmony_expands_conversations_of_several_answers(with_template):
    harmony = with_template(HARMONY)
    [rows] = encode_many([(AGENT + AGENT, TOOLS)], harmony, rewritten_turns="expand")
    assert [supervised_text(row, harmony).count("[analysis]") for row in rows] == [1, 1, 1, 1]
    assert [harmony.decode(row.input_ids).count("[analysis]") for row in rows] == [1, 2, 1, 2]


# GLM 4.5: no token ends a turn, the tag of the next role does.
NO_END = LISTS_TOOLS + (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}</tool_call>{% endfor %}{% endfor %}" + PROMPT
)
PLAIN_TEXT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: "
    "{% endif %}"
)


def test_a_turn_without_an_end_ends_with_the_tag_of_the_next(with_template):
    tokenizer = with_template(NO_END)
    encoded = encode([*SHORT, *SHORT], tokenizer)
    assert supervised_text(encoded, tokenizer) == "4<|user|>4<|user|>"
    prompt = encode_prompt([*SHORT, QUESTION], tokenizer)
    assert encoded.input_ids[: len(prompt)] == prompt
    called = encode([QUESTION, calls("Oslo")], tokenizer, tools=TOOLS)
    assert supervised_text(called, tokenizer).endswith("</tool_call><|tool|>")
    assert encode(SHORT, tokenizer, loss_on="all").input_ids[-1] == tokenizer.convert_tokens_to_ids("<|user|>")


def test_a_turn_without_any_token_ends_with_eos(with_template):
    tokenizer = with_template(PLAIN_TEXT)
    assert supervised_text(encode(SHORT, tokenizer), tokenizer) == "4\n<|end|>"
    with pytest.raises(DataError, match=r"messages\[1\]: no token ends this assistant turn .* rewritten_turns: expand"):
        encode([*SHORT, *SHORT], tokenizer)
    [rows] = encode_many([([*SHORT, *SHORT], None)], tokenizer, rewritten_turns="expand")
    assert [supervised_text(row, tokenizer) for row in rows] == ["4\n<|end|>"] * 2
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"messages\[1\]: no token ends this assistant turn.*prompt_format"):
        encode(SHORT, tokenizer)


@pytest.mark.parametrize(
    ("assistant", "supervised"),
    [("{instruction}", "4<|end|>"), ("{instruction} ###\n", "4 ###\n"), ("{instruction}<|end|>", "4<|end|>")],
)
def test_prompt_formats_end_with_their_own_text_or_with_eos(tokenizer, assistant, supervised):
    fmt = PromptFormat(system="{instruction}", user="U{instruction}", assistant=assistant)
    assert supervised_text(encode(SHORT, tokenizer, fmt), tokenizer) == supervised


@pytest.mark.parametrize(
    ("template", "ends"),
    [(NO_END, ["<|user|>", "<|tool|>"]), (NO_CALLS, ["<|end|>"]), (PLAIN_TEXT, ["<|end|>"])],
    ids="next-tag own eos".split(),
)
def test_the_tokens_that_end_an_answer(with_template, template, ends):
    tokenizer = with_template(template)
    assert end_of_turn(tokenizer, None) == ("", tokenizer.convert_tokens_to_ids(ends))


# Kimi K2 Thinking: the last answer without calls has an empty thought, as earlier ones.
EMPTIES_THOUGHT = NO_CALLS.replace(
    "<|{{ m.role }}|>",
    "<|{{ m.role }}|>{% if m.role == 'assistant' %}<think>{{ m.reasoning_content if m.tool_calls }}</think>{% endif %}",
)


def test_an_empty_thought_of_the_template_is_filled(with_template):
    tokenizer = with_template(EMPTIES_THOUGHT)
    assert (
        supervised_text(encode([QUESTION, REASONED], tokenizer), tokenizer) == "<think>It says 4.</think>Four.<|end|>"
    )
    assert supervised_text(encode(SHORT, tokenizer), tokenizer) == "<think></think>4<|end|>"


def test_an_answer_with_a_thought_ends_as_one_without(with_template):
    """GLM 4.5 shows no thought of an earlier turn, so that a next turn changes the text before it too."""
    shown = (
        "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    )
    tokenizer = with_template(NO_END.replace("{{ m.content }}", shown))
    for answer in (REASONED, {"role": "assistant", "content": "Four."}):
        assert supervised_text(encode([QUESTION, answer], tokenizer), tokenizer).endswith("Four.<|user|>")


# Qwen 3: what stands before the closing tag in a content is its thought, wherever the tag is.
PARSES_THOUGHT = NO_CALLS.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and '</think>' in m.content %}<think>\n{{ m.content.split('</think>')[0]"
    ".split('<think>')[-1].strip() }}\n</think>\n\n{{ m.content.split('</think>')[-1].lstrip() }}"
    "{% else %}{{ m.content }}{% endif %}",
)


def test_a_tag_that_an_answer_only_names_makes_no_thought(with_template):
    tokenizer = with_template(PARSES_THOUGHT)
    with pytest.raises(DataError, match=r"messages\[1\].content: the chat template does not show it unchanged"):
        encode([QUESTION, {"role": "assistant", "content": "Write </think> to end it."}], tokenizer)
    encode([{"role": "user", "content": "What is </think>?"}, SHORT[1]], tokenizer)


@pytest.mark.parametrize("template", [PARSES_THOUGHT, CUTS_THOUGHT], ids="qwen3 r1".split())
def test_an_output_whose_prompt_opened_the_thought_is_trained_with_it(with_template, template):
    tokenizer = with_template(template)
    for answer in ("It says 4.\n</think>\n\nFour.", "<think>\nIt says 4.\n</think>\n\nFour."):
        row = {"prompt": "How warm?", "completion": answer}
        example, _ = parse_row(row, "rows:1", "instruction_tuning")
        supervised = supervised_text(encode(example.messages, tokenizer), tokenizer)
        assert supervised == "<think>\nIt says 4.\n</think>\n\nFour.<|end|>"


def test_a_thought_that_does_not_end_is_an_error():
    row = {"prompt": "How warm?", "completion": "<think>\nIt says 4"}
    with pytest.raises(DataError, match=r"rows:1: messages\[1\].content opens a thought .* does not end: add </think>"):
        parse_row(row, "rows:1", "instruction_tuning")


def test_a_template_that_lists_some_of_the_tools_is_an_error(with_template):
    """Its probe lists one tool, which it shows."""
    first_only = NO_CALLS.replace("{{ tools | tojson }}", "{{ tools[0] | tojson }}").replace(
        "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    )
    other = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
    [whole] = encode_many([(SHORT, TOOLS)], with_template(first_only))
    assert not isinstance(whole, DataError)
    [error] = encode_many([(SHORT, [*TOOLS, other])], with_template(first_only))
    assert re.match(r"tools\[1\]\.function\.name: the chat template does not show it", str(error))


def test_a_thought_is_never_trained_behind_its_call(with_template):
    """A model that writes the call first has nothing to think about."""
    behind = LISTS_TOOLS + (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function | tojson }}{% endfor %}{{ m.reasoning_content }}<|end|>{% endfor %}" + PROMPT
    )
    tokenizer = with_template(behind)
    [pieces] = encode_many([(AGENT, TOOLS)], tokenizer)
    said = str(pieces) if isinstance(pieces, DataError) else supervised_text(pieces[0], tokenizer)
    assert isinstance(pieces, DataError) or said.index("read the sensor") < said.index("Oslo"), said
