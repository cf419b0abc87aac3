"""The plan of a run that starts: printed, kept beside what was measured, refused where it cannot be."""

import json
import shutil
from pathlib import Path

import pytest

from conftest import TINY_MODEL, losses_of
from forgebook.errors import ConfigError, ModelError, ResourceError
from forgebook.launch.fine_tune import fine_tune
from forgebook.models.shapes import find_shape
from forgebook.planning.history import read_throughputs
from forgebook.planning.preflight import plan_run
from forgebook.planning.prepare import prepare
from forgebook.reporting.console import PAGE_WIDTH
from forgebook.runs.atomic import read_json
from forgebook.runs.metrics import read_metrics
from forgebook.runs.run import open_run


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """No past runs."""
    monkeypatch.setenv("FORGEBOOK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model_of(tmp_path):
    """Write a model folder without weights: a shape and the tiny model's tokenizer."""

    def write(**shape) -> str:
        folder = tmp_path / "shape"
        folder.mkdir()
        for file in [*TINY_MODEL.glob("*token*.json"), TINY_MODEL / "chat_template.jinja"]:
            shutil.copy(file, folder)
        facts = json.loads((TINY_MODEL / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**facts, **shape}))
        return str(folder)

    return write


def test_a_run_that_stops_early_is_planned_for_the_examples_that_it_reaches(make_config):
    config = make_config(max_steps=2, train_batch_size_per_device=4)  # of 6 steps
    run = fine_tune(config)
    planned, measured = (read_json(run.summary)[name] for name in ("planned", "measured"))
    assert planned["tokens"] == measured["tokens"]


HUGE = {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 1000}


def test_planned_and_measured_figures_are_side_by_side(cache, make_config, capsys):
    config = make_config(num_epochs=2, train_batch_size_per_device=5, gradient_accumulation_steps=2)
    run = fine_tune(config)
    printed, summary = capsys.readouterr().out, read_json(run.summary)
    largest = read_json(run.plan)["memory"]["largest"]
    assert "  plan   " in printed and f"per worker, most of it {largest}; " in printed
    assert "time unknown: no similar earlier run on this machine" in printed
    lines = [
        line for line in printed.splitlines() if line.startswith(("  plan", "  memory", "         time", "  time"))
    ]
    assert len(lines) >= 3 and max(map(len, lines)) <= PAGE_WIDTH
    assert "memory per worker: planned " in printed and "tokens/s (excl" in printed
    planned, measured = summary["planned"], summary["measured"]
    assert planned.keys() == measured.keys() == summary["conventions"].keys() - {"ratio"} | {"steps", "tokens"}
    assert planned["steps"] == measured["steps"] == len(losses_of(run))
    assert planned["tokens"] == measured["tokens"]  # exact: from the run's own rows
    assert planned["step_seconds"] is None and measured["mfu"] is None and measured["cost_usd"] is None  # on a CPU
    assert planned["process_bytes_per_worker"] > 6e8 and measured["process_bytes_per_worker"] > 3e8
    # The same is planned and measured: the tensors, not the process with its libraries.
    assert summary["ratio"]["memory_bytes_per_worker"] == pytest.approx(1, abs=0.3)
    assert max(summary["peak_memory_bytes_per_worker"]) > 2 * measured["memory_bytes_per_worker"]
    assert measured["disk_bytes"] > 0
    assert summary["ratio"]["steps"] == summary["ratio"]["tokens"] == 1
    rows = [row for row in read_metrics(run.metrics) if "train_loss_batch" in row]
    real, supervised, padded = (f"{kind}_tokens_throughput" for kind in ("trained", "supervised", "padded"))
    assert all(0 < row[supervised] < row[real] <= row[padded] for row in rows)
    assert 0 < summary[supervised] < summary[real] <= summary[padded]
    assert read_json(run.plan)["steps"] == planned["steps"]

    # The next plan knows the pace.
    (pace,), _ = read_throughputs()
    assert pace.flops_per_second == pytest.approx(summary[padded] * planned["flops_per_token"])
    expected, _ = plan_run(prepare(config, open_run(config)))
    assert expected.assumption.endswith("based on 1 earlier run on this machine") and expected.cost is None
    assert expected.seconds == pytest.approx(expected.positions / summary[padded], rel=1e-3)


