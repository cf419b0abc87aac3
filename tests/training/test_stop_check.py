"""After the last step three training prompts are answered: does the model stop, and does a run never fail in that."""

import pytest
import torch

from conftest import LORA, losses_of
from forgebook.data.token_store import Tokens
from forgebook.launch.fine_tune import fine_tune
from forgebook.runs.atomic import read_json
from forgebook.training import loop
from forgebook.training.setup import make_accelerator, make_worker
from forgebook.training.stop_check import check_stops

NEVER = 17  # a token that ends nothing


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """A worker of the tiny model, and its config."""
    from conftest import config_for

    config = config_for(
        "tiny", task="instruction_tuning", dtype="float32", gradient_checkpointing=False, deepspeed=None
    )
    config = config.resolve(num_devices=0, learning_rate=1e-3).resolved(
        context_length=512, train_batch_size_per_device=2, eval_batch_size_per_device=2, num_epochs=1, run_name="run"
    )
    return make_worker(config, make_accelerator(config)), config


def tokens_of(*lengths, end=2, prompt=5):
    """Make examples of a prompt and an answer of given length, which ends with a token."""
    return Tokens.from_examples(
        ([1, *[20] * (prompt - 1), *[30] * (n - 1), end], [False] * prompt + [True] * n) for n in lengths
    )


def check(worker, tokens, config, seconds=0):
    return check_stops(worker, tokens, config.task, config.generation_config, seconds)


@pytest.fixture
def answers(monkeypatch, checked):
    """Replace generation: every prompt is continued by token 20 + its row, and by an end where `stops` says so."""
    calls = []

    def script(stops):
        def generate(**settings):
            calls.append(settings)
            ids, new = settings["input_ids"], settings["max_new_tokens"]
            tail = torch.full((len(ids), new), NEVER)
            tail[torch.tensor(stops[: len(ids)], dtype=torch.bool), 3] = 2
            return torch.cat([ids, tail], dim=1)

        monkeypatch.setattr(checked[0].model, "generate", generate)
        return calls

    return script


def test_a_run_reports_that_its_answers_stop(make_config, capsys):
    """The tiny model stops already; neither its losses nor the random numbers know of the check."""
    run = fine_tune(make_config(max_steps=2, lora_config=LORA))
    after = torch.random.get_rng_state()
    assert read_json(run.summary)["stop_check"] == {
        "prompts": 3, "stopped": 3, "max_new_tokens": 58, "trained_answer_tokens": 25, "note": None,
    }  # fmt: skip
    assert "3 of 3 answers to training prompts stopped\n" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "check_stops", lambda *_: None)
        without = fine_tune(make_config(run_name="without", max_steps=2, lora_config=LORA))
    assert losses_of(without) == losses_of(run) and torch.equal(torch.random.get_rng_state(), after)


def test_a_model_that_does_not_stop_is_a_warning_with_what_to_do(make_config, capsys, monkeypatch):
    def ramble(model, input_ids, max_new_tokens, **_):
        return torch.cat([input_ids, torch.full((len(input_ids), max_new_tokens), NEVER)], dim=1)

    monkeypatch.setattr("transformers.GenerationMixin.generate", ramble)
    run = fine_tune(make_config(max_steps=1, num_warmup_steps=0))
    assert read_json(run.summary)["stop_check"]["stopped"] == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "0 of 3 answers to training prompts stopped within 58 tokens (trained answers: up to 25)" in text
    assert "train for more epochs or with a higher learning_rate" in text and f"generate {run.folder} -p PROMPT" in text


