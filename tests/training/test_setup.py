"""What a worker is set up with; a killed build of an extension does not stop the runs after it."""

import math
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
import yaml

from conftest import LORA, REPOSITORY, TINY_MODEL, config_for
from forgebook.errors import ForgebookError, TrainingError
from forgebook.training import distributed, setup
from forgebook.training.setup import (
    STALE_LOCK_SECONDS,
    base_overrides,
    build_extensions,
    extensions_folder,
    make_accelerator,
    make_worker,
    prompt_format_text,
)
from support_families import save_family
from support_models import save_gemma3
from support_ranks import run_two_ranks


def test_an_environment_has_a_folder_of_its_own(monkeypatch, tmp_path):
    own = extensions_folder()
    monkeypatch.setattr(sys, "prefix", "/another/environment")
    assert extensions_folder() != own
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert extensions_folder() == tmp_path


def test_nothing_is_built_for_a_gpu_without_offloading(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    build_extensions({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}}, on_cpu=False)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_what_a_killed_build_left_behind_is_removed():
    """torch would wait for this file without end; one that may be in use is left alone."""
    code = "from forgebook.training.setup import build_extensions; build_extensions({}, on_cpu=True)"

    def build():
        subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=600, capture_output=True)

    build()
    left_behind = extensions_folder() / "deepspeed_shm_comm" / "lock"
    left_behind.touch()
    then = time.time() - 2 * STALE_LOCK_SECONDS
    os.utime(left_behind, (then, then))
    build()
    assert not left_behind.exists()


# What a worker is set up with ---------------------------------------------------------------------------


def make(config):
    resolved = config.resolved(context_length=128)
    return make_worker(resolved, make_accelerator(resolved))


def batch_of(worker):
    ids = torch.arange(5, 69).reshape(2, 32)
    return {"input_ids": ids, "labels": ids}


def test_noise_is_added_in_training_alone_and_as_large_as_the_paper_says(make_config):
    """NEFTune: uniform in +-alpha / sqrt(length * width), arXiv 2310.05914."""
    worker = make(make_config(lora_config=LORA, neftune_noise_alpha=5.0))
    embeddings, ids = worker.model.get_input_embeddings(), batch_of(worker)["input_ids"]
    plain = embeddings.weight[ids]
    noise = embeddings(ids) - plain
    size = 5.0 / math.sqrt(32 * 256)
    assert noise.abs().max() <= size * 1.001
    assert noise.std().item() == pytest.approx(size / math.sqrt(3), rel=0.02)
    losses = [worker.wrapped(**batch_of(worker)).item() for _ in range(2)]
    worker.wrapped.eval()
    quiet = [worker.wrapped(**batch_of(worker)).item() for _ in range(2)]
    assert torch.equal(embeddings(ids), plain) and quiet[0] == quiet[1] != losses[0] != losses[1]


@pytest.mark.parametrize("method", [None, LORA], ids=["full", "lora"])
def test_what_is_trained_is_counted_and_is_what_the_optimizer_updates(make_config, method):
    worker = make(make_config(lora_config=method, dtype="bfloat16", learning_rate=3e-4, weight_decay=0.1))
    total, trained = worker.parameters
    sizes = [(p.numel(), p.requires_grad) for p in worker.model.parameters()]
    assert total == sum(size for size, _ in sizes) and trained == sum(size for size, trains in sizes if trains)
    assert (trained == total) is (method is None)
    assert sum(p.numel() for p in worker.optimizer.trained) == trained
    groups = worker.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == ([0.1, 0.0] if method is None else [0.1])
    assert all(group["lr"] == 3e-4 for group in groups) and worker.deepspeed_engine is None


TAGS_ALONE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}"
    "<|assistant|>{% endif %}"
)


def test_an_adapter_starts_from_the_seed_alone(make_config, tmp_path):
    """Of a model with too few rows for its tokenizer, whose new ones are drawn first: other numbers in each dtype."""
    model = save_family("Llama 3", tmp_path / "model", vocab_size=512, hidden_size=512)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY_MODEL / name, model)
    starts = []
    for dtype in ("float32", "float16"):
        torch.manual_seed(42)  # as a run does before it loads the model
        starts.append(dict(make(make_config(model_id=model, dtype=dtype, lora_config=LORA)).model.named_parameters()))
    exact, half = starts
    names = [name for name in exact if "lora_A" in name]
    assert names and all(torch.allclose(half[name].float(), exact[name], atol=1e-3) for name in names)


@pytest.mark.parametrize(("template", "stops"), [(None, 2), (TAGS_ALONE, [2, 4])], ids=["own end", "next tag"])
def test_generation_stops_at_what_ends_an_answer_in_training(make_config, tmp_path, template, stops):
    folder = shutil.copytree(TINY_MODEL, tmp_path / "model")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    worker = make(make_config(model_id=str(folder), lora_config=LORA))
    assert worker.model.get_base_model().generation_config.eos_token_id == stops


