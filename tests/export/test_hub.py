"""A model for others: pushed to a stand-in of the hub over HTTP, exported through a converter."""

import base64
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
import yaml

from conftest import LORA, REPOSITORY, TINY_MODEL
from forgebook.cli.main import main
from forgebook.config.parse import dump_config
from forgebook.errors import ConfigError, ModelError
from forgebook.export import hub as publish
from forgebook.models.adapters import add_lora
from forgebook.models.load import load_model
from forgebook.runs import atomic
from forgebook.runs.run import Run
from forgebook.training import checkpoints

TOKEN = "hf_" + "x" * 34


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that an upload of small files uses; `Hub.files` is what it was given."""

    protocol_version = "HTTP/1.1"
    files: dict = {}  # noqa: RUF012  (one server for the module)
    created: dict = {}  # noqa: RUF012

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            Hub.created.update(json.loads(body))
            self.reply({"url": f"{Hub.url}/someone/tuned", "id": "someone/tuned", "name": "someone/tuned"})
        elif self.path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.reply({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    Hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.reply({"success": True, "commitOid": "0" * 40, "commitUrl": f"{Hub.url}/someone/tuned/commit/0"})
        else:
            self.reply({"error": f"not part of the stand-in: {self.path}"}, 404)

    def do_GET(self):
        self.reply({"id": "someone/tuned", "sha": "0" * 40, "siblings": [], "tags": [], "private": True})

    def reply(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub():
    """A stand-in of the hub on loopback."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.url = f"http://127.0.0.1:{server.server_port}"
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def make_run(make_config, tokenizer, tmp_path):
    """Make a complete run, as it lies after training, without training."""

    def make(name, lora=None, checkpoint=None, **values):
        config = make_config(run_name=name, lora_config=lora, context_length=256, **values)
        run = Run(tmp_path / "runs" / name)
        best = run.checkpoints / "epoch-1"
        if lora:
            model = add_lora(load_model(str(TINY_MODEL)), lora | {"init_lora_weights": False})
            checkpoints.save_checkpoint(model, tokenizer, best)
        else:
            shutil.copytree(TINY_MODEL, best)
        run.config.write_text(dump_config(config))
        rows = {"rows": 24, "supervised_tokens": 1200, "path": "train.jsonl"}
        atomic.write_json(run.data_report, {"train": rows, "valid": {**rows, "path": "hf://someone/rows:test"}})
        summary = {"best_checkpoint": "checkpoints/epoch-1", "eval_loss": 0.125, "steps": 3, "epochs": 1.0}
        atomic.write_json(run.summary, summary)
        atomic.write_json(run.folder / "evaluation.json", {"rows": 6, "exact_match_after": 0.5})
        return run

    return make


def push(run, *words, token=TOKEN):
    """Run the command with the stand-in as its hub; constants are read when huggingface_hub is imported."""
    settings = {"HF_ENDPOINT": Hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": token, "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, str(REPOSITORY / "main.py"), "push", str(run.folder), *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)


@pytest.mark.slow
def test_an_adapter_is_pushed_with_a_card_and_the_base_that_others_find(hub, make_run):
    run = make_run("adapter", LORA)
    done = push(run, "someone/tuned", "private=true", "base=someone/base")
    assert done.returncode == 0, done.stderr
    assert f"pushed to {hub.url}/someone/tuned" in done.stdout and TOKEN not in done.stdout + done.stderr
    assert hub.created["visibility"] == "private" and hub.created["name"] == "tuned"
    assert set(hub.files) == {path.name for path in (run.checkpoints / "epoch-1").iterdir()}
    weights = "adapter_model.safetensors"
    assert hub.files[weights] == (run.checkpoints / "epoch-1" / weights).read_bytes()
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "someone/base"
    card = hub.files["README.md"].decode()
    facts = yaml.safe_load(card.split("---")[1])
    assert facts["base_model"] == "someone/base" and facts["library_name"] == "peft"
    assert "| exact match after | 0.5 |" in card and "hf://someone/rows:test" in card
    assert 'PeftModel.from_pretrained(model, "someone/tuned")' in card
    assert str(run.folder) not in card and str(TINY_MODEL) not in card

    refused = push(run, "someone/tuned", "base=someone/base", token="hf_wrong")
    assert refused.returncode == 2 and "set HF_TOKEN to a token that may write there" in refused.stderr
    assert "Traceback" not in refused.stderr and "hf_wrong" not in refused.stderr


def test_an_adapter_on_a_local_base_is_not_pushed_without_its_name(make_run):
    with pytest.raises(ConfigError, match="where nobody else finds it: name its hub id with base="):
        publish.push(make_run("local", LORA), "someone/tuned")


def test_the_card_of_full_weights(make_run):
    run = make_run("full")
    card = publish.model_card(run, "someone/tuned", str(TINY_MODEL))
    facts = yaml.safe_load(card.split("---")[1])
    assert facts["library_name"] == "transformers" and "base_model" not in facts
    assert "| method | instruction_tuning, full |" in card and str(TINY_MODEL) not in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


@pytest.fixture
def converter(tmp_path, monkeypatch):
    """A stand-in of llama.cpp's script that takes its arguments and writes what it was told."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(
        "import argparse, pathlib, sys\n"
        "p = argparse.ArgumentParser()\n"
        "p.add_argument('model'); p.add_argument('--outfile'); p.add_argument('--outtype')\n"
        "a = p.parse_args()\n"
        "pathlib.Path(a.outfile).write_text('half')\n"
        "if a.outtype == 'f32': sys.exit('ValueError: no such architecture')\n"
        "pathlib.Path(a.outfile).write_text(f'GGUF {a.outtype} {pathlib.Path(a.model).name}')\n"
    )
    monkeypatch.setenv("LLAMA_CPP", str(folder))


def test_full_weights_are_exported_through_the_converter(converter, make_run, tmp_path, capsys):
    run = make_run("full")
    out = tmp_path / "model.gguf"
    assert main(["export", str(run.folder), str(out), "type=f16"]) == 0
    assert out.read_text() == "GGUF f16 epoch-1" and f"wrote {out}" in capsys.readouterr().out
    assert main(["export", str(TINY_MODEL), str(out)]) == 0
    assert out.read_text() == "GGUF q8_0 tiny_model"


def test_what_cannot_be_exported_is_told_and_leaves_nothing(converter, make_run, tmp_path, monkeypatch):
    out = tmp_path / "model.gguf"
    adapter = make_run("adapter", LORA).checkpoints / "epoch-1"
    with pytest.raises(ModelError, match=r"is an adapter.*merge it first"):
        publish.export_gguf(adapter, out)
    with pytest.raises(ModelError, match="no such architecture"):
        publish.export_gguf(TINY_MODEL, out, "f32")
    with pytest.raises(ConfigError, match="type must be one of"):
        publish.export_gguf(TINY_MODEL, out, "q3")
    monkeypatch.delenv("LLAMA_CPP")
    with pytest.raises(ConfigError, match=r"git clone .*llama\.cpp"):
        publish.export_gguf(TINY_MODEL, out)
    assert not out.exists() and not list(tmp_path.glob(".model.gguf*"))
