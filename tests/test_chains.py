"""One stage after another: pre-training, instructions, preferences; and contexts beyond the model's own."""

import json

import pytest

from conftest import LORA, REPOSITORY, chat
from forgebook.launch.ray_train import fine_tune
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


@pytest.mark.slow
def test_a_stretched_model_learns_long_texts_better(make_config, write_rows):
    """Texts of about 2,200 tokens for a model made for 1,024: RoPE scaling ends at a lower loss on held-out ones."""
    notes = [json.loads(line)["text"] for line in (REPOSITORY / "data/notes/train.jsonl").read_text().splitlines()]
    texts = [{"text": "\n".join((notes * 2)[60 * k : 60 * k + 80])} for k in range(16)]
    long = {
        "task": "causal_lm", "context_length": 4096, "train_batch_size_per_device": 2, "eval_batch_size_per_device": 2,
        "train_path": write_rows(texts[:12], "long.jsonl"), "valid_path": write_rows(texts[12:], "held-out.jsonl"),
        "num_epochs": 3, "learning_rate": 1e-3,
    }  # fmt: skip
    plain = fine_tune(make_config(run_name="plain", **long))
    scaling = {"rope_type": "linear", "factor": 4.0}
    stretched = fine_tune(make_config(run_name="stretched", rope_scaling=scaling, **long))
    assert evaluations(stretched)[-1] < evaluations(plain)[-1] - 0.05
    saved = read_json(stretched.folder / read_json(stretched.summary)["best_checkpoint"] / "config.json")
    assert saved["rope_parameters"]["factor"] == 4.0
