"""Config files: what loads, what is refused and in which words, and where every value came from."""

import dataclasses
import inspect
import json
import pickle
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import yaml

from forgebook.config import parse as config_module
from forgebook.config.blocks import LORA_KEYS
from forgebook.config.deepspeed_file import find_deepspeed_config, read_deepspeed_config
from forgebook.config.parse import (
    FinetuneConfig,
    PromptFormat,
    RetiredNameWarning,
    config_differences,
    dump_config,
    load_config,
)
from forgebook.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
FREQUENCY = "checkpoint_and_evaluation_frequency"
MINIMAL = "model_id: org/model\ntrain_path: train.jsonl\n"
LORA_BLOCK = """
lora_config:
  r: 8
  lora_alpha: 16
  lora_dropout: 0.05
  target_modules: [q_proj, v_proj, k_proj, o_proj, gate_proj, up_proj, down_proj, embed_tokens, lm_head]
  task_type: "CAUSAL_LM"
  modules_to_save: []
  bias: "none"
  fan_in_fan_out: false
  init_lora_weights: true
"""


@pytest.fixture
def write(tmp_path):
    """Write YAML text to a file and return its path."""

    def write(text, name="tiny.yaml"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write


@pytest.fixture
def load(write):
    """Load MINIMAL plus some YAML text."""
    return lambda text="", *overrides, **kwargs: load_config(write(MINIMAL + text), overrides, **kwargs)


def refusal(call, *args, **kwargs):
    """Return the message with which a call is refused."""
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "pydantic" not in message and "Input should" not in message, message
    return message


# -- values and defaults


def test_two_keys_are_enough(load):
    config = load()
    assert (config.model_id, config.train_path) == ("org/model", "train.jsonl")
    assert config.run_name == "tiny"
    assert config.task == "causal_lm"
    assert config.learning_rate == 1e-5 and not config.is_lora
    assert config.deepspeed.config_path == "deepspeed_configs/zero_3_offload_optim+param.json"
    assert config.gradient_checkpointing and config.padding == "longest" and config.truncation == "error"


def test_lora_raises_the_default_learning_rate(load):
    config = load("lora_config: {r: 8}")
    assert config.is_lora and config.learning_rate == 1e-4 and config.origins["learning_rate"] == "auto"
    assert load("lora_config: {r: 8}\nlearning_rate: 3e-5").learning_rate == 3e-5


def test_every_field_is_documented():
    blocks = [kind for kind in vars(config_module).values() if inspect.isclass(kind) and hasattr(kind, "model_fields")]
    blocks = [kind for kind in blocks if kind.__name__ != "BaseModel"]
    assert FinetuneConfig in blocks and len(blocks) > 10
    missing = [f"{kind.__name__}.{name}" for kind in blocks for name, field in kind.model_fields.items()
               if not field.description]  # fmt: skip
    assert not missing


def test_configs_are_frozen(load):
    with pytest.raises(Exception, match="frozen"):
        load().num_epochs = 3


def test_numbers_with_an_exponent_load_as_numbers_everywhere(load):
    config = load(
        """
learning_rate: 1e-4
adam_epsilon: 1E-8
adam_betas: [9e-1, 0.95]
max_steps: 1e3
worker_resources: {accelerator_type:A10G: 1e-3}
lora_config: {lora_dropout: 5e-2, rank_pattern: {a: 1e1}}
rope_scaling: {rope_type: linear, factor: 2e0}
""",
        "weight_decay=1e-2",
        "trainer_resources.memory=5e10",
    )
    assert config.learning_rate == 1e-4 and config.adam_epsilon == 1e-8 and config.weight_decay == 1e-2
    assert config.adam_betas == (0.9, 0.95)
    assert config.max_steps == 1000 and isinstance(config.max_steps, int)
    assert config.worker_resources == {"accelerator_type:A10G": 0.001}
    assert config.trainer_resources == {"memory": 5e10}
    assert config.lora_config == {"lora_dropout": 0.05, "rank_pattern": {"a": 10.0}}
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}


def test_text_that_looks_like_something_else_stays_text(load):
    config = load('run_name: "1e-4"\ncustom_model_tag: 1e-4\nlogger: {provider: wandb, provider_config: {name: 1e-4}}')
    assert (config.run_name, config.custom_model_tag) == ("1e-4", "1e-4")
    assert config.logger.provider_config == {"name": "1e-4"}
    assert load("run_name: 2024-06-01").run_name == "2024-06-01"


