"""What past runs on this machine achieved: kept, read again, the most alike chosen."""

import dataclasses

import pytest

from conftest import LORA, config_for
from forgebook.planning import history
from forgebook.planning.history import Pace, keep_pace, past_paces, usual_pace

ONE = Pace("A10G", "tiny", 100, "full", "bfloat16", 1, True, 1e12, "2026-01-02")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGEBOOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def many(*changes, **more):
    return [dataclasses.replace(ONE, **one, **more) for one in changes]


def test_paces_are_kept_and_read_again(cache):
    assert past_paces() == ([], "")
    assert keep_pace(ONE) == keep_pace(dataclasses.replace(ONE, workers=2)) == ""
    assert past_paces() == ([ONE, dataclasses.replace(ONE, workers=2)], "")


def test_lines_that_cannot_be_read_are_left_out_with_a_note(cache):
    keep_pace(ONE)
    with open(history.paces_file(), "ab") as file:
        file.write(b'{"device": "A10G"}\n\xff\xfe\nnull\n[1]\n')
    keep_pace(dataclasses.replace(ONE, flops_per_second=-1.0))
    found, note = past_paces()
    assert found == [ONE] and "paces.jsonl: 5 lines cannot be read" in note


def test_a_file_that_cannot_be_written_costs_no_run(cache):
    cache.write_text("not a folder")
    assert "plans will not know this run's pace" in keep_pace(ONE)


@pytest.mark.parametrize(
    ("past", "flops", "runs"),
    [
        (many({"flops_per_second": 1e12}, {"flops_per_second": 3e12}, {"flops_per_second": 8e12}), 3e12, 3),
        (many({"device": "T4"}, {"method": "lora"}, {"dtype": "float32"}, {"parameters": 1000}), None, 0),
        (many({"model_id": "other", "flops_per_second": 5e12}), 5e12, 1),
        (many({"model_id": "other", "flops_per_second": 5e12}, {}), 1e12, 1),
        (many({"workers": 8, "flops_per_second": 5e12}, {}), 1e12, 1),
        (many({"recomputes": False, "flops_per_second": 5e12}, {}), 1e12, 1),
        (many(*[{"flops_per_second": 9e12}] * 5, *[{}] * 10), 1e12, 10),
    ],
    ids=["median", "unlike", "like", "model", "workers", "recomputing", "latest"],
)
def test_the_runs_most_alike_tell_the_pace(past, flops, runs):
    usual = usual_pace(past, "A10G", config_for("tiny"), 200)
    assert usual == (None if flops is None else history.UsualPace(flops, runs))


def test_quantised_weights_are_a_method_of_their_own():
    methods = [history.method_of(config_for("tiny", lora_config=LORA, quantization=kind)) for kind in (None, "nf4")]
    assert [history.method_of(config_for("tiny")), *methods] == ["full", "lora", "lora nf4"]
