"""curate as a user calls it."""

import json

from conftest import REPOSITORY, chat
from forgebook.cli.main import main

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
