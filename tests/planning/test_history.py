"""What past runs on this machine achieved: kept, read again, the most alike chosen."""

import dataclasses

import pytest

from forgebook.planning import history
from forgebook.planning.history import (
    RunKind,
    Throughput,
    method_name,
    read_throughputs,
    record_throughput,
    typical_throughput,
)

ONE = Throughput("A10G", "tiny", 100, "full", "bfloat16", 1, True, 1e12, "2026-01-02")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGEBOOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def many(*changes, **more):
    return [dataclasses.replace(ONE, **one, **more) for one in changes]


def test_throughputs_are_saved_and_read_again(cache):
    assert read_throughputs() == ([], "")
    assert record_throughput(ONE) == record_throughput(dataclasses.replace(ONE, workers=2)) == ""
    assert read_throughputs() == ([ONE, dataclasses.replace(ONE, workers=2)], "")


def test_lines_that_cannot_be_read_are_left_out_with_a_note(cache):
    record_throughput(ONE)
    with open(history.history_file(), "ab") as file:
        file.write(b'{"device": "A10G"}\n\xff\xfe\nnull\n[1]\n')
    record_throughput(dataclasses.replace(ONE, flops_per_second=-1.0))
    throughputs, note = read_throughputs()
    assert throughputs == [ONE] and "throughputs.jsonl: 5 unreadable lines skipped" in note


def test_a_file_that_cannot_be_written_costs_no_run(cache):
    cache.write_text("not a folder")
    assert "plans will not know the throughput of this run" in record_throughput(ONE)


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
def test_the_most_similar_runs_give_the_throughput(past, flops, runs):
    typical = typical_throughput(past, "A10G", RunKind("tiny", 200, "full", "bfloat16", 1, True))
    assert typical == (None if flops is None else history.TypicalThroughput(flops, runs))


def test_quantized_weights_are_a_method_of_their_own():
    assert [method_name(False, None), method_name(True, None), method_name(True, "nf4")] == ["full", "lora", "lora nf4"]
