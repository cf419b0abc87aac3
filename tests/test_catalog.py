"""Facts: parameter counts from the shapes are the published ones; a wrong name is an error with the closest one."""

import json
import math

import pytest
import yaml

from conftest import REPOSITORY, TINY_MODEL, config_for
from forgebook.catalog import hardware_of, read_catalog, shape_of
from forgebook.errors import ConfigError, ModelError
from forgebook.planning.plan import plan
from forgebook.planning.plan_report import plan_summary, price_rows

# As the hub's safetensors figures state them; where a tied table is stored twice (Qwen3 0.6B, 1.7B), once.
PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Meta-Llama-Guard-2-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "HuggingFaceTB/SmolVLM-500M-Instruct": 507_482_304,
    "Qwen/Qwen3-VL-8B-Instruct": 8_767_123_696,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "openai/gpt-oss-20b": 20_914_757_184,
    "openai/gpt-oss-120b": 116_829_156_672,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "allenai/Olmo-3-7B-Instruct": 7_298_011_136,
    "zai-org/GLM-4-9B-0414": 9_400_279_040,
    "LiquidAI/LFM2-1.2B": 1_170_340_608,
    "ibm-granite/granite-3.3-8b-instruct": 8_170_864_640,
    "mistralai/Mistral-Small-24B-Instruct-2501": 23_572_403_200,
    "google/gemma-2-2b-it": 2_614_341_888,
    "google/gemma-2-9b-it": 9_241_705_984,
    "google/gemma-2-27b-it": 27_227_128_320,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-4b-it": 4_300_079_472,
    "google/gemma-3-12b-it": 12_187_325_040,
    "google/gemma-3-27b-it": 27_432_406_640,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Instruct-2407": 12_247_782_400,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "mistralai/Mixtral-8x22B-v0.1": 140_620_634_112,
    "mistralai/Mixtral-8x22B-Instruct-v0.1": 140_630_071_296,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "microsoft/phi-4": 14_659_507_200,
}


@pytest.mark.parametrize("model_id", PUBLISHED)
def test_parameters_are_the_published_ones(model_id):
    assert shape_of(model_id).parameters == PUBLISHED[model_id]


def test_every_shape_of_the_catalog_has_a_published_count():
    shapes = read_catalog().shapes
    checked = {shapes[model_id.lower()] for model_id in PUBLISHED}
    assert checked == set(shapes.values())


def test_tiny_is_counted_exactly():
    assert shape_of("tiny").parameters == shape_of(str(TINY_MODEL)).parameters == 2_885_888


@pytest.mark.parametrize(
    ("model_id", "published"),
    [("mistralai/Mixtral-8x7B-v0.1", 12.9e9), ("openai/gpt-oss-20b", 3.61e9), ("openai/gpt-oss-120b", 5.13e9)],
)
def test_chosen_experts_alone_work_on_a_token(model_id, published):
    assert shape_of(model_id).active_parameters == pytest.approx(published, rel=0.02)


def test_a_config_json_may_wrap_its_text_decoder_and_leave_defaults_out(tmp_path):
    """As Gemma 3 4B's does: no heads, no vocabulary."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    vision = {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "num_hidden_layers": 27}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {**vision, "patch_size": 14}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shape_of(str(tmp_path)) == read_catalog().shapes["google/gemma-3-4b-it"]


def test_an_unknown_model_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="did you mean 'qwen/qwen3-8b'"):
        shape_of("Qwen/Qwen3-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ModelError, match="model_type 'mamba'"):
        shape_of(str(tmp_path))


def test_hardware_is_a_count_and_a_gpu():
    count, gpu = hardware_of("8xa100-80g")
    assert (count, gpu.name, gpu.memory) == (8, "A100-80G", 80 * 2**30)
    assert hardware_of("H100")[0] == 1
    with pytest.raises(ConfigError, match="did you mean 'a100-80g'"):
        hardware_of("8xA100-80")


def test_the_catalog_can_be_replaced(tmp_path, monkeypatch):
    own = tmp_path / "own.yaml"
    own.write_text(
        "prices: {date: 2026-01, source: our own}\n"
        "gpus: {B1: {memory_mib: 1024, peak_tflops: 10, price: 0.1}}\nmodels: []\n"
    )
    monkeypatch.setenv("FORGEBOOK_CATALOG", str(own))
    assert list(read_catalog().gpus) == ["B1"] and read_catalog().priced == "our own (2026-01)"
    own.with_name("bad.yaml").write_text("gpus: 3\n")
    with pytest.raises(ConfigError, match="is no catalog"):
        read_catalog(own.with_name("bad.yaml"))


@pytest.fixture
def own_catalog(tmp_path, monkeypatch):
    """Write a catalog whose A10G has some other values, and let the environment name it."""

    def write(**values):
        facts = yaml.safe_load((REPOSITORY / "forgebook/catalog.yaml").read_text())
        facts["gpus"]["A10G"] |= values
        path = tmp_path / f"catalog-{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(yaml.safe_dump(facts))
        monkeypatch.setenv("FORGEBOOK_CATALOG", str(path))

    return write


@pytest.mark.parametrize(
    "values", [{"price": None}, {"price": 0}, {"peak_tflops": None}], ids="price free peak".split()
)
def test_price_and_peak_may_be_unknown(own_catalog, values):
    """A plan then has no cost on this GPU."""
    own_catalog(**values)
    config = config_for("meta-llama/Llama-3.1-8B", context_length=512, num_devices=2)
    planned = plan(config, shape_of(config.model_id), hardware_of("2xA10G"))
    [cost] = [one for one in planned.costs if one.gpu == "A10G"]
    assert planned.cost is None and cost.cost is None and plan_summary(planned) and price_rows(planned)


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key in ("memory_mib", "peak_tflops", "price") for value in ("much", -1, math.nan, True, [1])]
    + [("memory_mib", None), ("memory_mib", 0), ("peak_tflops", 0)],
)
def test_a_figure_that_is_no_number_is_named(own_catalog, key, value):
    own_catalog(**{key: value})
    with pytest.raises(ConfigError, match=rf"is no catalog.*gpus\.A10G\.{key}: got .*must be a positive number"):
        read_catalog()


def test_no_machine_has_a_million_gpus():
    assert hardware_of("999999xT4")[0] == 999_999
    with pytest.raises(ConfigError, match="must be like 8xA100-80G"):
        hardware_of("9" * 40 + "xT4")
