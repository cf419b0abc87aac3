"""evaluate, generate, chat, merge, serve: what they hand to the engine, and what they refuse."""

import json

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
        (["generate", "tiny", "more", "-p", "a"], "generate takes one RUN: 'more' is one word too many"),
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


def test_one_prompt_prints_its_answer_and_several_a_table(capsys, tmp_path):
    assert main(["generate", "tiny", "-p", "say flim", "max_new_tokens=4"]) == 0
    alone = capsys.readouterr().out.strip()
    assert main(["generate", "tiny", "-p", "say flim", "-p", "two", "max_new_tokens=4"]) == 0
    table = capsys.readouterr().out
    assert "prompt" in table and "answer" in table and alone.split()[0] in table
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "say flim"}]}) + "\n")
    assert main(["generate", "tiny", "data=p.jsonl", "out=a.jsonl", "max_new_tokens=4"]) == 0
    assert capsys.readouterr().out == "1 of 1 prompts answered, 0 were there: a.jsonl\n"
    assert alone in json.dumps(json.loads((tmp_path / "a.jsonl").read_text()), ensure_ascii=False)


def test_serve_hands_on_its_options_and_the_key_of_the_environment(monkeypatch):
    served = []
    monkeypatch.setattr("forgebook.inference.server.serve", lambda names, **options: served.append((names, options)))
    monkeypatch.setenv("FORGEBOOK_API_KEY", "secret")
    assert main(["serve", "a", "b", "port=0", "dtype=float32"]) == main(["serve", "a", "key=other"]) == 0
    assert served == [
        (["a", "b"], {"key": "secret", "port": 0, "host": "127.0.0.1", "engine": "auto", "dtype": "float32"}),
        (["a"], {"key": "other", "port": 8000, "host": "127.0.0.1", "engine": "auto"}),
    ]


def test_merge_hands_on_the_run_the_folder_and_the_checkpoint(monkeypatch):
    merged = []

    def merge_run(*words):
        merged.append(words)
        raise KeyboardInterrupt

    monkeypatch.setattr("forgebook.export.merge.merge_run", merge_run)
    assert main(["merge", "a", "out", "checkpoint=epoch-2"]) == 130
    assert merged == [("a", "out", "epoch-2")]
