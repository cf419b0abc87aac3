"""A filtered data set from one with planted faults, and what may not be written."""

import collections
import json
from pathlib import Path

import pytest

from conftest import REPOSITORY, chat
from forgebook.config.parse import load_config
from forgebook.curation.checks import Finding
from forgebook.curation.curate import Judged, curate, dropped_path
from forgebook.errors import ConfigError, DataError
from support_planted import SUMMARIES, plant, score


@pytest.fixture
def config_for(tmp_path):
    def make(train, *overrides):
        quickstart = REPOSITORY / "training_configs/tiny/quickstart.yaml"
        return load_config(quickstart, [f"train_path={train}", *overrides])

    return make


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The curation of the planted set, and where its faults are."""
    folder = tmp_path_factory.mktemp("planted")
    rows, faults = plant()
    train = write(folder / "train.jsonl", rows)
    before = train.read_bytes()
    quickstart = REPOSITORY / "training_configs/tiny/quickstart.yaml"
    overrides = [f"train_path={train}", f"valid_path={SUMMARIES / 'test.jsonl'}", "curation.max_characters=2000"]
    curation = curate(load_config(quickstart, overrides), folder / "clean.jsonl")
    assert train.read_bytes() == before
    return rows, faults, curation


@pytest.mark.parametrize(
    "fault",
    "exact_duplicate near_duplicate validation_overlap empty_answer truncated too_long refusal personal_data "
    "mixed_languages".split(),
)
def test_planted_faults_are_found(planted, fault):
    _, faults, curation = planted
    found = {finding.number for finding in curation.by_reason().get(fault, [])}
    precision, recall = score(found, faults[fault])
    assert precision == 1 and recall >= 0.9


def test_the_file_holds_the_rows_that_stay_in_their_order(planted):
    rows, faults, curation = planted
    written = [json.loads(line)["messages"] for line in curation.out.read_text().splitlines()]
    assert written == [row["messages"] for k, row in enumerate(rows) if k not in curation.dropped]
    assert not faults["personal_data"] & curation.dropped  # only reported
    dropped = [json.loads(line) for line in dropped_path(curation.out).read_text().splitlines()]
    assert [one["where"] for one in dropped] == [f"train.jsonl:{k + 1}" for k in sorted(curation.dropped)]
    assert all(one["reasons"] and one["row"]["messages"] for one in dropped)


def test_the_whole_example_stays_and_its_truncated_copy_goes(config_for, tmp_path):
    words = "the lamp that we sent on Monday is on the way to you and it will be there soon, in a big box"
    rows = [chat("Where is the lamp?", f"{words}, with"), chat("Where is the lamp?", f"{words}.")]
    curation = curate(config_for(write(tmp_path / "a.jsonl", rows), "valid_path=null"), tmp_path / "out.jsonl")
    assert curation.dropped == {0} and [one.reason for one in curation.findings] == ["truncated"]


def test_judges_see_what_is_left_one_after_the_other(config_for, tmp_path):
    train = write(tmp_path / "a.jsonl", [chat(f"Question of {name}?", "Yes.") for name in ("Ada", "Bo", "Ada", "Cy")])
    seen = []

    def judge(left):
        seen.append(sorted(left))
        return Judged([Finding(min(left), "low_score", "1 of 5")], {"judged": len(left)})

    curation = curate(config_for(train, "valid_path=null"), tmp_path / "out.jsonl", {"one": judge, "two": judge})
    assert seen == [[0, 1, 3], [1, 3]] and curation.dropped == {0, 1, 2}
    assert curation.judges == {"one": {"judged": 3}, "two": {"judged": 2}}


def test_what_is_not_in_drop_is_only_reported(config_for, tmp_path):
    train = write(tmp_path / "a.jsonl", [chat("Is it?", "Yes."), chat("Is it?", "Yes.")])
    curation = curate(config_for(train, "curation.drop=[refusal]", "valid_path=null"), tmp_path / "out.jsonl")
    again = curate(config_for(train, "curation.drop=[refusal]", "valid_path=null"), tmp_path / "out.jsonl")
    assert again.written == curation.written == 2  # its own file may be written again
    assert collections.Counter(f.reason for f in curation.findings) == {"exact_duplicate": 1}


def test_malformed_rows_are_left_out_and_counted(config_for, tmp_path):
    train = write(tmp_path / "a.jsonl", [chat("Is it?", "Yes."), {"messages": []}, {"foo": 1}])
    curation = curate(config_for(train, "valid_path=null"), tmp_path / "out.jsonl")
    assert curation.written == 1 and [text.split(": ")[0] for text in curation.notes.problems] == [
        "a.jsonl:2",
        "a.jsonl:3",
    ]


def test_what_may_not_be_written_is_refused(config_for, tmp_path):
    train = write(tmp_path / "a.jsonl", [chat("Is it?", "Yes.")])
    config = config_for(train, "valid_path=null")
    (tmp_path / "mine.jsonl").write_text("precious")
    for out, message in [
        (train, "is a file that is read"),
        (tmp_path / "mine.jsonl", "was not written by this command"),
        (tmp_path / "out.csv", "must end with .jsonl"),
    ]:
        with pytest.raises(ConfigError, match=message):
            curate(config, out)
    assert (tmp_path / "mine.jsonl").read_text() == "precious"


def test_nothing_is_written_where_nothing_is_left(config_for, tmp_path):
    train = write(tmp_path / "a.jsonl", [chat("Is it?", " ")])
    with pytest.raises(DataError, match="all 1 examples would be dropped"):
        curate(config_for(train, "valid_path=null"), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_rows_of_no_known_format_are_an_error_with_the_mapping_to_write(config_for, tmp_path):
    train = write(tmp_path / "a.jsonl", [{"ask": "Is it?", "tell": "Yes."}])
    with pytest.raises(DataError, match=r"columns:\n *user: ask\n *assistant: tell"):
        curate(config_for(train, "valid_path=null"), tmp_path / "out.jsonl")
