"""What vLLM can load, and which engine answers; without vLLM."""

import importlib.util

import pytest

from forgebook.errors import ConfigError
from forgebook.models.vllm_support import choose_engine, vllm_loads, vllm_max_rank, vllm_serves


def nobody_asks() -> str | None:
    raise AssertionError("the obstacle is looked for only where vLLM is a candidate")


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_auto_takes_vllm_where_it_can_load_the_model_and_is_worth_it(installed):
    assert choose_engine("auto", lambda: None) == choose_engine("vllm", lambda: None, is_worth_it=False) == "vllm"
    assert choose_engine("auto", lambda: "use_dora is set") == "transformers"
    assert choose_engine("auto", nobody_asks, is_worth_it=False) == "transformers"
    assert choose_engine("transformers", nobody_asks) == "transformers"


def test_an_engine_that_cannot_answer_is_rejected(installed, monkeypatch):
    with pytest.raises(ConfigError, match="engine must be auto, transformers or vllm, got 'llama'"):
        choose_engine("llama", nobody_asks)
    with pytest.raises(ConfigError, match="cannot load this: use_dora is set; use engine=transformers"):
        choose_engine("vllm", lambda: "use_dora is set")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_engine("auto", nobody_asks) == "transformers"
    with pytest.raises(ConfigError, match="it is not installed"):
        choose_engine("vllm", nobody_asks)


def test_the_rank_is_the_next_that_vllm_takes():
    assert [vllm_max_rank([{"r": rank}]) for rank in (1, 8, 9, 64, 300, 512)] == [8, 8, 16, 64, 320, 512]
    assert vllm_max_rank([{"r": 4}, {"r": 8, "rank_pattern": {"q_proj": 20}}]) == 32


def test_architectures_that_vllm_runs_natively():
    assert vllm_loads({"architectures": ["LlamaForCausalLM"]}) == "yes"
    assert vllm_loads({"architectures": ["OddForCausalLM"]}).startswith("perhaps: OddForCausalLM")
    assert vllm_loads({}).startswith("perhaps: an architecture without a name")


@pytest.mark.parametrize(
    ("settings", "verdict"),
    [
        ({"r": 8, "target_modules": "all-linear"}, "yes"),
        ({"r": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}, "yes"),
        ({"target_modules": r".*\.(q|v)_proj"}, "yes"),
        ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, "no: target_modules include embed_tokens, lm_head"),
        ({"target_modules": r".*(q_proj|lm_head)"}, "no: target_modules include lm_head"),
        (
            {"target_modules": "all-linear", "modules_to_save": ["embed_tokens", "lm_head"]},
            "no: modules_to_save include embed_tokens, lm_head",
        ),
        ({"target_modules": "all-linear", "use_dora": True, "bias": "all"}, "no: use_dora is set; bias is all"),
        ({"r": 512, "init_lora_weights": "pissa"}, "no: its rank is 1024, above 512"),
    ],
)
def test_what_vllm_can_serve(settings, verdict):
    assert vllm_serves(settings) == verdict
