"""One stage after another: pre-training, instructions, preferences."""

import json

import pytest

from conftest import LORA, REPOSITORY, chat
from forgebook.launch.fine_tune import fine_tune
from forgebook.runs.atomic import read_json
from forgebook.runs.metrics import read_metrics


def best_of(run) -> str:
    return str(run.folder / read_json(run.summary)["best_checkpoint"])


def evaluations(run) -> list[float]:
    return [row["eval_loss"] for row in read_metrics(run.metrics) if "eval_loss" in row]


def halves() -> tuple[list[dict], list[dict], list[dict]]:
    lines = (REPOSITORY / "data/quickstart/train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:160]]
    return rows[:64], rows[64:128], rows[128:]


@pytest.mark.parametrize("method", [None, LORA], ids=["full", "lora"])
def test_the_second_stage_starts_where_the_first_ended(make_config, write_rows, method):
    """Two halves of one set: the loss at step 0 of the second stage is the last of the first."""
    first, second, held_out = halves()
    valid = write_rows(held_out, "v.jsonl")
    one = fine_tune(
        make_config(run_name="one", train_path=write_rows(first, "1.jsonl"), valid_path=valid, lora_config=method)
    )
    start = "initial_adapter_model_ckpt_path" if method else "initial_base_model_ckpt_path"
    two = fine_tune(
        make_config(
            run_name="two", train_path=write_rows(second, "2.jsonl"), valid_path=valid, lora_config=method,
            eval_first=True, **{start: best_of(one)},
        )
    )  # fmt: skip
    assert evaluations(two)[0] == pytest.approx(evaluations(one)[-1], abs=1e-3)
    assert evaluations(two)[-1] < evaluations(two)[0]


def test_pre_training_then_instructions_then_preferences(make_config, write_rows, capsys):
    """Full parameter, then an adapter on it, then the same adapter; each begins from the last."""
    _, _, held_out = halves()
    texts = [{"text": row["messages"][-1]["content"]} for row in held_out]
    paths = {"train_path": write_rows(texts, "text.jsonl"), "valid_path": None}
    pretrained = fine_tune(
        make_config(run_name="pretrain", task="causal_lm", padding="packed", num_warmup_steps=0, **paths)
    )
    base = {"initial_base_model_ckpt_path": best_of(pretrained)}
    paths = {"train_path": write_rows(held_out, "chat.jsonl"), "valid_path": None}
    instructed = fine_tune(make_config(run_name="instruct", lora_config=LORA, **base, **paths))
    assert "serving it needs that whole checkpoint" in capsys.readouterr().out
    pairs = [
        {"chosen": row["messages"], "rejected": chat("x", "no", None)["messages"][:0] + row["messages"][:-1]
         + [{"role": "assistant", "content": "no"}]}
        for row in held_out[:16]
    ]  # fmt: skip
    preferred = fine_tune(
        make_config(
            run_name="prefer", task="preference_tuning", lora_config=LORA, **base,
            initial_adapter_model_ckpt_path=best_of(instructed), train_path=write_rows(pairs, "pairs.jsonl"),
            valid_path=write_rows(pairs, "pairs.jsonl"), eval_first=True,
        )
    )  # fmt: skip
    assert evaluations(preferred)[0] == pytest.approx(0.6931, abs=1e-3)  # its own reference
    assert evaluations(preferred)[-1] < evaluations(preferred)[0]


def test_an_adapter_is_continued_as_it_is(make_config):
    from forgebook.errors import ModelError

    first = fine_tune(make_config(run_name="first", lora_config=LORA))
    with pytest.raises(ModelError, match="has r: 8, lora_config says 16"):
        fine_tune(
            make_config(run_name="x", lora_config=LORA | {"r": 16}, initial_adapter_model_ckpt_path=best_of(first))
        )