def test_a_run_whose_generation_fails_is_a_finished_run(make_config, capsys, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("transformers.GenerationMixin.generate", fail)
    config = make_config(max_steps=1, num_warmup_steps=0)
    run = fine_tune(config)
    note = "generation failed (OutOfMemoryError: CUDA out of memory)"
    assert run.is_complete and read_json(run.summary)["stop_check"]["note"] == note
    assert f"not checked whether answers stop: {note}" in " ".join(capsys.readouterr().out.split())
    # A process that died in the check is followed by one without it.
    run.summary.unlink()
    assert fine_tune(config).is_complete and read_json(run.summary)["stop_check"] is None


@pytest.mark.parametrize("task", ["causal_lm", "classification"])
def test_tasks_without_answers_are_not_checked(checked, task):
    worker, config = checked
    assert check(worker, tokens_of(3), config.model_copy(update={"task": task})) is None


def test_prompts_are_those_of_typical_answers_up_to_the_answer(checked, answers):
    worker, config = checked
    calls = answers([True, True, False])
    result = check(worker, tokens_of(9, 3, 5, 7, 500), config)
    assert result == {
        "prompts": 3, "stopped": 2, "max_new_tokens": 26, "trained_answer_tokens": 9, "note": None,
    }  # fmt: skip
    [call] = calls
    assert call["input_ids"].tolist() == [[1, 20, 20, 20, 20]] * 3 and call["do_sample"] is False
    assert call["eos_token_id"] == [2] and call["max_time"] == 20 and call["synced_gpus"] is False
    assert worker.wrapped.training
    check(worker, tokens_of(3), config, 10_000)
    check(worker, tokens_of(3), config, 10_000_000)
    assert [one["max_time"] for one in calls[1:]] == [100, 300]  # a hundredth of the training, five minutes at most


def test_only_the_last_answer_of_a_conversation_is_generated(checked, answers):
    calls = answers([True])
    two = Tokens.from_examples(
        [([1, 20, 30, 2, 21, 31, 32, 2, 9], [False, False, True, True, False, True, True, True, False])]
    )
    check(checked[0], two, checked[1])
    assert calls[0]["input_ids"].tolist() == [[1, 20, 30, 2, 21]] and calls[0]["max_new_tokens"] == 14


def test_of_pairs_the_chosen_answers_count(checked, answers):
    worker, config = checked
    answers([True] * 3)
    pairs = tokens_of(4, 9, 4, 9)
    assert check(worker, pairs, config.model_copy(update={"task": "preference_tuning"})) == {
        "prompts": 2, "stopped": 2, "max_new_tokens": 16, "trained_answer_tokens": 4, "note": None,
    }  # fmt: skip


def test_a_text_may_end_answers(checked, answers):
    worker, config = checked
    calls = answers([True])
    stop = worker.tokenizer.decode([NEVER])
    generation = config.generation_config.model_copy(update={"stopping_sequences": [stop, 7]})
    config = config.model_copy(update={"generation_config": generation})
    assert check(worker, tokens_of(4, end=NEVER), config)["stopped"] == 1
    assert calls[0]["stop_strings"] == [stop] and calls[0]["eos_token_id"] == [2, 7]


@pytest.mark.parametrize(
    ("tokens", "note"),
    [
        (tokens_of(4, 5, end=NEVER), "no training answer ends with a token that stops: context_length cuts them off"),
        (tokens_of(129, 140), "no training answer has at most 128 tokens in an example of at most 2,048"),
        (tokens_of(4, prompt=2048), "no training answer has at most 128 tokens in an example of at most 2,048"),
    ],
)
def test_what_cannot_be_checked_is_a_note(checked, answers, tokens, note):
    calls = answers([True])
    result = check(checked[0], tokens, checked[1])
    assert result["note"].startswith(note) and result["prompts"] == 0 and calls == []


def test_generation_ends_in_time(checked, monkeypatch):
    """A model that is slow, as one gathered from all ranks for each token, is not generated from to the end."""
    monkeypatch.setattr("forgebook.training.stop_check.LEAST_SECONDS", 0.0)
    result = check(checked[0], tokens_of(100), checked[1])
    assert result["note"].startswith("1 token of each answer took 0 s") and result["prompts"] == 0
