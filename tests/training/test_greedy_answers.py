"""Answers to prompts of tokenized examples: where an example is divided, and where an answer ends."""

import numpy as np
import pytest

from forgebook.training.greedy_answers import Ends, last_answer


@pytest.mark.parametrize(
    ("mask", "stops", "expected"),
    [
        ([0, 0, 1, 1], None, ([10, 11], [12, 13])),
        ([0, 1, 0, 1], None, ([10, 11, 12], [13])),  # the last of two turns
        ([0, 1, 1, 0], None, ([10], [11, 12])),  # what follows the answer belongs to neither
        ([0, 0, 0, 0], None, None),
        ([1, 1, 1, 1], None, None),  # no prompt
        ([0, 0, 1, 1], frozenset({13}), ([10, 11], [12, 13])),
        ([0, 0, 1, 1], frozenset({9}), None),  # cut off
    ],
)
def test_an_example_is_divided_before_its_last_answer(mask, stops, expected):
    divided = last_answer(np.arange(10, 14), np.array(mask, bool), stops)
    assert (divided and (divided.prompt, divided.answer)) == expected


def test_the_text_of_an_answer_ends_where_generation_does(tokenizer):
    ids = tokenizer("a lamp", add_special_tokens=False)["input_ids"]
    rest = tokenizer("never read", add_special_tokens=False)["input_ids"]
    by_token, by_text = (Ends(frozenset({tokenizer.eos_token_id}), texts) for texts in ((), ("lam",)))
    assert by_token.text_before([*ids, tokenizer.eos_token_id, *rest], tokenizer) == "a lamp"
    assert by_text.text_before(ids, tokenizer) == "a"
    assert by_text.is_in(ids, tokenizer) and not by_token.is_in(ids, tokenizer)
    assert by_token.is_in([*ids, tokenizer.eos_token_id], tokenizer)
