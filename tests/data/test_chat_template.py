"""What is rendered: the chat template's text, tools and reasoning in it, and the turns that it rewrites."""

import copy

import pytest

from conftest import CONVERSATION, supervised_text
from forgebook.data.chat_template import render
from forgebook.data.masking import encode, encode_many, encode_prompt
from forgebook.errors import DataError


def test_a_template_that_rewrites_earlier_turns_is_rejected(tokenizer):
    forgetful = copy.deepcopy(tokenizer)
    forgetful.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content if loop.last or m.role != 'assistant' else '' }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(DataError, match=r"messages\[2\]: the chat template renders this assistant turn differently"):
        encode(CONVERSATION, forgetful)


def test_an_answer_that_the_template_changes_is_rejected(tokenizer):
    shouting = copy.deepcopy(tokenizer)
    shouting.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | upper }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(DataError, match=r"messages\[2\].content: the chat template does not show it unchanged"):
        encode(CONVERSATION, shouting)


def test_the_error_of_a_template_is_reported(tokenizer):
    rows = [{"role": "critic", "content": "a"}]
    with pytest.raises(DataError, match="the chat template rejects these messages: role is critic"):
        render(rows, tokenizer)


def test_no_template_and_no_prompt_format_is_rejected(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(DataError, match=r"no chat template: set generation_config\.prompt_format"):
        render(CONVERSATION, bare)


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


CALLS = [
    {"type": "function", "id": "1", "function": {"name": "weather", "arguments": {"city": "Rome"}}},
    {"type": "function", "id": "2", "function": {"name": "weather", "arguments": {"city": "Oslo"}}},
]


WITH_TOOLS = [
    {"role": "user", "content": "Rome and Oslo?"},
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "content": "sun", "tool_call_id": "1"},
    {"role": "tool", "content": "rain", "tool_call_id": "2"},
    {"role": "assistant", "content": "Sun and rain."},
]


def test_a_template_that_knows_tools_renders_them(tokenizer):
    encoded = encode(WITH_TOOLS, tokenizer, tools=TOOLS)
    assert encoded.input_ids == tokenizer.apply_chat_template(WITH_TOOLS, tools=TOOLS, return_dict=False)
    assert supervised_text(encoded, tokenizer).count("weather") == 2
    assert supervised_text(encoded, tokenizer).endswith("</tool_call><|end|>Sun and rain.<|end|>")


def test_other_templates_get_tools_as_text(tokenizer):
    """LLMForge's convention, parallel calls and their results included."""
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert render(WITH_TOOLS, plain, tools=TOOLS) == (
        '<|system|>[TOOL_LIST] [{"type": "function", "function": {"name": "weather", "parameters": '
        '{"type": "object"}}}] [/TOOL_LIST]<|end|><|user|>Rome and Oslo?<|end|>'
        '<|assistant|>[TOOL_CALLS] [{"function": {"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}, '
        '"type": "function"}, {"function": {"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}, '
        '"type": "function"}] [/TOOL_CALLS]<|end|>'
        '<|user|>[TOOL_RESULT] {"name": "weather", "content": "sun", "tool_call_id": "1"} [/TOOL_RESULT]'
        '[TOOL_RESULT] {"name": "weather", "content": "rain", "tool_call_id": "2"} [/TOOL_RESULT]<|end|>'
        "<|assistant|>Sun and rain.<|end|>"
    )
    encoded = encode(WITH_TOOLS, plain, tools=TOOLS)
    assert supervised_text(encoded, plain).startswith("[TOOL_CALLS]")
    prompt = encode_prompt(WITH_TOOLS[:1], plain, tools=TOOLS)
    assert encoded.input_ids[: len(prompt)] == prompt


# Like Qwen 3 and DeepSeek R1: the thinking of earlier turns is not shown.
FORGETS_THINKING = (
    "{% set last = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.index0 > last.user %}"
    "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


THOUGHT = [
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "A.", "reasoning_content": "first"},
    {"role": "user", "content": "b?"},
    {"role": "assistant", "content": "B.", "reasoning_content": "second"},
]


@pytest.fixture
def thinking(tokenizer):
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = FORGETS_THINKING
    return copied


def test_rewritten_turns_are_rejected_with_the_choices(thinking):
    with pytest.raises(DataError, match=r"messages\[1\]: .* set rewritten_turns: expand .* train_on: last"):
        encode(THOUGHT, thinking)


def test_rewritten_turns_can_be_expanded(thinking):
    """One row of each answer, as it was when it was given; each begins with what the model is asked then."""
    [rows] = encode_many([(THOUGHT, None)], thinking, rewritten_turns="expand")
    assert [supervised_text(row, thinking) for row in rows] == [
        "<think>\nfirst\n</think>\n\nA.<|end|>", "<think>\nsecond\n</think>\n\nB.<|end|>",
    ]  # fmt: skip
    for k, row in zip((1, 3), rows, strict=True):
        prompt = encode_prompt(THOUGHT[:k], thinking)
        assert row.input_ids[: len(prompt)] == prompt
    assert "first" not in thinking.decode(rows[1].input_ids)


def test_the_last_turn_alone_needs_no_choice(thinking):
    encoded = encode(THOUGHT, thinking, loss_on="last")
    assert supervised_text(encoded, thinking) == "<think>\nsecond\n</think>\n\nB.<|end|>"


def test_reasoning_precedes_the_content_where_the_template_does_not_know_it(tokenizer):
    encoded = encode(THOUGHT, tokenizer)
    assert supervised_text(encoded, tokenizer).startswith("<think>\nfirst\n</think>\n\nA.<|end|>")
