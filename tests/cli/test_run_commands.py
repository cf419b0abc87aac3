"""evaluate, generate, chat, merge, serve: what they hand to the engine, and what they refuse."""

import io
import json
import sys

import pytest

from forgebook.cli.main import main


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORGEBOOK_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "tiny"], "generate needs prompts: data=FILE or -p TEXT, one of the two"),
        (["generate", "tiny", "-p", "a", "data=x.jsonl"], "one of the two"),
        (["generate", "tiny", "more", "-p", "a"], "generate takes one RUN: 'more' is one argument too many"),
        (["generate", "tiny", "-p", "a", "top_p=2"], "top_p must be above 0 and at most 1"),
        (["chat", "tiny", "more"], "chat takes one RUN"),
        (["evaluate", "a", "b"], "evaluate takes one RUN"),
        (["merge", "a"], "merge needs OUT"),
        (["serve", "a", "port=-1"], "serve: port must be a whole number"),
    ],
)
def test_mistakes_are_one_sentence(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_only_answers_go_to_a_pipe(capsys, monkeypatch):
    monkeypatch.setattr("forgebook.reporting.console.SHORT_WAIT_SECONDS", 0)
    assert main(["generate", "tiny", "-p", "say flim", "max_new_tokens=4"]) == 0
    printed = capsys.readouterr().out
    assert "prompts" not in printed and "loading" not in printed


@pytest.mark.parametrize("command", [["generate", "tiny", "-p", "say flim", "max_new_tokens=4"], ["chat", "tiny"]])
def test_a_terminal_sees_what_is_loaded(command, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("loading tiny\n")


def test_one_prompt_prints_its_answer_and_several_a_table(capsys, tmp_path):
    assert main(["generate", "tiny", "-p", "say flim", "max_new_tokens=4"]) == 0
    alone = capsys.readouterr().out.strip()
    assert main(["generate", "tiny", "-p", "say flim", "-p", "two", "max_new_tokens=4"]) == 0
    table = capsys.readouterr().out
    assert "prompt" in table and "answer" in table and alone.split()[0] in table
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "say flim"}]}) + "\n")
    assert main(["generate", "tiny", "data=p.jsonl", "out=a.jsonl", "max_new_tokens=4"]) == 0
    assert capsys.readouterr().out.endswith("1 of 1 prompts answered, 0 already in the file: a.jsonl\n")
    assert alone in json.dumps(json.loads((tmp_path / "a.jsonl").read_text()), ensure_ascii=False)


def test_serve_hands_on_its_options_and_the_key_of_the_environment(monkeypatch, capsys):
    served = []
    monkeypatch.setattr("forgebook.inference.server.serve", lambda names, **options: served.append((names, options)))
    monkeypatch.setenv("FORGEBOOK_API_KEY", "secret")
    assert main(["serve", "a", "b", "port=0", "dtype=float32"]) == main(["serve", "a", "key=other"]) == 0
    assert capsys.readouterr().out == "loading a, b\nloading a\n"
    assert served == [
        (
            ["a", "b"],
            {"key": "secret", "ui": False, "port": 0, "host": "127.0.0.1", "engine": "auto", "dtype": "float32"},
        ),
        (["a"], {"key": "other", "ui": False, "port": 8000, "host": "127.0.0.1", "engine": "auto"}),
    ]


@pytest.fixture
def served(monkeypatch):
    """The keys that `serve` hands on, without a server."""
    keys = []
    monkeypatch.setattr("forgebook.inference.server.serve", lambda names, key, **options: keys.append(key))
    monkeypatch.delenv("FORGEBOOK_API_KEY", raising=False)
    return keys


def test_the_key_of_the_endpoint_comes_from_a_file_or_the_environment(served, monkeypatch, tmp_path):
    (tmp_path / "key").write_text("s3cret\n")
    (tmp_path / "key").chmod(0o600)
    assert main(["serve", "a", "key_file=key"]) == 0
    monkeypatch.setenv("FORGEBOOK_API_KEY", "other")
    assert main(["serve", "a"]) == main(["serve", "a", "key_file=key"]) == 0
    assert served == ["s3cret", "other", "s3cret"]


@pytest.mark.parametrize(
    ("content", "mode", "words", "message"),
    [
        ("s3cret", 0o644, [], "key_file key has mode 644, so that others can use it: chmod 600 key"),
        ("s3cret", 0o660, [], "has mode 660"),
        ("s3cret", 0o604, [], "has mode 604"),
        (" \n", 0o600, [], "key_file key must hold the key alone"),
        ("a" * 5000, 0o600, [], "must hold the key alone"),
        ("a\nb", 0o600, [], "must consist of printable ASCII characters"),
        (None, 0o600, [], "key_file key cannot be read: No such file"),
        ("s3cret", 0o600, ["key=other"], "key and key_file are both there"),
    ],
)
def test_a_file_of_a_key_is_of_mode_600_and_holds_one(served, capsys, tmp_path, content, mode, words, message):
    if content is not None:
        (tmp_path / "key").write_text(content)
        (tmp_path / "key").chmod(mode)
    assert main(["serve", "a", "key_file=key", *words]) == 2 and served == []
    error = capsys.readouterr().err
    assert message in error and "s3cret" not in error


def test_a_key_among_the_arguments_is_gone_before_anything_is_loaded(monkeypatch, capsys):
    """The process starts again, with the key in its environment and these arguments without it."""

    class StartedError(BaseException):
        pass

    def start(program, arguments, environment):
        assert environment["FORGEBOOK_API_KEY"] == "s3cret"
        raise StartedError(arguments)

    monkeypatch.setattr("os.execve", start)
    monkeypatch.setattr("sys.orig_argv", ["python", "main.py", "serve", "a", "key=s3cret", "port=0"])
    with pytest.raises(StartedError) as started:
        main(["serve", "a", "key=s3cret", "port=0"])
    assert started.value.args[0] == ["python", "main.py", "serve", "a", "port=0"]
    error = capsys.readouterr().err
    assert "set FORGEBOOK_API_KEY, or key_file=" in error and "s3cret" not in error


def test_merge_hands_on_the_run_the_folder_and_the_checkpoint(monkeypatch):
    merged = []

    def merge_run(*words, on_stage):
        merged.append(words)
        raise KeyboardInterrupt

    monkeypatch.setattr("forgebook.export.merge.merge_run", merge_run)
    assert main(["merge", "a", "out", "checkpoint=epoch-2"]) == 130
    assert merged == [("a", "out", "epoch-2")]
