"""What is rendered, and which tokens are trained."""

import pytest

from conftest import chat
from forgebook.config.parse import PromptFormat
from forgebook.data.chat_template import encode, encode_many, encode_prompt, encode_text, pieces_of, render, show
from forgebook.errors import DataError

LLAMA_2 = PromptFormat(
    system="<<SYS>>\n{instruction}\n<</SYS>>\n\n",
    user="[INST] {system}{instruction} [/INST]",
    assistant=" {instruction} </s><s>",
    bos="<s>",
    system_in_user=True,
)
CONVERSATION = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Where is the lamp?"},
    {"role": "assistant", "content": "On the table."},
    {"role": "user", "content": "And the key?"},
    {"role": "assistant", "content": "Under the lamp."},
]


def trained_text(encoded, tokenizer) -> str:
    return tokenizer.decode([i for i, t in zip(encoded.input_ids, encoded.trained, strict=True) if t])


def test_trains_the_assistant_turns_through_their_end_tokens(tokenizer):
    """Peers' point 1: the template has no `{% generation %}` tags, and the mask needs none."""
    assert "{% generation" not in tokenizer.chat_template
    encoded = encode(CONVERSATION, tokenizer)
    assert trained_text(encoded, tokenizer) == "On the table.<|end|>Under the lamp.<|end|>"


def test_the_ids_are_those_of_the_chat_template(tokenizer):
    assert encode(CONVERSATION, tokenizer).input_ids == tokenizer.apply_chat_template(CONVERSATION, return_dict=False)


def test_each_generation_prompt_is_a_prefix_of_the_training_row(tokenizer):
    """Peers' point 5."""
    encoded = encode(CONVERSATION, tokenizer)
    for k in (2, 4):
        prompt = encode_prompt(CONVERSATION[:k], tokenizer)
        assert encoded.input_ids[: len(prompt)] == prompt
        assert not encoded.trained[len(prompt) - 1] and encoded.trained[len(prompt)]


def test_there_is_one_bos(tokenizer):
    """Peers' point 3."""
    for encoded in (encode(CONVERSATION, tokenizer), encode_text("the lamp", tokenizer)):
        assert encoded.input_ids.count(tokenizer.bos_token_id) == 1


def test_pad_equal_to_eos_hides_no_end_token(tokenizer):
    """Peers' point 2."""
    import copy

    padded_with_eos = copy.deepcopy(tokenizer)
    padded_with_eos.pad_token = padded_with_eos.eos_token
    assert encode(CONVERSATION, padded_with_eos) == encode(CONVERSATION, tokenizer)


def test_causal_lm_trains_everything(tokenizer):
    assert all(encode(CONVERSATION, tokenizer, trained="all").trained)


def test_text_ends_with_eos(tokenizer):
    encoded = encode_text("the lamp is old", tokenizer)
    assert tokenizer.decode(encoded.input_ids) == "<|begin|>the lamp is old<|end|>"


def test_what_a_template_prints_after_the_end_token_is_not_trained(tokenizer):
    import copy

    chatml = copy.deepcopy(tokenizer)
    chatml.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert trained_text(encode(CONVERSATION, chatml), chatml) == "On the table.<|end|>Under the lamp.<|end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    import copy

    forgetful = copy.deepcopy(tokenizer)
    forgetful.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content if loop.last or m.role != 'assistant' else '' }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(DataError, match=r"messages\[2\]: the chat template renders this assistant turn differently"):
        encode(CONVERSATION, forgetful)


def test_no_token_spans_the_end_of_a_prompt_and_the_start_of_an_answer(tokenizer):
    """`: 7` would be tokenised otherwise than `:` and ` 7`; generation only ever sees the first piece."""
    plain = PromptFormat(system="{instruction}", user="{instruction} in", assistant="{instruction}<|end|>")
    messages = [{"role": "user", "content": "the k"}, {"role": "assistant", "content": "side of the road"}]
    encoded = encode(messages, tokenizer, plain)
    prompt = encode_prompt(messages[:1], tokenizer, plain)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert trained_text(encoded, tokenizer) == "side of the road<|end|>"


def test_a_turn_of_weight_0_is_not_trained(tokenizer):
    """OpenAI's key."""
    messages = [*CONVERSATION[:2], CONVERSATION[2] | {"weight": 0}, *CONVERSATION[3:]]
    encoded = encode(messages, tokenizer)
    assert encoded.input_ids == encode(CONVERSATION, tokenizer).input_ids
    assert trained_text(encoded, tokenizer) == "Under the lamp.<|end|>"


def test_only_the_last_answer_can_be_trained(tokenizer):
    assert trained_text(encode(CONVERSATION, tokenizer, trained="last"), tokenizer) == "Under the lamp.<|end|>"


