"""Examples that share a line, through the interface of torch's variable-length kernel, against SDPA with padding."""

import functools

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from conftest import LORA, TINY_MODEL, config_for, losses_of
from forgebook.catalog import Gpu
from forgebook.data import batching
from forgebook.data.token_store import Tokens
from forgebook.errors import ModelError
from forgebook.launch.fine_tune import fine_tune
from forgebook.models import varlen_attention
from forgebook.models.adapters import add_lora
from forgebook.models.load import load_model, model_class
from forgebook.models.shapes import find_shape
from forgebook.planning.feasibility import has_padding
from forgebook.runs.metrics import read_metrics
from forgebook.training.losses import SupervisedLM, check_isolation
from support_families import FAMILIES, save_family

LACKING = {
    "Llama 4": "layers of chunked_attention",
    "Llama 4 (text)": "layers of chunked_attention",
    "Qwen 3 Next": "layers of linear_attention",
    "Qwen 3.5, 3.6": "layers of linear_attention",
    "Qwen 3.5, 3.6 MoE": "layers of linear_attention",
    "Gemma 2": "logits are capped",
    "Gemma 4": "not of one size",
    "gpt-oss": "sinks",
    "Granite 4": "layers of linear_attention",
    "LFM 2": "layers of conv",
    "LFM 2 MoE": "layers of conv",
    "DeepSeek V3": "keys and values are of different sizes",
    "GLM 4.7 Flash": "keys and values are of different sizes",
}


@functools.cache
def examples() -> Tokens:
    """Seven examples of 3 to 40 tokens, in the loss at some of them."""
    rng = np.random.default_rng(0)
    lengths = (3, 40, 17, 8, 29, 16, 5)
    return Tokens.from_examples([(rng.integers(5, 100, n), [False, *(rng.random(n - 2) < 0.6), True]) for n in lengths])


def measured(source, attention, lora, packed=False, **settings):
    """Return the loss of the examples and the gradients of all that is trained."""
    torch.manual_seed(0)
    model = load_model(source, dtype="float32", attention=attention, **settings)
    if lora:
        model = add_lora(model, {**LORA, "init_lora_weights": False})
    wrapped, tokens = SupervisedLM(model).train(), examples()
    sequences = batching.pack(tokens.lengths, 64) if packed else batching.single_sequences(tokens)
    batch = batching.collate(tokens, sequences, 0, packed=packed, one_line=attention == "varlen")
    loss = wrapped(**batch) / tokens.supervised.sum()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(one, other):
    assert one[0] == pytest.approx(other[0], abs=1e-6) and one[1].keys() == other[1].keys() and one[1]
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_the_same_or_is_named_with_the_reason(name, tmp_path):
    source = save_family(name, tmp_path)
    config = AutoConfig.from_pretrained(source)
    reason = varlen_attention.why_not_varlen(config, model_class(config))
    # The plan, which loads no model, must not count on the kernel where it does not run.
    planned = config_for(str(source), dtype="bfloat16", padding="longest")
    assert reason is None or has_padding(planned, find_shape(str(source)), Gpu("", 1, None, None))
    if name in LACKING:
        assert reason is not None and LACKING[name] in reason
        return
    assert reason is None
    assert_equal(measured(source, "varlen", lora=False), measured(source, "sdpa", lora=False))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}], ids=["kept", "checkpointing"])
def test_packed_examples_compute_the_same_as_with_a_mask(lora, settings):
    source = str(TINY_MODEL)
    assert_equal(measured(source, "varlen", lora, packed=True, **settings), measured(source, "sdpa", lora, packed=True))


def test_a_sliding_window_ends_where_the_mask_does(tmp_path):
    source = save_family("Mistral", tmp_path, sliding_window=6)
    windowed = measured(source, "sdpa", lora=True)
    assert_equal(measured(source, "varlen", lora=True), windowed)
    whole = save_family("Mistral", tmp_path / "whole", sliding_window=None)
    assert abs(measured(whole, "varlen", lora=True)[0] - windowed[0]) > 1e-5


def test_one_line_has_a_batch_without_its_padding():
    tokens = examples()
    sequences = batching.single_sequences(tokens)
    padded, line = (batching.collate(tokens, sequences, 0, one_line=one) for one in (False, True))
    starts, longest = line["segments"]
    assert padded["input_ids"].shape == (7, 48) and line["input_ids"].shape == (1, 112)  # 111, in steps of 16
    assert starts.tolist() == [0, 2, 41, 57, 64, 92, 107, 111, 112] and longest == 39
    assert line["counts"].tolist() == padded["counts"].tolist() == tokens.supervised.tolist()
    ids, supervised = line["input_ids"][0], line["supervised"]
    assert all(
        torch.equal(ids[starts[k] : starts[k + 1]], padded["input_ids"][k, : starts[k + 1] - starts[k]])
        for k in range(7)
    )
    assert line["labels"][0, supervised].tolist() == padded["labels"].flatten()[padded["supervised"]].tolist()


def test_a_run_has_the_same_losses(make_config):
    runs = [
        fine_tune(make_config(run_name=name, lora_config=LORA, **values))
        for name, values in {
            "padded": {"attention": "sdpa"},
            "line": {"attention": "varlen"},
        }.items()
    ]
    rows = [read_metrics(run.metrics) for run in runs]
    assert losses_of(runs[0]) == pytest.approx(losses_of(runs[1]), abs=1e-5)
    assert rows[0][-1]["eval_loss"] == pytest.approx(rows[1][-1]["eval_loss"], abs=1e-5)
    assert rows[0][0]["padding_share"] > 3 * rows[1][0]["padding_share"]


def test_examples_of_a_line_see_themselves_alone(monkeypatch):
    wrapped = SupervisedLM(load_model(str(TINY_MODEL), dtype="float32", attention="varlen"))
    check_isolation(wrapped, torch.device("cpu"), takes_segments=True)
    plain = varlen_attention._one_by_one
    monkeypatch.setattr(
        varlen_attention, "_one_by_one", lambda q, k, v, starts, *rest: plain(q, k, v, [0, starts[-1]], *rest)
    )
    with pytest.raises(ModelError, match=r"would let examples see each other.*set attention: sdpa"):
        check_isolation(wrapped, torch.device("cpu"), takes_segments=True)


def test_generation_has_the_masks_of_sdpa():
    """Two prompts of different lengths, padded on the left, with a cache."""
    ids = torch.tensor([[0, 0, 0, 7, 8, 9], [11, 12, 13, 14, 15, 16]])
    answers = []
    for attention in ("sdpa", "varlen"):
        model = load_model(str(TINY_MODEL), dtype="float32", attention=attention).eval()
        answers.append(model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=8, do_sample=False))
    assert torch.equal(*answers)
