"""The plan before the run: whether it fits, what would make it fit, time and cost; LLMForge's table recomputed."""

import json
import subprocess
import sys

import pytest
from test_memory import LLAMA_8B, big

from conftest import LORA, REPOSITORY
from forgebook.catalog import hardware_of, read_catalog, shape_of
from forgebook.cli.main import main
from forgebook.data.examples import read_examples
from forgebook.models.tokenizer import tokenizer_of
from forgebook.planning.hardware import Cpu
from forgebook.planning.history import Throughput
from forgebook.planning.plan import cost_per_million_tokens, flops_per_token, plan, running_figures, utilization
from forgebook.planning.plan_report import plan_as_json, plan_summary, verdict
from forgebook.planning.token_count import count_data
from forgebook.planning.trainable import trainable_parameters

# -- does it fit, and what would make it


def fit(hardware: str, **values):
    config = big(**values)
    return plan(config, shape_of(config.model_id), hardware_of(hardware))


def test_what_fits_needs_no_change():
    planned = fit("4xA10G", lora_config=LORA)
    assert planned.fits and planned.changes == () and verdict(planned).startswith("it fits 4xA10G")


@pytest.mark.parametrize(
    ("hardware", "values", "changes"),
    [
        ("1xA100-40G", {"lora_config": LORA, "gradient_checkpointing": False, "train_batch_size_per_device": 16},
         ("gradient_checkpointing=true",)),
        ("1xL4", {"lora_config": LORA, "context_length": 8192, "train_batch_size_per_device": 2},
         ("train_batch_size_per_device=1 gradient_accumulation_steps=2",)),
        ("8xA100-80G", {}, ("deepspeed=zero_1",)),
        ("8xA100-40G", {}, ("deepspeed=zero_2",)),
        ("1xA100-80G", {}, ("deepspeed=zero_3_offload_optim",)),
        ("1xT4", {"lora_config": LORA, "train_batch_size_per_device": 1, "deepspeed": "zero_3_offload_optim+param",
                  "context_length": 8192, "attention": "eager", "model_id": "meta-llama/Llama-3.1-70B"}, ()),
    ],
)  # fmt: skip
def test_the_cheapest_change_is_proposed(hardware, values, changes):
    planned = fit(hardware, **values)
    assert planned.fits is False and planned.changes == changes
    if changes:
        assert planned.changed_memory.total <= planned.capacity and changes[0] in verdict(planned)
    else:
        assert "no change that the plan tries" in verdict(planned)


# -- data, time and money


def test_counted_tokens_are_near_those_of_the_run(make_config):
    from forgebook.data import tokenize

    config = make_config(train_path=str(REPOSITORY / "data/quickstart/train.jsonl"))
    counted = count_data(config)
    options = tokenize.EncodingOptions(config.task)
    whole = read_examples(config.train_path, config.task, counted.examples, (), config.on_bad_rows)
    exact = sum(
        len(one.input_ids) for row in tokenize.encode_examples(whole, tokenizer_of(config), options) for one in row
    )
    assert counted.examples == len(whole) and counted.tokens == pytest.approx(exact, rel=0.1)


def test_steps_are_those_of_the_run(make_config):
    from forgebook.launch.fine_tune import fine_tune
    from forgebook.runs.atomic import read_json

    config = make_config(num_epochs=2, train_batch_size_per_device=5, gradient_accumulation_steps=2)
    planned = plan(config, shape_of(config.model_id), None, count_data(config))
    summary = read_json(fine_tune(config).summary)
    assert planned.steps == summary["steps"]
    assert planned.tokens == pytest.approx(summary["trained_tokens"], rel=0.2)


def test_data_elsewhere_is_not_fetched():
    config = big(train_path="s3://bucket/rows.jsonl")
    planned = plan(config, shape_of(config.model_id), None, count_data(config))
    assert planned.steps is None and planned.costs[0].cost is None and planned.costs[0].cost_per_million_tokens > 0
    assert any("not counted" in note for note in planned.notes)


def test_the_plan_names_the_parameters_of_towers():
    config = big(model_id="google/gemma-3-4b-it")
    planned = plan(config, shape_of(config.model_id), None)
    assert planned.parameters - planned.trainable_parameters == 419_816_304
    assert any("419,816,304 parameters of vision and audio towers" in note for note in planned.notes)


@pytest.mark.parametrize(
    ("model", "lora", "verdict_start"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", LORA, "no: its experts share one tensor"),
        (
            "mistralai/Mixtral-8x7B-v0.1",
            {"r": 8, "target_modules": ["q_proj", "block_sparse_moe.w1"]},
            "no: its experts",
        ),
        ("mistralai/Mixtral-8x7B-v0.1", {"r": 8, "target_modules": ["q_proj", "v_proj"]}, "yes"),
        (LLAMA_8B, LORA, "yes"),
    ],
)
def test_the_plan_says_whether_vllm_finds_the_adapters_layers(model, lora, verdict_start):
    assert plan(big(model, lora_config=lora), shape_of(model), hardware_of("8xH100")).vllm.startswith(verdict_start)