def test_byte_counts_stay_whole(load):
    memory = load("trainer_resources: {memory: 53687091200}").trainer_resources["memory"]
    assert memory == 53687091200 and isinstance(memory, int)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_epochs: true", "num_epochs: got True, must be a whole number"),
        ("num_epochs: 0", "num_epochs: got 0, must be greater than 0"),
        ("num_epochs: 1.5", "num_epochs: got 1.5, must be a whole number"),
        ("learning_rate: true", "learning_rate: got True, must be a number"),
        ("learning_rate: .nan", "learning_rate: got nan, must be"),
        ("learning_rate: fast", "learning_rate: got 'fast', must be a number"),
        ("gradient_checkpointing: 1", "gradient_checkpointing: got 1, must be true or false"),
        ("padding: longset", "padding: got 'longset', must be 'longest', 'max_length' or 'packed'"),
        ("num_devices: {min: 1}", "num_devices: got {'min': 1}, must be a whole number, or two: {min: 1, max: 2}"),
        ("num_devices: {min: 3, max: 2}", "min_devices: got 3, num_devices is only 2"),
        ("num_devices: {min: 0, max: 2}", "min_devices: got 0, must be greater than or equal to 1"),
        ("num_devices: -1", "num_devices: got -1, must be greater than or equal to 0"),
        ("worker_resources: {GPU: true}", "worker_resources.GPU: got True, must be a number, 0 or more"),
        ("worker_resources: {GPU: -1}", "worker_resources.GPU: got -1, must be a number, 0 or more"),
        ("adam_betas: [0.9]", "adam_betas: got [0.9], must be"),
        ("adam_betas: [0.9, true]", "adam_betas.1: got True, must be a number"),
        ("run_name: 42", "run_name: got 42, must be text"),
        ("run_name: ../up", "run_name: got '../up', must be a folder name"),
        ("logger: wandb", "logger: got 'wandb', must be a block of 'key: value' lines"),
        ("logger: {rank_zero_only: true}", "missing key 'logger.provider'"),
        ("torch_compile: fast", "torch_compile: got 'fast', must be true, false or a block of options"),
        ("lora_config: {r: true}", "lora_config: r: got True, must be a whole number greater than 0"),
        ("classifier_config: {label_tokens: [a]}", ".label_tokens: got ['a'], must be a list of at least 2"),
        ("classifier_config: {label_tokens: [a, a]}", "must not contain a label twice"),
        ("initial_base_model_ckpt_path: {repo_id: 3}", ".repo_id: got 3, must be text"),
        ("checkpoint_and_evaluation_frequency: {unit: weeks, frequency: 0}", "must be 'epochs' or 'steps'"),
        ("generation_config: {stopping_sequences: [true]}", ".stopping_sequences.0: got True"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_in_one_line(load, text, message):
    refused = refusal(load, text)
    assert message in refused
    assert all(line.endswith("tiny.yaml:3)") for line in refused.splitlines()), refused


def test_missing_keys(write):
    assert refusal(load_config, write("model_id: m")).startswith("missing key 'train_path' (")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat': did you mean 'learning_rate'? ("),
        ("deepspeed: {config_pth: x}", "unknown key 'deepspeed.config_pth': did you mean 'config_path'? ("),
        ("generation_config: {prompt_format: {usr: x}}", "prompt_format.usr': did you mean 'user'? ("),
        ("lora_config: {lora_alhpa: 1}", "unknown key 'lora_alhpa': did you mean 'lora_alpha'? ("),
        ("zzz: 1", "unknown key 'zzz' ("),
        ("a.b: 1", "unknown key 'a.b' ("),
        ("7: 1", "unknown key '7' ("),
        ("initial_base_model_ckpt_path: {repo: x}", "_path.repo': did you mean 'repo_id'? ("),
        ("liger_kernel: {kwargs: {rmsnorm: true}}", "liger_kernel.kwargs.rmsnorm"),
    ],
)  # fmt: skip
def test_unknown_keys_name_the_nearest_one_and_the_line(load, text, message):
    refused = refusal(load, text)
    assert message in refused and "tiny.yaml:3)" in refused


def test_all_problems_are_reported_at_once_with_their_places(load):
    refused = refusal(load, "num_epochs: no\nseeed: 1\nlogger:\n  provider: tensorbord\n", "max_steps=-1").splitlines()
    assert len(refused) == 4
    places = {line.split(":")[0].split("'")[0].strip(): line for line in refused}
    assert places["num_epochs"].endswith("tiny.yaml:3)")
    assert places["unknown key"].endswith("tiny.yaml:4)")
    assert places["logger.provider"].endswith("tiny.yaml:6)")
    assert places["max_steps"].endswith("(override max_steps=-1)")


# -- tasks


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("", "causal_lm"),
        ("task: instruction_tuning", "instruction_tuning"),
        ("task:", "causal_lm"),
        ("classifier_config: {label_tokens: [a, b]}", "classification"),
        ("preference_tuning_config: {beta: 0.01}", "preference_tuning"),
        ("preference_tuning_config: {}", "preference_tuning"),
        ("task: preference_tuning", "preference_tuning"),
    ],
)
def test_task_follows_its_block(load, text, task):
    config = load(text)
    assert config.task == task
    assert config.origins["task"] == ("file" if "task: " in text else "auto")
    if task == "preference_tuning":
        assert config.preference_tuning_config.beta > 0


