"""Where a model's files are, and how its tokenizer is loaded; without torch."""

import ast
import http.server
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from conftest import LORA, REPOSITORY, TINY_MODEL
from forgebook.catalog import hub_id_of, model_folder, shape_of
from forgebook.config.blocks import HubRepo, labels_of
from forgebook.errors import ModelError, StorageError
from forgebook.export.gguf import export_gguf
from forgebook.inference.loading import base_of
from forgebook.launch.fine_tune import fine_tune
from forgebook.models.adapter_names import unserved_layers
from forgebook.models.adapters import read_lora_config
from forgebook.models.families import context_limit, native_context_length
from forgebook.models.tokenizer import (
    load_tokenizer,
    locate,
    readable_model_errors,
    refuse_pickled,
    tokenizer_of,
    tokenizer_source,
)
from forgebook.runs.run import best_checkpoint


def test_a_path_is_a_folder_and_another_name_a_hub_id():
    assert locate("tiny") == str(TINY_MODEL)
    assert locate(str(TINY_MODEL)) == str(TINY_MODEL)
    assert locate("owner/name") == "owner/name"
    with pytest.raises(StorageError, match=r"folder \./nothing does not exist"):
        locate("./nothing")


def test_a_hub_that_cannot_be_reached_is_one_readable_sentence():
    with pytest.raises(
        ModelError, match=r"cannot be reached: where it can, run `hf download owner/x .* FORGEBOOK_MODELS"
    ):
        load_tokenizer("owner/x")
    with pytest.raises(ModelError, match="no-such-owner/no-such-model could not be fetched from the hub"):
        locate(HubRepo(repo_id="no-such-owner/no-such-model"))


# What a hub answers for each name, and what the user reads.
ANSWERS = {
    "owner/gated": (403, "GatedRepo", "accept its license on https://huggingface.co/owner/gated, then"),
    "owner/revoked": (401, "", "the hub does not accept the token for 'owner/revoked'"),
    "meta-llama/llama-3.1-8": (
        404, "RepoNotFound", "has no model 'meta-llama/llama-3.1-8': did you mean 'meta-llama/llama-3.1-8b'?",
    ),
}  # fmt: skip
LOAD_EACH = """
import sys
from forgebook.errors import ModelError
from forgebook.models.tokenizer import load_tokenizer
for name in sys.argv[1:]:
    try:
        load_tokenizer(name)
    except ModelError as error:
        print(error)
"""


def test_each_refusal_of_the_hub_says_what_to_do(tmp_path):
    """A server on loopback in the hub's place; the real huggingface_hub asks it."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            status, code, _ = next(answer for name, answer in ANSWERS.items() if name in self.path)
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    there = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", LOAD_EACH, *ANSWERS]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | there, capture_output=True, text=True)
    server.shutdown()
    lines = done.stdout.splitlines()
    assert len(lines) == len(ANSWERS), done.stderr
    for line, (_, _, message) in zip(lines, ANSWERS.values(), strict=True):
        assert message in line


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder of models in the place of a hub: it holds `owner/chat`."""
    shutil.copytree(TINY_MODEL, tmp_path / "models/owner/chat")
    monkeypatch.setenv("FORGEBOOK_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def test_a_hub_id_is_looked_up_in_the_mirror_first(mirror):
    assert locate("owner/chat") == locate(HubRepo(repo_id="owner/chat")) == str(mirror / "owner/chat")
    assert locate("owner/another") == "owner/another"
    with pytest.raises(ModelError, match="could not be fetched"):  # it does not say which revision it holds
        locate(HubRepo(repo_id="owner/chat", revision="v2"))
    assert shape_of("owner/chat").parameters == 2_885_888


def test_only_owner_and_name_below_the_mirror_are_a_hub_id(mirror):
    """A run or a checkpoint that is kept there has no name that others know."""
    assert hub_id_of(mirror / "owner/chat") == "owner/chat" and hub_id_of(TINY_MODEL) is None
    assert hub_id_of(mirror / "tuned") is None and hub_id_of(mirror / "owner/chat/checkpoints/epoch-1") is None
    assert model_folder("../chat") == Path("../chat")


def test_layers_of_an_adapter_are_compared_with_a_mirrored_base(mirror):
    known, unknown = (f"base_model.model.model.layers.0.{name}.lora_A.weight" for name in ("mlp.up_proj", "mlp.w1"))
    assert unserved_layers([known], "owner/chat") is None
    assert "no layer model.layers.0.mlp.w1" in unserved_layers([known, unknown], "owner/chat")


def test_what_is_trained_on_a_mirrored_model_names_the_hub_id(mirror, make_config):
    run = fine_tune(make_config(model_id="owner/chat", lora_config=LORA, num_epochs=1))
    checkpoint = best_checkpoint(run)
    assert read_lora_config(checkpoint)["base_model_name_or_path"] == "owner/chat"
    assert base_of(checkpoint)[0] == str(mirror / "owner/chat")


@pytest.fixture
def model_with_code(tmp_path):
    """A model folder as repositories with code of their own have them; its code leaves a file when it runs."""
    folder = tmp_path / "model"
    shutil.copytree(TINY_MODEL, folder)
    for name, entries in {
        "config.json": {"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}, "model_type": "own"},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"},
    }.items():
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | entries))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own:\n    pass\n")
    return folder


