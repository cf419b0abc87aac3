"""A plan as people read it."""

import dataclasses
import json

import pytest

from conftest import LORA, config_for
from forgebook.catalog import Gpu, hardware_of, read_catalog, shape_of
from forgebook.planning.hardware import Cpu
from forgebook.planning.plan import plan
from forgebook.planning.plan_report import (
    compare_with_plan,
    plan_as_json,
    plan_rows,
    plan_summary,
    price_rows,
    verdict,
)
from forgebook.planning.token_count import Statistics

DATA = Statistics((100,) * 1000, 1.0, "made up")
LLAMA_8B = "meta-llama/Meta-Llama-3-8B-Instruct"


def planned(hardware=None, data=None, model_id=LLAMA_8B, **values):
    settings = {"context_length": 512, "train_batch_size_per_device": 4, "deepspeed": None, **values}
    config = config_for(model_id, **settings)
    return plan(config, shape_of(model_id), hardware, data)


def test_a_plan_is_a_table_whose_terms_add_up():
    result = planned(hardware_of("8xA100-80G"), DATA, lora_config=LORA)
    lines = {line[0]: line[1:] for line in plan_rows(result)}
    assert lines["parameters"][0] == "8,030,261,248" and "20,971,520 trained (0.26%)" in lines["parameters"]
    assert lines["batch"] == ["4 x 100 tokens", "per device; context 512"]
    assert lines["weights"] == ["16.1 GB", "the largest"] and lines["optimizer"][1] == ""
    assert lines["memory per GPU"][1] == "of 81.6 GB usable"
    assert lines["steps"][0] == f"{result.steps:,}" and f"{result.tokens:,} tokens" in lines["steps"][1]
    assert lines["vLLM can serve it"] == ["yes", ""]
    uncounted = {line[0] for line in plan_rows(planned())}
    assert {"steps", "FLOPs"} & uncounted == set() and "disk" in uncounted


def test_time_and_cost_are_shown_where_they_are_known():
    rows = {row[0]: row[1:] for row in price_rows(planned(hardware_of("8xA100-80G"), DATA, lora_config=LORA))}
    assert rows.keys() == {f"8x{name}" for name in read_catalog().gpus}
    assert rows["8xA100-80G"][0] == "yes" and rows["8xA100-80G"][2].startswith("$")
    unknown = {row[0]: row[1:] for row in price_rows(planned())}
    assert unknown["1xT4"][:3] == ["no", "", ""] and unknown["1xT4"][3].startswith("$")


def test_a_gpu_without_a_price_has_times_and_no_costs():
    catalog = read_catalog()
    free = dataclasses.replace(catalog.gpus["A10G"], price=None)
    config = config_for("tiny", context_length=512, train_batch_size_per_device=4, deepspeed=None, num_epochs=1)
    for data in (DATA, None):
        result = plan(
            config, shape_of("tiny"), (1, free), data, catalog=dataclasses.replace(catalog, gpus={"A10G": free})
        )
        (cost,) = result.costs
        assert cost.cost is None and cost.cost_per_million_tokens is None and result.cost is None
        assert (cost.seconds is None) == (data is None) and price_rows(result)[0][3:] == ["", ""]
        assert "$" not in plan_summary(result)


@pytest.mark.parametrize(
    ("hardware", "values", "sentence"),
    [
        (None, {"lora_config": LORA}, "it needs 18.8 GB per GPU: it fits L4, A10G, "),
        (None, {"model_id": "meta-llama/Llama-3.3-70B-Instruct"}, "it fits no GPU of the catalog"),
        (hardware_of("1xA100-80G"), {"lora_config": LORA}, "it fits 1xA100-80G: 30.4 GB of 81.6 GB usable per GPU"),
        (hardware_of("8xA100-80G"), {}, "it does not fit 8xA100-80G: "),
        (hardware_of("8xA100-80G"), {}, "; the cheapest change: deepspeed=zero_1 ("),
        ((1, Cpu("a CPU", 10**9, 10**9)), {}, "it does not fit this machine (a CPU): "),
        ((1, Cpu("a CPU", 10**9, 10**9)), {}, "; no change that the plan tries makes it fit"),
        ((1, Cpu("a CPU", 10**12, 10**12)), {"dtype": "float32"}, "usable per worker"),
    ],
)
def test_the_verdict_is_one_sentence(hardware, values, sentence):
    assert sentence in verdict(planned(hardware, **values))


def test_the_summary_says_why_the_time_is_unknown():
    assert "time unknown: the config names no GPU of the catalog" in plan_summary(planned(None, DATA))
    cpu = (1, Cpu("a CPU", 10**12, 10**12))
    assert "time unknown: no similar earlier run on this machine" in plan_summary(planned(cpu, DATA))
    gpu = plan_summary(planned(hardware_of("1xH200"), DATA, lora_config=LORA, num_epochs=1))
    assert "of steps, $" in gpu and "at 40% MFU, assumed" in gpu and "per GPU, most of it weights" in gpu
    unknown = plan_summary(planned((1, Gpu("RTX 4090", 24 * 2**30, None, None)), DATA, lora_config=LORA))
    assert "time unknown" in unknown


def test_planned_and_measured_are_compared_in_one_line():
    figures = {
        "memory_bytes_per_worker": 46e6, "process_bytes_per_worker": 7e8, "step_seconds": 80.0, "mfu": None,
        "cost_usd": None,
    }  # fmt: skip
    measured = {**figures, "memory_bytes_per_worker": 2e9, "process_bytes_per_worker": None, "step_seconds": 600.0}
    line = compare_with_plan(figures, measured)
    assert line == "memory per worker: planned 46.0 MB, measured 2.0 GB; time of steps: planned 80 s, measured 10 min"
    gpu = compare_with_plan({**figures, "step_seconds": None}, {**measured, "mfu": 0.41, "cost_usd": 1.234})
    assert gpu.endswith("measured 2.0 GB; MFU 41%; $1.23")
    assert "not measured" in compare_with_plan(figures, {**measured, "memory_bytes_per_worker": None})
    cpu = compare_with_plan(figures, {**measured, "process_bytes_per_worker": 8e8})
    assert "; process: planned 0.7 GB, measured 0.8 GB; time of steps" in cpu


def test_a_plan_is_json_all_through():
    result = planned(hardware_of("1xA100-80G"))
    values = json.loads(json.dumps(plan_as_json(result)))
    assert values["memory"]["total"] == result.memory.total > values["changed_memory"]["total"]
    assert values["memory"]["largest"] == "optimizer" and values["verdict"] == verdict(result)
    assert plan_as_json(planned())["changed_memory"] is None
