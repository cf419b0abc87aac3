"""train_path and valid_path in all their forms, and what is wrong with others."""

import pytest

from forgebook.config.data_block import DataSource, HeldOut, template_columns
from forgebook.config.parse import config_differences, dump_config, load_config
from forgebook.errors import ConfigError


def test_every_form_is_read_and_written_back(write_yaml, tmp_path):
    text = """
    model_id: tiny
    train_path:
      path: a.jsonl
      columns: {user: "${x} {q}", assistant: a}
      system: "Costs $5, ~/ and ${HOME}."
    valid_path: {split: 0.05}
    """
    with pytest.raises(ConfigError, match=r"train_path\.columns: got '\$\{\} \{q\}', must name"):
        load_config(write_yaml(text.replace("${x}", "${}")))
    config = load_config(write_yaml(text.replace("${x} ", "")))
    assert config.train_path.system == "Costs $5, ~/ and ${HOME}." and config.valid_path == HeldOut(split=0.05)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    again = load_config(tmp_path / "again.yaml")
    assert again.train_path == config.train_path and again.valid_path == config.valid_path
    mix = load_config(write_yaml("model_id: tiny\ntrain_path: [a, {path: b, system: s}]\nvalid_path: {path: c}"))
    assert mix.train_path[1] == DataSource(path="b", system="s") and mix.valid_path.path == "c"


@pytest.mark.parametrize(
    ("train", "valid", "systems"),
    [
        ("{path: a, system: s}", "v", ["s"]),
        ("{path: a, system: s}", "{path: v, columns: {user: q, assistant: a}}", ["s"]),
        ("[{path: a, system: s}, {path: b, system: s}]", "[v, {path: w, system: t}, {path: x}]", ["s", "t", "s"]),
        ("{path: a, system: s}", "{path: v, system: ''}", [""]),
        ("{path: a, system: s}", "{path: v, system: null}", [None]),
        ("[{path: a, system: s}, b]", "{path: v}", [None]),
        ("[{path: a, system: s}, {path: b, system: t}]", "{path: v}", [None]),
        ("{path: a, system: ''}", "{path: v}", [None]),
    ],
    ids="path columns list empty none one-of-two two no-system".split(),
)
def test_validation_has_the_system_message_of_training(write_yaml, tmp_path, train, valid, systems):
    """If training has one and validation sets none; also when a stored config is read again."""
    config = load_config(write_yaml(f"model_id: tiny\ntrain_path: {train}\nvalid_path: {valid}\n"))
    (tmp_path / "again.yaml").write_text(dump_config(config))
    for one in (config, load_config(tmp_path / "again.yaml")):
        entries = one.valid_path if isinstance(one.valid_path, list) else [one.valid_path]
        assert [entry.system for entry in entries] == systems


def test_a_share_and_paths_alone_stay_as_they_are(write_yaml):
    head = "model_id: tiny\ntrain_path: {path: a, system: s}\n"
    assert load_config(write_yaml(f"{head}valid_path: {{split: 0.05}}\n")).valid_path == HeldOut(split=0.05)
    assert load_config(write_yaml(head)).valid_path is None
    assert load_config(write_yaml("model_id: tiny\ntrain_path: a\nvalid_path: v\n")).valid_path == "v"


def test_labels_of_numbers_and_switches_are_written_back(write_yaml, tmp_path):
    source = "{path: a, columns: {text: t, label: l}, labels: {true: x, 0: y}}"
    config = load_config(write_yaml(f"model_id: tiny\ntrain_path: [{source}]\nvalid_path: {source}\n"))
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert config_differences(config, load_config(tmp_path / "again.yaml")) == []
    assert config.valid_path.labels == {"true": "x", "0": "y"}


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            "{user: q}",
            r"train_path\.columns: got user, must name the columns of one kind of example: user and assistant;",
        ),
        ("{usr: q, assistant: a}", r"unknown key 'usr', must be one of .*: did you mean 'user'"),
        ("{user: '{q', assistant: a}", r"got '\{q'"),
        ("{user: '{}', assistant: a}", r"must name a column in each pair of braces"),
        ("{user: '{q:>3}', assistant: a}", r"must name a column in each pair of braces"),
        ("{user: '', assistant: a}", r"user is empty"),
        ("{user: q, assistant: a}, labels: 3", r"train_path\.labels: got 3"),
        ("{messages: m}, labels: [a]", r"labels: needs columns with a label"),
    ],
)
def test_mistakes_name_their_key(write_yaml, block, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write_yaml(f"model_id: tiny\ntrain_path: {{path: a, columns: {block}}}\n"))


@pytest.mark.parametrize("share", ["0", "1", "half", "0.1, sed: 2"])
def test_a_share_is_between_0_and_1(write_yaml, share):
    with pytest.raises(ConfigError, match=r"valid_path"):
        load_config(write_yaml(f"model_id: tiny\ntrain_path: a\nvalid_path: {{split: {share}}}\n"))


def test_template_columns():
    assert template_columns("q") == ["q"] and template_columns("{a.b}: {{x}} {c}") == ["a.b", "c"]
