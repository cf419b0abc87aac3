"""Generation: batches answer as single prompts do, sampling follows its seed and the model's probabilities."""

import collections

import pytest

from conftest import TINY_MODEL, uneven_rows
from forgebook.data.masking import encode_prompt
from forgebook.errors import ConfigError
from forgebook.inference.generate import complete
from forgebook.inference.loading import load_for_generation
from forgebook.inference.sampling import Sampling


@pytest.fixture(scope="module")
def tiny():
    return load_for_generation(TINY_MODEL, "float32")


def questions(count):
    return [row["messages"][:-1] for row in uneven_rows(count)]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 7}], ids=["greedy", "sampled"])
def test_a_batch_of_32_answers_as_one_at_a_time(tiny, sampling):
    model, tokenizer, _ = tiny
    together, *alone = [
        complete(model, tokenizer, questions(32), batch_size=size, max_new_tokens=8, **sampling) for size in (32, 1)
    ]
    assert [together] == alone and len(set(together)) > 1


def test_samples_follow_their_seed_and_the_models_probabilities(tiny):
    import torch

    model, tokenizer, _ = tiny
    asked = questions(1)[0]
    drawn = complete(model, tokenizer, [asked] * 400, max_new_tokens=1, temperature=2.0, batch_size=400, seed=3)
    assert drawn == complete(model, tokenizer, [asked] * 400, max_new_tokens=1, temperature=2.0, batch_size=400, seed=3)
    assert drawn != complete(model, tokenizer, [asked] * 400, max_new_tokens=1, temperature=2.0, batch_size=400, seed=4)
    with torch.no_grad():
        logits = model(torch.tensor([encode_prompt(asked, tokenizer)])).logits[0, -1].float()
    chances = torch.softmax(logits / 2, -1)
    best = int(chances.argmax())
    share = collections.Counter(drawn)[tokenizer.decode([best], skip_special_tokens=True)] / 400
    assert share == pytest.approx(float(chances[best]), abs=0.08)
    narrow = complete(model, tokenizer, [asked] * 20, max_new_tokens=1, temperature=2.0, top_p=1e-6)
    assert set(narrow) == set(complete(model, tokenizer, [asked], max_new_tokens=1))


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


@pytest.mark.parametrize(
    ("values", "message"),
    [({"temperature": -1}, "temperature must be"), ({"top_p": 0}, "top_p must be"), ({"batch_size": 0}, "batch_size")],
    ids="temperature top_p batch_size".split(),
)
def test_sampling_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**values)
