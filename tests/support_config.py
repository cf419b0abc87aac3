"""Texts of configs, and how the tests read a refusal."""

import pytest

from forgebook.errors import ConfigError

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


def refusal(call, *args, **kwargs) -> str:
    """Return the message with which a call is refused."""
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "pydantic" not in message and "Input should" not in message, message
    return message