def test_what_one_worker_cannot_load_is_named(make_config, tmp_path):
    with pytest.raises(ForgebookError, match="nowhere"):
        make(make_config(model_id=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("zero_3", [True, False])
def test_a_rank_that_cannot_load_waits_for_the_others_unless_they_wait_in_the_loading(make_config, monkeypatch, zero_3):
    """Under ZeRO-3 they do: it would wait in one collective, they in another, forever."""
    shared = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "_shared", lambda error, group: shared.append(error) or error)
    monkeypatch.setattr(setup, "is_deepspeed_zero3_enabled", lambda: zero_3)
    monkeypatch.setattr(setup, "_load_model", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(make_config())
    assert [type(error) for error in shared if error] == ([] if zero_3 else [ZeroDivisionError])


def test_what_a_checkpoint_says_of_its_base(make_config):
    assert base_overrides(None, None) == {} and base_overrides(None, "nf4") == {"quantization": "nf4"}
    config = make_config(
        generation_config={
            "prompt_format": {"system": "S {instruction}", "user": "U {instruction}", "assistant": "A {instruction}"}
        }
    )
    saved = yaml.safe_load(prompt_format_text(config.generation_config.prompt_format))
    assert saved["user"] == "U {instruction}" and prompt_format_text(None) is None


def test_one_process_takes_no_port_and_deepspeed_gets_the_batch_sizes(make_config, monkeypatch):
    """What the config leaves "auto" in DeepSpeed's file is filled in from ours."""
    started = {}

    class Started:
        distributed_type = "NO"

        def __init__(self, **keywords):
            started.update(keywords)

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.setattr(setup, "Accelerator", Started)
    monkeypatch.setattr(setup, "build_extensions", lambda settings, on_cpu: None)
    config = make_config(deepspeed="zero_2", gradient_accumulation_steps=2, max_grad_norm=0.5).resolved(
        context_length=128
    )
    try:
        with pytest.raises(TrainingError, match="deepspeed is set, but accelerate started NO"):
            make_accelerator(config)
        assert distributed.world_size() == 1 and torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()
    settings = started["deepspeed_plugin"].hf_ds_config.config
    assert settings["train_micro_batch_size_per_gpu"] == 8 and settings["train_batch_size"] == 16
    assert settings["gradient_accumulation_steps"] == 2 and settings["gradient_clipping"] == 0.5
    assert settings["bf16"]["enabled"] is False and "MASTER_PORT" not in os.environ


# Two workers ------------------------------------------------------------------------------------------


def train_gemma3(rank, settings):
    """Take three steps with each sharding; return the losses, and what full fine-tuning changed in towers."""
    from accelerate.state import AcceleratorState

    losses, changed = {}, []
    for sharding, lora in (("none", None), ("none", LORA), ("zero_2", LORA), ("zero_3", LORA)):
        AcceleratorState._reset_state(reset_partial_state=True)
        config = config_for(**settings, deepspeed=sharding, lora_config=lora).resolved()
        accelerator = make_accelerator(config)
        torch.manual_seed(0)
        worker = make_worker(config, accelerator)
        towers = {name: p.clone() for name, p in worker.model.named_parameters() if not p.requires_grad and not lora}
        ids = torch.arange(5, 69).reshape(2, 32) + 64 * rank
        name = f"{sharding} {'lora' if lora else 'full'}"
        losses[name] = []
        for _ in range(3):
            loss = worker.wrapped(input_ids=ids, labels=ids)
            losses[name].append(float(loss))
            if worker.deepspeed_engine:
                accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=True)
            else:
                loss.backward()
                worker.optimizer.step()
                worker.optimizer.zero_grad()
        changed += [one for one, p in worker.model.named_parameters() if one in towers and not p.equal(towers[one])]
    return losses, changed


@pytest.mark.slow
def test_two_workers_train_a_model_with_a_vision_tower(tmp_path):
    """Neither DDP nor ZeRO waits for the gradients of a tower, which full fine-tuning leaves as it was."""
    settings = {
        "model_id": save_gemma3(tmp_path / "gemma3"), "dtype": "float32", "gradient_checkpointing": False,
        "num_devices": 2, "context_length": 32, "train_batch_size_per_device": 2, "eval_batch_size_per_device": 2,
        "num_epochs": 1, "learning_rate": 1e-2, "run_name": "run",
    }  # fmt: skip
    for losses, changed in run_two_ranks(train_gemma3, tmp_path, settings):
        assert changed == []
        assert all(one[2] < one[0] for one in losses.values())
        for sharding in ("zero_2 lora", "zero_3 lora"):
            assert losses[sharding] == pytest.approx(losses["none lora"], rel=1e-3), sharding


STARTED = """
import sys
from forgebook.config.parse import load_config
from forgebook.training.setup import make_accelerator
make_accelerator(load_config("training_configs/tiny/quickstart.yaml", ["num_devices=0", "deepspeed=zero_2"]).resolved())
print("imported:", "deepspeed" in sys.modules, "mlflow" in sys.modules)
"""


@pytest.mark.slow
def test_deepspeed_starts_without_importing_mlflow():
    """Its tuner would, if it is installed: a second of each worker's start."""
    started = subprocess.run([sys.executable, "-c", STARTED], cwd=REPOSITORY, capture_output=True, text=True)
    assert "imported: True False" in started.stdout, started.stderr
