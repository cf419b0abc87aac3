"""A run's model pushed to a stand-in of the hub over HTTP, and its card."""

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
from forgebook.config.parse import dump_config
from forgebook.errors import ConfigError
from forgebook.export import hub as hub_export
from forgebook.export.hub import model_card, push_to_hub
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


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("hf://a/b:train, https://c.org/d.jsonl?token=secret", "24 of hf://a/b:train, https://c.org/d.jsonl, 9"),
        ("hf://a/b:train, /home/me/tickets.jsonl", "24, 9"),
    ],
)
def test_a_card_names_what_is_public_alone(path, text):
    described = hub_export._describe({"path": path, "rows": 24, "supervised_tokens": 9})
    assert described == f"{text} supervised tokens"


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
    with pytest.raises(ConfigError, match="which others cannot load: name its hub id with base="):
        push_to_hub(make_run("local", LORA), "someone/tuned")


def test_the_card_of_an_adapter_loads_the_published_class_and_names_what_cannot_serve_it(make_run, tmp_path):
    """As a plain text model, Qwen3.5 has other names: the adapter would change nothing."""
    from support_models import model_with_towers

    run = make_run("wrapped", LORA)
    model_with_towers("Qwen3_5").save_pretrained(tmp_path / "base")
    file = run.checkpoints / "epoch-1/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    reason = "the published weights of its base have no layer model.layers.0.mlp.experts"
    atomic.write_json(run.summary, atomic.read_json(run.summary) | {"vllm_serves": f"no: {reason}"})
    card = model_card(run, "someone/tuned", "Qwen/Qwen3.5-4B")
    assert 'model = AutoModelForImageTextToText.from_pretrained("Qwen/Qwen3.5-4B"' in card
    assert card.endswith(f"vLLM cannot serve the adapter: {reason}. Merge it into its base first.\n")


def test_the_card_of_full_weights(make_run):
    run = make_run("full")
    card = model_card(run, "someone/tuned", str(TINY_MODEL))
    facts = yaml.safe_load(card.split("---")[1])
    assert facts["library_name"] == "transformers" and "base_model" not in facts
    assert "| method | instruction_tuning, full |" in card and str(TINY_MODEL) not in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