def test_the_plan_says_that_vllm_serves_no_adapter_with_labels():
    """Its new tokens are trained as trainable_token_indices, which training adds."""
    labels = {"label_tokens": ["[[ham]]", "[[spam]]"]}
    config = big(LLAMA_8B, lora_config=LORA, task="classification", classifier_config=labels)
    assert plan(config, shape_of(LLAMA_8B), hardware_of("8xH100")).vllm == "no: trainable_token_indices is set"


def test_flops_are_six_and_four_per_parameter():
    shape = shape_of(big().model_id)
    active = shape.parameters - shape.embedding_parameters  # no look-up
    assert flops_per_token(shape, 0) == 6 * active
    adapter = trainable_parameters(LORA, shape)
    assert flops_per_token(shape, 0, adapter) == 4 * active + 6 * adapter
    # Causal attention: half of 4 FLOPs x width x length per layer, and twice that backward.
    assert flops_per_token(shape, 512) - 6 * active == 6 * 32 * 4096 * 512


def test_cost_follows_from_time_and_price():
    config = big(lora_config=LORA)
    slow, fast = (plan(config, shape_of(config.model_id), mfu=mfu).costs for mfu in (0.2, 0.4))
    for one, other in zip(slow, fast, strict=True):
        assert one.cost_per_million_tokens == pytest.approx(2 * other.cost_per_million_tokens)


def test_past_runs_give_the_mfu_of_their_gpu(make_config):
    config = make_config(num_devices=2)
    shape, a10g = shape_of(config.model_id), read_catalog().gpus["A10G"]
    past = [
        Throughput(
            "A10G", config.model_id, shape.parameters, "full", "float32", 2, False, 0.1 * a10g.peak, "2026-01-02"
        )
    ]
    planned = plan(config, shape, (2, a10g), count_data(config), throughputs=past)
    assert (
        planned.mfu == pytest.approx(0.1) and planned.assumption == "at 10% MFU, based on 1 earlier run on this machine"
    )
    costs = {one.gpu: one for one in planned.costs}
    assert costs["A10G"].seconds == planned.seconds == pytest.approx(planned.flops / (2 * 0.1 * a10g.peak))
    assert costs["T4"].seconds == pytest.approx(planned.flops / (2 * 0.4 * read_catalog().gpus["T4"].peak))
    assert planned.cost == costs["A10G"].cost and "at 10% MFU, based on 1 earlier run on this machine" in plan_summary(
        planned
    )
    with_mfu = plan(config, shape, (2, a10g), count_data(config), mfu=0.4, throughputs=past)
    assert with_mfu.mfu == 0.4 and with_mfu.seconds == pytest.approx(planned.seconds / 4)


def test_on_a_cpu_the_time_comes_from_past_runs_and_there_is_no_cost(make_config):
    config = make_config()
    shape, cpu = shape_of(config.model_id), Cpu("a processor", 10**10, 10**10)
    past = [Throughput("a processor", "other", shape.parameters, "full", "float32", 1, False, 3e9, "2026-01-02")]
    planned = plan(config, shape, (1, cpu), count_data(config), throughputs=past)
    assert planned.seconds == pytest.approx(planned.flops / 3e9) and planned.cost is None and planned.mfu is None
    assert planned.fits and planned.capacity == 10**10 and planned.memory.buffers == 0
    assert "at 3 GFLOP/s, based on 1 earlier run on this machine" in plan_summary(planned)
    alone = plan(config, shape, (1, cpu), count_data(config))
    assert alone.seconds is None and "no similar earlier run" in plan_summary(alone)


def test_on_a_cpu_nothing_is_offloaded_and_no_gpu_is_bought():
    config = big(deepspeed="zero_3_offload_optim+param")
    planned = plan(config, shape_of(config.model_id), (1, Cpu("a processor", 10**10, 10**10)))
    assert planned.memory.optimizer == 12 * shape_of(config.model_id).parameters and planned.fits is False
    assert not any("offload" in change or "num_devices" in change for change in planned.changes)
    assert "does not fit this machine (a processor)" in verdict(planned)


def test_running_figures_are_those_of_the_definition():
    gpu = read_catalog().gpus["A100-80G"]
    assert running_figures(gpu, 8, 6 * 7e9, 28_000, 1800) == {
        "mfu": pytest.approx(0.4712, abs=1e-4), "cost_usd": pytest.approx(8 * 3.43 / 2),
    }  # fmt: skip
    assert running_figures(None, 8, 6 * 7e9, 28_000, 1800) == {}
    assert running_figures(gpu, 8, None, 28_000, 3600) == {"cost_usd": pytest.approx(8 * 3.43)}


