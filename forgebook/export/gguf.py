"""A full model as one GGUF file, for llama.cpp and the programs built on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from forgebook.errors import ConfigError, ModelError
from forgebook.models.tokenizer import refuse_own_code, refuse_pickled
from forgebook.runs.atomic import atomic_file
from forgebook.runs.checksums import check_files

__all__ = ["check_exportable", "export_gguf"]

TENSOR_TYPES = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "auto")
CONVERTER = "convert_hf_to_gguf.py"


def export_gguf(source: Path, out: Path, kind: str = "q8_0") -> Path:
    """Convert a folder of full weights to one GGUF file with llama.cpp's own converter.

    source: a merged model, or a checkpoint of a full fine-tuning run. kind: the type of its tensors, such as f16.

    Raises ModelError for an adapter, ConfigError without llama.cpp. The file is complete or absent.
    """
    check_exportable(source, kind)
    converter = _find_converter()
    with atomic_file(out.expanduser().resolve()) as temporary:
        command = [sys.executable, str(converter), str(source), "--outfile", str(temporary), "--outtype", kind]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not temporary.exists():
            lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            raise ModelError(f"{converter} could not convert {source}: {lines[-1] if lines else 'it wrote no file'}")
    return out


def check_exportable(source: Path, kind: str = "q8_0") -> None:
    """Raise ModelError for a folder that holds no full model, ConfigError for a type that GGUF does not have."""
    if kind not in TENSOR_TYPES:
        raise ConfigError(f"export: type must be one of {', '.join(TENSOR_TYPES)}, got {kind!r}")
    if (source / "adapter_config.json").exists():
        raise ModelError(
            f"{source} is an adapter, and a GGUF file holds a full model: merge it first "
            "(python main.py merge RUN FOLDER), then export FOLDER"
        )
    if not (source / "config.json").exists():
        raise ModelError(f"{source} holds no model (no config.json)")
    refuse_own_code(source)
    refuse_pickled(str(source))
    check_files(source)


def _find_converter() -> Path:
    """Find llama.cpp's converter in $LLAMA_CPP or on the PATH."""
    folder = os.environ.get("LLAMA_CPP")
    if folder and (Path(folder).expanduser() / CONVERTER).is_file():
        return Path(folder).expanduser() / CONVERTER
    if path := shutil.which(CONVERTER):
        return Path(path)
    raise ConfigError(
        f"export needs llama.cpp's {CONVERTER}, which is not {f'in {folder}' if folder else 'on the PATH'}: git clone "
        "https://github.com/ggml-org/llama.cpp, pip install gguf, and set LLAMA_CPP to the folder"
    )
