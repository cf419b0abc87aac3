"""curate and synthesize as a user calls them."""

import json

from conftest import REPOSITORY, chat
from forgebook.cli.main import main
from support_endpoint import endpoint

QUICKSTART = str(REPOSITORY / "training_configs/tiny/quickstart.yaml")


def test_curate_writes_the_file_the_reports_and_prints_a_table(write_rows, tmp_path, capsys):
    train, out = (
        write_rows([chat("Is it?", "Yes."), chat("Is it?", "Yes."), chat("And now?", "No.")]),
        tmp_path / "o.jsonl",
    )
    arguments = ["curate", QUICKSTART, f"train_path={train}", "valid_path=null", f"out={out}"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "exact_duplicate" in printed and "2 of 3 examples written" in printed
    assert len(out.read_text().splitlines()) == 2
    assert json.loads((tmp_path / "o.report.json").read_text())["written"] == 2
    assert (tmp_path / "o.report.html").read_text().startswith("<!doctype html>")
    assert main(arguments) == 0  # its own file may be written again


def test_curate_needs_a_file_to_write(capsys):
    assert main(["curate", QUICKSTART]) == 2
    assert "curate needs a file to write: out=FILE.jsonl" in capsys.readouterr().err


def test_where_nothing_is_found_it_says_so(write_rows, tmp_path, capsys):
    train = write_rows([chat("Is it?", "Yes.")])
    assert main(["curate", QUICKSTART, f"train_path={train}", "valid_path=null", f"out={tmp_path}/o.jsonl"]) == 0
    printed = capsys.readouterr().out
    assert f"nothing found in {train}" in printed and "1 of 1 examples written" in printed


def test_the_shorthands_set_the_keys_of_the_blocks(write_rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORGEBOOK_CACHE", str(tmp_path / "cache"))
    train = write_rows([chat("Is it?", "Yes."), chat("And now?", "No.")])
    base = [QUICKSTART, f"train_path={train}", "valid_path=null", f"out={tmp_path}/o.jsonl"]
    with endpoint(lambda body: f"Score: {5 if 'Yes.' in body['messages'][-1]['content'] else 1}") as (url, requests):
        assert main(["curate", *base, "judge=critic", f"base_url={url}"]) == 0
        assert "1 of 2 examples written" in capsys.readouterr().out
        assert {request["model"] for request in requests} == {"critic"}
    with endpoint(lambda body: json.dumps(chat("Is it new?", "It is."))) as (url, requests):
        new = f"out={tmp_path}/n.jsonl"
        assert main(["synthesize", *base[:3], new, "teacher=writer", f"base_url={url}", "count=1"]) == 0
        assert {request["model"] for request in requests} == {"writer"}
    printed = capsys.readouterr().out
    assert "yield" in printed and len((tmp_path / "n.jsonl").read_text().splitlines()) == 1


def test_synthesize_without_a_teacher(capsys, tmp_path):
    assert main(["synthesize", QUICKSTART, f"out={tmp_path}/n.jsonl"]) == 2
    assert "needs a block `synthesis` with a teacher" in capsys.readouterr().err
