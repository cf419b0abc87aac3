"""LLMForge's prompt formats, field by field."""

import pytest
from jinja2 import TemplateError

from conftest import CONVERSATION, chat, supervised_text
from forgebook.config.blocks import PromptFormat
from forgebook.data.chat_template import render
from forgebook.data.masking import encode
from forgebook.data.prompt_formats import as_chat_template, render_prompt_format
from forgebook.errors import DataError

LLAMA_2 = PromptFormat(
    system="<<SYS>>\n{instruction}\n<</SYS>>\n\n",
    user="[INST] {system}{instruction} [/INST]",
    assistant=" {instruction} </s><s>",
    bos="<s>",
    system_in_user=True,
)


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
    assert supervised_text(encode(CONVERSATION, tokenizer, fmt), tokenizer).startswith(" On the table.")


def test_braces_in_a_prompt_format_and_in_messages_stay_text(tokenizer):
    fmt = PromptFormat(system="{instruction}", user='{"q": "{instruction}"}', assistant="{instruction}")
    rows = [{"role": "user", "content": "{system} {x}"}]
    assert render(rows, tokenizer, fmt) == '{"q": "{system} {x}"}'


def test_two_system_messages_are_rejected(tokenizer):
    rows = [{"role": "system", "content": "a"}] * 2 + chat("q", "a", system=None)["messages"]
    with pytest.raises(DataError, match="2 system messages; expected one at most"):
        render(rows, tokenizer, LLAMA_2)


# As a chat template -----------------------------------------------------------------------------------

FORMAT = {
    "system": "S {instruction}\n",
    "user": 'Q "{instruction}" }}{{ é😀\n',
    "assistant": " A {instruction}<|end|>",
}
FORMATS = {
    "plain": {},
    "bos and default": {"bos": "<|begin|>", "default_system_message": " be brief ", "trailing_assistant": " A"},
    "empty tags": {"add_system_tags_even_if_message_is_empty": True},
    "in user": {"user": "Q {system}{instruction}", "system_in_user": True},
    "in last user": {"user": "Q {system}{instruction}", "system_in_user": True, "system_in_last_user": True},
    "unstripped": {"strip_whitespace": False, "default_system_message": " x "},
}


@pytest.mark.parametrize("settings", FORMATS.values(), ids=FORMATS.keys())
def test_a_prompt_format_as_a_chat_template_renders_the_same(tokenizer, settings):
    fmt = PromptFormat(**FORMAT | settings)
    template = as_chat_template(fmt)
    turns = [
        {"role": "user", "content": " one {system} {{ x }}"},
        {"role": "assistant", "content": " two "},
        {"role": "user", "content": "three\n"},
    ]
    for system in ([], [{"role": "system", "content": " be {instruction} "}], [{"role": "system", "content": ""}]):
        for messages, generates in ((system + turns, True), (system + turns[:2], False), (system + turns[:1], True)):
            written = tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=generates
            )
            assert written == render_prompt_format(messages, fmt, generates)
    with pytest.raises(TemplateError, match="no tools"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], chat_template=template, tokenize=False)