def test_a_plan_that_cannot_fit_is_refused_before_weights_are_needed(make_config, model_of, capsys):
    config = make_config(model_id=model_of(**HUGE), context_length=256)
    with pytest.raises(
        ResourceError, match=r"(?s)does not fit this machine \(.*most of it .*\nforce=true starts the run anyway"
    ) as refused:
        fine_tune(config)
    assert refused.value.exit_code == 2
    assert [path.name for path in Path(config.storage_path).iterdir()] == [".tokens"]
    with pytest.raises(ModelError):  # it went on, to the weights that are not there
        fine_tune(make_config(model_id=config.model_id, context_length=256, force=True))
    assert "does not fit this machine" in capsys.readouterr().out


def test_a_change_that_makes_it_fit_is_named(make_config, monkeypatch):
    monkeypatch.setattr("forgebook.planning.hardware.host_memory", lambda: (800_000_000, 50_000_000))
    with pytest.raises(ResourceError, match=r"the cheapest change: .*train_batch_size_per_device="):
        fine_tune(
            make_config(num_warmup_steps=0, train_batch_size_per_device=24, context_length=160, padding="max_length")
        )


@pytest.mark.parametrize(
    ("free", "message"), [(10**6, "one checkpoint may take"), (2 * 10**7, "its checkpoints and training state")]
)
def test_a_small_disk_is_reported(make_config, monkeypatch, free, message):
    from forgebook.planning import preflight as room

    usage = shutil._ntuple_diskusage(total=10**9, used=10**9 - free, free=free)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: usage)
    config = make_config()
    run = open_run(config)
    planned, _ = plan_run(prepare(config, run))
    if free > planned.checkpoint_bytes:
        assert any(message in one for one in room.check_plan(planned, run.folder, force=False))
        return
    with pytest.raises(ResourceError, match=message):
        room.check_plan(planned, run.folder, force=False)
    assert message in room.check_plan(planned, run.folder, force=True)[0]


def test_memory_that_is_taken_now_is_a_warning(make_config, monkeypatch):
    from forgebook.planning import preflight as room

    monkeypatch.setattr("forgebook.planning.hardware.host_memory", lambda: (10**12, 10**6))
    config = make_config()
    planned, _ = plan_run(prepare(config, open_run(config)))
    (warning,) = room.check_plan(planned, open_run(config).folder, force=False)
    assert planned.fits and "0.0 GB are free now" in warning


def test_an_architecture_that_is_not_known_has_no_plan(make_config, monkeypatch):
    def find_none(model_id):
        raise ModelError("no shape of newcomer is known")

    config = make_config()
    monkeypatch.setattr("forgebook.planning.preflight.find_shape", find_none)
    planned, note = plan_run(prepare(config, open_run(config)))
    assert planned is None and note.startswith("no plan: ") and "newcomer" in note


def test_an_architecture_without_a_rule_is_counted(make_config, model_of):
    config = make_config(model_id=model_of(model_type="olmo"))
    planned, _ = plan_run(prepare(config, open_run(config)))
    tiny = find_shape("tiny")
    assert planned.parameters == tiny.parameters - (2 * tiny.layers + 1) * tiny.hidden  # OLMo's norms have no weights


@pytest.mark.parametrize("lora", [None, {"r": 4, "target_modules": "all-linear"}])
def test_a_run_of_one_step_that_would_save_its_base_is_refused(lora, make_config):
    config = make_config(max_steps=1, lora_config=lora)
    with pytest.raises(ConfigError, match="the run has a single optimizer step: nothing would be trained"):
        fine_tune(config)
    assert not open_run(config).folder.exists()


def test_settings_without_effect_are_printed_before_training(make_config, capsys):
    lora = {"r": 4, "target_modules": ["q_proj", "query"]}
    fine_tune(make_config(num_warmup_steps=50, max_steps=2, min_update_steps=7, lora_config=lora))
    before, _, _ = " ".join(capsys.readouterr().out.split()).partition("step 1")
    for words in ("num_warmup_steps is 50", "is named query", "min_update_steps has no effect"):
        assert words in before