@pytest.mark.parametrize(
    "text",
    [
        "task: causal_lm\nclassifier_config: {label_tokens: [a, b]}",
        "task: classification\npreference_tuning_config: {beta: 0.1}",
        "classifier_config: {label_tokens: [a, b]}\npreference_tuning_config: {beta: 0.1}",
    ],
)
def test_a_task_that_contradicts_a_block_is_refused(load, text):
    assert "contradicts" in refusal(load, text)


def test_blocks_that_need_each_other(load):
    assert "needs classifier_config" in refusal(load, "task: classification")
    assert "needs lora_config" in refusal(load, "initial_adapter_model_ckpt_path: s3://b/a")


# -- prompt formats


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"system": "x"}, "prompt_format.system: got 'x', must contain '{instruction}'"),
        ({"user": "x"}, "prompt_format.user: got 'x', must contain '{instruction}'"),
        ({"assistant": "x"}, "prompt_format.assistant: got 'x', must contain '{instruction}'"),
        ({"system_in_user": True}, "system_in_user: true needs '{system}' in the user template"),
        ({"system_in_last_user": True}, "system_in_last_user: true needs system_in_user: true"),
        ({"colour": "red"}, "unknown key 'generation_config.prompt_format.colour'"),
        ({"bos": 1}, "prompt_format.bos: got 1, must be text"),
    ],
)
def test_prompt_formats_are_checked(load, change, message):
    templates = dict.fromkeys(("system", "user", "assistant"), "{instruction}") | change
    assert message in refusal(load, yaml.safe_dump({"generation_config": {"prompt_format": templates}}))


def test_prompt_format_defaults():
    templates = PromptFormat(system="{instruction}", user="{instruction}", assistant="{instruction}")
    assert (templates.trailing_assistant, templates.bos, templates.default_system_message) == ("", "", "")
    assert templates.strip_whitespace and not templates.system_in_user


# -- files that are no configs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty, must hold"),
        ("# only a comment\n", "is empty, must hold"),
        ("- a\n- b\n", "holds ['a', 'b'], must hold"),
        ("model_id: m\ntrain_path: [\n", "tiny.yaml:3: not valid YAML"),
        ("model_id: m\n  train_path: t\n", "tiny.yaml:2: not valid YAML"),
        ("model_id: m\na: !!python/name:os.system\n", "tiny.yaml:2: not valid YAML"),
        ("model_id: m\n[a]: 1\n", "tiny.yaml:2: not valid YAML"),
        ("model_id: \x00", "tiny.yaml: not valid YAML"),
        ("a: 1\n---\nb: 1\n", "not valid YAML"),
        (
            MINIMAL + "seed: 1\nnum_epochs: 2\nseed: 2\n",
            "tiny.yaml:5: key 'seed' has another value in line 3",
        ),
        (
            MINIMAL + "lora_config:\n  r: 8\n  r: 16\n",
            "tiny.yaml:5: key 'lora_config.r' has another value in line 4",
        ),
    ],
)
def test_files_that_are_no_configs(write, text, message):
    assert message in refusal(load_config, write(text))


def test_a_key_repeated_with_the_same_value_is_harmless(load):
    assert load("seed: 7\nnum_epochs: 1\nseed: 7\n").seed == 7


