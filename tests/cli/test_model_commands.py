"""models, push and export: what they print, and what they hand to the engine."""

import io
import json
import shutil

import pytest

from conftest import TINY_MODEL
from forgebook.cli.main import main


@pytest.fixture
def run(make_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_run("a")


def test_models_are_listed_and_shown(run, capsys):
    assert main(["models", "--json"]) == 0
    [record] = json.loads(capsys.readouterr().out)
    assert record["id"] == "a" and record["is_complete"] and record["figures"] == {"eval_loss": 0.5}
    assert main(["models"]) == 0
    listing = capsys.readouterr().out
    assert "Models under runs" in listing and "0.5000" in listing
    assert main(["models", "show", "a"]) == 0
    assert "ft_type            instruction_tuning, full" in capsys.readouterr().out
    assert main(["models", "none"]) == 0 and capsys.readouterr().out == "no models under none\n"
    run.summary.unlink()
    assert main(["models"]) == 0 and "not complete" in capsys.readouterr().out


def test_a_model_is_deleted_only_after_a_yes(run, capsys, monkeypatch):
    prompts = []
    monkeypatch.setattr("builtins.input", lambda prompt: prompts.append(prompt) or "")
    assert main(["models", "delete", "a"]) == 0 and run.config.exists()
    assert capsys.readouterr().out == "nothing was deleted\n" and prompts == [f"delete {run.folder}? [y/N] "]
    assert main(["models", "delete", "a", "--yes"]) == 0 and not run.folder.exists() and len(prompts) == 1


@pytest.mark.parametrize("stdin", [io.StringIO(""), None], ids=["at its end", "closed"])
def test_a_deletion_that_nobody_can_confirm_is_refused(run, capsys, monkeypatch, stdin):
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(["models", "delete", "a"]) == 2 and run.config.exists()
    assert "add --yes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models", "storage_path=runs"], "write models runs"),
        (["models", "runs", "more"], "models takes a storage path, or show RUN, or delete RUN; got runs more"),
        (["models", "show"], "models show needs a RUN"),
        (["push", "a"], "push needs a repository after the RUN: OWNER/NAME"),
        (["push", "a", "o/n", "private=maybe"], "push: private must be true or false, got 'maybe'"),
        (["export", "a"], "export needs a file to write after the MODEL"),
        (["export", "a.gguf", "a"], "the MODEL comes first: export a a.gguf"),
        (
            ["export", "a", "out=a.gguf"],
            "unknown option out (options: type=, ollama=, checkpoint=); usage: export MODEL",
        ),
    ],
)
def test_mistakes_are_one_sentence(run, capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_push_hands_on_the_run_and_its_options(run, capsys, monkeypatch):
    pushed = []
    monkeypatch.setattr("forgebook.export.hub.push_to_hub", lambda *words: pushed.append(words) or "URL")
    assert main(["push", "a", "o/n", "private=true", "base=o/base"]) == 0
    assert main(["push", "a", "o/n"]) == 0
    assert pushed == [(run, "o/n", True, "o/base"), (run, "o/n", False, None)]
    assert "pushed to URL" in capsys.readouterr().out


def test_export_takes_a_model_folder_or_the_best_checkpoint_of_a_run(run, monkeypatch, tmp_path):
    exported = []
    (tmp_path / "convert_hf_to_gguf.py").touch()
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    shutil.copytree(TINY_MODEL, run.checkpoints / "epoch-1", dirs_exist_ok=True)
    monkeypatch.setattr("forgebook.export.gguf.export_gguf", lambda *words, on_stage: exported.append(words))
    assert main(["export", "a", "a.gguf"]) == main(["export", str(TINY_MODEL), "b.gguf", "type=f16"]) == 0
    assert [(str(folder), str(out), kind) for folder, out, kind in exported] == [
        (str(run.checkpoints / "epoch-1"), "a.gguf", "q8_0"),
        (str(TINY_MODEL), "b.gguf", "f16"),
    ]