# LLMForge's table of January 2024: LoRA on one machine of 8 A100-80G at 40.77 USD per hour. For each model: the
# parameters that its MFU counts, and rows of (million tokens per hour, MFU, published USD per million tokens).
PRICE, GPUS = 40.77, 8
PUBLISHED = {
    "Llama-2-7B": (7e9, [(101.47, 0.47, 0.74), (103.7, 0.48, 0.72), (99.75, 0.47, 0.71), (102.58, 0.48, 0.69)]),
    "Llama-2-70B": (70e9, [(11.23, 0.53, 3.05), (9.65, 0.45, 4.77), (8.58, 0.40, 4.25), (13.40, 0.63, 3.65)]),
    "Mixtral-8x7B": (14e9, [(59.73, 0.56, 0.41), (57.20, 0.53, 0.40), (56.85, 0.53, 0.40), (55.84, 0.52, 0.40)]),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_llmforges_table_recomputed(model):
    parameters, rows = PUBLISHED[model]
    peak = read_catalog().gpus["A100-80G"].peak
    for millions_per_hour, mfu, _ in rows:
        per_second = millions_per_hour * 1e6 / 3600
        # Its formula: 2 x 3 x tokens x parameters / time / peak, so six per parameter although LoRA needs four.
        assert utilization(per_second, 6 * parameters, GPUS, peak) == pytest.approx(mfu, abs=0.01)
        assert mfu * GPUS * peak / (6 * parameters) == pytest.approx(per_second, rel=0.02)


def test_llmforges_costs_are_upside_down():
    rows = [row for _, block in PUBLISHED.values() for row in block]
    computed = [cost_per_million_tokens(PRICE, millions * 1e6 / 3600) for millions, _, _ in rows]
    published = [cost for _, _, cost in rows]
    assert sum(abs(a - b) > 0.02 for a, b in zip(computed, published, strict=True)) == len(rows)
    assert computed == pytest.approx(published[::-1], rel=0.01, abs=0.02)


# -- the command


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        f"model_id: {LLAMA_8B}\ntrain_path: {REPOSITORY}/data/quickstart/train.jsonl\ntask: instruction_tuning\n"
        "context_length: 512\nnum_epochs: 1\ntrain_batch_size_per_device: 4\ndeepspeed: zero_2\n"
        "worker_resources: {accelerator_type:A10G: 0.001}\nlora_config: {r: 8, target_modules: all-linear}\n"
    )
    return str(path)


def test_plan_prints_and_answers_in_json(config_file, capsys):
    assert main(["plan", config_file]) == 0
    printed = capsys.readouterr().out
    assert "it fits 1xA10G" in printed and "the largest" in printed and "8xH100" not in printed
    assert main(["plan", config_file, "hardware=8xH100", "mfu=0.5", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (
        planned["workers"] == 8
        and planned["fits"]
        and planned["mfu"] == 0.5
        and planned["memory"]["largest"] == "weights"
    )
    assert planned["steps"] > 0 and {one["gpu"] for one in planned["costs"]} == set(read_catalog().gpus)


def test_fit_writes_a_config_that_can_be_run(config_file, capsys):
    from forgebook.config.parse import load_config

    assert main(["plan", config_file, "hardware=1xL40S", "fit=true"]) == 0
    assert "it fits 1xL40S" in capsys.readouterr().out
    written = load_config(config_file.replace("c.yaml", "c-fit.yaml"))
    assert not written.gradient_checkpointing and written.deepspeed is None and written.global_batch_size == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "plan needs a CONFIG"),
        (["hardware=8xB52"], "hardware: got '8xB52'"),
        (["fit=true", "hardware=1xT4", "attention=eager", "padding=max_length", "context_length=8192"], "no settings"),
        (["mfu=2"], "mfu must be a share"),
        (["model_id=meta/nothing"], "the shape of 'meta/nothing' is not known"),
    ],
)
def test_mistakes_are_reported(config_file, capsys, arguments, message):
    assert main(["plan", *([config_file, *arguments] if arguments else [])]) == 2
    assert message in capsys.readouterr().err


def test_a_plan_imports_no_gpu_stack(config_file):
    code = "import sys; from forgebook.cli.main import main; main(sys.argv[1:]);"
    code += "print(sorted({'torch', 'ray', 'transformers', 'peft'} & set(sys.modules)), file=sys.stderr)"
    for model in ("tiny", LLAMA_8B):
        command = [sys.executable, "-c", code, "plan", config_file, f"model_id={model}"]
        ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        assert ran.stderr.strip() == "[]"


def test_a_plan_is_json_all_through():
    planned = plan_as_json(fit("1xA100-80G"))
    assert json.loads(json.dumps(planned))["changed_memory"]["total"] < planned["memory"]["total"]
