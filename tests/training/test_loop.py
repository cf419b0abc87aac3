"""The loop, in this process: invariants that hold however a batch is divided, and an outside oracle."""

import json
import math
from pathlib import Path

import pytest
import torch

from conftest import LORA, TINY_MODEL, chat, fine_tune_until, losses_of
from forgebook.data import batching
from forgebook.errors import CheckpointError, ModelError, TrainingError
from forgebook.launch.fine_tune import fine_tune
from forgebook.planning.prepare import prepare
from forgebook.runs.atomic import read_json
from forgebook.runs.metrics import read_metrics
from forgebook.runs.run import open_run


def test_loss_falls(make_config):
    run = fine_tune(make_config(num_epochs=6))
    losses = losses_of(run)
    assert len(losses) == 18 and losses[-1] < losses[0] - 0.3
    evaluations = [row["eval_loss"] for row in read_metrics(run.metrics) if "eval_loss" in row]
    assert len(evaluations) == 6 and evaluations[-1] < evaluations[0]
    assert run.loss_curve.stat().st_size > 5_000


@pytest.mark.parametrize("method", [None, LORA], ids=["full", "lora"])
def test_accumulation_does_not_change_the_loss(make_config, method):
    whole = fine_tune(make_config(run_name="whole", lora_config=method))
    split = fine_tune(
        make_config(run_name="split", lora_config=method, train_batch_size_per_device=1, gradient_accumulation_steps=8)
    )
    assert losses_of(whole) == pytest.approx(losses_of(split), abs=2e-5)
    norms = [[row["grad_norm"] for row in read_metrics(run.metrics) if "grad_norm" in row] for run in (whole, split)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_does_not_move_loss_or_gradient(make_config, attention):
    """Peers' point 16: two runs whose only update has all rows, one packed and one not, are one run."""
    whole = {"train_batch_size_per_device": 24, "attention": attention, "context_length": 160, "num_warmup_steps": 0}
    alone = fine_tune(make_config(run_name="alone", **whole))
    packed = fine_tune(make_config(run_name="packed", padding="packed", **whole))
    assert losses_of(alone) == pytest.approx(losses_of(packed), abs=1e-5) and len(losses_of(packed)) == 1
    rows = [read_metrics(run.metrics) for run in (alone, packed)]
    assert rows[0][0]["grad_norm"] == pytest.approx(rows[1][0]["grad_norm"], rel=1e-5)
    assert rows[0][-1]["eval_loss"] == pytest.approx(rows[1][-1]["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("name", ["mamba", "jamba"])
def test_packing_is_refused_where_rows_would_see_each_other(name):
    """A recurrent model carries its state over from the row before, whether or not it takes positions."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from forgebook.training.losses import SupervisedLM, check_isolation

    torch.manual_seed(0)
    shapes = {
        "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        "jamba": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "num_experts": 1, "num_experts_per_tok": 1, "attn_layer_period": 2,
            "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_dt_rank": 4, "pad_token_id": 0,
        },
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, vocab_size=64, **shapes[name]))
    with pytest.raises(ModelError, match="padding: packed would let examples see each other"):
        check_isolation(SupervisedLM(model), torch.device("cpu"))


def test_padding_does_not_move_the_loss(make_config):
    short = fine_tune(make_config(run_name="short"))
    long = fine_tune(make_config(run_name="long", padding="max_length", context_length=160))
    assert losses_of(short) == pytest.approx(losses_of(long), abs=2e-5)
    assert next(row for row in read_metrics(long.metrics) if "padding_share" in row)["padding_share"] > 0.5


@pytest.mark.parametrize("method", [None, {**LORA, "lora_dropout": 0.1}], ids=["full", "lora with dropout"])
def test_resuming_gives_the_same_run(make_config, method):
    frequency = {"unit": "steps", "frequency": 2}
    settings = {"num_epochs": 2, "lora_config": method, "checkpoint_and_evaluation_frequency": frequency}
    whole = fine_tune(make_config(run_name="whole", max_steps=4, **settings))
    halves = make_config(run_name="halves", max_steps=4, **settings)
    with pytest.raises(KeyboardInterrupt):
        fine_tune_until(halves, step=3)
    assert [row["step"] for row in read_metrics(whole.metrics)][-1] == 4
    halves = fine_tune(halves)
    assert losses_of(halves) == losses_of(whole)
    averages = [
        [row["avg_train_loss_epoch"] for row in read_metrics(run.metrics) if "avg_train_loss_epoch" in row]
        for run in (whole, halves)
    ]
    assert averages[0] == averages[1] and len(averages[0]) == 6  # interrupted in the middle of an epoch
    last = "checkpoints/step-4"
    names = sorted(path.name for path in (whole.folder / last).glob("*.safetensors"))
    for name in names:
        assert (whole.folder / last / name).read_bytes() == (halves.folder / last / name).read_bytes()


def test_the_loss_equals_transformers_trainer(make_config, tokenizer, tmp_path):
    """Same batches, same optimizer, same schedule: the same losses as transformers.Trainer, to float32 rounding."""
    from torch.utils.data import DataLoader, Dataset
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    config = make_config(num_epochs=3, weight_decay=0.5)
    ours = losses_of(fine_tune(config))
    tokens = prepare(config, open_run(config)).train
    sequences = batching.single_sequences(tokens)
    order = [
        row
        for epoch in range(3)
        for step in batching.epoch_batches(tokens, sequences, 8, config.seed, epoch)
        for [row] in batching.split_batch(step, tokens, 1, 1)[0][0]
    ]

    class Rows(Dataset):
        def __len__(self):
            return len(order)

        def __getitem__(self, k):
            ids, trained = tokens.example(order[k])
            ids = torch.tensor(ids, dtype=torch.long)
            return {"input_ids": ids, "labels": torch.where(torch.tensor(trained), ids, -100)}

    def stack(rows):
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([row["input_ids"] for row in rows], batch_first=True, padding_value=tokenizer.pad_token_id)
        labels = pad([row["labels"] for row in rows], batch_first=True, padding_value=-100)
        return {"input_ids": ids, "labels": labels, "attention_mask": ids.ne(tokenizer.pad_token_id)}

    class InOrder(Trainer):
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, batch_size=8, shuffle=False, collate_fn=stack)

    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32),
        args=TrainingArguments(
            output_dir=str(tmp_path / "trainer"), max_steps=9, per_device_train_batch_size=8, learning_rate=1e-3,
            lr_scheduler_type="cosine", warmup_steps=1, weight_decay=0.5, max_grad_norm=1.0, logging_steps=1,
            optim="adamw_torch", report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        ),
        train_dataset=Rows(),
    )  # fmt: skip
    trainer.train()
    theirs = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(theirs) == 9
    assert ours == pytest.approx(theirs, abs=5e-4)


def test_early_stopping_ends_the_run_and_keeps_the_best(make_config, capsys):
    """No loss falls by 100: the second evaluation is the last, and another start of the command adds none."""
    config = make_config(num_epochs=5, early_stopping={"patience": 1, "min_delta": 100}, num_checkpoints_to_keep=2)
    run = fine_tune(config)
    summary = read_json(run.summary)
    assert (summary["steps"], summary["steps_without_early_stopping"], summary["epochs"]) == (6, 15, 2)
    losses = {row["checkpoint_dir_name"]: row["eval_loss"] for row in read_metrics(run.metrics) if "eval_loss" in row}
    assert list(losses) == ["epoch-1", "epoch-2"]
    assert summary["best_checkpoint"] == f"checkpoints/{min(losses, key=losses.get)}"
    assert "stopped early after step 6 of 15" in capsys.readouterr().out
    fine_tune(config)
    assert "is complete already" in capsys.readouterr().out and read_json(run.summary) == summary


def test_every_lora_matrix_moves_with_gradient_checkpointing(make_config):
    from safetensors.torch import load_file

    run = fine_tune(make_config(lora_config=LORA, gradient_checkpointing=True, dtype="bfloat16"))
    saved = load_file(run.folder / read_json(run.summary)["best_checkpoint"] / "adapter_model.safetensors")
    matrices = {name: tensor for name, tensor in saved.items() if "lora_B" in name}
    layers = json.loads((TINY_MODEL / "config.json").read_text())["num_hidden_layers"]
    assert len(matrices) == 7 * layers
    assert all(tensor.any() for tensor in matrices.values())


def test_gradient_checkpointing_changes_nothing(make_config, capsys):
    plain = fine_tune(make_config(run_name="plain", lora_config=LORA))
    for kind in (True, "selective", "offload"):
        recomputed = fine_tune(make_config(run_name=str(kind), lora_config=LORA, gradient_checkpointing=kind))
        assert losses_of(plain) == pytest.approx(losses_of(recomputed), abs=1e-6)
    chosen = fine_tune(make_config(run_name="auto", lora_config=LORA, gradient_checkpointing="auto"))
    assert "gradient_checkpointing:" not in capsys.readouterr().out
    assert "gradient_checkpointing: false  # auto: the least that fits" in chosen.config.read_text()


@pytest.mark.parametrize("method", [None, LORA], ids=["full", "lora"])
def test_the_checkpoint_loads_without_this_project(make_config, method):
    """Plain transformers and PEFT, their own loss, the saved chat template: the same evaluation loss."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = make_config(lora_config=method)
    run = fine_tune(config)
    summary = read_json(run.summary)
    folder = run.folder / summary["best_checkpoint"]
    if method:
        base = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, folder).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for line in Path(config.valid_path).read_text().splitlines():
        messages = json.loads(line)["messages"]
        ids = tokenizer.apply_chat_template(messages, return_dict=False, return_tensors="pt")
        prompt = tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=False, return_tensors="pt"
        )
        labels = ids.clone()
        labels[:, : prompt.shape[1]] = -100
        n = int((labels != -100).sum())
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * n
        count += n
    assert total / count == pytest.approx(summary["eval_loss"], abs=1e-4)
    assert summary["perplexity"] == pytest.approx(math.exp(summary["eval_loss"]))


@pytest.mark.parametrize("method", [None, LORA], ids=["full", "lora"])
def test_a_run_starts_from_another_runs_checkpoint(make_config, method):
    first = fine_tune(make_config(run_name="first", lora_config=method, num_epochs=3))
    summary = read_json(first.summary)
    key = "initial_adapter_model_ckpt_path" if method else "initial_base_model_ckpt_path"
    start = {key: str(first.folder / summary["best_checkpoint"])}
    second = fine_tune(make_config(run_name="second", lora_config=method, eval_first=True, **start))
    rows = read_metrics(second.metrics)
    assert rows[0]["eval_loss"] == pytest.approx(summary["eval_loss"], abs=1e-5)
    assert rows[-1]["eval_loss"] != rows[0]["eval_loss"]


def test_keeps_the_best_checkpoints(make_config):
    run = fine_tune(make_config(num_epochs=4, num_checkpoints_to_keep=2))
    losses = {r["checkpoint_dir_name"]: r["eval_loss"] for r in read_metrics(run.metrics) if "eval_loss" in r}
    kept = {path.name for path in run.checkpoints.iterdir()}
    assert kept == set(sorted(losses, key=losses.get)[:2])
    assert read_json(run.summary)["best_checkpoint"] == "checkpoints/" + min(losses, key=losses.get)


def test_evaluates_before_training_if_requested(make_config):
    run = fine_tune(make_config(eval_first=True))
    first = read_metrics(run.metrics)[0]
    assert first["step"] == 0 and first["eval_loss"] > 0


def test_causal_lm_trains_every_token(make_config, write_rows):
    path = write_rows([{"text": "the lamp is on the table"}, {"messages": chat("hello there", "hi")["messages"][:2]}])
    config = make_config(
        task="causal_lm", train_path=path, valid_path=None, train_batch_size_per_device=2, num_warmup_steps=0
    )
    tokens = prepare(config, open_run(config)).train
    assert (tokens.supervised == tokens.lengths - 1).all()
    assert math.isfinite(losses_of(fine_tune(config))[0])


def test_metrics_have_the_names_of_the_reference_system(make_config):
    rows = read_metrics(fine_tune(make_config()).metrics)
    step = {
        "step", "epoch", "train_loss_batch", "avg_train_loss_epoch", "learning_rate", "fwd_time", "bwd_time",
        "train_time_per_step", "num_iterations", "total_trained_steps", "trained_tokens", "trained_tokens_this_iter",
        "trained_tokens_throughput", "trained_tokens_throughput_this_iter", "time_total_s",
        "padded_tokens_this_iter", "padded_tokens_throughput", "supervised_tokens_throughput",
    }  # fmt: skip
    evaluation = {
        "eval_loss", "perplexity", "eval_time_per_epoch", "avg_fwd_time_per_epoch", "avg_bwd_time_per_epoch",
        "train_time_per_epoch", "checkpoint_dir_name",
    }  # fmt: skip
    assert step <= rows[0].keys()
    assert evaluation <= rows[-1].keys()


# Guards -----------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(make_config):
    with pytest.raises(TrainingError, match=r"step \d: the loss is .*(nan|inf).*Lower learning_rate"):
        fine_tune(make_config(learning_rate=1e30))


def test_a_gradient_of_zero_stops_the_run(make_config, tmp_path):
    """Behind an output projection of zeros, an adapter on the queries can change nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "dead")
    AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(tmp_path / "dead")
    with pytest.raises(TrainingError, match="gradient of the first step is zero"):
        fine_tune(make_config(model_id=str(tmp_path / "dead"), lora_config={**LORA, "target_modules": ["q_proj"]}))


def test_nothing_trainable_is_an_error(make_config, monkeypatch):
    from forgebook.models import adapters

    add_lora = adapters.add_lora

    def add_frozen(model, settings):
        model = add_lora(model, settings)
        model.requires_grad_(False)
        return model

    monkeypatch.setattr(adapters, "add_lora", add_frozen)
    with pytest.raises(ModelError, match="no parameter is trainable"):
        fine_tune(make_config(lora_config=LORA))


def test_a_full_disk_shows_before_the_first_step(make_config, monkeypatch):
    import shutil

    from forgebook.training import checkpoints

    usage = shutil._ntuple_diskusage(total=10**6, used=10**6, free=10)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage)
    config = make_config(force=True)  # the plan sees it earlier
    with pytest.raises(CheckpointError, match=r"needs about .* GB .* free: set storage_path"):
        fine_tune(config)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_base_is_never_saved_as_a_result(lora, make_config):
    """One step per epoch: in the first one, the learning rate of the warm-up is 0. It is evaluated, not saved."""
    every = {"num_checkpoints_to_keep": 3, "lora_config": lora, "train_batch_size_per_device": 24}
    run = fine_tune(make_config(num_epochs=3, num_warmup_steps=2, **every))
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["epoch-2", "epoch-3"]
    evaluations = [row for row in read_metrics(run.metrics) if "eval_loss" in row]
    assert [row.get("checkpoint_dir_name") for row in evaluations] == [None, "epoch-2", "epoch-3"]
