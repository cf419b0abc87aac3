"""Generation prompts that end inside a thought or after one, and the answers that continue them."""

import pytest

from forgebook.data.generation_prompt import (
    added_to_prompt,
    after_thought,
    begins_with_empty_thought,
    closes_thought,
    fill_thought,
    opened_thought,
)


@pytest.mark.parametrize(
    ("prompt", "closing"),
    [
        ("<|assistant|>", ""),
        ("<assistant>\n", ""),
        ("<|assistant|><think>\n", "</think>"),
        ("<seed:think>", "</seed:think>"),
        ("[THINK]", "[/THINK]"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|channel>thought\n", "<channel|>"),
        ("<think></think>", ""),
    ],
)
def test_an_open_thought_is_closed_by_its_own_tag(prompt, closing):
    assert opened_thought(prompt) == closing


@pytest.mark.parametrize(
    ("answer", "closing", "rest"),
    [
        ("Four.", "", "Four."),
        ("<think>\nhm\n</think>\n\nFour.", "", "Four."),
        ("hm</think>Four.", "</think>", "Four."),
        ("hm[/THINK]Four, </think>", "[/THINK]", "Four, </think>"),
        ("Write <think></think>.", "", "Write <think></think>."),
        ("<think>\nhm", "", None),
        ("hm", "</think>", None),
    ],
    ids="none own of-the-prompt other-tag in-the-answer own-unended unended".split(),
)
def test_an_answer_is_what_follows_its_thought(answer, closing, rest):
    assert after_thought(answer, closing) == rest


@pytest.mark.parametrize(
    ("prompt", "closed"),
    [
        ("</think>", True),
        ("<think>\n\n</think>\n\n", True),
        ("[/THINK]", True),
        ("<channel|>", True),
        ("[/INST]", False),
    ],
)
def test_closed_thoughts(prompt, closed):
    assert closes_thought(prompt) is closed


@pytest.mark.parametrize(
    ("prompt", "header", "turn", "reasoning", "added"),
    [
        ("<a><thought></thought>", "<a>", "<a>Loire.<e>", "", "Loire.<e>"),
        ("<a><thought></thought>", "<a>", "<a><thoughtful>.<e>", "", "<thoughtful>.<e>"),
        ("<a><think>\n", "<a>", "<a>Loire.<e>", "Rivers", "Rivers\n</think>\n\nLoire.<e>"),
        ("<a><think>", "<a></think>", "<a></think>Loire.<e>", "Rivers", "Rivers</think>Loire.<e>"),
        ("<a><think>\n", "<a><think></think>", "<a><think></think>Loire.<e>", "", "</think>Loire.<e>"),
        ("<a><think>\n", "<a>", "<a>Loire.<e>", "", "\n</think>\n\nLoire.<e>"),
    ],
    ids="closed-thought same-tag-in-content open closing-in-turn empty-in-turn open-without-reasoning".split(),
)
def test_what_a_message_adds_to_its_prompt(prompt, header, turn, reasoning, added):
    assert added_to_prompt(prompt, header, turn, reasoning) == added


@pytest.mark.parametrize(
    ("turn", "filled"),
    [
        ("<think></think>Four.", "<think>cold</think>Four."),
        ("\n<think>\n\n</think>\n\nFour.", "\n<think>\ncold\n</think>\n\nFour."),
        ("<seed:think></seed:think>Four.", "<seed:think>cold</seed:think>Four."),
        ("<think>warm</think>Four.", None),
        ("Write <think></think>.", None),
    ],
    ids="kimi qwen seed not-empty not-first".split(),
)
def test_an_empty_thought_at_the_begin_of_a_turn_is_filled(turn, filled):
    assert begins_with_empty_thought(turn) == (filled is not None)
    assert fill_thought(turn, "cold") == (filled or turn)
