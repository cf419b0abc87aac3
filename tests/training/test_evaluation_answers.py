"""eval_generation, metrics and best_metric: answers in evaluations, equal to `generate`'s, and what they choose."""

import json

import pytest

from conftest import LORA, chat, losses_of
from forgebook.inference.generate import complete
from forgebook.inference.loading import load_for_generation
from forgebook.launch.fine_tune import fine_tune
from forgebook.runs.atomic import read_json
from forgebook.runs.metrics import read_metrics
from forgebook.training import evaluation_answers

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
LAMPS = [chat("what is it", "a lamp 7")] * 12
OFTEN = {"checkpoint_and_evaluation_frequency": {"unit": "epochs", "frequency": 1}, "num_checkpoints_to_keep": 9}


@pytest.fixture
def answering(make_config, write_rows):
    """Make a config that learns an answer by heart and answers the question at each evaluation."""

    def make(rows=LAMPS, valid=None, metrics=("exact_match",), every=1, **values):
        settings = {
            "train_path": write_rows(rows, "t.jsonl"), "valid_path": write_rows(valid or rows[:4], "v.jsonl"),
            "eval_generation": {"prompts": 3, "every": every, "max_new_tokens": 24}, "metrics": list(metrics),
            "num_epochs": 4, "learning_rate": 1e-2, "train_batch_size_per_device": 4, "lora_config": LORA,
        }  # fmt: skip
        return make_config(**OFTEN, **{**settings, **values})

    return make


def evaluations_of(run) -> list[dict]:
    return [row for row in read_metrics(run.metrics) if "eval_loss" in row]


def test_a_run_answers_learns_and_chooses_by_its_answers(answering, capsys):
    run = fine_tune(answering(best_metric="exact_match", eval_first=True, num_epochs=6))
    first, *later = evaluations_of(run)
    assert first["eval_exact_match"] == 0 and later[-1]["eval_exact_match"] == 1
    assert later[-1]["generated"][0]["answer"] == later[-1]["generated"][0]["reference"] == "a lamp 7"
    assert len(later[-1]["generated"]) == 3 and "what is it" in first["generated"][0]["prompt"]
    named = [row["checkpoint_dir_name"] for row in later if row["eval_exact_match"] == 1][-1]
    summary = read_json(run.summary)
    assert summary["best_checkpoint"] == f"checkpoints/{named}" and summary["eval_exact_match"] == 1
    output = capsys.readouterr().out
    assert "exact match 100.0%" in output and "a lamp 7" in output


def test_the_answers_are_those_of_the_saved_checkpoint(answering):
    rows = [chat(f"what is {k}", f"a lamp {k}") for k in range(12)]
    run = fine_tune(answering(rows, rows[:6], num_epochs=2))
    last = evaluations_of(run)[-1]
    model, tokenizer, _ = load_for_generation(run.checkpoints / last["checkpoint_dir_name"])
    # Every second of six examples.
    expected = complete(model, tokenizer, [rows[k]["messages"][:-1] for k in (0, 2, 4)], max_new_tokens=24)
    assert [one["answer"] for one in last["generated"]] == [text.strip() for text in expected]


def test_thoughts_are_not_compared(answering):
    """The validation examples think in other words than the model learns."""

    def thinking(thought):
        row = chat("what is it", "a lamp 7")
        row["messages"][-1]["reasoning_content"] = thought
        return [row] * 12

    run = fine_tune(answering(thinking("a table"), thinking("the old door"), num_epochs=8))
    last = evaluations_of(run)[-1]
    assert last["eval_exact_match"] == 1 and "a table" in last["generated"][0]["answer"]


def test_losses_do_not_know_of_the_answers(answering):
    """Nor the random numbers of dropout, which continue in the second epoch."""
    settings = {"num_epochs": 2, "lora_config": LORA | {"lora_dropout": 0.2}}
    with_answers = fine_tune(answering(run_name="with", **settings))
    without = fine_tune(answering(run_name="without", metrics=(), eval_generation=None, **settings))
    assert losses_of(without) == losses_of(with_answers)


def test_the_checkpoint_with_the_best_answers_is_the_best_and_a_state_knows_it(answering, monkeypatch):
    """With answers that are right at the second of four evaluations alone, when the loss still falls."""
    monkeypatch.setattr(
        evaluation_answers.EvaluationAnswers, "figures", lambda self, number, is_last: {"eval_exact_match": number == 1}
    )
    run = fine_tune(answering(best_metric="exact_match"))
    losses = [row["eval_loss"] for row in evaluations_of(run)]
    assert losses[1] > min(losses) and read_json(run.summary)["best_checkpoint"] == "checkpoints/epoch-2"
    [state] = run.resume.glob("step-*/place.json")
    assert json.loads(state.read_text())["scores"] == {"epoch-1": 0, "epoch-2": -1, "epoch-3": 0, "epoch-4": 0}


def test_every_second_evaluation_and_the_last(answering):
    rows = evaluations_of(fine_tune(answering(every=2)))
    assert ["generated" in row for row in rows] == [True, False, True, True]


def test_tool_calls_are_compared_by_their_arguments(answering):
    asking = {"role": "user", "content": "the weather of Oslo"}
    row = {"messages": [asking, {"role": "assistant", "content": "", "tool_calls": [CALL]}], "tools": [WEATHER]}
    rows = evaluations_of(fine_tune(answering([row] * 12, metrics=("tool_calls",), num_epochs=8)))
    assert rows[-1]["eval_tool_calls"] == 1 and "weather" in rows[-1]["generated"][0]["answer"]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "zero_3"])
def test_two_workers_share_the_prompts(answering, without_ray, sharding):
    """Three prompts, two for one worker and one for the other; all for both where the weights are partitioned."""
    rows = [chat(f"what is {k}", f"a lamp {k}") for k in range(12)]
    run = fine_tune(answering(rows, num_devices=2, deepspeed=sharding, train_batch_size_per_device=2, num_epochs=2))
    last = evaluations_of(run)[-1]
    model, tokenizer, _ = load_for_generation(run.checkpoints / last["checkpoint_dir_name"])
    expected = complete(model, tokenizer, [rows[k]["messages"][:-1] for k in (0, 1, 2)], max_new_tokens=24)
    assert [one["answer"] for one in last["generated"]] == [text.strip() for text in expected]
