"""`profile: true`: a trace of steps 5 to 8, and a table that covers their time."""

import gzip
import json

import pytest

from forgebook.launch.fine_tune import fine_tune
from forgebook.reporting.run_text import profile_rows
from forgebook.training.profiler import FIRST, LAST


def summary_of(run) -> dict:
    return json.loads(run.summary.read_text())


def test_a_run_with_a_profile(make_config, capsys):
    """Twelve steps, the longest of them among the profiled ones: measuring its memory must not end the profile."""
    run = fine_tune(make_config(profile=True, train_batch_size_per_device=2))
    profile = summary_of(run)["profile"]
    assert profile["steps"] == LAST - FIRST + 1 == 4 and profile["operators_on"] == "cpu"
    phases = profile["phases"]
    assert {"batch", "forward", "backward", "optimizer", "other"} <= set(phases)
    assert sum(phases.values()) == pytest.approx(profile["seconds"], rel=0.01)
    assert phases["forward"] > phases["batch"] and phases["backward"] > phases["batch"]
    assert any(name.startswith("aten::") for name in profile["operators"])
    assert sum(facts["seconds"] for facts in profile["operators"].values()) < 1.1 * profile["seconds"]
    with gzip.open(run.folder / profile["trace"]) as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    # One event each of the four steps, whose batch is one micro batch.
    assert names.count("step: forward") == names.count("step: optimizer") == 4
    output = capsys.readouterr().out
    assert "Where the time of 4 steps goes" in output and "trace.json.gz" in output


def test_a_run_that_ends_before_the_first_profiled_step(make_config):
    run = fine_tune(make_config(profile=True))
    assert summary_of(run)["profile"] is None and not (run.folder / "profile").exists()


def test_the_table_counts_per_step():
    profile = {
        "steps": 4, "seconds": 2.0, "phases": {"forward": 1.0, "other": 1.0}, "operators_on": "gpu",
        "operators": {"aten::mm": {"seconds": 0.5, "calls": 400}},
    }  # fmt: skip
    assert profile_rows(profile) == [
        ("forward", "250.0 ms", "50%"),
        ("other", "250.0 ms", "50%"),
        ("largest operators, on the GPU", "", ""),
        ("  aten::mm (100 calls)", "125.0 ms", "25%"),
    ]
