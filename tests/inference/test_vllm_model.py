"""What vLLM is passed, without it: an engine that answers "yes". vLLM itself is in tests/engines."""

import json
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest

from conftest import TINY_MODEL
from forgebook.config.blocks import GenerationConfig
from forgebook.inference.batch import Prompt, answer
from forgebook.inference.sampling import Sampling
from forgebook.inference.vllm_model import CHUNK, load_in_vllm

ANSWER = SimpleNamespace(outputs=[SimpleNamespace(text="yes", token_ids=[9, 7])])
QUESTION = [{"role": "user", "content": "Where is the lamp?"}]


@pytest.fixture
def vllm(monkeypatch):
    """Engines that were started, calls of their `generate`, and the sampling of each prompt."""
    calls = SimpleNamespace(engines=[], prompts=[], sampling=[])

    def generate(inputs, settings, lora_request=None, use_tqdm=False):
        calls.prompts.append(([one["prompt_token_ids"] for one in use_tqdm(inputs, desc="reading")], lora_request))
        bar = use_tqdm(total=len(inputs), desc="answers", dynamic_ncols=True, postfix="0 tokens/s")
        bar.start_t -= 100  # seconds, so that those of this test do not count
        for done in range(1, len(inputs) + 1):  # as vLLM does
            speed = done * len(ANSWER.outputs[0].token_ids) / bar.format_dict["elapsed"]
            bar.postfix = f"est. speed input: 1.00 toks/s, output: {speed:.2f} toks/s"
            bar.update(1)
        bar.close()
        return [ANSWER for _ in inputs]

    def start(**options):
        calls.engines.append(options)
        return SimpleNamespace(generate=generate)

    fake, request = ModuleType("vllm"), ModuleType("vllm.lora.request")
    fake.LLM, fake.SamplingParams = start, lambda **values: calls.sampling.append(values)
    request.LoRARequest = lambda name, number, path: (name, number, path)
    for module in (fake, ModuleType("vllm.lora"), request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


@pytest.fixture
def base(tmp_path):
    """A model's folder without weights, which penalizes repetitions and has an end of its own."""
    folder = tmp_path / "base"
    folder.mkdir()
    for path in [*TINY_MODEL.glob("*token*"), TINY_MODEL / "chat_template.jinja"]:
        shutil.copy2(path, folder)
    (folder / "generation_config.json").write_text('{"repetition_penalty": 1.1, "eos_token_id": 7}')
    return folder


def adapter_of(base, rank):
    folder = shutil.copytree(base, base.parent / f"adapter-{rank}")
    settings = {"base_model_name_or_path": str(base), "peft_type": "LORA", "r": rank}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_it_gets_the_models_own_ends_and_repetition_penalty(vllm, base, monkeypatch):
    monkeypatch.setattr("forgebook.inference.batch.engine_for", lambda *_: "vllm")
    prompts = [Prompt(k, QUESTION) for k in range(6)]
    reports = []
    answers = answer(str(base), prompts, Sampling(max_new_tokens=6), on_progress=lambda *one: reports.append(one))
    assert dict(answers) == dict.fromkeys(range(6), "yes")
    assert reports == [(done, 2 * done, 0.0) for done in range(1, 7)]
    [first, *others] = vllm.sampling
    assert len(others) == 5 and first["repetition_penalty"] == 1.1 and 7 in first["stop_token_ids"]
    assert first["max_tokens"] == 6 and first["skip_special_tokens"]


def test_adapters_share_the_engine_of_their_base(vllm, base):
    """Another model gets an engine of its own, when it is its turn."""
    adapters = [adapter_of(base, rank) for rank in (8, 16)]
    other = shutil.copytree(base, base.parent / "other")
    models = load_in_vllm([str(base), *map(str, adapters), str(other)], dtype="float32")
    engines, requests = [], []
    for model in models:
        engines.append(len(vllm.engines))
        requests.append(model.adapter)
        assert model.dtype == "float32"
    assert engines == [1, 1, 1, 2]
    assert requests == [None, ("adapter-2", 2, str(adapters[0])), ("adapter-3", 3, str(adapters[1])), None]
    first, second = vllm.engines
    assert first["model"] == str(base) and first["max_loras"] == 2 and first["max_lora_rank"] == 16
    assert second["model"] == str(other) and "enable_lora" not in second


def test_answers_and_their_tokens_are_reported_as_they_finish(vllm, base, capfd):
    count, reports, answers = 2 * CHUNK + 3, [], {}
    [model] = load_in_vllm([str(base)], defaults=GenerationConfig(stopping_sequences=["END"]))
    model.answer(
        [QUESTION] * count, tools=[None] * count, keep_special=True, max_new_tokens=5,
        on_progress=lambda *figures: reports.append(figures), on_answer=answers.__setitem__,
    )  # fmt: skip
    assert reports == [(done, 2 * done, 0.0) for done in range(1, count + 1)]
    assert answers == dict.fromkeys(range(count), "yes") and capfd.readouterr() == ("", "")
    assert [len(ids) for ids, _ in vllm.prompts] == [CHUNK, CHUNK, 3]
    assert not vllm.sampling[0]["skip_special_tokens"] and "END" in vllm.sampling[0]["stop"]
