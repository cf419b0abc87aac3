"""Liger's kernels: used where they give the model's own results, else left out, or refused, with the reason."""

import sys
import types

import pytest
import torch
from transformers import AutoConfig

from conftest import TINY_MODEL
from forgebook.config.blocks import LigerKernel
from forgebook.errors import ConfigError, ModelError
from forgebook.models import load
from forgebook.training import liger

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def package(monkeypatch):
    """Stand in for the package, which needs a GPU, with what of it is called: its models, and what patches one.

    The patch gives each norm a forward pass of its own, times `factor`, and replaces the class of norms, as Liger does.
    """
    import transformers.models.llama.modeling_llama as llama

    state = types.SimpleNamespace(calls=[], factor=1.0, own_class=llama.LlamaRMSNorm)

    def apply_to_llama(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True):
        """Have the arguments that the real one has."""

    def patch(model, **kwargs):
        state.calls.append((model, kwargs))
        llama.LlamaRMSNorm = type("FusedNorm", (torch.nn.Module,), {})
        for norm in [module for module in model.modules() if isinstance(module, state.own_class)]:
            plain = norm.forward
            norm.forward = lambda x, plain=plain: plain(x) * state.factor

    inside = types.ModuleType("liger_kernel.transformers")
    inside._apply_liger_kernel_to_instance = patch
    table = types.ModuleType("liger_kernel.transformers.monkey_patch")
    table.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply_to_llama}
    for module in (types.ModuleType("liger_kernel"), inside, table):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(liger, "is_installed", lambda name: True)
    yield state
    llama.LlamaRMSNorm = state.own_class


def test_the_switches_are_passed_on_and_the_loss_stays_ours(package):
    model = load.load_model(str(TINY_MODEL))
    liger.use_liger(model, {"rope": False, "fused_linear_cross_entropy": True})
    assert package.calls == [(model, {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False})]


def test_kernels_that_liger_has_not_got_are_named(package):
    model = load.load_model(str(TINY_MODEL))
    with pytest.raises(ConfigError, match="Liger has no geglu kernel for llama models"):
        liger.use_liger(model, {"geglu": True})
    model.config.model_type = "mamba"
    with pytest.raises(ModelError, match="Liger has no kernels for mamba models"):
        liger.use_liger(model, {})
    assert package.calls == []


@pytest.mark.parametrize(("factor", "is_used"), [(1.0, True), (1.00001, True), (1.01, False), (float("nan"), False)])
def test_they_are_used_where_they_agree_with_the_model(package, factor, is_used):
    """Another order of additions is no other result; a wrong scale is, and so is NaN."""
    package.factor = factor
    requested = LigerKernel(enabled=True)
    if is_used:
        assert liger.choose_liger(requested, str(TINY_MODEL), CPU) == liger.LigerChoice(True)
    else:
        with pytest.raises(ModelError, match=r"change what llama models compute.*: set liger_kernel.enabled: false"):
            liger.choose_liger(requested, str(TINY_MODEL), CPU)
    [(model, _)] = package.calls
    assert len(decoder_layers(model)) == 2


def test_what_they_replace_for_the_comparison_is_put_back(package):
    import transformers.models.llama.modeling_llama as llama

    state = torch.random.get_rng_state()
    liger.largest_difference(AutoConfig.from_pretrained(TINY_MODEL), {}, CPU)
    assert llama.LlamaRMSNorm is package.own_class and torch.equal(torch.random.get_rng_state(), state)


def test_auto_leaves_them_out_with_the_reason(package, monkeypatch, tmp_path):
    auto = LigerKernel()
    assert auto.enabled == "auto" and liger.choose_liger(auto, str(TINY_MODEL), CPU) == liger.LigerChoice(False)
    monkeypatch.setattr(liger, "largest_difference", lambda *args: 0.5)
    choice = liger.choose_liger(auto, str(TINY_MODEL), GPU)
    assert not choice.is_used and choice.note.endswith("change what llama models compute (by 0.5 of the largest value)")
    (tmp_path / "config.json").write_text(AutoConfig.for_model("opt").to_json_string())
    choice = liger.choose_liger(auto, str(tmp_path), GPU)
    assert choice.note == "without Liger's fused kernels: Liger has no kernels for opt models"
    monkeypatch.setattr(liger, "is_installed", lambda name: False)
    assert "pip install liger-kernel" in liger.choose_liger(auto, str(TINY_MODEL), GPU).note
    off = LigerKernel(enabled=False)
    assert liger.choose_liger(off, str(TINY_MODEL), GPU) == liger.LigerChoice(False)


def test_a_model_on_which_they_fail_is_a_reason_too(package):
    package.factor = "two"
    with pytest.raises(ModelError, match="Liger's kernels could not be tried"):
        liger.choose_liger(LigerKernel(enabled=True), str(TINY_MODEL), CPU)


@pytest.mark.parametrize(
    "kind",
    [
        "gemma3_text", "gemma4_text", "glm4", "gpt_oss", "granite", "llama", "ministral", "mistral", "mixtral", "olmo3",
        "phi3", "qwen2", "qwen3", "qwen3_5_text", "qwen3_moe", "smollm3",
    ],
)  # fmt: skip
def test_a_short_model_of_each_family_can_be_built_and_compared(package, kind, monkeypatch):
    """Of the families that Liger knows, with sizes that a CPU computes at once."""
    config = AutoConfig.for_model(kind)
    text = config.get_text_config()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_attention_heads": 4,
             "num_key_value_heads": 2, "num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 32,
             "num_experts_per_tok": 2, "shared_expert_intermediate_size": 32,
             "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 64}  # fmt: skip
    for name in sizes.keys() & vars(text).keys():
        setattr(text, name, sizes[name])
    monkeypatch.setattr(liger, "use_liger", lambda model, switches: None)
    assert liger.largest_difference(config, {}, CPU) == 0


def decoder_layers(model) -> list:
    return list(model.model.layers)