def _export(source):
    export_gguf(Path(source), Path(source) / "model.gguf")


@pytest.mark.parametrize(
    "load", [load_tokenizer, native_context_length, context_limit, _export], ids=lambda f: f.__name__
)
def test_a_repositorys_code_never_runs_whatever_is_on_standard_input(load, model_with_code, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    with pytest.raises(ModelError, match="needs Python code from its own repository, which is never run here") as error:
        load(str(model_with_code))
    assert error.value.exit_code == 2 and not (model_with_code.parent / "ran").exists()
    assert "[y/N]" not in capsys.readouterr().out


def test_every_loader_of_transformers_refuses_a_repositorys_code():
    calls = [
        (path, node)
        for path in (REPOSITORY / "forgebook").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and re.match(r"Auto\w+\.from_pretrained$", ast.unparse(node.func))
    ]
    assert len(calls) > 5
    for path, call in calls:
        refusals = [ast.unparse(word.value) for word in call.keywords if word.arg == "trust_remote_code"]
        assert refusals == ["False"], f"{path}:{call.lineno}"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "adapter_model.bin"])
def test_pickled_weights_are_refused_in_one_sentence(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(ModelError, match=rf"are pickled \({name}\), and loading a pickle can run code") as error:
        refuse_pickled(str(tmp_path))
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    (tmp_path / name.replace(".bin", ".safetensors")).touch()
    refuse_pickled(str(tmp_path))
    refuse_pickled("owner/name")


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (pickle.UnpicklingError("Weights only load failed"), "are pickled"),
        (OSError("cannot be loaded with `safetensors`. Please do not set `use_safetensors=True`"), "are pickled"),
        (ValueError("Please pass the argument `trust_remote_code=True`"), "is never run here"),
        (type("SafetensorError", (Exception,), {})("header too large"), "no model could be .*: header too large"),
        (TypeError("list indices must be integers"), "no model could be loaded"),
    ],
)
def test_what_transformers_raises_is_one_sentence(raised, message):
    with pytest.raises(ModelError, match=message), readable_model_errors("owner/name", "model"):
        raise raised


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_token(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token == tokenizer.eos_token and loaded.padding_side == "right"


def test_labels_become_tokens_and_stay_visible(make_config):
    config = make_config(task="classification", classifier_config={"label_tokens": ["[[yes]]", "flim"]})
    assert labels_of(config.classifier_config) == ("[[yes]]", "flim") and labels_of(None) == ()
    tokenizer = tokenizer_of(config)
    label = tokenizer.convert_tokens_to_ids("flim")
    assert label in tokenizer("say flim")["input_ids"] and label not in tokenizer("flimsy")["input_ids"]
    assert tokenizer.decode(tokenizer("[[yes]]")["input_ids"], skip_special_tokens=True).endswith("[[yes]]")


def test_a_label_of_several_words_is_no_part_of_a_word():
    tokenizer = load_tokenizer(str(TINY_MODEL), ["not ok", "ok", "non-spam"])
    ids = tokenizer.convert_tokens_to_ids(["not ok", "ok", "non-spam"])
    for text in ("that is not okay", "joke", "non-spammer"):
        assert not set(ids) & set(tokenizer(text)["input_ids"])
    for text, label in zip(("not ok", "ok", "non-spam"), ids, strict=True):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == [label]


def test_a_continued_checkpoint_has_its_own_tokenizer(make_config, tmp_path):
    assert tokenizer_source("tiny", None, str(tmp_path)) == str(TINY_MODEL)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert tokenizer_source("tiny", None, str(tmp_path)) == str(tmp_path)


def test_loading_a_tokenizers_module_imports_no_torch():
    code = "import sys, forgebook.models.tokenizer, forgebook.models.families; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "False"
