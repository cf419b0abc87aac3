"""GGUF files, through a stand-in of llama.cpp's converter."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import TINY_MODEL
from forgebook.cli.main import main
from forgebook.data.prompt_formats import as_chat_template, read_prompt_format
from forgebook.errors import ConfigError, ModelError, StorageError
from forgebook.export.gguf import export_gguf
from forgebook.export.ollama import read_modelfile
from forgebook.runs import atomic


@pytest.fixture
def converter(tmp_path, monkeypatch):
    """A stand-in of llama.cpp's script: it takes the same arguments and writes what they were.

    It fails for f32, and for bf16 it copies the model that it was given to `converted`, next to itself.
    """
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(
        "import argparse, pathlib, shutil, sys\n"
        "p = argparse.ArgumentParser()\n"
        "p.add_argument('model'); p.add_argument('--outfile'); p.add_argument('--outtype')\n"
        "a = p.parse_args()\n"
        "pathlib.Path(a.outfile).write_text('half')\n"
        "if a.outtype == 'f32': sys.exit('ValueError: no such architecture')\n"
        "if a.outtype == 'bf16': shutil.copytree(a.model, pathlib.Path(__file__).parent / 'converted')\n"
        "pathlib.Path(a.outfile).write_text(f'GGUF {a.outtype} {pathlib.Path(a.model).name}')\n"
    )
    monkeypatch.setenv("LLAMA_CPP", str(folder))
    return folder


@pytest.fixture
def full_model(tmp_path):
    """A folder that looks like a full model; the stand-in does not read it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_a_full_model_is_converted_with_the_requested_type(converter, full_model, tmp_path):
    out = tmp_path / "model.gguf"
    assert export_gguf(full_model, out, "f16") == out and out.read_text() == "GGUF f16 model"
    export_gguf(full_model, out)
    assert out.read_text() == "GGUF q8_0 model"


def test_the_converter_is_found_on_the_path_too(converter, full_model, tmp_path, monkeypatch):
    (converter / "convert_hf_to_gguf.py").chmod(0o755)
    monkeypatch.delenv("LLAMA_CPP")
    monkeypatch.setenv("PATH", str(converter))
    assert export_gguf(full_model, tmp_path / "model.gguf").read_text() == "GGUF q8_0 model"


def test_the_command_exports_a_folder_or_a_complete_runs_best_checkpoint(converter, tmp_path, make_config, capsys):
    from forgebook.config.parse import dump_config

    out, folder = tmp_path / "model.gguf", tmp_path / "runs" / "full"
    best = folder / "checkpoints" / "epoch-1"
    best.mkdir(parents=True)
    (best / "config.json").write_text("{}")
    (folder / "config.yaml").write_text(dump_config(make_config(run_name="full")))
    atomic.write_json(folder / "summary.json", {"best_checkpoint": "checkpoints/epoch-1"})
    assert main(["export", str(folder), str(out), "type=f16"]) == 0
    assert out.read_text() == "GGUF f16 epoch-1" and f"wrote {out}" in capsys.readouterr().out
    assert main(["export", str(TINY_MODEL), str(out)]) == 0
    assert out.read_text() == "GGUF q8_0 tiny_model"


def test_a_modelfile_is_written_with_its_gguf_file_or_not_at_all(converter, tmp_path, capsys):
    out, modelfile = tmp_path / "model.gguf", tmp_path / "model.Modelfile"
    assert main(["export", str(TINY_MODEL), str(out), "type=f32", "ollama=true"]) != 0  # the stand-in fails
    assert not out.exists() and not modelfile.exists()
    assert main(["export", str(TINY_MODEL), str(out), "type=f16", "ollama=true"]) == 0
    assert modelfile.read_text().startswith("FROM ./model.gguf\n") and f"-f {modelfile}" in capsys.readouterr().out


def test_an_adapter_is_merged_first(converter, tmp_path):
    """The converter sees what `merge` writes, under the file's name, and nothing else is left."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(TINY_MODEL), peft.LoraConfig(r=2))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data += 0.1 * torch.randn_like(p)
    adapter, out = tmp_path / "adapter", tmp_path / "out" / "mine.gguf"
    model.save_pretrained(adapter)
    AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(adapter)
    assert main(["export", str(adapter), str(out), "type=bf16", "ollama=true"]) == 0
    assert out.read_text() == "GGUF bf16 mine"
    assert sorted(path.name for path in out.parent.iterdir()) == ["mine.Modelfile", "mine.gguf"]
    assert main(["merge", str(adapter), str(tmp_path / "merged")]) == 0
    weights = [load_file(path / "model.safetensors") for path in (converter / "converted", tmp_path / "merged")]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
    assert read_modelfile(tmp_path / "merged", out.name) == out.with_suffix(".Modelfile").read_text()


def test_the_prompt_format_of_training_is_the_chat_template_inside(converter, tmp_path):
    """A full model trained with one still has the chat template that its base came with."""
    source = tmp_path / "source"
    shutil.copytree(TINY_MODEL, source)
    texts = {"system": "{instruction}", "user": "Q: {instruction}", "assistant": "A: {instruction}</s>"}
    (source / "prompt_format.yaml").write_text(json.dumps(texts))
    assert main(["export", str(source), str(tmp_path / "model.gguf"), "type=bf16"]) == 0
    converted = (converter / "converted" / "chat_template.jinja").read_text()
    assert converted == as_chat_template(read_prompt_format(source))
    assert (tmp_path / "model.gguf").read_text() == "GGUF bf16 model"
    (source / "chat_template.jinja").write_text(converted)  # as `merge` leaves it: there is nothing to write anew
    assert export_gguf(source, tmp_path / "model.gguf").read_text() == "GGUF q8_0 source"


def test_what_cannot_be_exported_is_rejected_and_leaves_nothing(converter, full_model, tmp_path, monkeypatch):
    out, empty = tmp_path / "model.gguf", tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match="holds no model"):
        export_gguf(empty, out)
    with pytest.raises(StorageError, match=r"empty is a folder: name a file in it"):
        export_gguf(full_model, empty)
    with pytest.raises(ModelError, match="no such architecture"):
        export_gguf(full_model, out, "f32")
    with pytest.raises(ConfigError, match="type must be one of"):
        export_gguf(full_model, out, "q3")
    with pytest.raises(ConfigError, match=r"llama-quantize IN.gguf OUT.gguf Q4_K_M"):
        export_gguf(full_model, out, "q4_k_m")
    monkeypatch.delenv("LLAMA_CPP")
    with pytest.raises(ConfigError, match=r"git clone .*llama\.cpp"):
        export_gguf(full_model, out)
    assert not out.exists() and not list(tmp_path.glob(".model.gguf*"))
