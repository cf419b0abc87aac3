"""Every YAML and every DeepSpeed file of the repository, one test each."""

import importlib.util
import json
import sys

import pytest

from conftest import REPOSITORY
from forgebook.config.deepspeed_file import read_deepspeed_config
from forgebook.config.parse import load_config
from forgebook.data.prompt_formats import render_prompt_format
from forgebook.launch.fine_tune import fine_tune
from forgebook.runs.metrics import read_metrics

FOLDERS = ("training_configs", "cookbooks", "end-to-end-examples")
CONFIGS = sorted(path for folder in FOLDERS for path in REPOSITORY.glob(f"{folder}/**/*.yaml"))
DEEPSPEED = sorted(REPOSITORY.glob("deepspeed_configs/*.json"))
STAGES = {path.stem: int(path.stem.split("_")[1]) for path in DEEPSPEED}
PLANNED = [
    path
    for path in CONFIGS
    if {"default", "custom", "real"} & set(path.relative_to(REPOSITORY).parts) and not path.name.startswith("cpu-")
]


@pytest.fixture(scope="module")
def headers():
    """The script that writes the headers; it plans each config once."""
    spec = importlib.util.spec_from_file_location("make_headers", REPOSITORY / "training_configs/make_headers.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def name(path):
    return str(path.relative_to(REPOSITORY))


def test_there_are_files_to_test():
    assert {path.stem for path in CONFIGS} >= {"quickstart", "pretrain", "gsm8k-lora", "gsm8k-full"}
    assert set(STAGES) >= {
        "zero_1", "zero_2", "zero_3", "zero_3_hpz", "zero_3_offload_optim", "zero_3_offload_optim+param",
    }  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_config_loads(path, recwarn):
    config = load_config(path, default="default" in path.parts)
    assert config.run_name == path.stem or config.origins["run_name"] == "file"
    assert config.deepspeed is None or read_deepspeed_config(config.deepspeed, config.source)
    assert not recwarn.list, "a config of ours uses a retired name"


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_config_says_how_it_is_run(path):
    assert path.read_text().startswith("#") and f"python main.py {name(path)}" in path.read_text()


def test_runs_have_folders_of_their_own():
    configs = [load_config(path) for path in CONFIGS]
    assert len({(config.storage_path, config.run_name) for config in configs}) == len(configs)


@pytest.mark.parametrize("path", PLANNED, ids=name)
def test_config_fits_its_own_hardware(path, headers):
    """Offline, from the catalog's shapes; rows as long as the context, in default mode GSM8K's."""
    facts = headers.facts_of(path)
    assert facts.worst.fits, f"{facts.worst.memory.total:,} bytes; {' '.join(facts.worst.changes)} would make it fit"
    assert facts.gsm8k.fits and facts.cost > 0
    assert facts.worst.context_length <= headers.shape_of(facts.config.model_id).context or facts.config.rope_scaling
    if {"custom", "real"} & set(path.parts):  # the file's place says what it is
        assert path.name.startswith(f"{facts.hardware}-{facts.config.context_length or 'auto'}")
        assert path.parent.name == ("lora" if facts.config.is_lora else "full")
        assert facts.config.origins["truncation"] == facts.config.origins["task"] == "file"


@pytest.mark.parametrize("path", PLANNED, ids=name)
def test_header_is_up_to_date(path, headers):
    assert headers.written(path) == path.read_text(), "run `make configs`"


def test_table_is_up_to_date(headers):
    assert headers.written(headers.README) == headers.README.read_text(), "run `make configs`"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (
            "google/gemma-2-27b/lora/8xA100-80G-512.yaml",
            "<bos><start_of_turn>user\nBe brief.\n\n2+2?<end_of_turn>\n<start_of_turn>model\n4<end_of_turn>\n",
        ),
        (
            "meta-llama/Meta-Llama-Guard-2-8B/lora/8xA10G-4096.yaml",
            "<|begin_of_text|>Be brief.2+2?4<|end_of_text|>",
        ),
    ],
    ids=["gemma", "guard"],
)
def test_prompt_format_renders(file, text):
    """Gemma's system message inside the first user message; Llama Guard's rows as they are, and an end."""
    prompt_format = load_config(REPOSITORY / "training_configs/custom" / file).generation_config.prompt_format
    roles = zip(("system", "user", "assistant"), ("Be brief.", "2+2?", "4"), strict=True)
    messages = [{"role": role, "content": content} for role, content in roles]
    assert render_prompt_format(messages, prompt_format, for_generation=False) == text


def test_a_header_says_what_of_llmforge_does_not_fit(headers, tmp_path):
    path = REPOSITORY / "training_configs/custom/mistralai/Mixtral-8x7B/lora/16xA10G-4096.yaml"
    text = "\n".join(headers.header(headers.facts_of(path)))
    assert "train_batch_size_per_device=8 gradient_accumulation_steps=1 takes" in text and "it does not fit" in text
    assert "gradient_accumulation_steps=2, applied here" in text
    with pytest.raises(SystemExit, match="needs the lines"):
        headers.between("model_id: tiny\n", headers.START, headers.END, [], path)


# What the tiny model reaches on held-out rows, as the YAMLs and the README say.
RESULTS = {
    "classify": lambda first, last: last["eval_accuracy"] > 0.9,
    "prefer": lambda first, last: first["eval_reward_accuracy"] <= 0.5 and last["eval_reward_accuracy"] > 0.9,
    "notes": lambda first, last: first["perplexity"] > 1_000 and last["perplexity"] < 6,
}


@pytest.mark.slow
@pytest.mark.parametrize("stem", RESULTS)
def test_a_task_reaches_its_result(stem, tmp_path, monkeypatch):
    """In this process, without DeepSpeed: the same rows in the same updates as with its two workers."""
    monkeypatch.chdir(REPOSITORY)
    path = REPOSITORY / f"training_configs/tiny/{stem}.yaml"
    batch = load_config(path).global_batch_size
    overrides = ["num_devices=0", "deepspeed=none", f"train_batch_size_per_device={batch}", f"storage_path={tmp_path}"]
    run = fine_tune(load_config(path, overrides))
    evaluations = [row for row in read_metrics(run.metrics) if "eval_loss" in row]
    assert RESULTS[stem](evaluations[0], evaluations[-1]), evaluations


@pytest.mark.parametrize("path", DEEPSPEED, ids=name)
def test_deepspeed_file_is_understood_by_deepspeed(path):
    """DeepSpeed's own model of its ZeRO block accepts every key, with the stage that the file's name says."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    settings = json.loads(path.read_text())
    block = {key: value for key, value in settings["zero_optimization"].items() if value != "auto"}
    known = {field.alias or key for key, field in DeepSpeedZeroConfig.model_fields.items()}
    known |= set(DeepSpeedZeroConfig.model_fields)
    assert set(settings["zero_optimization"]) <= known
    assert DeepSpeedZeroConfig(**block).stage == STAGES[path.stem]
