"""The blocks of curate and synthesize: what they reject, and that no key of an endpoint is shown."""

import pytest

from forgebook.config.parse import dump_config, load_config
from forgebook.errors import ConfigError

BASE = "model_id: tiny\ntrain_path: a.jsonl\n"
TEACHER = "synthesis: {teacher: {model: m}, "


def load(tmp_path, text: str):
    path = tmp_path / "c.yaml"
    path.write_text(BASE + text)
    return load_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("curation: {drop: [typo]}", "curation.drop"),
        ("curation: {drop: [unusable]}", "curation.drop"),
        ("curation: {similarity: 0.1}", "curation.similarity"),
        ("curation: {refusals: ['(']}", "is no regular expression"),
        ("curation: {critic: {model: m, lowest: 5}}", "must be less than highest"),
        ("curation: {critic: {model: m, shots: [{question: q, answer: a, score: 9}]}}", "score 9 is not between"),
        ("curation: {critic: {model: m, base_url: localhost:8000}}", "must start with http"),
        (TEACHER + "exact_match: '.+'}", "needs write: answers"),
        (TEACHER + "write: answers, exact_match: '('}", "no regular expression"),
        (TEACHER + "prompt: hello}", "must contain {seeds}"),
        (TEACHER + "verifier: check}", "must be FILE.py:NAME"),
    ],
)
def test_what_is_rejected(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message.replace("{", r"\{")):
        load(tmp_path, text)


def test_a_key_in_place_of_its_variable_is_rejected_and_not_shown(tmp_path):
    with pytest.raises(ConfigError, match="and not the key") as caught:
        load(tmp_path, "curation: {critic: {model: m, api_key_env: sk-proj-1234567890}}")
    assert "1234567890" not in str(caught.value)


def test_neither_block_is_read_by_training(tmp_path):
    from forgebook.config.parse import config_differences

    config, plain = load(tmp_path, "curation: {similarity: 0.9}\n" + TEACHER + "count: 5}"), load(tmp_path, "")
    assert config_differences(config, plain) == []
    assert "similarity: 0.9  # file" in dump_config(config)
