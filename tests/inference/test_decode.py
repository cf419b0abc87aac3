"""The decoding loop against `generate` of transformers, one prompt at a time."""

import pytest
import torch

from conftest import TINY_MODEL
from forgebook.errors import ModelError
from forgebook.inference.decode import Request, decode
from forgebook.inference.sampling import TokenSampling
from support_models import model_with_towers

EOS = 2
LIMITS = (4, 16, 9, 12, 16, 2, 7)
RANDOM = torch.Generator().manual_seed(1)
PROMPTS = [torch.randint(3, 2000, (length,), generator=RANDOM).tolist() for length in (5, 23, 11, 17, 3, 14, 9)]


@pytest.fixture(scope="module")
def tiny():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32).eval()


def alone(model, prompt: list[int], limit: int, **settings) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, eos_token_id=EOS,
        pad_token_id=0, **settings,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def expected(tiny):
    return [alone(tiny, *pair) for pair in zip(PROMPTS, LIMITS, strict=True)]


def together(model, batch_size: int) -> tuple[list[list[int]], list[int], list[int]]:
    """Answer all prompts; return the answers, the order in which they ended and the number of tokens of each step."""
    answers: list[list[int]] = [[] for _ in PROMPTS]
    steps: list[int] = []

    def adding(k: int):
        def add_token(token: int) -> bool:
            answers[k].append(token)
            return token == EOS or len(answers[k]) == LIMITS[k]

        return add_token

    requests = [Request(prompt, TokenSampling(), adding(k)) for k, prompt in enumerate(PROMPTS)]
    return answers, list(decode(model, requests, batch_size, steps.append)), steps


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_answers_leave_and_join_a_batch_and_are_those_of_each_prompt_alone(tiny, expected, batch_size):
    answers, order, steps = together(tiny, batch_size)
    assert answers == expected
    assert sorted(order) == list(range(len(PROMPTS))) and len({tuple(one) for one in answers}) == len(PROMPTS)
    # Nothing is computed for an answer that has ended, and free places are taken at once.
    assert sum(steps) == sum(map(len, answers)) and max(steps) <= batch_size
    if batch_size == 3:
        assert len(steps) <= sum(map(len, answers)) / 3 + max(LIMITS)


@pytest.mark.parametrize("name", ["Gemma3", "Qwen3_5"], ids=["sliding-windows", "recurrent-states"])
def test_models_whose_rows_cannot_join_answer_in_waves(name):
    model = model_with_towers(name).eval()
    answers, _, steps = together(model, 3)
    assert answers == [alone(model, *pair) for pair in zip(PROMPTS, LIMITS, strict=True)]
    assert sum(steps) == sum(map(len, answers))


def test_an_architecture_with_a_cache_of_its_own_kind_is_refused():
    """RWKV ignores a cache that it does not know, and each answer would depend on its newest token alone."""
    from transformers import RwkvConfig, RwkvForCausalLM

    sizes = {"hidden_size": 8, "attention_hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    model = RwkvForCausalLM(RwkvConfig(vocab_size=2000, **sizes))
    with pytest.raises(ModelError, match="RwkvForCausalLM has a cache of its own kind"):
        together(model, 2)


def test_a_models_own_settings_apply_to_each_answer(tiny, expected, monkeypatch):
    """A repetition penalty looks at the answer and its prompt, and at no padding."""
    monkeypatch.setattr(tiny.generation_config, "repetition_penalty", 5.0)
    answers, _, _ = together(tiny, 3)
    assert answers == [alone(tiny, *pair) for pair in zip(PROMPTS, LIMITS, strict=True)] != expected
