"""The kinds of values: what is read as a number, and what stays text."""


def test_numbers_with_an_exponent_load_as_numbers_everywhere(load_yaml):
    config = load_yaml(
        """
learning_rate: 1e-4
adam_epsilon: 1E-8
adam_betas: [9e-1, 0.95]
max_steps: 1e3
worker_resources: {accelerator_type:A10G: 1e-3}
lora_config: {lora_dropout: 5e-2, alpha_pattern: {a: 1e1}}
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
    assert config.lora_config == {"lora_dropout": 0.05, "alpha_pattern": {"a": 10.0}}
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}


def test_text_that_looks_like_something_else_stays_text(load_yaml):
    config = load_yaml(
        'run_name: "1e-4"\ncustom_model_tag: 1e-4\nlogger: {provider: wandb, provider_config: {name: 1e-4}}'
    )
    assert (config.run_name, config.custom_model_tag) == ("1e-4", "1e-4")
    assert config.logger.provider_config == {"name": "1e-4"}
    assert load_yaml("run_name: 2024-06-01").run_name == "2024-06-01"


def test_byte_counts_stay_whole(load_yaml):
    memory = load_yaml("trainer_resources: {memory: 53687091200}").trainer_resources["memory"]
    assert memory == 53687091200 and isinstance(memory, int)
