"""What a config says and does not do, reported by `plan` in launch's words, without torch."""

import json
import os
import subprocess
import sys

import pytest

from conftest import LORA, REPOSITORY, TINY_MODEL, uneven_rows
from forgebook.cli.main import main


@pytest.fixture
def plan(make_config, tmp_path, monkeypatch, capsys):
    """Plan a small run, 3 optimizer steps, with overrides; return the exit code, the warnings and the errors."""
    make_config(num_warmup_steps=0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORGEBOOK_CACHE", str(tmp_path / "cache"))

    def run(*overrides):
        code = main(["plan", "run.yaml", *overrides, "--json"])
        printed = capsys.readouterr()
        return code, json.loads(printed.out)["warnings"] if code == 0 else [], printed.err

    return run


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (["lora_config={r: 4, target_modules: [q_proj, query]}"], "lora_config.target_modules: no layer that a text"),
        (["lora_config={r: 4, layers_to_transform: [0, 99]}"], "lora_config.layers_to_transform: there is no layer 99"),
        (["num_warmup_steps=3"], "num_warmup_steps is 3, the run has 3 optimizer steps: the learning rate never"),
        (["eval_first=true", "valid_path=null"], "eval_first has no effect without valid_path: set valid_path"),
        (["max_failures=2"], "max_failures has no effect with num_devices: 0"),
    ],
)
def test_what_has_no_effect_is_a_warning(plan, overrides, warning):
    code, warnings, _ = plan(*overrides)
    assert code == 0 and any(text.startswith(warning) for text in warnings), warnings


def test_bad_rows_are_a_warning_and_nothing_is_written(plan, write_rows, tmp_path):
    bad = write_rows([*uneven_rows(3), {"mesages": []}], "bad.jsonl")
    for on_bad_rows, follows in (("fail", "the run stops at these"), ("drop", "the run drops these")):
        code, [warning], _ = plan(f"train_path={bad}", f"on_bad_rows={on_bad_rows}")
        assert code == 0 and warning.startswith("1 of 4 rows of ") and follows in warning
        assert "bad.jsonl:4: no 'messages'" in warning
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora_config={r: 4, target_modules: [query, value]}"], "ModelError: lora_config.target_modules: no layer"),
        (["lora_config={r: 4, target_modules: q_proj}"], "q_proj is a pattern over whole names such as model.layers.0"),
        (["num_warmup_steps=1", "max_steps=1"], "ConfigError: num_warmup_steps: 1 starts the learning rate at 0"),
        (
            ["lora_config={r: 4, target_modules: [q_proj], exclude_modules: [q_proj]}"],
            "exclude_modules leaves out every layer",
        ),
    ],
)
def test_what_would_train_nothing_is_an_error(plan, overrides, message):
    code, _, error = plan(*overrides)
    assert code == 2 and message in error


def test_a_config_that_does_what_it_says_has_no_warning(plan):
    assert plan(f"lora_config={json.dumps(LORA)}")[:2] == (0, [])
    code, warnings, _ = plan("num_warmup_steps=0", "eval_batch_size_per_device=4")
    assert (code, warnings) == (0, [])


def test_warnings_are_below_the_table_and_need_no_torch(tmp_path):
    """In a process of its own: the tests beside import torch."""
    config = (
        f"model_id: {TINY_MODEL}\ntrain_path: absent.jsonl\nlora_config: {{r: 4, target_modules: [o_proj, query]}}\n"
    )
    (tmp_path / "c.yaml").write_text(config)
    code = "import sys; from forgebook.cli.main import main; main(['plan', 'c.yaml'])\n"
    code += "print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "warning: lora_config.target_modules: no layer that a text passes through is named query" in printed
    assert printed.endswith("[]\n")
