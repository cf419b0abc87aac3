"""The chunked loss against the plain one, for every kind of output layer."""

import pytest
import torch
from torch.nn import functional

from conftest import TINY_MODEL
from forgebook.data.batching import IGNORED
from forgebook.models.load import load_model
from forgebook.planning.loss_chunk import FEWEST_POSITIONS
from forgebook.training import losses
from forgebook.training.losses import SupervisedLM, chunked_cross_entropy, fused_linear_cross_entropy
from support_families import save_family


def plain_loss(hidden, weight, labels):
    return functional.cross_entropy(hidden.float() @ weight.float().T, labels, reduction="sum")


def example(positions, dtype, width=32, vocabulary=500, spread=1.0):
    torch.manual_seed(0)
    hidden = (spread * torch.randn(positions, width)).to(dtype).requires_grad_()
    weight = (0.3 * torch.randn(vocabulary, width)).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocabulary, (positions,))


@pytest.mark.parametrize("positions", [1, FEWEST_POSITIONS - 1, FEWEST_POSITIONS, 2 * FEWEST_POSITIONS + 3])
def test_fused_loss_and_gradients_equal_the_plain_ones(positions):
    hidden, weight, labels = example(positions, torch.float32)
    (3 * fused_linear_cross_entropy(hidden, weight, labels)).backward()
    computed = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    loss = plain_loss(hidden, weight, labels)
    (3 * loss).backward()
    assert fused_linear_cross_entropy(hidden, weight, labels).item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(computed, (hidden.grad, weight.grad), rtol=1e-4, atol=1e-5)


def test_the_size_of_chunks_changes_no_loss(monkeypatch):
    def computed(chunk):
        monkeypatch.setattr(losses, "loss_chunk", lambda on_gpu, bytes_each: chunk)
        hidden, weight, labels = example(700, torch.float32)
        total = fused_linear_cross_entropy(hidden, weight, labels)
        total = total + chunked_cross_entropy(hidden, labels, lambda h: h @ weight.T, 500)
        total = total + losses.chunked_log_probabilities(hidden, labels, lambda h: h @ weight.T, 500).sum()
        total.backward()
        return [total.detach(), hidden.grad, weight.grad]

    torch.testing.assert_close(computed(1024), computed(256), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(computed(1), computed(256), rtol=1e-4, atol=1e-4)


def test_fused_loss_in_bfloat16_stays_within_a_thousandth_of_float32():
    hidden, weight, labels = example(1000, torch.bfloat16, width=256, vocabulary=5000)
    exact = plain_loss(hidden, weight, labels).item() / 1000
    assert fused_linear_cross_entropy(hidden, weight, labels).item() / 1000 == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize("never_waits", [("cpu",), ()], ids=["cpu", "as on a gpu"])
def test_a_label_of_vanishing_probability_has_a_finite_loss(never_waits, monkeypatch):
    monkeypatch.setattr(losses, "NEVER_WAITS", never_waits)
    hidden, weight, labels = example(8, torch.float32, spread=200.0)
    loss = fused_linear_cross_entropy(hidden, weight, labels)
    assert loss.item() == pytest.approx(plain_loss(hidden, weight, labels).item(), rel=1e-5)


def test_gradients_are_made_only_where_wanted():
    hidden, weight, labels = example(10, torch.float32)
    fused_linear_cross_entropy(hidden, weight.detach(), labels).backward()
    assert hidden.grad is not None and weight.grad is None


def test_no_supervised_position_gives_zero_and_a_gradient():
    hidden, weight, labels = example(0, torch.float32)
    for loss in (
        fused_linear_cross_entropy(hidden, weight, labels),
        chunked_cross_entropy(hidden, labels, lambda h: h @ weight.T, 500),
    ):
        loss.backward()
        assert loss.item() == 0


def test_nothing_as_large_as_the_logits_is_kept_for_backward():
    hidden, weight, labels = example(4 * FEWEST_POSITIONS, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        fused_linear_cross_entropy(hidden, weight, labels)
        chunked_cross_entropy(hidden, labels, lambda h: h @ weight.detach().T, 500)
    assert max(saved) < len(labels) * len(weight)


def tiny_families():
    """Random two-layer models of families whose output layers differ."""
    from transformers import (
        AutoModelForCausalLM,
        CohereConfig,
        Gemma2Config,
        GraniteConfig,
        LlamaConfig,
        MixtralConfig,
        PhiConfig,
        Qwen2Config,
        Qwen3Config,
    )

    shape = {
        "vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    configs = {
        "llama": LlamaConfig(**shape),
        "llama, tied": LlamaConfig(**shape, tie_word_embeddings=True),
        "qwen2": Qwen2Config(**shape),
        "qwen3": Qwen3Config(**shape, head_dim=8),
        "phi (bias)": PhiConfig(**shape),
        "gemma2 (soft cap)": Gemma2Config(**shape, head_dim=8, final_logit_softcapping=3.0),
        "cohere (scale)": CohereConfig(**shape, logit_scale=0.3),
        "granite (scale)": GraniteConfig(**shape, logits_scaling=4.0),
        "mixtral": MixtralConfig(**shape, num_local_experts=4),
    }
    return {name: (config, AutoModelForCausalLM) for name, config in configs.items()}


@pytest.mark.parametrize("family", list(tiny_families()))
def test_the_loss_of_each_family_equals_its_own(family):
    config, auto = tiny_families()[family]
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    ids = torch.randint(3, 120, (3, 20))
    labels = ids.clone()
    labels[:, :7] = -100
    theirs = model(input_ids=ids, labels=labels)
    gradients = torch.autograd.grad(theirs.loss, model.get_input_embeddings().weight)[0]
    targets = torch.full_like(labels, -100)
    targets[:, :-1] = labels[:, 1:]
    ours = SupervisedLM(model)(ids, targets) / (targets != -100).sum()
    assert ours.item() == pytest.approx(theirs.loss.item(), abs=1e-5)
    computed = torch.autograd.grad(ours, model.get_input_embeddings().weight)[0]
    torch.testing.assert_close(computed, gradients, rtol=1e-3, atol=1e-6)


def test_lora_on_the_output_layer():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    ids = torch.randint(30, 500, (2, 12))
    theirs = model(input_ids=ids, labels=ids).loss
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    ours = SupervisedLM(model)(ids, targets) / 22
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)


def test_the_model_still_gives_logits_for_generation():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    SupervisedLM(model)
    assert model(input_ids=torch.tensor([[5, 6]])).logits.shape == (1, 2, model.config.vocab_size)


@pytest.mark.parametrize("family", ["Qwen 3 MoE", "Mixtral", "gpt-oss"])
def test_the_loss_of_unevenly_used_experts_is_that_of_the_model(family, tmp_path):
    """Where its config.json sets output_router_logits; in training alone, an evaluation loss is one of tokens."""
    model = load_model(
        save_family(family, tmp_path, output_router_logits=True, router_aux_loss_coef=0.5), dtype="float32"
    )
    ids = torch.arange(3, 67).reshape(4, 16)
    labels = ids.roll(-1, 1)
    labels[:, -1] = IGNORED
    plain = model.train()(input_ids=ids, labels=ids)
    wrapped = SupervisedLM(model)
    ours = [wrapped.train(mode)(ids, labels) / (labels != IGNORED).sum() for mode in (True, False)]
    assert plain.aux_loss > 0.5 and ours[0].item() == pytest.approx(plain.loss.item(), abs=1e-5)
    assert (ours[0] - ours[1]).item() == pytest.approx(0.5 * plain.aux_loss.item(), abs=1e-5)
