"""A second start in a run's folder, with an edited config, with other data; in this process."""

import json
from pathlib import Path

import pytest

from conftest import chat, fine_tune_until, losses_of, uneven_rows
from forgebook.errors import DataError, StoppedError, StorageError
from forgebook.launch.fine_tune import fine_tune
from forgebook.runs import atomic
from forgebook.runs.run import open_run
from forgebook.runs.run_files import is_run_file
from forgebook.training import distributed


def test_a_finished_run_goes_on_for_another_epoch(make_config, capsys):
    """The epochs before stay as they are, and the schedule is the new one: as if it had been set from the start."""
    once = fine_tune(make_config())
    before = losses_of(once)
    run = fine_tune(make_config(num_epochs=2, learning_rate=5e-4))
    printed = capsys.readouterr().out
    assert "learning_rate: 0.001 -> 0.0005; num_epochs: 1 -> 2" in printed and "ends at step 6 instead of 3" in printed
    assert losses_of(run)[:3] == before and len(losses_of(run)) == 6
    assert atomic.read_json(run.summary)["steps"] == 6 and "num_epochs: 2" in run.config.read_text()
    [edit] = map(json.loads, run.changes.read_text().splitlines())
    assert edit["step"] == 3 and "num_epochs: 1 -> 2" in edit["changes"][0]
    assert not fine_tune(make_config(num_epochs=2, learning_rate=5e-4)).changes.read_text().count("\n") > 1


def test_smaller_batches_of_the_same_step_give_the_same_losses(make_config):
    settings = {"num_epochs": 2, "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 2}}
    whole = losses_of(fine_tune(make_config(run_name="whole", **settings)))
    with pytest.raises(KeyboardInterrupt):
        fine_tune_until(make_config(run_name="edited", **settings), 3)
    edited = make_config(run_name="edited", **settings, train_batch_size_per_device=4, gradient_accumulation_steps=2)
    assert losses_of(fine_tune(edited)) == pytest.approx(whole, rel=1e-5)


def test_a_run_ends_at_the_step_that_it_has_reached_if_there_is_a_checkpoint_of_it(make_config, monkeypatch):
    """Between two checkpoints the training state alone is saved, by the clock: to end there would leave no model."""
    stops = iter([False, True, False, True])
    monkeypatch.setattr(distributed, "is_stop_requested", lambda folder: next(stops))
    with pytest.raises(StoppedError):
        fine_tune(make_config(num_epochs=2))
    with pytest.raises(StorageError, match="max_steps would end it at step 2, whose model is not saved: set more"):
        fine_tune(make_config(num_epochs=2, max_steps=2))
    by_steps = {"num_epochs": 2, "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 2}}
    with pytest.raises(StoppedError):
        fine_tune(make_config(**by_steps))
    assert atomic.read_json(fine_tune(make_config(**by_steps, max_steps=4)).summary)["steps"] == 4


@pytest.mark.parametrize("key", ["train_path", "valid_path"])
def test_bad_rows_at_a_later_start_leave_the_run_as_it_is(make_config, key):
    run, config = fine_tune(make_config(max_steps=1, num_warmup_steps=0)), make_config(max_steps=1, num_warmup_steps=0)
    path = Path(getattr(config, key))
    rows = path.read_text()
    path.write_text(rows + '{"bad": 1}\n')
    with pytest.raises(DataError, match=r"All of them: .*/rejected_rows\.json"):
        fine_tune(config)
    path.write_text(rows)
    assert fine_tune(config).is_complete and is_run_file(run.rejected_rows.name)


def test_a_run_from_before_the_key_resumes_with_its_weight_decay(make_config):
    settings = {"weight_decay": 0.1, "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 1}}
    with pytest.raises(KeyboardInterrupt):
        fine_tune_until(make_config(**settings, decay_norms_and_biases=True), 3)
    path = open_run(make_config()).config
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("decay_norms_and_biases")))
    with pytest.raises(StorageError, match=r"decay_norms_and_biases: .* made with the other value \(it was true\)"):
        fine_tune(make_config(**settings))
    run = fine_tune(make_config(**settings, decay_norms_and_biases=True))
    assert len(losses_of(run)) == 3 and run.saved_step == 3 and not run.changes.exists()


def test_an_object_that_changed_before_a_resume_is_named(make_config, s3, write_rows):
    s3.upload_file(write_rows(uneven_rows(24)), "forgebook", "resume/rows.jsonl")
    settings = {"train_path": "s3://forgebook/resume/rows.jsonl", "valid_path": None, "max_steps": 2}
    run = fine_tune(make_config(**settings))
    [source] = atomic.read_json(run.data_report)["train"]["sources"]
    assert source["version"] and source["bytes"]
    s3.upload_file(write_rows([chat("q", "a")] * 24), "forgebook", "resume/rows.jsonl")
    with pytest.raises(StorageError, match=r"s3://forgebook/resume/rows\.jsonl \(it was .*, it is .*\) is not what"):
        fine_tune(make_config(**settings))
    again = fine_tune(make_config(**settings, on_existing="overwrite"))
    assert atomic.read_json(again.data_report)["train"]["duplicate_rows"] == 23
