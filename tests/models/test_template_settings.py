"""Settings of a chat template become its defaults, wherever it is rendered."""

import copy

import pytest

from forgebook.config.schema import FinetuneConfig
from forgebook.errors import ConfigError
from forgebook.models.template_settings import set_template_defaults, template_defaults, template_variables
from forgebook.models.tokenizer import load_tokenizer, tokenizer_of

READS = (
    "{% macro mode() %}{{ reasoning_effort | default('medium') }}{% endmacro %}{{ bos_token }}"
    "{% for m in messages %}{{ m.content }}|{{ mode() }}|{{ 'think' if enable_thinking | default(true) else 'brief' }}"
    "{% endfor %}{% if tools %}{{ raise_exception('no tools') }}{% endif %}"
)
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def reading(tokenizer):
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = READS
    return copied


def text(tokenizer, **settings) -> str:
    return tokenizer.apply_chat_template(HELLO, tokenize=False, **settings)


def test_settings_are_defaults_that_a_caller_may_override(reading):
    assert text(reading) == "<|begin|>hello|medium|think"
    set_template_defaults(reading, {"enable_thinking": False, "reasoning_effort": "low"})
    assert text(reading) == "<|begin|>hello|low|brief"
    assert text(reading, enable_thinking=True) == "<|begin|>hello|low|think"
    assert template_defaults(reading.chat_template) == {"enable_thinking", "reasoning_effort"}
    set_template_defaults(reading, {"enable_thinking": True})
    assert text(reading) == "<|begin|>hello|low|think"


def test_settings_reach_the_tokenizer_of_a_config_and_stay_with_its_checkpoint(reading, tmp_path):
    reading.save_pretrained(tmp_path / "model")
    settings = {"chat_template_kwargs": {"enable_thinking": False}}
    config = FinetuneConfig.model_validate(
        {"model_id": str(tmp_path / "model"), "train_path": "x", "generation_config": settings}
    )
    tokenizer = tokenizer_of(config)
    assert text(tokenizer).endswith("|brief")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    assert text(load_tokenizer(str(tmp_path / "checkpoint"))).endswith("|brief")


def test_named_templates_each_get_the_settings(reading):
    reading.chat_template = {"default": READS, "tool_use": READS}
    set_template_defaults(reading, {"enable_thinking": False})
    assert text(reading).endswith("|brief")


def test_a_setting_that_the_template_does_not_read_is_an_error(reading, tokenizer):
    assert template_variables(READS) == {"enable_thinking", "reasoning_effort"}
    with pytest.raises(ConfigError, match=r"reads no 'enable_thinkng'.*it reads enable_thinking, reasoning_effort"):
        set_template_defaults(reading, {"enable_thinkng": False})
    with pytest.raises(ConfigError, match="reads no 'enable_thinking'; it reads none"):
        set_template_defaults(copy.deepcopy(tokenizer), {"enable_thinking": False})
    reading.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        set_template_defaults(reading, {"enable_thinking": False})
