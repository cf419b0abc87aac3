"""Flags of other programs and misspelled commands: the error says what to write."""

import pytest

from forgebook.cli.main import main

CONFIG = "model_id: tiny\ntrain_path: rows.jsonl\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(CONFIG)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("c.yaml --num_epochs 3", "main.py has no flag --num_epochs: write num_epochs=3"),
        ("c.yaml --num_epochs=3", "write num_epochs=3"),
        ("--num_epochs 3 c.yaml", "write num_epochs=3"),
        ("c.yaml --num-epochs 3 --seed 4", "write num_epochs=3"),
        ("c.yaml --lora_config.r 16", "write lora_config.r=16"),
        ("plan c.yaml --hardware 8xH100", "plan has no flag --hardware: write hardware=8xH100"),
        ("c.yaml --force", "write force=VALUE"),
        ("c.yaml -n 3", "main.py has no flag -n: write n=3"),
        ("c.yaml --defualt", "did you mean '--default'?"),
        ("--config c.yaml", "main.py has no flag --config: write the path alone, c.yaml"),
        ("evaluate run --rows 5", "evaluate has no flag --rows: write rows=5"),
        ("evaluate run --colour", "evaluate has no flag --colour"),
        ("serve run --port 8000", "serve has no flag --port: write port=8000"),
        ("models --yess", "did you mean '--yes'?"),
        ("models delte run", "models: 'delte' is not a command: did you mean 'delete'?"),
        ("c.yaml plan", "the command comes first: python main.py plan c.yaml"),
        ("evalute run", "'evalute' is neither a command nor a config file: did you mean 'evaluate'?"),
        ("Plan c.yaml", "did you mean 'plan'?"),
        ("preveiw c.yaml", "did you mean 'preview'?"),
        ("train c.yaml", "to fine-tune, give the config file alone"),
        ("inspect run", "'inspect' is neither a command nor a config file (commands: plan, preview,"),
        ("absent.yaml", "cannot read absent.yaml: No such file"),
        ("n" * 5000 + ".yaml", "is longer than a path can be"),
        ("evaluate ${UNSET_HERE}/run", "needs the environment variable UNSET_HERE"),
        ("evaluate run data=~no-such-user/x", "the home folder of a user who does not exist"),
    ],
)
def test_an_argument_meant_as_something_else_is_an_error_with_the_fix(capsys, words, message):
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