def test_unreadable_files(tmp_path):
    assert "No such file" in refusal(load_config, tmp_path / "absent.yaml")
    assert "directory" in refusal(load_config, tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not text" in refusal(load_config, tmp_path / "binary.yaml")


def test_urls(monkeypatch):
    import io
    import urllib.error
    import urllib.request

    pages = {"https://host/path/remote.yaml?raw=1": MINIMAL}

    def urlopen(url, timeout):
        assert timeout > 0
        if url not in pages:
            raise urllib.error.HTTPError(url, 404, "Not Found", None, None)
        return io.BytesIO(pages[url].encode())

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    config = load_config("https://host/path/remote.yaml?raw=1", ["num_epochs=2"])
    assert config.run_name == "remote" and config.num_epochs == 2
    refused = refusal(load_config, "https://host/absent.yaml")
    assert "cannot download https://host/absent.yaml" in refused and "404" in refused
    assert "a local file or an https:// URL" in refusal(load_config, "s3://bucket/config.yaml")


# -- overrides


def test_overrides_set_nested_values_and_later_ones_win(load):
    config = load(
        LORA_BLOCK,
        "lora_config.r=16",
        "num_epochs=2",
        "num_epochs=3",
        "lora_config.target_modules=[q_proj, v_proj]",
        "logger={provider: wandb, provider_config: {tags: [a, b]}}",
        "logger.provider_config.name=x=y",
        "train_path=s3://bucket/train.jsonl",
        "worker_resources.accelerator_type:A10G=0.001",
    )
    assert config.lora_config["r"] == 16 and config.lora_config["lora_alpha"] == 16
    assert config.lora_config["target_modules"] == ["q_proj", "v_proj"]
    assert config.num_epochs == 3 and config.train_path == "s3://bucket/train.jsonl"
    assert config.logger.provider_config == {"tags": ["a", "b"], "name": "x=y"}
    assert config.worker_resources == {"accelerator_type:A10G": 0.001}


def test_null_removes_a_block_and_a_block_replaces_a_block(load):
    assert load(LORA_BLOCK, "lora_config=null").lora_config is None
    assert load(LORA_BLOCK, "lora_config={r: 4}").lora_config == {"r": 4}


@pytest.mark.parametrize("override", ["num_epochs", "=3", "num_epochs=", "lora_config..r=3", "num_epochs=[1", "--x"])
def test_malformed_overrides(load, override):
    assert f"override {override!r}" in refusal(load, "", override)


def test_unknown_overrides_name_the_nearest_key(load):
    refused = refusal(load, "", "lora_config.rr=3", "num_epoch=3")
    assert "unknown key 'num_epoch': did you mean 'num_epochs'? (override num_epoch=3)" in refused
    assert "lora_config: unknown key 'rr': did you mean 'r'?" in refused


# -- the default mode


def test_default_mode_trains_a_small_adapter(load):
    config = load("", default=True)
    assert config.lora_config == {
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "target_modules": "all-linear",
    }
    assert config.learning_rate == 1e-4
    assert config.origins["lora_config.r"] == "auto"


def test_default_mode_leaves_a_given_lora_config_alone(load):
    assert load("lora_config: {r: 64}", default=True).lora_config == {"r": 64}
    assert load("lora_config: null", default=True).lora_config is None


# -- DeepSpeed


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("", "deepspeed_configs/zero_3_offload_optim+param.json"),
        ("deepspeed: zero_2", "deepspeed_configs/zero_2.json"),
        ("deepspeed: {config_path: deepspeed_configs/zero_3.json}", "deepspeed_configs/zero_3.json"),
        ("deepspeed: {config_path: ./deepspeed_configs/zero_2.json}", "./deepspeed_configs/zero_2.json"),
        ("deepspeed: none", None),
        ("deepspeed: null", None),
    ],
)
def test_deepspeed_forms(load, text, path):
    config = load(text)
    assert (config.deepspeed and config.deepspeed.config_path) == path
    settings = read_deepspeed_config(config)
    assert settings is None if path is None else "zero_optimization" in settings


def test_deepspeed_overrides(load):
    assert load("deepspeed: zero_2", "deepspeed.config_path=deepspeed_configs/zero_1.json").deepspeed.config_path == (
        "deepspeed_configs/zero_1.json"
    )
    assert load("deepspeed: {config_path: deepspeed_configs/zero_3.json}", "deepspeed=none").deepspeed is None


def test_deepspeed_files_are_found_from_any_working_directory(load, monkeypatch, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert find_deepspeed_config("deepspeed_configs/zero_2.json") == REPOSITORY / "deepspeed_configs/zero_2.json"
    assert read_deepspeed_config(load("deepspeed: zero_2"))["zero_optimization"]["stage"] == 2


def test_a_deepspeed_file_beside_the_config_is_still_found_from_the_run_folder(load, tmp_path):
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 0}}')
    config = load("deepspeed: {config_path: mine.json}")
    run_folder = tmp_path / "runs" / "tiny"
    run_folder.mkdir(parents=True)
    (run_folder / "config.yaml").write_text(dump_config(config))
    assert load_config(run_folder / "config.yaml") == config


