"""PEFT without bitsandbytes, where no weights are quantized."""

import subprocess
import sys

from peft.import_utils import is_bnb_4bit_available, is_bnb_available

from conftest import REPOSITORY, TINY_MODEL
from forgebook.models.peft_library import without_unused_bitsandbytes

# In one process: full fine-tuning, then an adapter of a plain model, then one of a quantized model.
THREE_KINDS = """
import sys
from forgebook.cli.main import main
settings = ["num_devices=0", "deepspeed=none", "max_steps=1", "num_warmup_steps=0", "valid_path=null"]
paths = ["train_path=data/quickstart/test.jsonl", f"storage_path={sys.argv[2]}"]
assert main(["training_configs/tiny/quickstart.yaml", "lora_config=null", *settings, *paths]) == 0
others = {"bitsandbytes", "datasets", "pandas", "peft", "ray", "scipy", "torch._inductor.compile_fx"}
print("imports:", *(others & set(sys.modules)))

from forgebook.models.adapters import add_lora
from forgebook.models.load import load_model
for quantization in (None, "nf4"):
    adapted = add_lora(load_model(sys.argv[1], quantization=quantization), {"r": 2, "target_modules": ["q_proj"]})
    layer = adapted.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    print("imports:", type(layer).__name__, "bitsandbytes" in sys.modules)
"""


def test_a_process_imports_what_its_model_needs(tmp_path):
    command = [sys.executable, "-c", THREE_KINDS, str(TINY_MODEL), str(tmp_path)]
    printed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    imports = [line for line in printed.splitlines() if line.startswith("imports:")]
    assert imports == ["imports:", "imports: _FusedLinear False", "imports: Linear4bit True"]


def test_peft_looks_for_bitsandbytes_again_after_the_block(monkeypatch):
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    assert is_bnb_available()
    with without_unused_bitsandbytes():
        assert not is_bnb_available() and not is_bnb_4bit_available()
    assert is_bnb_available()
