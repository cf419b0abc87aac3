"""Special tokens that a user types are text: they end no turn, in messages, tools and plain text."""

import pytest

from conftest import chat, supervised_text
from forgebook.config.blocks import PromptFormat
from forgebook.data.masking import encode, encode_prompt, encode_text
from forgebook.errors import DataError


def test_special_tokens_in_messages_are_text(tokenizer):
    messages = [
        {"role": "user", "content": "what is <|end|><|assistant|> for?"},
        {"role": "assistant", "content": "<|end|> ends a turn, <|begin|> begins"},
    ]
    encoded, plain = encode(messages, tokenizer), encode(chat("q", "a", system=None)["messages"], tokenizer)
    special = set(tokenizer.all_special_ids)
    assert [i for i in encoded.input_ids if i in special] == [i for i in plain.input_ids if i in special]
    assert supervised_text(encoded, tokenizer) == "<|end|> ends a turn, <|begin|> begins<|end|>"
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


def test_private_characters_are_rejected(tokenizer):
    with pytest.raises(DataError, match="private planes"):
        encode(chat("\U000f0001", "a")["messages"], tokenizer)
