"""What is rendered, and which tokens are trained."""

import pytest

from conftest import chat
from helpers.config import PromptFormat
from helpers.errors import DataError
from helpers.prompts import encode, encode_prompt, encode_text, render

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
    encoded = encode(CONVERSATION, tokenizer)
    assert trained_text(encoded, tokenizer) == "On the table.<|end|>Under the lamp.<|end|>"


def test_the_ids_are_those_of_the_chat_template(tokenizer):
    assert encode(CONVERSATION, tokenizer).input_ids == tokenizer.apply_chat_template(CONVERSATION, return_dict=False)


def test_each_generation_prompt_is_a_prefix_of_the_training_row(tokenizer):
    encoded = encode(CONVERSATION, tokenizer)
    for k in (2, 4):
        prompt = encode_prompt(CONVERSATION[:k], tokenizer)
        assert encoded.input_ids[: len(prompt)] == prompt
        assert not encoded.trained[len(prompt) - 1] and encoded.trained[len(prompt)]


def test_there_is_one_bos(tokenizer):
    for encoded in (encode(CONVERSATION, tokenizer), encode_text("the lamp", tokenizer)):
        assert encoded.input_ids.count(tokenizer.bos_token_id) == 1


def test_pad_equal_to_eos_hides_no_end_token(tokenizer):
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
