"""Files of prompts: answered in order, continued where they stopped, the same on Ray workers."""

import copy
import json
from dataclasses import replace

import pytest

from conftest import TINY_MODEL, uneven_rows
from forgebook.data.examples import read_examples
from forgebook.data.tools import ToolCall, calls_of_message
from forgebook.errors import ConfigError, DataError, ResourceError, StorageError
from forgebook.inference.batch import Prompt, answer, engine_for, read_prompts, write_answers
from forgebook.inference.generate import complete
from forgebook.inference.loading import load_for_generation
from forgebook.inference.sampling import Sampling

SHORT = Sampling(max_new_tokens=6, batch_size=2)


@pytest.fixture
def asked(write_rows):
    return read_prompts(write_rows(uneven_rows(6), "prompts.jsonl"))


def test_an_answer_in_the_file_is_the_reference(write_rows):
    rows = uneven_rows(2)
    rows[1]["messages"].pop()
    first, second = read_prompts(write_rows(rows))
    assert first.reference == rows[0]["messages"][-1]["content"] and first.messages == rows[0]["messages"][:-1]
    assert second == Prompt(1, rows[1]["messages"])
    with pytest.raises(DataError, match=r"rows.jsonl:1: this is a text; expected messages"):
        read_prompts(write_rows([{"text": "a"}]))


def test_a_file_of_answers_is_continued_where_it_stopped(asked, tmp_path, monkeypatch):
    path, seen = tmp_path / "out" / "answers.jsonl", []
    assert write_answers(path, str(TINY_MODEL), asked, SHORT, on_progress=lambda *at: seen.append(at)) == 6
    assert sorted({at[:2] for at in seen}) == [(done, 6) for done in range(7)] and seen[-1][2] > 6
    whole = path.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    model, tokenizer, _ = load_for_generation(TINY_MODEL)
    expected = complete(model, tokenizer, [one.messages for one in asked], max_new_tokens=6, batch_size=2)
    assert [row["row"] for row in rows] == list(range(6))
    assert [row["messages"][-1] for row in rows] == [{"role": "assistant", "content": text} for text in expected]
    assert rows[0]["reference"] == asked[0].reference and rows[0]["messages"][:-1] == asked[0].messages
    # Killed in the middle of a line: whole lines stay, the rest is answered.
    lines = whole.splitlines(keepends=True)
    path.write_text(lines[4] + lines[1] + lines[3][:20])
    assert write_answers(path, str(TINY_MODEL), asked, SHORT) == 4
    assert path.read_text() == whole
    assert write_answers(path, str(TINY_MODEL), asked, SHORT) == 0
    with pytest.raises(StorageError, match=r"was written by .* max_new_tokens=6"):
        write_answers(path, str(TINY_MODEL), asked, Sampling(max_new_tokens=7))
    with pytest.raises(StorageError, match="answers another prompt than prompt 0"):
        write_answers(path, str(TINY_MODEL), [Prompt(0, asked[1].messages)], SHORT)
    with_tools = [replace(one, tools=[{"type": "function", "function": {"name": "now"}}]) for one in asked]
    with pytest.raises(StorageError, match="answers another prompt than prompt 0"):
        write_answers(path, str(TINY_MODEL), with_tools, SHORT)
    # A run that was trained again under its name is another model.
    with monkeypatch.context() as patch, pytest.raises(StorageError, match=r"was written by .* not .* id=b"):
        patch.setattr("forgebook.inference.batch.model_identity", lambda source: "b")
        write_answers(path, str(TINY_MODEL), asked, SHORT)
    corrected = [replace(one, reference="corrected") for one in asked]
    assert write_answers(path, str(TINY_MODEL), corrected, SHORT) == 0 and "corrected" in path.read_text()
    path.write_text("notes\n")
    with pytest.raises(StorageError, match="not a line of answers"):
        write_answers(path, str(TINY_MODEL), asked, SHORT)
    assert path.read_text() == "notes\n"


def test_a_call_whose_mark_is_a_special_token_can_be_trained_on(tmp_path, tokenizer, monkeypatch):
    """Mistral's [TOOL_CALLS]: the line has the call itself, and the template writes the mark again."""
    written = copy.deepcopy(tokenizer)
    written.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    ids = written.encode('I look.[TOOL_CALLS] [{"name": "now", "arguments": {"zone": 1}}]', add_special_tokens=False)
    monkeypatch.setattr("forgebook.inference.loading.load_tokenizer", lambda *source, **options: written)

    def decode(model, requests, *options):
        for k, request in enumerate(requests):
            any(request.add_token(token) for token in [*ids, tokenizer.eos_token_id])
            yield k

    monkeypatch.setattr("forgebook.inference.decode.decode", decode)
    asked = [Prompt(0, [{"role": "user", "content": "When?"}], [{"type": "function", "function": {"name": "now"}}])]
    path = tmp_path / "answers.jsonl"
    assert write_answers(path, str(TINY_MODEL), asked, Sampling(max_new_tokens=200)) == 1
    whole = path.read_text()
    function = {"name": "now", "arguments": {"zone": 1}}
    call = {"type": "function", "function": function}
    assert json.loads(whole)["messages"][-1] == {"role": "assistant", "content": "I look.", "tool_calls": [call]}
    assert write_answers(path, str(TINY_MODEL), asked, Sampling(max_new_tokens=200)) == 0 and path.read_text() == whole
    [example] = read_examples(str(path), "instruction_tuning")
    assert calls_of_message(example.messages[-1]) == [ToolCall("now", {"zone": 1})]


def test_vllm_is_chosen_where_it_is_worth_its_start(monkeypatch, tmp_path):
    import torch

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        '{"r": 8, "target_modules": ["q_proj"], "base_model_name_or_path": "b"}'
    )
    assert engine_for("auto", str(TINY_MODEL), 1_000) == "transformers"  # no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert engine_for("auto", str(TINY_MODEL), 1_000) == engine_for("auto", str(adapter), 1_000) == "vllm"
    assert engine_for("auto", str(TINY_MODEL), 10) == "transformers"
    assert engine_for("vllm", str(TINY_MODEL), 10) == "vllm"
    (adapter / "config_overrides.json").write_text('{"quantization": "nf4"}')
    assert engine_for("auto", str(adapter), 1_000) == "transformers"
    with pytest.raises(ConfigError, match="its base was loaded with quantization in training"):
        engine_for("vllm", str(adapter), 10)


@pytest.mark.slow
def test_two_ray_workers_answer_as_this_process(asked, ray_session):
    drawn = Sampling(max_new_tokens=6, batch_size=2, temperature=1.0, seed=5)
    here = dict(answer(str(TINY_MODEL), asked, drawn))
    assert dict(answer(str(TINY_MODEL), asked, drawn, num_devices=2)) == here and len(here) == 6
    with pytest.raises(ResourceError, match="num_devices is 9, the cluster has 2 CPUs"):
        list(answer(str(TINY_MODEL), asked, drawn, num_devices=9))
