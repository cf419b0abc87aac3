"""doctor as a user runs it: the report, the next step, the exit code."""

import json

from conftest import TINY_MODEL
from forgebook.cli.main import main

ROW = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'


def test_the_report_of_a_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text(ROW)
    (tmp_path / "c.yaml").write_text(f"model_id: {TINY_MODEL}\ntrain_path: train.jsonl\ntask: instruction_tuning\n")
    assert main(["doctor", "c.yaml"]) == 0
    output = capsys.readouterr().out
    assert "+ attention kernels" in output and "+ end of turn" in output
    assert output.endswith("next: step 1\npython main.py preview c.yaml n=5\n")
    assert main(["doctor", "c.yaml", "train_path=none.jsonl", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    problems = {finding["name"]: finding["problem"] for finding in report["findings"] if finding["problem"]}
    assert set(problems) == {"first example"} and "none.jsonl does not exist" in problems["first example"]
    assert len(report["steps"]) == 6
    assert {path.name for path in tmp_path.iterdir()} == {"c.yaml", "train.jsonl"}


def test_a_missing_model_has_no_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("model_id: ./none\ntrain_path: t.jsonl\n")
    assert main(["doctor", "c.yaml"]) == 1
    output = capsys.readouterr().out
    assert "none does not exist" in output and "next: step" not in output


def test_a_mistake_in_the_config_comes_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("model_id: m\n")
    assert main(["doctor", "c.yaml"]) == 2
    assert "train_path" in capsys.readouterr().err