def test_the_working_directory_comes_first(load, monkeypatch, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    for folder, stage in ((tmp_path, 1), (here, 2)):
        (folder / "mine.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    monkeypatch.chdir(here)
    assert find_deepspeed_config("mine.json", str(tmp_path / "tiny.yaml")) == here / "mine.json"


@pytest.mark.parametrize(
    "name",
    [
        "config_files/deepspeed/zero_3_optimizer_parameter_offload.json",
        "deepspeed_configs/zero_3_llama_2_7b.json",
        "deepspeed_configs/zero_3_llama_2_70b.json",
        "deepspeed_configs/zero_3_mistral_7b.json",
    ],
)
def test_files_of_early_trees_are_read_as_the_shipped_one_with_their_settings(load, name):
    with pytest.warns(UserWarning, match=r"does not exist: using deepspeed_configs/zero_3_offload_optim\+param"):
        config = load(f"deepspeed: {{config_path: {name}}}")
    assert read_deepspeed_config(config)["zero_optimization"]["offload_param"]["device"] == "cpu"


def test_a_folder_of_another_project_falls_back_on_the_shipped_file_of_that_name(load):
    with pytest.warns(UserWarning, match=r"configs/deepspeed/zero_3\.json does not exist: using deepspeed_configs/"):
        config = load("deepspeed: {config_path: configs/deepspeed/zero_3.json}")
    assert config.deepspeed.config_path == "deepspeed_configs/zero_3.json"


def test_unknown_and_damaged_deepspeed_files(load, tmp_path):
    refused = refusal(load, "deepspeed: zero_4")
    assert "deepspeed.config_path: got 'deepspeed_configs/zero_4.json'" in refused and "zero_3_hpz.json" in refused
    (tmp_path / "list.json").write_text("[1]")
    assert "list.json holds [1], must hold one JSON object" in refusal(load, "deepspeed: list.json")
    (tmp_path / "bad.json").write_text('{\n"a": }')
    assert "bad.json:2: not valid JSON" in refusal(load, "deepspeed: bad.json")


SHIPPED = sorted((REPOSITORY / "deepspeed_configs").glob("*.json"))
assert {path.stem for path in SHIPPED} >= {
    "zero_1", "zero_2", "zero_3", "zero_3_hpz", "zero_3_offload_optim", "zero_3_offload_optim+param"
}  # fmt: skip


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_deepspeed_files(path):
    settings = json.loads(path.read_text())
    assert settings["bf16"] == {"enabled": "auto"}
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert settings[key] == "auto"
    zero = settings["zero_optimization"]
    assert f"zero_{zero['stage']}" == path.stem[:6]
    assert ("offload_optimizer" in zero) == ("optim" in path.stem)
    assert ("offload_param" in zero) == ("param" in path.stem)
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == (zero["stage"] == 3)
    model = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    known = set(model.model_fields) | {field.alias for field in model.model_fields.values()}
    assert set(zero) <= known
    model(**{key: value for key, value in zero.items() if value != "auto"})


# -- origins, resolving and writing back


def test_origins_tell_who_set_a_value(load):
    config = load("num_epochs: 3\nlogger: {provider: wandb}\nlearning_rate:\n", "seed=1", "deepspeed=zero_2")
    assert {key: config.origins[key] for key in (
        "num_epochs", "logger.provider", "logger.rank_zero_only", "seed", "deepspeed.config_path",
        "learning_rate", "task", "run_name", "padding", "context_length",
    )} == {
        "num_epochs": "file", "logger.provider": "file", "logger.rank_zero_only": "default",
        "seed": "override", "deepspeed.config_path": "override",
        "learning_rate": "auto", "task": "auto", "run_name": "auto",
        "padding": "default", "context_length": "default",
    }  # fmt: skip
    assert set(config.origins.values()) <= {"file", "override", "default", "auto"}


def test_resolve_returns_a_checked_copy(load):
    config = load("num_devices: 4\ntrain_batch_size_per_device: 2\nseed: 1\n")
    resolved = config.resolve(context_length=512, train_batch_size_per_device=8, seed=1)
    assert (config.context_length, resolved.context_length) == (None, 512)
    assert resolved.origins["context_length"] == resolved.origins["train_batch_size_per_device"] == "auto"
    assert resolved.origins["seed"] == resolved.origins["num_devices"] == "file"
    assert resolved.source == config.source
    with pytest.raises(ValueError, match="context_length"):
        config.resolve(context_length=-1)


def test_fewer_devices_may_go_on(load, tmp_path):
    config = load("num_devices: {min: 1, max: 4}\ndeepspeed: none\n")
    assert (config.min_devices, config.num_devices) == (1, 4)
    assert config.origins["min_devices"] == config.origins["num_devices"] == "file"
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dumped.yaml") == config


@pytest.mark.parametrize(("devices", "rows"), [(0, 8), (1, 8), (4, 32)])
def test_global_batch_size(load, devices, rows):
    config = load(f"num_devices: {devices}\ngradient_accumulation_steps: 4\n")
    with pytest.raises(ValueError, match="train_batch_size_per_device"):
        _ = config.global_batch_size
    assert config.resolve(train_batch_size_per_device=2).global_batch_size == rows


def test_dump_loads_back_to_an_equal_config(load, write):
    config = load(
        LORA_BLOCK
        + """
learning_rate: 1e-5
adam_betas: [0.9, 0.95]
custom_model_tag: "1e-4"
worker_resources: {anyscale/accelerator_shape:4xA10G: 0.001, g5.4xlarge: 1}
initial_adapter_model_ckpt_path: {repo_id: org/adapter}
generation_config:
  prompt_format:
    system: "{instruction} + "
    user: "<start_of_turn>user\\n{system}{instruction}<end_of_turn>\\n # not a comment"
    assistant: "model: {instruction}é"
    system_in_user: true
  stopping_sequences: ["<end_of_turn>", 7, "# x"]
torch_compile: {mode: reduce-overhead}
logger: {provider: wandb, provider_config: {notes: "a: b", entity: null}}
""",
        "deepspeed=zero_2",
    ).resolve(context_length=512)
    text = dump_config(config)
    assert "context_length: 512  # auto" in text
    assert "  config_path: deepspeed_configs/zero_2.json  # override" in text
    assert "  r: 8  # file" in text and "padding: longest  # default" in text
    assert load_config(write(text, "config.yaml")) == config
    assert config != config.resolve(seed=7)


def test_dump_writes_no_secrets(load):
    text = dump_config(load("""
logger:
  provider: wandb
  provider_config: {project: p, api_key: AAA, deep: {password: BBB, hf_TOKEN: CCC, client_secret: {x: DDD}}}
"""))  # fmt: skip
    assert "project: p" in text and text.count("***") == 4
    assert not [secret for secret in ("AAA", "BBB", "CCC", "DDD") if secret in text]


def test_configs_cross_process_borders(load):
    config = load("num_epochs: 3")
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config and copy.origins == config.origins and copy.source == config.source


def test_differences_leave_out_what_does_not_change_the_weights(load):
    config = load("num_devices: 4\n" + LORA_BLOCK)
    same = load(
        "num_devices: 4\n" + LORA_BLOCK,
        "run_name=other", "storage_path=s3://b", "on_existing=fail", "max_failures=0",
        "worker_resources={GPU: 1}", "trainer_resources={memory: 1e9}", "logger={provider: wandb}",
        "gradient_checkpointing=false",
        "generation_config.stopping_sequences=[a]",
    )  # fmt: skip
    assert config_differences(config, same) == []
    other = load("num_devices: 2\n" + LORA_BLOCK, "lora_config.r=16", "learning_rate=1e-3", "deepspeed=none")
    assert config_differences(config, other) == [
        "deepspeed.config_path", "learning_rate", "lora_config.r", "num_devices"
    ]  # fmt: skip


# -- retired names


@pytest.mark.parametrize(
    ("text", "expected", "note"),
    [
        ("no_gradient_checkpoint: True", {"gradient_checkpointing": False}, "gradient_checkpointing: false"),
        ("no_gradient_checkpoint: False", {"gradient_checkpointing": True}, "gradient_checkpointing: true"),
        ("flash_attention_2: true", {"attention": "auto"}, "read as attention"),
        ("flash_attention_2: false", {"attention": "sdpa"}, "read as attention"),
        ("checkpoint_every_n_epochs: 2", {FREQUENCY: ("epochs", 2)}, '"frequency": 2'),
        ("max_num_checkpoints: 10\nnum_epochs: 3", {FREQUENCY: ("epochs", 1)}, "frequency"),
        ("max_num_checkpoints: 2\nnum_epochs: 5", {FREQUENCY: ("epochs", 3)}, "frequency"),
        ("max_num_checkpoints: 2", {FREQUENCY: None}, "without num_epochs, every epoch ends with one"),
        ("dataset_size_scaling_factor: 1e10", {}, "ignored: data sets have no size limit"),
        ("output_dir: /mnt/local_storage", {"storage_path": "runs"}, "storage_path says where runs go"),
        ("num_data_blocks: 20", {"num_data_blocks_per_device": 20}, "read as num_data_blocks_per_device: 20"),
        ("min_num_update_steps: 24", {"min_update_steps": 24}, "read as min_update_steps: 24"),
        ("model_tag: mine", {"custom_model_tag": "mine"}, "read as custom_model_tag"),
        ("forward_checkpoint_config: {tag: t, remote_uri: s3://b}", {}, "name it with custom_model_tag"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("as_override", [False, True], ids=["file", "override"])
def test_retired_names_load_with_one_warning(load, text, expected, note, as_override):
    lines = text.splitlines()
    overrides = [line.replace(": ", "=", 1) for line in lines[:1]] if as_override else []
    with pytest.warns() as caught:
        config = load("\n".join(lines[1:] if as_override else lines) + "\n", *overrides)
    [warning] = caught
    assert warning.category is RetiredNameWarning and note in str(warning.message)
    assert str(warning.message).startswith(f"{text.split(':')[0]} is retired")
    for key, value in expected.items():
        got = getattr(config, key)
        assert ((got.unit, got.frequency) if isinstance(value, tuple) else got) == value
        if value is not None and key != "storage_path":
            assert {origin for name, origin in config.origins.items() if name.startswith(key)} == {
                "override" if as_override else "file"
            }


def test_retired_checkpoint_keys_together_are_decided_by_the_interval(load):
    with pytest.warns(RetiredNameWarning) as caught:
        config = load("checkpoint_every_n_epochs: 2\nmax_num_checkpoints: 10\nnum_epochs: 4\n")
    assert len(caught) == 2 and config.checkpoint_and_evaluation_frequency.frequency == 2


def test_retired_resources_of_the_reference_workers(load):
    text = "preference_tuning_config: {logprob_processor_scaling_config: {%s: {accelerator_type:A10G: 0.001}}}"
    with pytest.warns(RetiredNameWarning, match="read as custom_resources"):
        old = load(text % "worker_resources")
    assert old == load(text % "custom_resources")


@pytest.mark.parametrize(
    "text",
    [
        "no_gradient_checkpoint: true\ngradient_checkpointing: false",
        "flash_attention_2: true\nattention: sdpa",
        "model_tag: a\ncustom_model_tag: a",
        f"max_num_checkpoints: 1\nnum_epochs: 2\n{FREQUENCY}: {{unit: steps, frequency: 9}}",
    ],
)
@pytest.mark.filterwarnings("ignore::forgebook.config.parse.RetiredNameWarning")
def test_an_old_and_a_new_name_together_are_refused(load, text):
    refused = refusal(load, text)
    assert all(line.split(":")[0] in refused for line in text.splitlines() if "num_epochs" not in line)
    assert "both given" in refused


@pytest.mark.filterwarnings("ignore::forgebook.config.parse.RetiredNameWarning")
def test_an_override_of_today_wins_over_a_retired_name_in_the_file(load):
    assert load("no_gradient_checkpoint: true\n", "gradient_checkpointing=true").gradient_checkpointing
    assert "gradient_checkpointing: got 'perhaps'" in refusal(load, "no_gradient_checkpoint: perhaps\n")


# -- shapes of LLMForge's time; the values are those of its published table, the texts are ours

ACCELERATORS = ["accelerator_type:A10G", "accelerator_type:A100-80G", "anyscale/accelerator_shape:4xA10G"]
PUBLISHED = [  # context, devices, train and eval batch, accumulation, epochs, learning rate, DeepSpeed, LoRA
    (512, 4, 4, 4, 1, 3, "1e-4", "zero_3_offload_optim+param", True),
    (512, 4, 2, 4, 2, 3, "1e-4", "zero_2", True),
    (512, 16, 8, 8, 1, 3, "1e-4", "zero_3_offload_optim+param", True),
    (512, 16, 4, 4, 1, 3, "5e-6", "zero_3_offload_optim+param", False),
    (512, 16, 8, 16, 1, 3, "1e-5", "zero_3_offload_optim+param", False),
    (4096, 16, 2, 2, 1, 3, "5e-6", "zero_3_hpz", False),
    (4096, 32, 8, 8, 1, 3, "5e-6", "zero_3_offload_optim+param", False),
    (4096, 8, 2, 2, 1, 3, "1e-4", "zero_3_offload_optim+param", True),
    (4096, 32, 1, 1, 1, 3, "1e-4", "zero_3_offload_optim+param", True),
    (1024, 8, 12, 12, 8, 4, "1e-5", "zero_3_offload_optim", False),
    (4096, 16, 8, 8, 1, 3, "1e-4", "zero_3", True),
    (512, 32, 8, 8, 1, 3, "5e-6", "zero_3_offload_optim", False),
    (8192, 8, 1, 1, 1, 1, "1e-4", "zero_3_offload_optim+param", True),
    (2048, 4, 32, 16, 1, 6, "3e-5", "zero_3", True),
    (512, 2, 16, 16, 1, 3, "1e-4", "zero_3_offload_optim+param", True),
]


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: "-".join(map(str, row)))
@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_published_recommendations_load(load, row, accelerator):
    context, devices, train, evaluate, accumulation, epochs, rate, deepspeed, lora = row
    config = load(
        f"""
valid_path: s3://bucket/valid.jsonl
context_length: {context}
num_devices: {devices}
num_epochs: {epochs}
train_batch_size_per_device: {train}
eval_batch_size_per_device: {evaluate}
gradient_accumulation_steps: {accumulation}
learning_rate: {rate}
padding: "longest"
num_checkpoints_to_keep: 1
deepspeed:
  config_path: deepspeed_configs/{deepspeed}.json
trainer_resources:
  memory: 53687091200 # rank 0 gathers the weights
worker_resources:
  {accelerator}: 0.001
"""
        + (LORA_BLOCK if lora else "")
    )
    assert config.learning_rate == float(rate) and config.is_lora == lora
    assert config.global_batch_size == train * devices * accumulation
    assert read_deepspeed_config(config)["zero_optimization"]["stage"] == int(deepspeed[5])


ERAS = {
    "early 2024": """
        context_length: 512
        num_devices: 16
        num_epochs: 10
        learning_rate: 5e-6
        num_checkpoints_to_keep: 1
        max_num_checkpoints: 10
        dataset_size_scaling_factor: 10000
        output_dir: /mnt/local_storage
        no_gradient_checkpoint: False
        deepspeed:
          config_path: deepspeed_configs/zero_3.json
        dataset_size_scaling_factor: 10000 # said twice, as published
        flash_attention_2: true
        forward_checkpoint_config: {tag: mine, remote_uri: s3://bucket/lora}
        worker_resources: {g5.4xlarge: 1}
        """,
    "mid 2024": """
        num_devices: 16
        gradient_accumulation_steps: 2
        learning_rate: 1e-4
        lr_scheduler_type: linear
        num_warmup_steps: 10
        checkpoint_every_n_epochs: 1
        flash_attention_2: true
        trainer_resources: {memory: 53687091200}
        """,
    "late 2024": """
        gradient_checkpointing: True
        checkpoint_and_evaluation_frequency: {unit: epochs, frequency: 5}
        custom_model_tag: my-model
        eval_first: true
        min_update_steps: 100
        """,
    "preference tuning": """
        task: "preference_tuning"
        context_length: 4096
        num_data_blocks_per_device: 32
        num_devices: 12
        learning_rate: 5e-6
        no_gradient_checkpoint: False
        preference_tuning_config:
          beta: 0.01
          logprob_processor_scaling_config:
            worker_resources: {accelerator_type:A10G: 0.001}
            concurrency: 4
            batch_size: 2
        """,
    "classifier": """
        context_length: 1024
        lr_scheduler_type: constant
        learning_rate: 1e-5
        flash_attention_2: true
        classifier_config:
          label_tokens: ["[[1]]", "[[2]]", "[[3]]", "[[4]]", "[[5]]"]
          eval_metrics: ["prauc", "accuracy", "f1"]
        """,
    "liger": """
        liger_kernel:
          enabled: True
          kwargs: {rms_norm: True, rope: True, cross_entropy: True, fused_linear_cross_entropy: False}
        """,
    "liger without kwargs": "liger_kernel: {enabled: True}",
    "wandb": """
        logger:
          provider: wandb
          provider_config: {project: llmforge, group: g, name: n, tags: [a, b]}
          rank_zero_only: True
        """,
    "wandb by default": "logger: {provider: wandb}",
    "mlflow": """
        logger:
          provider: mlflow
          provider_config:
            tracking_uri: "https://host"
            experiment_name: "/Users/me/experiment"
            create_experiment_if_not_exists: True
        """,
    "continue from an adapter": LORA_BLOCK + "initial_adapter_model_ckpt_path: s3://bucket/adapter\n",
    "continue from the hub": """
        initial_base_model_ckpt_path:
          repo_id: org/weights
        """,
    "pass-through prompt format": """
        initial_base_model_ckpt_path: s3://bucket/guard
        generation_config:
          prompt_format:
            system: "{instruction}"
            user: "{instruction}"
            assistant: "{instruction} </s>"
            trailing_assistant: ""
            bos: ""
        """,
    "system in user": """
        generation_config:
          prompt_format:
            system: "{instruction} + "
            assistant: "<start_of_turn>model\\n{instruction}<end_of_turn>\\n"
            trailing_assistant: "<start_of_turn>model\\n"
            user: "<start_of_turn>user\\n{system}{instruction}<end_of_turn>\\n"
            system_in_user: True
            bos: "<bos>"
            default_system_message: ""
          stopping_sequences: ["<end_of_turn>"]
        """,
    "empty prompt format": "generation_config:\n  prompt_format:\n",
}


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.filterwarnings("ignore::forgebook.config.parse.RetiredNameWarning")
def test_shapes_of_every_era_load_unchanged(load, write, era):
    config = load(textwrap.dedent(ERAS[era]))
    assert load_config(write(dump_config(config), "config.yaml")) == config


# -- the module itself


def test_lora_keys_are_those_of_the_installed_peft():
    peft = pytest.importorskip("peft")
    assert {field.name for field in dataclasses.fields(peft.LoraConfig) if field.init} == LORA_KEYS


def test_import_is_light():
    heavy = "{'torch', 'ray', 'transformers', 'pyarrow', 'peft', 'deepspeed', 'accelerate'}"
    code = f"import sys, forgebook.config.parse; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_exist():
    assert all(hasattr(config_module, name) for name in config_module.__all__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(FinetuneConfig(model_id="m", train_path="t"), FinetuneConfig)
