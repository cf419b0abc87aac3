"""A model as one GGUF file, for llama.cpp and the programs built on it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from forgebook.data.prompt_formats import as_chat_template, read_prompt_format
from forgebook.errors import ConfigError, ModelError, StorageError
from forgebook.models.adapters import read_lora_config
from forgebook.models.tokenizer import refuse_own_code, refuse_pickled
from forgebook.runs.atomic import atomic_file
from forgebook.runs.checksums import check_files

__all__ = ["check_exportable", "export_gguf"]

TENSOR_TYPES = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "auto")
CONVERTER = "convert_hf_to_gguf.py"


def export_gguf(
    source: Path, out: Path, kind: str = "q8_0", on_stage: Callable[[str], None] = lambda stage: None
) -> Path:
    """Convert a checkpoint or model folder to one GGUF file with llama.cpp's own converter.

    source: full weights, or an adapter, which is merged into its base first. kind: the type of its tensors, such as
    f16. on_stage: called with what is being done.

    Raises ModelError for what is no model, ConfigError without llama.cpp, StorageError if a folder has the file's name.
    The file is complete or absent.
    """
    check_exportable(source, out, kind)
    converter, out = _find_converter(), out.expanduser()
    with _full_model(source, out, on_stage) as folder, atomic_file(out.resolve()) as temporary:
        on_stage(f"converting to {kind}")
        command = [sys.executable, str(converter), str(folder), "--outfile", str(temporary), "--outtype", kind]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not temporary.exists():
            lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            raise ModelError(f"{converter} could not convert {source}: {lines[-1] if lines else 'it wrote no file'}")
    return out


@contextlib.contextmanager
def _full_model(source: Path, out: Path, on_stage: Callable[[str], None]) -> Iterator[Path]:
    """Yield a folder of full weights whose chat template is that of training; a temporary one is next to `out`."""
    if read_lora_config(source) is None and _has_template_of_training(source):
        yield source
        return
    from forgebook.export.merge import merge_run

    work = out.with_name(f".merging-{out.name}")
    shutil.rmtree(work, ignore_errors=True)  # of a command that was killed
    try:
        yield merge_run(str(source), work / out.stem, on_stage=on_stage).folder  # its name becomes the model's
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _has_template_of_training(folder: Path) -> bool:
    prompt_format, template = read_prompt_format(folder), folder / "chat_template.jinja"
    if prompt_format is None:
        return True
    return template.is_file() and template.read_text(encoding="utf-8") == as_chat_template(prompt_format)


def check_exportable(source: Path, out: Path, kind: str = "q8_0") -> None:
    """Raise for a folder that holds no model, a type or a file that cannot be written, and without llama.cpp."""
    if kind not in TENSOR_TYPES:
        also = ""
        if re.fullmatch(r"i?q\d_\w+", kind.lower()):
            also = f". For {kind}: export type=f16, then llama.cpp's llama-quantize IN.gguf OUT.gguf {kind.upper()}"
        raise ConfigError(f"export: type must be one of {', '.join(TENSOR_TYPES)}, got {kind!r}{also}")
    if out.expanduser().is_dir():
        raise StorageError(f"{out} is a folder: name a file in it, such as {out / 'model.gguf'}")
    if read_lora_config(source) is None and not (source / "config.json").exists():
        raise ModelError(f"{source} holds no model (no config.json)")
    refuse_own_code(source)
    refuse_pickled(str(source))
    check_files(source)
    _find_converter()


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
