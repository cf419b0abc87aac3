"""What only a GPU can show. Without one each test is listed as skipped, with what it would check.

    python -m pytest tests/gpu -rs

FORGEBOOK_GPU_TESTS=cpu runs the part of them that a CPU can run, slowly: to see that the tests themselves work.
"""

import importlib.util
import os
import shutil

import pytest
import torch

from conftest import LORA, TINY_MODEL, losses_of
from forgebook.launch.fine_tune import fine_tune
from forgebook.runs.atomic import read_json
from support_families import save_family

SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "head_dim": 64}
HAS_GPU = torch.cuda.is_available()
ON_CPU = os.environ.get("FORGEBOOK_GPU_TESTS") == "cpu"


def needs(what: str, *packages: str, runs_on_cpu: bool = False):
    """Skip without a GPU, or without a package; what: what the test would check."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing and HAS_GPU:
        return pytest.mark.skipif(True, reason=f"needs {', '.join(missing)}: {what}")
    return pytest.mark.skipif(not HAS_GPU and not (ON_CPU and runs_on_cpu), reason=f"needs a GPU: {what}")


@pytest.fixture
def trained(make_config, tmp_path):
    """A function that trains a model of 8 layers with random weights, and returns its losses and its summary."""
    model = save_family("Llama 3", tmp_path / "model", vocab_size=512, max_position_embeddings=1024, **SHAPE)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY_MODEL / name, model)

    def train(name: str, **values):
        settings = {"context_length": 128, "num_epochs": 3, "lora_config": LORA, **values}
        run = fine_tune(make_config(run_name=name, model_id=str(model), **settings))
        return losses_of(run), read_json(run.summary)

    return train


@needs("attention: varlen in bfloat16 trains as SDPA does, with and without packing", runs_on_cpu=True)
@pytest.mark.parametrize("padding", ["longest", "packed"])
def test_varlen_trains_as_sdpa(trained, padding):
    plain, _ = trained("sdpa", dtype="bfloat16", attention="sdpa", padding=padding)
    varlen, _ = trained("varlen", dtype="bfloat16", attention="varlen", padding=padding)
    assert varlen == pytest.approx(plain, abs=0.03)


@needs("dtype: float16 trains as float32 does, and skips steps whose gradients overflow", runs_on_cpu=True)
def test_float16_trains_as_float32(trained, monkeypatch):
    exact, _ = trained("float32")
    monkeypatch.setattr("forgebook.training.optimizers.FIRST_LOSS_SCALE", 2.0**10)
    half, summary = trained("float16", dtype="float16")
    assert half == pytest.approx(exact, abs=0.03) and summary["skipped_steps"] == 0
    monkeypatch.setattr("forgebook.training.optimizers.FIRST_LOSS_SCALE", 2.0**21)
    _, summary = trained("overflowing", dtype="float16")
    assert 1 <= summary["skipped_steps"] < summary["steps"]


@needs("attention: auto takes a kernel without padding, and says so where it does not")
def test_auto_computes_no_padding(trained, capsys):
    auto, _ = trained("auto", dtype="bfloat16")
    varlen, _ = trained("varlen", dtype="bfloat16", attention="varlen")
    assert auto == pytest.approx(varlen, abs=0.03) and "padding" not in capsys.readouterr().out


@needs("liger_kernel.enabled: auto changes no loss beyond rounding", "liger_kernel")
def test_fused_kernels_change_no_loss(trained, capsys):
    plain, _ = trained("plain", liger_kernel={"enabled": False})
    fused, _ = trained("fused", liger_kernel={"enabled": True})
    assert fused == pytest.approx(plain, abs=1e-3) and fused != plain
    automatic, _ = trained("auto")
    assert automatic == pytest.approx(fused, abs=1e-5) and "Liger" not in capsys.readouterr().out


@needs("selective, true and offload take less memory each, at the same losses", runs_on_cpu=True)
def test_each_kind_of_recomputation_takes_less(trained):
    kinds = [False, "selective", True, "offload"]
    found = [trained(str(kind), gradient_checkpointing=kind, context_length=512) for kind in kinds]
    for losses, _ in found[1:]:
        assert losses == pytest.approx(found[0][0], abs=1e-4)
    if HAS_GPU:
        peaks = [max(summary["step_memory_bytes_per_worker"]) for _, summary in found]
        assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)


@needs("the planned memory of LoRA, nf4 and full fine-tuning is within 10% of the measured", "bitsandbytes")
@pytest.mark.parametrize(
    "values", [{}, {"quantization": "nf4"}, {"lora_config": None}, {"gradient_checkpointing": "selective"}], ids=str
)
def test_the_plan_is_near(trained, values):
    _, summary = trained("run", dtype="bfloat16", **values)
    planned, measured = (summary[key]["memory_bytes_per_worker"] for key in ("planned", "measured"))
    assert planned == pytest.approx(measured, rel=0.1)


@needs("a step reads nothing back from the GPU")
def test_a_step_does_not_wait_for_the_gpu(trained, monkeypatch):
    from forgebook.training import loop

    plain, seen = loop.queue_step, []

    def watched(*args):
        if len(seen) > 2:  # the first steps allocate, and compile
            torch.cuda.set_sync_debug_mode("error")
        try:
            seen.append(1)
            return plain(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "queue_step", watched)
    trained("run")
    assert len(seen) > 5


@needs("tf32 is another rounding of the same losses, on Ampere and later")
def test_tf32_is_near_float32(trained):
    exact, _ = trained("exact")
    rounded, _ = trained("rounded", tf32=True)
    assert rounded == pytest.approx(exact, abs=0.01) and rounded != exact


@needs("optimizer: paged_adamw_8bit trains as adamw_8bit does", "bitsandbytes")
def test_paged_moments_are_those_of_8_bits(trained):
    plain, _ = trained("plain", optimizer="adamw_8bit")
    paged, _ = trained("paged", optimizer="paged_adamw_8bit")
    assert paged == pytest.approx(plain, abs=1e-4)


@needs("torch_compile reaches its first step within a minute and changes no loss")
def test_compiled_layers_start_within_a_minute(trained, monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    plain, _ = trained("plain", padding="max_length", context_length=128)
    with torch._dynamo.config.patch(disable=False):
        compiled, summary = trained("compiled", padding="max_length", context_length=128, torch_compile=True)
    assert compiled == pytest.approx(plain, abs=1e-3) and summary["training_seconds"] < 60
