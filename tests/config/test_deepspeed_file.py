"""DeepSpeed files: where they are found, what they hold, and how they shard."""

import json

import pytest

from conftest import REPOSITORY
from forgebook.config.deepspeed_file import Zero, find_deepspeed_config, read_deepspeed_config, zero_of
from forgebook.config.parse import dump_config, load_config
from support_config import refusal


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("", "deepspeed_configs/zero_3_offload_optim+param.json"),
        ("deepspeed: zero_2", "deepspeed_configs/zero_2.json"),
        ("deepspeed: {config_path: deepspeed_configs/zero_3.json}", "deepspeed_configs/zero_3.json"),
        ("deepspeed: {config_path: ./deepspeed_configs/zero_2.json}", "./deepspeed_configs/zero_2.json"),
        ("deepspeed: none", None),
        ("deepspeed: null", None),
    ],
)
def test_deepspeed_forms(load_yaml, text, path):
    config = load_yaml(text)
    assert (config.deepspeed and config.deepspeed.config_path) == path
    settings = read_deepspeed_config(config.deepspeed, config.source)
    assert settings is None if path is None else "zero_optimization" in settings


def test_deepspeed_overrides(load_yaml):
    assert load_yaml(
        "deepspeed: zero_2", "deepspeed.config_path=deepspeed_configs/zero_1.json"
    ).deepspeed.config_path == ("deepspeed_configs/zero_1.json")
    assert load_yaml("deepspeed: {config_path: deepspeed_configs/zero_3.json}", "deepspeed=none").deepspeed is None


def test_deepspeed_files_are_found_from_any_working_directory(load_yaml, monkeypatch, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert find_deepspeed_config("deepspeed_configs/zero_2.json") == REPOSITORY / "deepspeed_configs/zero_2.json"
    assert read_deepspeed_config(load_yaml("deepspeed: zero_2").deepspeed)["zero_optimization"]["stage"] == 2


def test_a_deepspeed_file_beside_the_config_is_still_found_from_the_run_folder(load_yaml, tmp_path):
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 0}}')
    config = load_yaml("deepspeed: {config_path: mine.json}")
    run_folder = tmp_path / "runs" / "tiny"
    run_folder.mkdir(parents=True)
    (run_folder / "config.yaml").write_text(dump_config(config))
    assert load_config(run_folder / "config.yaml") == config


def test_the_working_directory_comes_first(load_yaml, monkeypatch, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    for folder, stage in ((tmp_path, 1), (here, 2)):
        (folder / "mine.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    monkeypatch.chdir(here)
    assert find_deepspeed_config("mine.json", str(tmp_path / "tiny.yaml")) == here / "mine.json"


@pytest.mark.parametrize(
    "name",
    [
        "config_files/deepspeed/zero_3_optimizer_parameter_offload.json",
        "deepspeed_configs/zero_3_llama_2_7b.json",
        "deepspeed_configs/zero_3_llama_2_70b.json",
        "deepspeed_configs/zero_3_mistral_7b.json",
        "deepspeed_configs/zero_3_7b.json",
        "deepspeed_configs/zero_3_8b.json",
        "configs/zero_3_13b.json",
        "zero_3_70b.json",
        "zero_3_mixtral_8x7b.json",
        "zero_3_llama_3_8B.json",
    ],
)
def test_files_of_early_trees_are_read_as_the_shipped_one_with_their_settings(load_yaml, name):
    with pytest.warns(UserWarning, match=r"does not exist: using deepspeed_configs/zero_3_offload_optim\+param"):
        config = load_yaml(f"deepspeed: {{config_path: {name}}}")
    assert (
        read_deepspeed_config(config.deepspeed, config.source)["zero_optimization"]["offload_param"]["device"] == "cpu"
    )


def test_a_file_of_stage_2_for_a_size_stays_in_its_stage(load_yaml):
    with pytest.warns(UserWarning, match=r"zero_2_7b\.json does not exist: using deepspeed_configs/zero_2\.json"):
        assert zero_of(read_deepspeed_config(load_yaml("deepspeed: zero_2_7b").deepspeed)) == Zero(2)


def test_a_folder_of_another_project_falls_back_on_the_shipped_file_of_that_name(load_yaml):
    with pytest.warns(UserWarning, match=r"configs/deepspeed/zero_3\.json does not exist: using deepspeed_configs/"):
        config = load_yaml("deepspeed: {config_path: configs/deepspeed/zero_3.json}")
    assert config.deepspeed.config_path == "deepspeed_configs/zero_3.json"


def test_unknown_and_damaged_deepspeed_files(load_yaml, tmp_path):
    refused = refusal(load_yaml, "deepspeed: zero_4")
    assert "deepspeed.config_path: got 'deepspeed_configs/zero_4.json'" in refused and "zero_3_hpz.json" in refused
    (tmp_path / "list.json").write_text("[1]")
    assert "list.json holds [1], must hold one JSON object" in refusal(load_yaml, "deepspeed: list.json")
    (tmp_path / "bad.json").write_text('{\n"a": }')
    (tmp_path / "deep.json").write_text('{"a": ' + "[" * 5000 + "]" * 5000 + "}")
    assert "deep.json: not valid JSON: nested too deeply" in refusal(load_yaml, "deepspeed: deep.json")
    assert "bad.json:2: not valid JSON" in refusal(load_yaml, "deepspeed: bad.json")


SHIPPED = sorted((REPOSITORY / "deepspeed_configs").glob("*.json"))
assert {path.stem for path in SHIPPED} >= {
    "zero_1", "zero_2", "zero_3", "zero_3_hpz", "zero_3_offload_optim", "zero_3_offload_optim+param"
}  # fmt: skip


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_deepspeed_files(path):
    settings = json.loads(path.read_text())
    assert settings["bf16"] == {"enabled": "auto"}
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert settings[key] == "auto"
    zero = settings["zero_optimization"]
    assert f"zero_{zero['stage']}" == path.stem[:6]
    assert ("offload_optimizer" in zero) == ("optim" in path.stem)
    assert ("offload_param" in zero) == ("param" in path.stem)
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == (zero["stage"] == 3)
    model = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    known = set(model.model_fields) | {field.alias for field in model.model_fields.values()}
    assert set(zero) <= known
    model(**{key: value for key, value in zero.items() if value != "auto"})


@pytest.mark.parametrize(
    ("settings", "zero"),
    [
        (None, Zero()),
        ({}, Zero()),
        ({"zero_optimization": {"stage": 2}}, Zero(2)),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, Zero(2, True)),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, Zero(3, False, True)),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}, "offload_param": None}}, Zero(3)),
        # DeepSpeed offloads parameters in stage 3 alone.
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, Zero(2)),
    ],
)
def test_the_stage_and_the_offloads(settings, zero):
    assert zero_of(settings) == zero


def test_unreadable_deepspeed_files(load_yaml, tmp_path):
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    assert "binary.json is not text, must be a JSON file" in refusal(load_yaml, "deepspeed: binary.json")