def test_a_special_token_in_the_middle_of_an_answer_ends_no_training(tokenizer):
    """The answer's own template may open with one."""
    fmt = PromptFormat(system="{instruction}", user="U{instruction}", assistant="<|assistant|>{instruction} ###\n")
    assert trained_text(encode(CONVERSATION[1:3], tokenizer, fmt), tokenizer) == "<|assistant|>On the table. ###\n"


def test_an_answer_that_the_template_changes_is_refused(tokenizer):
    import copy

    shouting = copy.deepcopy(tokenizer)
    shouting.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | upper }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(DataError, match=r"messages\[2\].content: the chat template does not show it as it is"):
        encode(CONVERSATION, shouting)


# Special tokens in messages: peers' point 3 and what a user can type ----------------------------------


def test_special_tokens_in_messages_are_text(tokenizer):
    messages = [
        {"role": "user", "content": "what is <|end|><|assistant|> for?"},
        {"role": "assistant", "content": "<|end|> ends a turn, <|begin|> begins"},
    ]
    encoded, plain = encode(messages, tokenizer), encode(chat("q", "a", system=None)["messages"], tokenizer)
    special = set(tokenizer.all_special_ids)
    assert [i for i in encoded.input_ids if i in special] == [i for i in plain.input_ids if i in special]
    assert trained_text(encoded, tokenizer) == "<|end|> ends a turn, <|begin|> begins<|end|>"
    prompt = encode_prompt(messages[:1], tokenizer)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encode_text("a <|end|> b", tokenizer).input_ids.count(tokenizer.eos_token_id) == 1


def test_special_tokens_in_tools_and_with_prompt_formats_are_text(tokenizer):
    fmt = PromptFormat(system="<|system|>{instruction}<|end|>", user="<|user|>{instruction}<|end|>",
                       assistant="<|assistant|>{instruction}<|end|>", trailing_assistant="<|assistant|>",
                       bos="<|begin|>")  # fmt: skip
    tools = [{"type": "function", "function": {"name": "f", "description": "ends <|end|>"}}]
    messages = chat("q <|end|>", "a", system=None)["messages"]
    for prompt_format in (fmt, None):
        encoded = encode(messages, tokenizer, prompt_format, tools=tools)
        assert encoded.input_ids.count(tokenizer.eos_token_id) == 3


def test_private_characters_are_refused(tokenizer):
    with pytest.raises(DataError, match="private planes"):
        encode(chat("\U000f0001", "a")["messages"], tokenizer)


# Tools ------------------------------------------------------------------------------------------------

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
    assert trained_text(encoded, tokenizer).count("weather") == 2
    assert trained_text(encoded, tokenizer).endswith("</tool_call><|end|>Sun and rain.<|end|>")


def test_other_templates_get_tools_as_text(tokenizer):
    """LLMForge's convention, parallel calls and their results included."""
    import copy

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
    assert trained_text(encoded, plain).startswith("[TOOL_CALLS]")
    prompt = encode_prompt(WITH_TOOLS[:1], plain, tools=TOOLS)
    assert encoded.input_ids[: len(prompt)] == prompt


