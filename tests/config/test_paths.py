"""Variables and home folders in a config are expanded, or refused as not expanded; so are impossible paths."""

import pytest

from forgebook.config.parse import dump_config, load_config
from forgebook.config.paths import expand_path
from forgebook.errors import ConfigError
from support_config import refusal


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    for name, value in {"FT_DATA": "/data", "HOME": "/home/me", "EPOCHS": "3", "FLAG": "false", "EMPTY": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("UNSET", raising=False)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train_path=${FT_DATA}/rows.jsonl", "train_path", "/data/rows.jsonl"),
        ("train_path=$FT_DATA/rows.jsonl", "train_path", "/data/rows.jsonl"),
        ("train_path=s3://b/${EPOCHS}/rows.jsonl", "train_path", "s3://b/3/rows.jsonl"),
        ("train_path=~/rows.jsonl", "train_path", "/home/me/rows.jsonl"),
        ("valid_path=~/rows.jsonl", "valid_path", "/home/me/rows.jsonl"),
        ("train_path=['${FT_DATA}/a.jsonl', ~/b.jsonl]", "train_path", ["/data/a.jsonl", "/home/me/b.jsonl"]),
        ("storage_path=${FT_DATA}/runs", "storage_path", "/data/runs"),
        ("storage_path=~/runs", "storage_path", "/home/me/runs"),
        ("storage_path=~", "storage_path", None),  # YAML's null
        ("storage_path=${UNSET:-/tmp}/runs", "storage_path", "/tmp/runs"),
        ("model_id=${HOME}/model", "model_id", "/home/me/model"),
        ("model_id=~/model", "model_id", "/home/me/model"),
        ("initial_base_model_ckpt_path=~/c", "initial_base_model_ckpt_path", "/home/me/c"),
        ("run_name=try-${EPOCHS}", "run_name", "try-3"),
        ("num_epochs=${EPOCHS}", "num_epochs", 3),
        ("gradient_checkpointing=${FLAG}", "gradient_checkpointing", False),
        ("custom_model_tag=cost$5", "custom_model_tag", "cost$5"),
        ("generation_config.stopping_sequences=['${UNSET}', '~/']", "generation_config", ["${UNSET}", "~/"]),
    ],
)
def test_variables_and_home_folders_are_expanded(load_yaml, override, key, value):
    if value is None:
        assert "storage_path: got nothing" in refusal(load_yaml, "", override)
        return
    config = load_yaml("", override)
    assert (getattr(config, key).stopping_sequences if key == "generation_config" else getattr(config, key)) == value


def test_a_run_folder_stores_what_was_expanded(load_yaml, tmp_path):
    config = load_yaml("logger: {provider: wandb, provider_config: {project: 'p-${EPOCHS}'}}\n", "train_path=~/a.jsonl")
    (tmp_path / "stored.yaml").write_text(dump_config(config))
    stored = load_config(tmp_path / "stored.yaml")
    assert stored.train_path == "/home/me/a.jsonl" and stored.logger.provider_config["project"] == "p-3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("storage_path: ${UNSET}/runs", "storage_path: '${UNSET}/runs' needs the environment variable UNSET"),
        ("storage_path: $UNSET/runs", "needs the environment variable UNSET"),
        ("storage_path: ${EMPTY}/runs", "needs the environment variable EMPTY"),
        ("num_epochs: ${UNSET}", "num_epochs: '${UNSET}' needs the environment variable UNSET, which is not set"),
        ("logger: {provider: wandb, provider_config: {project: '${UNSET}'}}", "logger.provider_config.project: "),
        ("storage_path: ${oc.env:HOME}/runs", "'${oc.env:HOME}' cannot be expanded: only environment variables"),
        ("storage_path: ${{ secrets.X }}/runs", "cannot be expanded"),
        ("storage_path: ${HOME/runs", "'${HOME/runs' cannot be expanded"),
        ("storage_path: ~no-such-user-here/runs", "the home folder of a user who does not exist"),
        ("storage_path: a/" + "n" * 300, "is longer than a path can be: 255 bytes for a name"),
        ("valid_path: " + "n/" * 3000, "is longer than a path can be"),
        ("model_id: " + "n" * 5000, "is longer than a path can be"),
        ("deepspeed: {config_path: " + "n" * 5000 + "}", "is longer than a path can be"),
        ("deepspeed: " + "n" * 5000, "is longer than a path can be"),
        ("run_name: " + "n" * 300, "is longer than a path can be"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*is set a second time")
def test_what_cannot_be_expanded_or_be_a_path_is_refused(load_yaml, text, message):
    refused = refusal(load_yaml, text + "\n")
    assert message in refused and "tiny.yaml:3)" in refused


def test_paths_of_commands():
    assert expand_path("~/a") == "/home/me/a" and expand_path("a$x/$FT_DATA") == "a$x//data"
    with pytest.raises(ConfigError, match="needs the environment variable UNSET"):
        expand_path("${UNSET}")


@pytest.mark.parametrize("key", ["train_path", "valid_path", "storage_path", "model_id", "deepspeed"])
@pytest.mark.parametrize(
    "address", ["file:///data", "http://host/a.jsonl", "hdfs://x/y", "abfss://c@a.net/x", "S3://b/x"]
)
def test_an_address_of_another_scheme_is_no_folder(load_yaml, key, address):
    scheme = address.partition("//")[0] + "//"
    assert f"{scheme} is not supported: use https://, s3://" in refusal(load_yaml, "", f"{key}={address}")
