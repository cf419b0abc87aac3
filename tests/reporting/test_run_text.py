"""What a run prints before it starts and at its end; summary.json."""

import io
import json

import pytest
from rich.console import Console

from conftest import LORA
from forgebook.planning.prepare import prepare
from forgebook.reporting.console import PAGE_WIDTH
from forgebook.reporting.run_text import print_plan, print_run, print_summary, stopped_text, write_summary
from forgebook.runs.atomic import read_json
from forgebook.runs.run import Run, open_run


@pytest.fixture
def output():
    return Console(file=io.StringIO(), width=400)


def printed(output: Console) -> str:
    return output.file.getvalue()


def prepared_run(config):
    run = open_run(config)
    return run, prepare(config, run)


def test_a_run_prints_what_it_trains_and_how(make_config, output):
    run, prepared = prepared_run(make_config(lora_config=LORA, max_steps=2))
    print_run(output, run, prepared, "yes")
    text = printed(output)
    assert f"LoRA r={LORA['r']}, instruction_tuning, float32" in text and "vLLM can serve the adapter: yes" in text
    assert "steps  1 epoch of 3, at most 2, 8 examples each, learning rate 0.001 cosine" in text
    assert "where  this process, no DeepSpeed" in text and "beyond the" not in text


def test_what_should_make_a_user_look_is_printed(make_config, output):
    config = make_config(context_length=2048, initial_base_model_ckpt_path=None)
    run, prepared = prepared_run(config)
    prepared.report["train"]["answer_tokens_cut"] = 3
    prepared.report["overlap"] = {"rows": 2, "places": ["valid.jsonl:1"]}
    print_run(output, run, prepared, None)
    text = printed(output)
    assert "full fine-tuning" in text and "vLLM" not in text
    assert "3 supervised tokens are cut off (truncation: error)" in text
    assert "2 validation examples are also training examples, so their loss measures nothing (valid.jsonl:1)" in text


def test_warnings_may_hold_brackets(output):
    print_plan(output, None, ["a [list] of things"])
    assert printed(output) == "  a [list] of things\n"


def test_a_summary_is_written_and_printed(make_config, output, monkeypatch):
    run, prepared = prepared_run(make_config(lora_config=LORA))
    run.folder.mkdir(parents=True, exist_ok=True)
    run.metrics.write_text(json.dumps({"step": 1, "train_loss_batch": 2.0, "train_time_per_step": 0.1}) + "\n")
    monkeypatch.setattr("forgebook.planning.preflight.compare_run", lambda *_: {})
    monkeypatch.setattr("forgebook.planning.preflight.record_run", lambda *_: "not saved")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "raysubmit_1"}}')
    result = {
        "best_checkpoint": "checkpoints/epoch-1", "eval_loss": 0.5, "perplexity": 1.649, "steps": 3,
        "trained_tokens": 123_400, "training_seconds": 2.4, "trained_tokens_throughput": 512.6,
        "vllm_serves": "no: why",
    }  # fmt: skip
    assert write_summary(run, prepared.config, None, result, 9.87) == "not saved"
    summary = read_json(run.summary)
    assert summary["total_seconds"] == 9.9 and summary["run_name"] == "run"
    assert summary["job_id"] == "raysubmit_1" and "torch" in summary["versions"] and run.loss_curve.exists()
    print_summary(output, run)
    text = printed(output)
    assert text.startswith("done  evaluation loss 0.5000, perplexity 1.649") and "checkpoints/epoch-1\n" in text
    assert max(map(len, text.splitlines()[:2])) <= PAGE_WIDTH, text
    assert "  vLLM cannot serve the adapter: why; merge it first" in text
    assert "3 steps, 123,400 tokens in 2 s, 513 tokens/s (excluding padding)\n" in text


def test_a_run_that_got_worse_says_so_instead_of_how_its_answers_end(make_config, output, monkeypatch):
    run, prepared = prepared_run(make_config())
    run.folder.mkdir(parents=True, exist_ok=True)
    losses = [2.0] * 5 + [5.0] * 10
    records = [{"step": k, "train_loss_batch": loss, "train_time_per_step": 0.1} for k, loss in enumerate(losses, 1)]
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr("forgebook.planning.preflight.compare_run", lambda *_: {})
    result = {
        "best_checkpoint": "checkpoints/epoch-1", "eval_loss": 5.0, "perplexity": 148.4, "steps": 15,
        "trained_tokens": 1, "training_seconds": 1.0, "trained_tokens_throughput": 1.0,
        "stop_check": {"note": None, "prompts": 3, "stopped": 0, "max_new_tokens": 9, "trained_answer_tokens": 5},
    }  # fmt: skip
    write_summary(run, prepared.config, None, result, 2.0)
    print_summary(output, run)
    text = printed(output)
    assert "  the training loss has risen from 2.0000 (first 5) to 5.0000 (latest 10): the run has diverged" in text
    assert "answers to training prompts" not in text


def test_a_stopped_run_says_what_is_saved_and_how_to_resume(tmp_path):
    run = Run(tmp_path / "runs/run")
    assert "before a state was saved" in stopped_text(run) and "starts the run again" in stopped_text(run)
    for step in (9, 10):
        (run.resume / f"step-{step}").mkdir(parents=True)
        (run.resume / f"step-{step}/place.json").touch()
    (run.resume / "step-11").mkdir()  # not complete
    saved = f"stopped; step 10 is saved in {run.folder}"
    assert stopped_text(run) == f"{saved}, and the same command resumes after it"
    (run.checkpoints / "epoch-1").mkdir(parents=True)
    (run.checkpoints / ".writing-epoch-2").mkdir()
    assert stopped_text(run) == f"{saved} (checkpoints: epoch-1), and the same command resumes after it"
    assert "s3://bucket/run" in stopped_text(Run(run.folder, "s3://bucket/run"))