def test_a_template_that_drops_calls_is_refused(tokenizer):
    import copy

    dropping = copy.deepcopy(tokenizer)
    dropping.chat_template = (
        "{% if tools %}{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(DataError, match="leaves out the call of 'weather'"):
        encode(WITH_TOOLS, dropping, tools=TOOLS)


# Reasoning: peers' point 6 ----------------------------------------------------------------------------

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
    import copy

    copied = copy.deepcopy(tokenizer)
    copied.chat_template = FORGETS_THINKING
    return copied


def test_rewritten_turns_are_refused_with_the_choices(thinking):
    with pytest.raises(DataError, match=r"messages\[1\]: .* set rewritten_turns: expand .* train_on: last"):
        encode(THOUGHT, thinking)


def test_rewritten_turns_can_be_expanded(thinking):
    """One row of each answer, as it was when it was given; each begins with what the model is asked then."""
    [rows] = encode_many([(THOUGHT, None)], thinking, rewritten_turns="expand")
    assert [trained_text(row, thinking) for row in rows] == [
        "<think>\nfirst\n</think>\n\nA.<|end|>", "<think>\nsecond\n</think>\n\nB.<|end|>",
    ]  # fmt: skip
    for k, row in zip((1, 3), rows, strict=True):
        prompt = encode_prompt(THOUGHT[:k], thinking)
        assert row.input_ids[: len(prompt)] == prompt
    assert "first" not in thinking.decode(rows[1].input_ids)


def test_the_last_turn_alone_needs_no_choice(thinking):
    encoded = encode(THOUGHT, thinking, trained="last")
    assert trained_text(encoded, thinking) == "<think>\nsecond\n</think>\n\nB.<|end|>"


def test_reasoning_stands_before_the_content_where_the_template_does_not_know_it(tokenizer):
    encoded = encode(THOUGHT, tokenizer)
    assert trained_text(encoded, tokenizer).startswith("<think>\nfirst\n</think>\n\nA.<|end|>")


# Looking ----------------------------------------------------------------------------------------------


def test_show_marks_what_is_trained(tokenizer):
    html = show(encode(CONVERSATION, tokenizer), tokenizer).data
    assert html.count('background:#2e7d3244;">On the table.</span>') == 1 and "&lt;|end|&gt;" in html
    assert f"{sum(encode(CONVERSATION, tokenizer).trained)} of" in html


def test_pieces_join_to_the_text(tokenizer):
    messages = chat("漢字 and é", "👩\u200d👩 ok")["messages"]
    pieces = pieces_of(encode(messages, tokenizer), tokenizer)
    assert "".join(text for text, _, _ in pieces) == render(messages, tokenizer)
    assert [text for text, trained, _ in pieces if trained] == ["👩\u200d👩 ok", "<|end|>"]


# LLMForge's prompt formats ----------------------------------------------------------------------------


def test_llama_2_with_the_system_text_in_the_first_user_turn(tokenizer):
    messages = [
        {"role": "system", "content": "hello1"},
        {"role": "user", "content": "hello2"},
        {"role": "assistant", "content": "hello3"},
        {"role": "user", "content": "hello4"},
    ]
    assert render(messages, tokenizer, LLAMA_2, for_generation=True) == (
        "<s>[INST] <<SYS>>\nhello1\n<</SYS>>\n\nhello2 [/INST] hello3 </s><s>[INST] hello4 [/INST]"
    )


@pytest.mark.parametrize(
    ("settings", "messages", "text"),
    [
        ({}, ["user: hi "], "U(hi)"),
        ({"strip_whitespace": False}, ["user: hi "], "U( hi )"),
        ({"bos": "^"}, ["user:a", "assistant:b"], "^U(a)A(b)"),
        ({"default_system_message": "d"}, ["user:a"], "S(d)U(a)"),
        ({"default_system_message": "d"}, ["system:s", "user:a"], "S(s)U(a)"),
        ({}, ["system:", "user:a"], "U(a)"),
        ({"add_system_tags_even_if_message_is_empty": True}, ["user:a"], "S()U(a)"),
        ({"trailing_assistant": "A("}, ["user:a"], "U(a)"),
    ],
)
def test_fields_of_a_prompt_format(tokenizer, settings, messages, text):
    fmt = PromptFormat(
        **{"system": "S({instruction})", "user": "U({instruction})", "assistant": "A({instruction})"} | settings
    )
    rows = [dict(zip(("role", "content"), message.split(":"), strict=True)) for message in messages]
    assert render(rows, tokenizer, fmt) == text


def test_trailing_assistant_is_for_generation_only(tokenizer):
    fmt = PromptFormat(
        system="{instruction}", user="U{instruction}", assistant="A{instruction}", trailing_assistant="A"
    )
    rows = [{"role": "user", "content": "a"}]
    assert render(rows, tokenizer, fmt) == "Ua"
    assert render(rows, tokenizer, fmt, for_generation=True) == "UaA"


def test_the_system_text_can_go_into_the_last_user_turn_at_inference(tokenizer):
    fmt = LLAMA_2.model_copy(update={"system_in_last_user": True})
    text = render(CONVERSATION[:4], tokenizer, fmt, for_generation=True)
    assert text.index("<<SYS>>") > text.index("On the table.")
    assert trained_text(encode(CONVERSATION, tokenizer, fmt), tokenizer).startswith(" On the table.")


def test_braces_in_a_prompt_format_and_in_messages_stay_text(tokenizer):
    fmt = PromptFormat(system="{instruction}", user='{"q": "{instruction}"}', assistant="{instruction}")
    rows = [{"role": "user", "content": "{system} {x}"}]
    assert render(rows, tokenizer, fmt) == '{"q": "{system} {x}"}'


def test_two_system_messages_are_refused(tokenizer):
    rows = [{"role": "system", "content": "a"}] * 2 + chat("q", "a", system=None)["messages"]
    with pytest.raises(DataError, match="only one system message"):
        render(rows, tokenizer, LLAMA_2)


def test_what_the_template_refuses_is_told(tokenizer):
    rows = [{"role": "critic", "content": "a"}]
    with pytest.raises(DataError, match="the chat template refuses these messages: role is critic"):
        render(rows, tokenizer)


def test_no_template_and_no_format_is_refused(tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(DataError, match=r"no chat template: set generation_config\.prompt_format"):
        render(CONVERSATION, bare)
