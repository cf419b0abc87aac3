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
        ("a: 1\nmodel_id: \x00", "tiny.yaml:2: not valid YAML: U+0000 is not allowed"),
        ("a: 1\n---\nb: 1\n", "not valid YAML"),
        ("model_id: &m {a: *m}\n", "tiny.yaml:1: not valid YAML: an anchor holds an alias of itself"),
        ("model_id: &m [*m]\n", "an anchor holds an alias of itself"),
        ("a: " + "[" * 500 + "]" * 500, "tiny.yaml:1: not valid YAML: nested more than 40 levels"),
        ("a: &a " + "[" * 30 + "]" * 30 + "\nb: " + "[" * 30 + "*a" + "]" * 30, "nested more than 40 levels"),
        ("a: " + "{b: " * 60 + "1" + "}" * 60, "tiny.yaml:1: not valid YAML: nested more than 40 levels"),
        (
            "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
            + "".join(f"{k}: &{k} [{', '.join([f'*{chr(ord(k) - 1)}'] * 9)}]\n" for k in "bcdefghij"),
            "more than 20,000 values",
        ),
        ("model_id: m\nseed: !!int abc\n", "tiny.yaml:2: not valid YAML: 'abc' is not of the type int"),
        ("model_id: m\nseed: 0512\n", "tiny.yaml:2: not valid YAML: 0512 is 330 in YAML, in base 8 or 60: write it in"),
        ("seed: 1:30\n", "1:30 is 90 in YAML"),
        ("seed: !!int ''\n", "'' is not of the type int"),
        ("seed: !!float abc\n", "'abc' is not of the type float"),
        ("seed: !!bool abc\n", "'abc' is not of the type bool"),
        ("seed: !!timestamp abc\n", "'abc' is not of the type timestamp"),
        ("seed: !!timestamp 2024-19-41\n", "'2024-19-41' is not of the type timestamp"),
        ('model_id: "a\\0b"\n', "tiny.yaml:1: not valid YAML: a text holds a zero byte"),
        ('model_id: "\\uD800"\n', "half of a character"),
    ],
)
def test_files_that_are_no_configs(write_yaml, text, message):
    assert message in refusal(load_config, write_yaml(text))


@pytest.mark.parametrize(
    ("text", "key", "value", "message"),
    [
        ("seed: 1\nnum_epochs: 2\nseed: 2\n", "seed", 2, "tiny.yaml:5: key 'seed' is set a second time"),
        ("lora_config:\n  r: 8\n  r: 16\n", "lora_config", {"r": 16}, "'lora_config.r' is set a second time"),
        ("lora_config: {r: 8}\nlora_config: {lora_alpha: 4}\n", "lora_config", {"lora_alpha": 4}, "line 3 is ignored"),
    ],
)  # fmt: skip
def test_a_key_set_twice_takes_its_last_value_with_a_warning(load_yaml, text, key, value, message):
    with pytest.warns(UserWarning) as caught:
        config = load_yaml(text)
    [warning] = caught
    assert getattr(config, key) == value and message in str(warning.message)


def test_a_key_repeated_with_the_same_value_is_harmless(load_yaml):
    assert load_yaml("seed: 7\nnum_epochs: 1\nseed: 7\n").seed == 7


def test_top_level_keys_that_start_with_x_hold_anchors(load_yaml):
    text = "x-lora: &lora {r: 4}\nx-rest: &rest {seed: 7, num_epochs: 3}\nlora_config: *lora\n<<: *rest\n"
    config = load_yaml(text)
    assert config.lora_config == {"r": 4} and (config.seed, config.num_epochs) == (7, 3)
    assert "unknown key" in refusal(load_yaml, "deepspeed: {x-a: 1, config_path: zero_2.json}\n")


def test_unreadable_files(tmp_path):
    assert "No such file" in refusal(load_config, tmp_path / "absent.yaml")
    assert "directory" in refusal(load_config, tmp_path)
    assert "File name too long" in refusal(load_config, "n" * 5000 + ".yaml")
    assert "cannot read" in refusal(load_config, "a\0b.yaml")
    (tmp_path / "long.yaml").write_text("#" * 1_100_000)
    assert "more than 1,048,576 bytes" in refusal(load_config, tmp_path / "long.yaml")
    (tmp_path / "latin.yaml").write_bytes(MINIMAL.encode() + b"run_name: caf\xe9\n")
    assert "latin.yaml:3: not UTF-8 text" in refusal(load_config, tmp_path / "latin.yaml")


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


def test_an_override_changes_one_of_the_keys_that_share_an_alias(load_yaml):
    block = "&data {path: a.jsonl, columns: {user: q, assistant: a}}"
    config = load_yaml(f"train_path: {block}\nvalid_path: *data\n", "train_path.path=b.jsonl")
    assert config.train_path.path == "b.jsonl" and config.valid_path.path == "a.jsonl"


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


@pytest.mark.parametrize("name", ["a\nb", "a\u2028b", "a\tb"])
def test_a_run_name_from_the_environment_is_one_line(load_yaml, monkeypatch, name):
    monkeypatch.setenv("NAME", name)
    assert "run_name: got " in refusal(load_yaml, "run_name: ${NAME}\n")
