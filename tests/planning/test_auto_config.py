"""What --default chooses: every core model fits its hardware, each choice has a reason, what is given wins."""

import json
import re

import pytest

from conftest import REPOSITORY, chat, losses_of, uneven_rows
from forgebook.catalog import hardware_of, read_catalog, shape_of
from forgebook.cli.main import main
from forgebook.config.parse import config_differences, dump_config, load_config
from forgebook.errors import ConfigError, ModelError, ResourceError
from forgebook.planning.auto_config import KEYS, choose, choose_task, core_shape
from forgebook.planning.feasibility import fits, longest_sequence, unpadded_lengths
from forgebook.planning.hardware import gpu_named
from forgebook.planning.memory import memory_of
from forgebook.planning.prepare import prepare
from forgebook.planning.token_count import Statistics
from forgebook.runs import run

LLAMA_8B = "meta-llama/Llama-3.1-8B-Instruct"
# Rows as GSM8K's: 7,473 of about 200 tokens, the longest of 480.
GSM8K = Statistics((*(120 + 7 * k % 181 for k in range(7472)), 480), 1.0, "made up")
CORE = sorted({shape: model for model, shape in read_catalog().shapes.items()}.values())  # one of each shape


@pytest.fixture
def config(tmp_path):
    def load(model_id="tiny", *overrides, **values):
        path = tmp_path / "run.yaml"
        settings = {"model_id": model_id, "train_path": "train.jsonl", "storage_path": str(tmp_path / "runs"), **values}
        path.write_text(json.dumps(settings))
        return load_config(path, overrides, default=True)

    return load


def chosen(config, hardware="8xA100-80G", data=GSM8K):
    config = choose_task(config, [chat("q", "a")])
    return choose(config, shape_of(config.model_id), hardware and hardware_of(hardware), data)


# -- many models on much hardware


@pytest.mark.parametrize(
    ("hardware", "models"),
    [("8xA100-80G", CORE), ("1xH200", CORE[::5]), ("1xA10G", CORE[1::5]), ("1xT4", CORE[2::5])],
    ids=["8xA100-80G", "1xH200", "1xA10G", "1xT4"],
)
def test_core_models_get_settings_that_fit(config, hardware, models):
    count, gpu = hardware_of(hardware)
    for model in models:
        done, choices = chosen(config(model), hardware)
        assert [choice.key for choice in choices if not choice.reason] == []
        assert {choice.key for choice in choices} >= set(KEYS) - {"generation_config.prompt_format"}
        shape = shape_of(done.model_id)
        longest, lengths = longest_sequence(done, GSM8K), unpadded_lengths(done, shape, GSM8K, gpu)
        need = memory_of(done, shape, workers=count, length=longest, lengths=lengths)
        assert fits(need, gpu), f"{model} on {hardware}"
        assert done.num_devices == count and done.global_batch_size == 64 and done.num_epochs == 3, model


