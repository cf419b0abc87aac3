"""The report: counts, personal data masked, a page that loads nothing and shows text as text."""

import json
import re

from conftest import REPOSITORY, chat
from forgebook.config.parse import load_config
from forgebook.curation.curate import Judged, curate
from forgebook.curation.report import as_json, as_page, table_rows


def curation_of(tmp_path, rows, judges=None):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    quickstart = REPOSITORY / "training_configs/tiny/quickstart.yaml"
    config = load_config(quickstart, [f"train_path={path}", "valid_path=null", "curation.examples_per_reason=2"])
    return curate(config, tmp_path / "out.jsonl", judges)


ROWS = [
    chat("Is <script>alert(1)</script> safe?", "Yes."),
    *[chat("Is <script>alert(1)</script> safe?", "Yes.")] * 3,
    chat("My address is ada@example.org, is it?", "Yes."),
    {"messages": "no"},
]


def test_counts_of_rows_and_reasons(tmp_path):
    curation = curation_of(tmp_path, ROWS)
    report = as_json(curation)
    assert (report["rows"], report["written"], report["dropped"]) == (6, 2, 4)
    assert {name: (one["count"], one["dropped"]) for name, one in report["reasons"].items()} == {
        "unusable": (1, True),
        "exact_duplicate": (3, True),
        "personal_data": (1, False),
    }
    [first, second] = report["reasons"]["exact_duplicate"]["examples"]
    assert (first["where"], first["of"], second["where"]) == ("rows.jsonl:2", "rows.jsonl:1", "rows.jsonl:3")
    assert [row[:4] for row in table_rows(curation)] == [
        ["unusable", "1", "16.7%", "dropped"],
        ["exact_duplicate", "3", "50.0%", "dropped"],
        ["personal_data", "1", "16.7%", "reported"],
    ]


def test_the_page_is_self_contained_and_shows_text_as_text(tmp_path):
    page = as_page(curation_of(tmp_path, ROWS))
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert not re.search(r"(src|href)\s*=(?!['\"]#)", page) and "url(" not in page
    assert page.count("<article>") == 3 and "rows.jsonl:2 repeats rows.jsonl:1" in page


def test_personal_data_is_in_no_report(tmp_path):
    curation = curation_of(tmp_path, ROWS)
    for report in (json.dumps(as_json(curation)), as_page(curation)):
        assert "ada@example.org" not in report and "ada[email address]" in report


def test_a_thought_with_personal_data_is_shown_and_masked(tmp_path):
    row = chat("Who?", "Her.")
    row["messages"][-1]["reasoning_content"] = "It is ada@example.org."
    report = json.dumps(as_json(curation_of(tmp_path, [row])))
    assert r"It is ada[email address].\nHer." in report and "ada@example.org" not in report


def test_what_a_judge_reports_is_shown(tmp_path):
    def judge(left):
        return Judged([], {"median": 0.25, "shown": [4], "lists": {"lowest loss": [(4, "0.1 nats")]}})

    curation = curation_of(tmp_path, ROWS, {"label_noise": judge})
    assert as_json(curation)["label_noise"] == {
        "median": 0.25,
        "lowest loss": [{"where": "rows.jsonl:5", "detail": "0.1 nats"}],
    }
    page = as_page(curation)
    assert "<h2>label noise</h2>" in page and "rows.jsonl:5: 0.1 nats" in page
