"""Which tokens are in the loss, and that prompts are prefixes of the examples trained on."""

import copy

from conftest import CONVERSATION, supervised_text
from forgebook.config.blocks import PromptFormat
from forgebook.data.masking import encode, encode_prompt, encode_text


def test_the_loss_covers_assistant_turns_through_their_end_of_turn_tokens(tokenizer):
    """Peers' point 1: the template has no `{% generation %}` tags, and the mask needs none."""
    assert "{% generation" not in tokenizer.chat_template
    encoded = encode(CONVERSATION, tokenizer)
    assert supervised_text(encoded, tokenizer) == "On the table.<|end|>Under the lamp.<|end|>"


def test_the_ids_are_those_of_the_chat_template(tokenizer):
    assert encode(CONVERSATION, tokenizer).input_ids == tokenizer.apply_chat_template(CONVERSATION, return_dict=False)


def test_each_generation_prompt_is_a_prefix_of_the_training_example(tokenizer):
    """Peers' point 5."""
    encoded = encode(CONVERSATION, tokenizer)
    for k in (2, 4):
        prompt = encode_prompt(CONVERSATION[:k], tokenizer)
        assert encoded.input_ids[: len(prompt)] == prompt
        assert not encoded.loss_mask[len(prompt) - 1] and encoded.loss_mask[len(prompt)]


def test_there_is_one_bos(tokenizer):
    """Peers' point 3."""
    for encoded in (encode(CONVERSATION, tokenizer), encode_text("the lamp", tokenizer)):
        assert encoded.input_ids.count(tokenizer.bos_token_id) == 1


def test_pad_equal_to_eos_hides_no_end_token(tokenizer):
    """Peers' point 2."""
    padded_with_eos = copy.deepcopy(tokenizer)
    padded_with_eos.pad_token = padded_with_eos.eos_token
    assert encode(CONVERSATION, padded_with_eos) == encode(CONVERSATION, tokenizer)


def test_causal_lm_puts_every_token_in_the_loss(tokenizer):
    assert all(encode(CONVERSATION, tokenizer, loss_on="all").loss_mask)


def test_text_ends_with_eos(tokenizer):
    encoded = encode_text("the lamp is old", tokenizer)
    assert tokenizer.decode(encoded.input_ids) == "<|begin|>the lamp is old<|end|>"


def test_what_a_template_prints_after_the_end_of_turn_token_is_not_in_the_loss(tokenizer):
    chatml = copy.deepcopy(tokenizer)
    chatml.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert supervised_text(encode(CONVERSATION, chatml), chatml) == "On the table.<|end|>Under the lamp.<|end|>"


def test_no_token_spans_the_end_of_a_prompt_and_the_start_of_an_answer(tokenizer):
    """`: 7` would be tokenized differently from `:` and ` 7`; generation only ever sees the first piece."""
    plain = PromptFormat(system="{instruction}", user="{instruction} in", assistant="{instruction}<|end|>")
    messages = [{"role": "user", "content": "the k"}, {"role": "assistant", "content": "side of the road"}]
    encoded = encode(messages, tokenizer, plain)
    prompt = encode_prompt(messages[:1], tokenizer, plain)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert supervised_text(encoded, tokenizer) == "side of the road<|end|>"


def test_a_turn_of_weight_0_is_not_in_the_loss(tokenizer):
    """OpenAI's key."""
    messages = [*CONVERSATION[:2], CONVERSATION[2] | {"weight": 0}, *CONVERSATION[3:]]
    encoded = encode(messages, tokenizer)
    assert encoded.input_ids == encode(CONVERSATION, tokenizer).input_ids
    assert supervised_text(encoded, tokenizer) == "Under the lamp.<|end|>"


def test_the_loss_can_cover_the_last_answer_alone(tokenizer):
    assert supervised_text(encode(CONVERSATION, tokenizer, loss_on="last"), tokenizer) == "Under the lamp.<|end|>"


def test_a_special_token_in_the_middle_of_an_answer_does_not_end_the_loss(tokenizer):
    """The answer's own template may open with one."""
    fmt = PromptFormat(system="{instruction}", user="U{instruction}", assistant="<|assistant|>{instruction} ###\n")
    assert supervised_text(encode(CONVERSATION[1:3], tokenizer, fmt), tokenizer) == "<|assistant|>On the table. ###\n"