def test_small_models_need_neither_sharding_nor_recomputing(config):
    done, _ = chosen(config(LLAMA_8B))
    assert (done.deepspeed, done.gradient_checkpointing, done.quantization) == (None, False, None)
    assert done.lora_config == {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear"}
    assert done.learning_rate == 1e-4 and done.dtype == "bfloat16" and done.hardware == "8xA100-80G"


def test_large_models_are_shared_out(config):
    done, choices = chosen(config("meta-llama/Llama-3.3-70B-Instruct"))
    assert done.deepspeed.config_path == "deepspeed_configs/zero_3.json"
    assert re.search(r"fastest way that fits: .* of .* per GPU", {c.key: c.reason for c in choices}["deepspeed"])


def test_what_zero_3_cannot_train_is_not_given_to_it(config):
    labels = {"label_tokens": ["[[1]]", "[[2]]"]}
    done, choices = chosen(config("meta-llama/Llama-3.3-70B-Instruct", classifier_config=labels))
    assert (done.sharding, done.deepspeed, done.quantization) == ("fsdp", None, None)
    assert "the fastest way that fits" in {c.key: c.reason for c in choices}["deepspeed"]


def test_a_gpu_without_bfloat16_gets_float16_or_float32(config):
    done, choices = chosen(config("Qwen/Qwen2.5-0.5B"), "1xT4")
    assert (done.dtype, done.deepspeed, done.quantization) == ("float16", None, None)
    assert "T4 has no bfloat16" in {c.key: c.reason for c in choices}["dtype"]
    done, _ = chosen(config(LLAMA_8B), "1xT4")
    assert (done.dtype, done.quantization) == ("float16", "nf4")
    # What float16 does not work with gets float32.
    for values in ({"deepspeed": "zero_2"}, {"optimizer": "adafactor"}):
        assert chosen(config("Qwen/Qwen2.5-0.5B", **values), "1xT4")[0].dtype == "float32"


def test_quantisation_is_the_last_resort(config):
    done, choices = chosen(config("meta-llama/Llama-3.3-70B-Instruct", "deepspeed=none"), "1xA100-80G")
    assert done.quantization == "nf4" and "does not fit otherwise" in {c.key: c.reason for c in choices}["quantization"]
    with pytest.raises(ResourceError, match=r"does not fit 1xT4 .*: try .*offload"):
        chosen(config("meta-llama/Llama-3.3-70B-Instruct", "deepspeed=none"), "1xT4")


def test_a_laptop_trains_in_this_process(config, monkeypatch):
    monkeypatch.setattr("forgebook.planning.cpu_dtype.bfloat16_speedup", lambda hidden, inner: 0.9)
    done, _ = chosen(config(), None)
    assert (done.num_devices, done.deepspeed, done.dtype, done.attention) == (0, None, "float32", "eager")
    assert (done.train_batch_size_per_device, done.gradient_checkpointing, done.hardware) == (32, False, None)


def test_a_cpu_that_is_faster_in_bfloat16_gets_it(config, monkeypatch):
    monkeypatch.setattr("forgebook.planning.cpu_dtype.bfloat16_speedup", lambda hidden, inner: 2.7)
    done, choices = chosen(config(), None)
    assert done.dtype == "bfloat16" and "2.7 times faster" in {c.key: c.reason for c in choices}["dtype"]
    assert chosen(config(dtype="float32"), None)[0].dtype == "float32"


# -- the rules


@pytest.mark.parametrize(
    ("longest", "context"), [(100, 512), (512, 512), (513, 1024), (9_000, 16_384), (40_000, 40_960), (50_000, 40_960)]
)
def test_the_context_holds_the_longest_example(config, longest, context):
    data = Statistics((100,) * 2000 + (longest,), 1.0, "made up")
    done, choices = chosen(config("Qwen/Qwen3-8B"), data=data)
    assert done.context_length == context
    reason = {choice.key: choice.reason for choice in choices}["context_length"]
    assert f"{longest:,} tokens" in reason and ("1 training examples are longer" in reason) == (longest > 40_960)


def test_validation_rows_are_held_too(config):
    done = config(LLAMA_8B)
    assert choose(done, shape_of(done.model_id), None, GSM8K, longest_valid=900)[0].context_length == 1024


@pytest.mark.parametrize(
    ("rows", "batch", "epochs"), [(10, 10, 100), (500, 16, 4), (3_000, 32, 3), (20_000, 64, 2), (200_000, 64, 1)]
)
def test_the_batch_and_the_epochs_depend_on_the_number_of_examples(config, rows, batch, epochs):
    done, _ = chosen(config(LLAMA_8B), "1xA100-80G", Statistics((200,) * (rows // 10), 10.0, "made up"))
    assert (done.global_batch_size, done.num_epochs) == (batch, epochs)
    assert done.num_warmup_steps <= max(10, 0.04 * rows * epochs / batch)


def test_one_epoch_is_evaluated_on_its_way(config):
    many = Statistics((200,) * 20_000, 5.0, "made up")
    done, _ = chosen(config(LLAMA_8B, valid_path="valid.jsonl"), data=many)
    assert done.checkpoint_and_evaluation_frequency.unit == "steps"
    assert chosen(config(LLAMA_8B), data=many)[0].checkpoint_and_evaluation_frequency is None


def test_uneven_rows_are_packed_only_where_attention_knows_their_ends(config):
    uneven = Statistics((10, 400) * 4, 100.0, "made up")
    assert chosen(config(LLAMA_8B), data=uneven)[0].padding == "longest"
    assert chosen(config(LLAMA_8B, "attention=flash_attention_2"), data=uneven)[0].padding == "packed"


@pytest.mark.parametrize(
    ("row", "task"),
    [
        (chat("q", "a"), "instruction_tuning"),
        ({"instruction": "i", "output": "o"}, "instruction_tuning"),
        ({"chosen": chat("q", "a")["messages"], "rejected": chat("q", "b")["messages"]}, "preference_tuning"),
        ({"text": "once"}, "causal_lm"),
        ({"messages": [{"role": "user", "content": "only a question"}]}, "causal_lm"),
    ],
    ids=["chat", "alpaca", "pair", "text", "question"],
)
def test_the_task_is_chosen_from_the_rows(config, row, task):
    assert choose_task(config(), [row]).task == task
    assert choose_task(config(classifier_config={"label_tokens": ["a", "b"]}), [row]).task == "classification"


def test_pairs_want_a_small_learning_rate_and_one_pass(config):
    pairs = choose_task(config(LLAMA_8B), [{"chosen": "a", "rejected": "b", "prompt": "q"}])
    done, _ = choose(pairs, shape_of(pairs.model_id), hardware_of("1xA100-80G"), Statistics((100,) * 40_000, 1.0, ""))
    assert done.learning_rate == pytest.approx(5e-6) and done.num_epochs == 1


def test_base_models_get_their_family_s_prompt_format(config):
    done = choose_task(config("mistralai/Mixtral-8x7B-v0.1"), [chat("q", "a")])
    assert done.generation_config.prompt_format.assistant.endswith("</s>")
    assert choose_task(config("mistralai/Mixtral-8x7B-v0.1"), [{"text": "t"}]).generation_config.prompt_format is None
    assert choose_task(config(LLAMA_8B), [chat("q", "a")]).generation_config.prompt_format is None


# -- what the config sets, and what is printed

GIVEN = {
    "task": "causal_lm", "lora_config": None, "context_length": 4096, "num_devices": 4, "gradient_checkpointing": True,
    "train_batch_size_per_device": 2, "learning_rate": 3e-5, "num_epochs": 7, "num_warmup_steps": 0,
    "deepspeed": "deepspeed_configs/zero_3.json", "eval_batch_size_per_device": 9, "padding": "max_length",
    "attention": "sdpa", "dtype": "bfloat16", "gradient_accumulation_steps": 3, "hardware": "4xH200",
}  # fmt: skip


@pytest.mark.parametrize("key", GIVEN)
def test_what_is_given_wins(config, key):
    value = {"config_path": GIVEN[key]} if key == "deepspeed" else GIVEN[key]
    done, choices = chosen(config(LLAMA_8B, **{key: value}), "4xH200")
    plain = done.model_dump()[key]
    assert plain == value
    assert {choice.key: choice.reason for choice in choices}.get(key, "set in the config") == "set in the config"
    assert all(choice.reason for choice in choices)


def test_the_same_again_and_readable_back(config, tmp_path):
    once, _ = chosen(config(LLAMA_8B))
    again, _ = chosen(config(LLAMA_8B))
    assert once == again
    text = dump_config(once)
    assert "context_length: 512  # auto: the longest example has 480 tokens" in text and "model_id: " in text
    (tmp_path / "again.yaml").write_text(text)
    assert config_differences(load_config(tmp_path / "again.yaml"), once) == []
    assert config_differences(once, load_config(tmp_path / "again.yaml", ["hardware=1xT4"])) == []


def test_an_unknown_model_is_an_error_that_lists_the_core_models(config):
    with pytest.raises(ModelError, match=r"architecture that transformers has.*core models: tiny, .*meta-llama"):
        core_shape("owner/unheard-of")


def test_hardware_is_found_by_the_driver_s_name():
    assert gpu_named("NVIDIA A100-SXM4-80GB", 85_098_000_000).name == "A100-80G"
    assert gpu_named("NVIDIA A100-SXM4-40GB", 42_400_000_000).name == "A100-40G"
    assert gpu_named("NVIDIA H100 80GB HBM3", 85_000_000_000).name == "H100"
    assert gpu_named("Tesla T4", 15_800_000_000).name == "T4"
    assert gpu_named("NVIDIA GeForce RTX 4090", 25_000_000_000).name == "NVIDIA GeForce RTX 4090"


def test_an_unknown_gpu_is_an_error(config):
    with pytest.raises(ConfigError, match="hardware: got '8xB52'"):
        config(hardware="8xB52")


# -- through main.py


def test_plan_prints_the_choices(config, capsys, write_rows):
    path = config(LLAMA_8B, train_path=write_rows(uneven_rows(40)), hardware="8xA100-80G").source
    assert main(["plan", path, "--default", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    reasons = {choice["key"]: choice["reason"] for choice in printed["choices"]}
    assert (
        printed["fits"]
        and printed["workers"] == 8
        and reasons["hardware"] == "set in the config"
        and "all of" in reasons["num_devices"]
    )
    assert main(["plan", path, "--default", "--json", "num_devices=2"]) == 0
    assert json.loads(capsys.readouterr().out)["workers"] == 2
    assert main(["plan", path, "--default"]) == 0
    assert "Chosen (--default)" in capsys.readouterr().out


def test_choices_are_recorded(config, write_rows, monkeypatch):
    monkeypatch.setattr("forgebook.planning.prepare.local_hardware", lambda: None)
    settings = config(train_path=write_rows(uneven_rows(16)), max_steps=3)
    prepared = prepare(settings, run.open_run(settings))
    text = dump_config(prepared.config)
    assert (
        "num_devices: 0  # auto: no GPU" in text and "r: 8  # auto: rank 8" in text and "max_steps: 3  # file" in text
    )
    printed = {choice["key"]: choice["value"] for choice in prepared.report["choices"]}
    assert printed["task"] == "instruction_tuning" and printed["context_length"] == 512 and len(printed) > 15


@pytest.mark.slow
def test_default_mode_learns_on_a_laptop_and_resumes(config, capsys, monkeypatch):
    """The first updates of the quickstart's task alone, in this process."""
    monkeypatch.setattr("forgebook.planning.prepare.local_hardware", lambda: None)
    path = config(train_path=str(REPOSITORY / "data/quickstart/train.jsonl")).source
    for _ in range(2):
        assert main([path, "--default", "max_steps=24"]) == 0
    assert "is complete already" in capsys.readouterr().out
    losses = losses_of(run.open_run(load_config(path)))
    assert len(losses) == 24 and sum(losses[-5:]) < 0.2 * sum(losses[:5])
