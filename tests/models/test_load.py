"""Where models come from, and how they are built."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import termios

import pytest
import torch

from conftest import LORA, REPOSITORY, TINY_MODEL
from forgebook.errors import ModelError
from forgebook.models import adapters, families, load
from support_families import save_family


def test_lora_trains_only_the_adapter_and_takes_the_dtype_of_its_base():
    model = adapters.add_lora(load.load_model(str(TINY_MODEL)), LORA)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and p.dtype == torch.bfloat16 for name, p in trained.items())
    everything, trainable = load.parameter_counts(model)
    assert trainable == sum(p.numel() for p in trained.values()) < everything


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["nowhere"]}, {"r": 8, "target_modules": "all-linear", "bias": "x"}]
)
def test_a_lora_config_that_does_not_fit_is_an_error(settings):
    with pytest.raises(ModelError, match="lora_config does not fit this model"):
        adapters.add_lora(load.load_model(str(TINY_MODEL)), settings)


def test_layers_are_named_where_peft_knows_none(tmp_path):
    model = load.load_model(save_family("OLMo 3", tmp_path))
    with pytest.raises(ModelError, match=r"names no target_modules.*add target_modules: all-linear"):
        adapters.add_lora(model, {"r": 4})


def test_rope_scaling_reaches_the_model():
    model = load.load_model(str(TINY_MODEL), rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert model.config.rope_parameters["factor"] == 2.0
    assert families.native_context_length(str(TINY_MODEL)) == 1024


def test_pickled_weights_and_a_repositorys_code_are_refused(tmp_path):
    shutil.copy(TINY_MODEL / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(ModelError, match=r"are pickled \(pytorch_model.bin\)"):
        load.load_model(str(tmp_path))
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}')
    with pytest.raises(ModelError, match="which is never run here"):
        load.load_model(str(tmp_path))


def test_zero_3_never_holds_the_whole_model_on_a_rank():
    """The DeepSpeed config exists before the weights are read: every parameter arrives partitioned."""
    code = f"""
from forgebook.config.schema import FinetuneConfig
from forgebook.models import load as models
from forgebook.training import setup as worker
config = FinetuneConfig(model_id="tiny", train_path="-", deepspeed="zero_3", train_batch_size_per_device=1)
accelerator = worker.make_accelerator(config)
parameters = list(models.load_model({str(TINY_MODEL)!r}).parameters())
print(len(parameters), sum(hasattr(p, "ds_id") and p.numel() == 0 for p in parameters))
"""
    printed = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    count, partitioned = printed.stdout.split()[-2:]
    assert count == partitioned and int(count) > 20


def test_experts_of_four_bits_are_unpacked_to_be_trained(tmp_path, monkeypatch):
    """As gpt-oss is published. Left to itself, transformers keeps them packed on a GPU that has the kernels for it."""
    from safetensors.torch import load_file, save_file
    from transformers.quantizers import quantizer_mxfp4

    source = save_family("gpt-oss", tmp_path, hidden_size=64, intermediate_size=64, head_dim=16)
    weights = load_file(tmp_path / "model.safetensors")
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = weights.pop(name).shape
        weights[f"{name}_blocks"] = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        weights[f"{name}_scales"] = torch.full((experts, outputs, inputs // 32), 120, dtype=torch.uint8)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts | {"quantization_config": {"quant_method": "mxfp4"}}))
    unpacks, check = [], quantizer_mxfp4.Mxfp4HfQuantizer.validate_environment

    def observed(quantizer, *args, **kwargs):
        unpacks.append(quantizer.quantization_config.dequantize)
        return check(quantizer, *args, **kwargs)

    monkeypatch.setattr(quantizer_mxfp4.Mxfp4HfQuantizer, "validate_environment", observed)
    model = load.load_model(source, dtype="float32")
    assert unpacks == [True] and getattr(model.config, "quantization_config", None) is None
    experts = model.model.layers[0].mlp.experts.gate_up_proj
    assert experts.dtype == torch.float32 and experts.shape == (4, 64, 128) and experts.requires_grad
    # The scale of 120 is 2^-7; four bits hold 0, 0.5, 1, 1.5, 2, 3, 4 and 6.
    assert set((experts.detach().abs() * 2**7).unique().tolist()) == {0, 0.5, 1, 1.5, 2, 3, 4, 6}


@pytest.mark.parametrize("notebook", [False, True])
def test_bars_of_libraries_are_drawn_in_terminals_not_in_notebooks(notebook, tmp_path):
    """A notebook gives its cells' processes a terminal, and keeps every state of a bar as text."""
    code = f"from forgebook.models.load import load_model; load_model({str(TINY_MODEL)!r})"
    environment = {name: value for name, value in os.environ.items() if name != "JPY_PARENT_PID"}
    controller, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=terminal, env=environment | ({"JPY_PARENT_PID": "1"} if notebook else {})
    ) as process:
        process.wait()
    os.close(terminal)
    printed = b""
    with contextlib.suppress(OSError), open(controller, "rb", buffering=0) as lines:  # a closed terminal is an error
        while part := lines.read(1000):
            printed += part
    assert process.returncode == 0 and (b"Loading weights" in printed) != notebook
