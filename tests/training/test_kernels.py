"""Switches that depend on the machine: they work, or are refused in one sentence before the run."""

import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import LORA, losses_of
from forgebook.errors import ConfigError, ResourceError
from forgebook.launch.fine_tune import fine_tune
from forgebook.models.adapters import add_lora
from forgebook.models.families import decoder_of
from forgebook.runs.atomic import read_json
from forgebook.training import kernels
from forgebook.training.optimizers import AdamW

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@without_gpu
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention": "flex"}, "attention: flex has no backward pass on a CPU"),
        ({"liger_kernel": {"enabled": True}}, "liger_kernel.enabled: its kernels run on a GPU"),
        ({"optimizer": "paged_adamw_8bit"}, "paged_adamw_8bit moves its state between a GPU and its host"),
        ({"tf32": True}, "tf32: needs an Ampere GPU or later"),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(make_config, tmp_path, values, message):
    with pytest.raises(ResourceError, match=message):
        fine_tune(make_config(**values))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantization": "nf4", "lora_config": LORA}, "quantization: nf4 needs the package bitsandbytes"),
        ({"optimizer": "adamw_8bit"}, "optimizer: adamw_8bit needs the package bitsandbytes"),
        ({"optimizer": "paged_adamw_8bit"}, "optimizer: paged_adamw_8bit needs the package bitsandbytes"),
        ({"liger_kernel": {"enabled": True}}, "liger_kernel.enabled needs the package liger-kernel"),
    ],
)
def test_a_missing_package_is_named(make_config, monkeypatch, values, message):
    monkeypatch.setattr(kernels, "is_installed", lambda package: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ResourceError, match=message):
        kernels.refuse_missing(make_config(**values))


def test_tf32_needs_a_gpu_that_has_it(make_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ResourceError, match="tf32: needs an Ampere GPU or later"):
        kernels.refuse_missing(make_config(tf32=True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    kernels.refuse_missing(make_config(tf32=True))


@without_gpu
def test_a_missing_compiler_is_named(make_config, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ResourceError, match=r"torch_compile on a CPU needs a C\+\+ compiler"):
        fine_tune(make_config(torch_compile=True))


# torch.compile ----------------------------------------------------------------------------------------


@pytest.fixture
def dynamo(monkeypatch):
    """The compiler, which tests switch off."""
    import torch._dynamo

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    with torch._dynamo.config.patch(disable=False):
        yield


@pytest.mark.slow
def test_a_compiled_model_has_the_same_losses_and_the_same_checkpoint(make_config, dynamo):
    settings = {"padding": "max_length", "context_length": 96, "lora_config": LORA}
    plain = fine_tune(make_config(run_name="plain", **settings))
    compiled = fine_tune(make_config(run_name="compiled", torch_compile={"dynamic": False}, **settings))
    assert losses_of(compiled) == pytest.approx(losses_of(plain), abs=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    names = [
        sorted(path.name for path in (run.folder / read_json(run.summary)["best_checkpoint"]).iterdir())
        for run in (plain, compiled)
    ]
    assert names[0] == names[1]


@pytest.mark.slow
def test_layers_share_what_is_compiled(dynamo):
    """With an adapter, whose own product breaks no graph: one for the first layer, whose input has no gradient, one for
    all others."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=5, **sizes))
    model = add_lora(llama, {"r": 4, "target_modules": "all-linear"})
    kernels.compile_decoder(model, {"backend": "aot_eager"})
    torch._dynamo.utils.counters.clear()
    hidden = decoder_of(llama)(torch.arange(16)[None], use_cache=False).last_hidden_state
    hidden.sum().backward()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def test_an_argument_that_torch_compile_does_not_take_is_named(make_config, dynamo):
    with pytest.raises(ConfigError, match=r"torch_compile: .*'mod'"):
        fine_tune(make_config(torch_compile={"mod": "max-autotune"}))


# AdamW in 8 bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_8_bit_moments_train_nearly_as_32_bit_ones(make_config, dtype):
    settings = {"num_epochs": 3, "dtype": dtype, "learning_rate": 3e-4}
    plain = fine_tune(make_config(run_name="plain", **settings))
    small = fine_tune(make_config(run_name="small", optimizer="adamw_8bit", **settings))
    assert losses_of(small)[:2] == losses_of(plain)[:2] and losses_of(small) != losses_of(plain)
    assert losses_of(small) == pytest.approx(losses_of(plain), abs=0.05)


def test_8_bit_moments_are_bitsandbytes_own_and_are_small():
    from bitsandbytes.optim import AdamW8bit

    torch.manual_seed(0)
    start = torch.randn(64, 128)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizers = (
        AdamW([ours], kind="adamw_8bit", lr=1e-2, weight_decay=0.1),
        AdamW8bit([theirs], lr=1e-2, weight_decay=0.1),
    )
    for step in range(3):
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    assert torch.equal(ours, theirs)
    moments = [value for value in optimizers[0].inner.state[ours].values() if getattr(value, "shape", ()) == (64, 128)]
    assert len(moments) == 2 and all(moment.dtype == torch.uint8 for moment in moments)


def test_a_run_with_8_bit_moments_continues_exactly(make_config):
    from conftest import fine_tune_until

    settings = {
        "optimizer": "adamw_8bit", "max_steps": 4, "num_epochs": 2,
        "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 2},
    }  # fmt: skip
    whole = fine_tune(make_config(run_name="whole", **settings))
    halves = make_config(run_name="halves", **settings)
    with pytest.raises(KeyboardInterrupt):
        fine_tune_until(halves, step=3)
    assert losses_of(fine_tune(halves)) == losses_of(whole)


def test_8_bit_moments_are_refused_where_deepspeed_has_its_own(make_config):
    with pytest.raises(ConfigError, match="adamw_8bit does not work with an offloaded optimizer"):
        make_config(optimizer="adamw_8bit", deepspeed="zero_3_offload_optim+param")
