"""Config files: what loads and what is refused, in which words and where; what is written back loads again."""

import subprocess
import sys
import textwrap
import warnings

import pytest

from conftest import REPOSITORY
from forgebook.config.deepspeed_file import read_deepspeed_config
from forgebook.config.parse import config_differences, dump_config, load_config, load_resolved
from forgebook.config.schema import FinetuneConfig
from forgebook.errors import ConfigError
from support_config import LORA_BLOCK, MINIMAL, refusal


def test_missing_keys(write_yaml):
    assert refusal(load_config, write_yaml("model_id: m")).startswith("missing key 'train_path' (")


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
def test_unknown_keys_name_the_nearest_one_and_the_line(load_yaml, text, message):
    refused = refusal(load_yaml, text)
    assert message in refused and "tiny.yaml:3)" in refused


def test_all_problems_are_reported_at_once_with_their_places(load_yaml):
    refused = refusal(
        load_yaml, "num_epochs: no\nseeed: 1\nlogger:\n  provider: tensorbord\n", "max_steps=-1"
    ).splitlines()
    assert len(refused) == 4
    places = {line.split(":")[0].split("'")[0].strip(): line for line in refused}
    assert places["num_epochs"].endswith("tiny.yaml:3)")
    assert places["unknown key"].endswith("tiny.yaml:4)")
    assert places["logger.provider"].endswith("tiny.yaml:6)")
    assert places["max_steps"].endswith("(override max_steps=-1)")


def test_default_mode_trains_a_small_adapter(load_yaml):
    config = load_yaml("", default=True)
    assert config.lora_config == {
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "target_modules": "all-linear",
    }
    assert config.learning_rate == 1e-4
    assert config.origins["lora_config.r"] == "auto"


def test_default_mode_leaves_a_given_lora_config_alone(load_yaml):
    assert load_yaml("lora_config: {r: 64}", default=True).lora_config == {"r": 64}
    assert load_yaml("lora_config: null", default=True).lora_config is None


def test_fewer_devices_may_continue(load_yaml, tmp_path):
    config = load_yaml("num_devices: {min: 1, max: 4}\ndeepspeed: none\n")
    assert (config.min_devices, config.num_devices) == (1, 4)
    assert config.origins["min_devices"] == config.origins["num_devices"] == "file"
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dumped.yaml") == config


def test_dump_loads_back_to_an_equal_config(load_yaml, write_yaml):
    config = load_yaml(
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
    assert load_config(write_yaml(text, "config.yaml")) == config
    assert config != config.resolve(seed=7)


def test_a_key_without_effect_is_reported(load_yaml):
    with pytest.warns(UserWarning, match="rank_zero_only: false has no effect"):
        config = load_yaml("logger: [{provider: tensorboard}, {provider: wandb, rank_zero_only: false}]")
    assert [logger.provider for logger in config.loggers] == ["tensorboard", "wandb"] and load_yaml().loggers == []


def test_dump_writes_no_secrets(load_yaml):
    text = dump_config(load_yaml("""
logger:
  provider: wandb
  provider_config: {project: p, api_key: AAA, deep: {password: BBB, hf_TOKEN: CCC, client_secret: {x: DDD}}}
"""))  # fmt: skip
    assert "project: p" in text and text.count("***") == 4
    assert not [secret for secret in ("AAA", "BBB", "CCC", "DDD") if secret in text]


def test_differences_leave_out_what_does_not_change_the_weights(load_yaml):
    config = load_yaml("num_devices: 4\n" + LORA_BLOCK)
    same = load_yaml(
        "num_devices: 4\n" + LORA_BLOCK,
        "run_name=other", "storage_path=s3://b", "on_existing=fail", "max_failures=0",
        "worker_resources={GPU: 1}", "trainer_resources={memory: 1e9}", "logger={provider: wandb}",
        "gradient_checkpointing=false",
        "generation_config.stopping_sequences=[a]",
    )  # fmt: skip
    assert config_differences(config, same) == []
    other = load_yaml("num_devices: 2\n" + LORA_BLOCK, "lora_config.r=16", "learning_rate=1e-3", "deepspeed=none")
    assert config_differences(config, other) == [
        "deepspeed.config_path", "learning_rate", "lora_config.r", "num_devices"
    ]  # fmt: skip


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
def test_published_recommendations_load(load_yaml, row, accelerator):
    context, devices, train, evaluate, accumulation, epochs, rate, deepspeed, lora = row
    config = load_yaml(
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
    assert read_deepspeed_config(config.deepspeed, config.source)["zero_optimization"]["stage"] == int(deepspeed[5])


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
        dataset_size_scaling_factor: 10000 # set twice, as published
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
@pytest.mark.filterwarnings("ignore::forgebook.config.legacy_keys.RetiredNameWarning")
def test_shapes_of_every_era_load_unchanged(load_yaml, write_yaml, era):
    config = load_yaml(textwrap.dedent(ERAS[era]))
    assert load_config(write_yaml(dump_config(config), "config.yaml")) == config


def test_import_is_light():
    heavy = "{'torch', 'ray', 'transformers', 'pyarrow', 'peft', 'deepspeed', 'accelerate'}"
    code = f"import sys, forgebook.config.parse; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_config_is_made_in_python_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FinetuneConfig(model_id="m", train_path="t").model_id == "m"


def test_a_runs_config_that_lacks_a_value_is_named(write_yaml):
    path = write_yaml(MINIMAL + "context_length: 64\nnum_epochs: 1\ntrain_batch_size_per_device: 1\n")
    message = "has no value of eval_batch_size_per_device: it is damaged, or not the config of a run"
    assert message in refusal(load_resolved, path)
    path.write_text(path.read_text() + "eval_batch_size_per_device: 1\n")
    assert load_resolved(path).context_length == 64


def test_settings_of_the_template_may_stand_at_the_top_level(load_yaml):
    text = "chat_template_kwargs: {enable_thinking: false}\ngeneration_config: {stopping_sequences: [x]}\n"
    config = load_yaml(text)
    assert config.generation_config.chat_template_kwargs == {"enable_thinking": False}
    assert config.generation_config.stopping_sequences == ["x"]
    assert config.origins["generation_config.chat_template_kwargs.enable_thinking"] == "file"
    assert load_yaml("chat_template_kwargs:\n").generation_config.chat_template_kwargs == {}
    alone = load_yaml("", "chat_template_kwargs.reasoning_effort=low")
    assert alone.generation_config.chat_template_kwargs == {"reasoning_effort": "low"}
    both = "chat_template_kwargs: {a: 1}\ngeneration_config: {chat_template_kwargs: {a: 2}}\n"
    with pytest.raises(ConfigError, match=r"generation_config.chat_template_kwargs are both set: keep one"):
        load_yaml(both)
    with pytest.raises(ConfigError, match=r"chat_template_kwargs: got \['a'\], must be a block.*tiny\.yaml:3"):
        load_yaml("chat_template_kwargs: [a]\n")
