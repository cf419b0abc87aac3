"""metrics.jsonl and progress.jsonl: written by rank 0, read while they grow, cut back when a run resumes."""

import json
import threading

import pytest

from forgebook.runs.metrics import Progress, read_curve, read_metrics, read_new_lines, watch_lines
from forgebook.runs.run import Run


def test_a_continued_run_drops_what_it_will_write_again(tmp_path):
    run = Run(tmp_path)
    first = Progress(run)
    for step in (1, 2, 3):
        first.step(step=step)
    with open(run.metrics, "a") as file:
        file.write('{"step": 4, "tra')  # killed while writing
    Progress(run, resume_step=2).step(step=3, again=True)
    assert read_metrics(run.metrics) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_stages_go_to_the_console_alone(tmp_path):
    run = Run(tmp_path)
    progress = Progress(run)
    progress.stage("loading", seconds=1)
    progress.evaluation(step=1, eval_loss=0.5)
    assert read_metrics(run.metrics) == [{"step": 1, "eval_loss": 0.5}]
    lines = [json.loads(line) for line in (run.logs / "progress.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["stage", "evaluation"] and lines[0]["seconds"] == 1


def test_other_ranks_write_nothing(tmp_path):
    progress = Progress(Run(tmp_path), silent=True)
    progress.stage("loading")
    progress.step(step=1)
    assert not list(tmp_path.iterdir())


def test_one_metric_of_a_run_is_a_curve(tmp_path):
    run = Run(tmp_path)
    run.config.write_text("")
    run.metrics.write_text('{"step": 1, "a": 0.5}\n{"step": 2, "eval_loss": 3}\n{"step": 3, "a": 0.25}\n')
    assert read_curve(str(tmp_path), "a") == ([1, 3], [0.5, 0.25])


def test_new_lines_are_read_from_an_offset_and_never_halves(tmp_path):
    log, ended = tmp_path / "log", threading.Event()
    log.write_text('{"n": 1}\n{"n": 2}\n{"n"')
    lines = read_new_lines(log, len('{"n": 1}\n'), ended, 0.001)
    assert next(lines) == [{"n": 2}] and next(lines) == []
    log.write_text('{"n": 1}\n{"n": 2}\n{"n": 3}\n')
    assert next(lines) == [{"n": 3}]
    ended.set()
    assert list(lines) == [[]]


def test_lines_written_during_a_block_have_all_been_handled_at_its_end(tmp_path):
    log, handled = tmp_path / "log", []
    with pytest.raises(RuntimeError), watch_lines(log, 0, 60, handled.append):
        log.write_text('{"n": 1}\n{"n": 2}\n')
        raise RuntimeError
    assert handled == [{"n": 1}, {"n": 2}]
