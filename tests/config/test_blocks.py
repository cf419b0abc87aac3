"""The nested blocks: what is refused and in which words."""

import pytest
import yaml

from forgebook.config.blocks import PromptFormat
from support_config import refusal


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_epochs: true", "num_epochs: got True, must be a whole number"),
        ("num_epochs: 0", "num_epochs: got 0, must be greater than 0"),
        ("num_epochs: 1.5", "num_epochs: got 1.5, must be a whole number"),
        ("learning_rate: true", "learning_rate: got True, must be a number"),
        ("learning_rate: .nan", "learning_rate: got nan, must be"),
        ("learning_rate: fast", "learning_rate: got 'fast', must be a number"),
        ("gradient_checkpointing: 1", "gradient_checkpointing: got 1, must be true, false, selective, offload or auto"),
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
        ("lora_config: {r: true}", "lora_config: r: got True, must be a whole number from 1"),
        ("seed: " + "9" * 40, "seed: got 9999"),
        ("train_batch_size_per_device: " + "9" * 40, "must be less than"),
        ("gradient_accumulation_steps: 2147483648", "must be less than or equal to 65536"),
        ("torch_compile: " + "a" * 500, "must be true, false or a block of options"),
        ("worker_resources: {CPU: " + "9" * 40 + "}", "must be a number, 0 or more"),
        ("classifier_config: {label_tokens: [a]}", ".label_tokens: got ['a'], must be a list of at least 2"),
        ("classifier_config: {label_tokens: [a, a]}", "must not contain a label twice"),
        ("initial_base_model_ckpt_path: {repo_id: 3}", ".repo_id: got 3, must be text"),
        ("checkpoint_and_evaluation_frequency: {unit: weeks, frequency: 0}", "must be 'epochs' or 'steps'"),
        ("generation_config: {stopping_sequences: [true]}", ".stopping_sequences.0: got True"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_in_one_line(load_yaml, text, message):
    refused = refusal(load_yaml, text)
    assert message in refused and len(refused) < 400
    assert all(line.endswith("tiny.yaml:3)") for line in refused.splitlines()), refused


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
def test_prompt_formats_are_checked(load_yaml, change, message):
    templates = dict.fromkeys(("system", "user", "assistant"), "{instruction}") | change
    assert message in refusal(load_yaml, yaml.safe_dump({"generation_config": {"prompt_format": templates}}))


def test_template_settings_are_checked(load_yaml):
    settings = "generation_config: {chat_template_kwargs: {enable_thinking: false, reasoning_effort: low, budget: 8}}"
    config = load_yaml(settings, "generation_config.chat_template_kwargs.enable_thinking=true")
    assert config.generation_config.chat_template_kwargs == {
        "enable_thinking": True, "reasoning_effort": "low", "budget": 8,
    }  # fmt: skip
    templates = dict.fromkeys(("system", "user", "assistant"), "{instruction}")
    both = {"prompt_format": templates, "chat_template_kwargs": {"a": 1}}
    message = refusal(load_yaml, yaml.safe_dump({"generation_config": both}))
    assert "chat_template_kwargs: has no effect together with prompt_format" in message
    assert "chat_template_kwargs" in refusal(load_yaml, "generation_config: {chat_template_kwargs: {a b: 1}}")


def test_prompt_format_defaults():
    templates = PromptFormat(system="{instruction}", user="{instruction}", assistant="{instruction}")
    assert (templates.trailing_assistant, templates.bos, templates.default_system_message) == ("", "", "")
    assert templates.strip_whitespace and not templates.system_in_user
