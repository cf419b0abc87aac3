"""The text of a config: files, URLs and overrides; what is no YAML is refused with its line."""

import pytest

from forgebook.config.parse import load_config
from support_config import LORA_BLOCK, MINIMAL, refusal


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
def test_files_that_are_no_configs(write_yaml, text, message):
    assert message in refusal(load_config, write_yaml(text))


def test_a_key_repeated_with_the_same_value_is_harmless(load_yaml):
    assert load_yaml("seed: 7\nnum_epochs: 1\nseed: 7\n").seed == 7


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


def test_overrides_set_nested_values_and_later_ones_win(load_yaml):
    config = load_yaml(
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


def test_null_removes_a_block_and_a_block_replaces_a_block(load_yaml):
    assert load_yaml(LORA_BLOCK, "lora_config=null").lora_config is None
    assert load_yaml(LORA_BLOCK, "lora_config={r: 4}").lora_config == {"r": 4}


@pytest.mark.parametrize("override", ["num_epochs", "=3", "num_epochs=", "lora_config..r=3", "num_epochs=[1", "--x"])
def test_malformed_overrides(load_yaml, override):
    assert f"override {override!r}" in refusal(load_yaml, "", override)


def test_unknown_overrides_name_the_nearest_key(load_yaml):
    refused = refusal(load_yaml, "", "lora_config.rr=3", "num_epoch=3")
    assert "unknown key 'num_epoch': did you mean 'num_epochs'? (override num_epoch=3)" in refused
    assert "lora_config: unknown key 'rr': did you mean 'r'?" in refused
