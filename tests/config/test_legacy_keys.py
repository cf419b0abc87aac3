"""Names that LLMForge has dropped: each loads with one warning, and contradicts its new name."""

import pytest

from forgebook.config.legacy_keys import RetiredNameWarning
from support_config import FREQUENCY, refusal


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
        ("dataset_size_scaling_factor: 1e10", {}, "ignored: data sets no longer have a size limit"),
        ("output_dir: /mnt/local_storage", {"storage_path": "runs"}, "storage_path sets where runs are stored"),
        ("num_data_blocks: 20", {"num_data_blocks_per_device": 20}, "read as num_data_blocks_per_device: 20"),
        ("min_num_update_steps: 24", {"min_update_steps": 24}, "read as min_update_steps: 24"),
        ("model_tag: mine", {"custom_model_tag": "mine"}, "read as custom_model_tag"),
        ("eval_path: v.jsonl", {"valid_path": "v.jsonl"}, 'read as valid_path: "v.jsonl"'),
        ("forward_checkpoint_config: {tag: t, remote_uri: s3://b}", {}, "name it with custom_model_tag"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("as_override", [False, True], ids=["file", "override"])
def test_retired_names_load_with_one_warning(load_yaml, text, expected, note, as_override):
    lines = text.splitlines()
    overrides = [line.replace(": ", "=", 1) for line in lines[:1]] if as_override else []
    with pytest.warns() as caught:
        config = load_yaml("\n".join(lines[1:] if as_override else lines) + "\n", *overrides)
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


def test_retired_checkpoint_keys_together_are_decided_by_the_interval(load_yaml):
    with pytest.warns(RetiredNameWarning) as caught:
        config = load_yaml("checkpoint_every_n_epochs: 2\nmax_num_checkpoints: 10\nnum_epochs: 4\n")
    assert len(caught) == 2 and config.checkpoint_and_evaluation_frequency.frequency == 2


@pytest.mark.parametrize("overrides", [[], ["lora_config.rank=16"]])
def test_the_rank_of_an_adapter(load_yaml, overrides):
    with pytest.warns(RetiredNameWarning, match="rank is retired: read as r: "):
        config = load_yaml("lora_config: {rank: 4, lora_alpha: 8}\n", *overrides)
    assert config.lora_config == {"r": 16 if overrides else 4, "lora_alpha": 8}


def test_retired_resources_of_the_reference_workers(load_yaml):
    text = "preference_tuning_config: {logprob_processor_scaling_config: {%s: {accelerator_type:A10G: 0.001}}}"
    with pytest.warns(RetiredNameWarning, match="read as custom_resources"):
        old = load_yaml(text % "worker_resources")
    assert old == load_yaml(text % "custom_resources")


@pytest.mark.parametrize(
    "text",
    [
        "no_gradient_checkpoint: true\ngradient_checkpointing: false",
        "flash_attention_2: true\nattention: sdpa",
        "model_tag: a\ncustom_model_tag: a",
        "eval_path: a\nvalid_path: a",
        f"max_num_checkpoints: 1\nnum_epochs: 2\n{FREQUENCY}: {{unit: steps, frequency: 9}}",
    ],
)
@pytest.mark.filterwarnings("ignore::forgebook.config.legacy_keys.RetiredNameWarning")
def test_an_old_and_a_new_name_together_are_refused(load_yaml, text):
    refused = refusal(load_yaml, text)
    assert all(line.split(":")[0] in refused for line in text.splitlines() if "num_epochs" not in line)
    assert "both set" in refused


@pytest.mark.filterwarnings("ignore::forgebook.config.legacy_keys.RetiredNameWarning")
def test_an_override_of_today_wins_over_a_retired_name_in_the_file(load_yaml):
    assert load_yaml("no_gradient_checkpoint: true\n", "gradient_checkpointing=true").gradient_checkpointing
    assert "gradient_checkpointing: got 'perhaps'" in refusal(load_yaml, "no_gradient_checkpoint: perhaps\n")
