"""Generation and the comparison with the base model."""

import pytest

from conftest import TINY_MODEL, chat, uneven_rows
from helpers.evaluate import compare_with_base, exact_match
from helpers.generate import complete, load_for_generation
from helpers.launch import fine_tune
from helpers.prompts import encode_prompt


@pytest.fixture(scope="module")
def tiny():
    return load_for_generation(TINY_MODEL)


def questions(count):
    return [row["messages"][:-1] for row in uneven_rows(count)]


def test_a_batch_answers_as_one_at_a_time(tiny):
    model, tokenizer, _ = tiny
    model.float()  # in bfloat16 padding may flip a tie
    together = complete(model, tokenizer, questions(16), batch_size=16, max_new_tokens=12)
    alone = complete(model, tokenizer, questions(16), batch_size=1, max_new_tokens=12)
    assert together == alone and len(set(together)) > 1


def test_an_answer_ends_before_its_end_token(tiny):
    model, tokenizer, _ = tiny
    for answer in complete(model, tokenizer, questions(4), max_new_tokens=40):
        assert tokenizer.eos_token not in answer


def test_the_answer_is_what_plain_transformers_gives(tiny):
    import torch

    model, tokenizer, _ = tiny
    asked = questions(1)[0]
    ids = torch.tensor([encode_prompt(asked, tokenizer)])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert complete(model, tokenizer, [asked], max_new_tokens=20) == [expected]


def test_exact_match():
    assert exact_match(["a", " b\n", "c", ""], ["a", "b", "d", "x"]) == 0.5


def test_a_run_learns_its_rows_by_heart(make_config, write_rows):
    """Overfitted on four rows, the tuned model repeats them; its base does not."""
    rows = [chat(question, f"{question} and out") for question in ("alpha", "bravo", "carol", "delta")]
    path = write_rows(rows, "four.jsonl")
    config = make_config(train_path=path, valid_path=path, num_epochs=40, learning_rate=3e-3)
    compared = compare_with_base(fine_tune(config))
    before, after = compared.accuracy()
    assert before == 0 and after == 1
    assert compared.references[0] == "alpha and out" and compared.summary()["rows"] == 4


def test_a_prompt_format_travels_with_the_checkpoint(make_config):
    fmt = {"system": "{instruction}", "user": "Q {instruction}", "assistant": " A {instruction}<|end|>"}
    run = fine_tune(make_config(generation_config={"prompt_format": fmt}))
    _, _, loaded = load_for_generation(next(run.checkpoints.iterdir()))
    assert loaded.user == "Q {instruction}" and loaded.assistant.endswith("<|end|>")
