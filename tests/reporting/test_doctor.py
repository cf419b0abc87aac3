"""What doctor finds: on this machine, and in configs with one thing wrong each."""

import importlib.metadata
import json
import shutil
import socket

import pytest

from conftest import TINY_MODEL, config_for
from forgebook.reporting.doctor import config_findings, machine_findings

ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def by_name(findings) -> dict:
    return {finding.name: finding for finding in findings}


def test_this_machine(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    findings = by_name(machine_findings(config_for("tiny", storage_path=str(tmp_path / "runs"))))
    assert findings["torch"].text == importlib.metadata.version("torch")
    assert "sdpa" in findings["attention kernels"].text and "flash_attention_2" in findings["attention kernels"].text
    assert f"GB free at {tmp_path}" in findings["disk of storage_path"].text
    assert findings["devices"].text and findings["Ray"].problem == findings["transformers"].problem == ""


def test_another_version_than_the_tested_one_needs_a_fix(monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.0" if name == "peft" else version(name))
    assert "tested with" in by_name(machine_findings())["peft"].problem


def test_a_disk_is_too_small_for_what_the_run_stores(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=3 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "less than 10 GB are free" in by_name(machine_findings())["disk of cache"].problem
    small = by_name(machine_findings(config_for("tiny", storage_path=str(tmp_path))))
    assert small["disk of storage_path"].problem == small["disk of cache"].problem == ""
    large = by_name(machine_findings(config_for("Qwen/Qwen3-8B", storage_path=str(tmp_path))))
    assert "GB: make room, or set another storage_path" in large["disk of storage_path"].problem
    assert large["disk of storage_path"].problem.startswith("the run may take ")


def test_an_address_is_tried(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert by_name(machine_findings(config_for("tiny", address=address)))["Ray"].text == f"{address} answers"
    assert "does not answer" in by_name(machine_findings(config_for("tiny", address=address)))["Ray"].problem


def test_a_bucket_is_listed(s3):
    findings = by_name(machine_findings(config_for("tiny", storage_path="s3://forgebook/runs")))
    assert findings["object store"].problem == "" and "can be listed" in findings["object store"].text
    assert "disk of storage_path" not in findings
    missing = by_name(machine_findings(config_for("tiny", storage_path="s3://no-such-bucket-here/runs")))
    assert "there is no such bucket" in missing["object store"].problem


@pytest.fixture
def found(tmp_path):
    """Return the findings of a config of one row, by a model folder and more values."""

    def make(model=TINY_MODEL, row=ROW, **values):
        (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
        values = {"task": "instruction_tuning", **values, "train_path": str(tmp_path / "train.jsonl")}
        return by_name(config_findings(config_for(str(model), **values)))

    return make


def test_a_good_config(found):
    findings = found()
    assert not any(finding.problem for finding in findings.values())
    assert "EOS" in findings["end of turn"].text and "in the loss" in findings["first example"].text


def test_a_model_without_a_template(found, tmp_path):
    model = shutil.copytree(TINY_MODEL, tmp_path / "base")
    (model / "chat_template.jinja").unlink()
    findings = found(model)
    assert "set generation_config.prompt_format" in findings["template"].problem and "end of turn" not in findings


@pytest.mark.parametrize("end", ["<|end|>", "\nEND"])
def test_the_end_of_an_answer(found, end):
    prompt_format = {"system": "{instruction}", "user": "{instruction}", "assistant": "{instruction}" + end}
    finding = found(generation_config={"prompt_format": prompt_format})["end of turn"]
    assert not finding.problem and repr(end.strip()) in finding.text


def test_two_beginnings(found):
    prompt_format = {"bos": "<|begin|><|begin|>", "system": "{instruction}", "user": "{instruction}"}
    prompt_format |= {"assistant": "{instruction}<|end|>"}
    finding = found(generation_config={"prompt_format": prompt_format})["first example"]
    assert "begins with '<|begin|>' twice" in finding.problem


def test_a_tokenizer_without_any_end(found, tmp_path):
    model = shutil.copytree(TINY_MODEL, tmp_path / "base")
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    assert "must print one" in found(model)["end of turn"].problem


def test_a_row_that_cannot_be_used(found):
    assert "no assistant turn" in found(row={"messages": [{"role": "user", "content": "q"}]})["first example"].problem


def test_a_model_that_is_not_there(found, tmp_path):
    findings = found(tmp_path / "none")
    assert list(findings) == ["model"] and "does not exist" in findings["model"].problem
