"""Bytes before the run: parameters against PEFT's, bytes against hand arithmetic and against measured peaks."""

import dataclasses
import importlib.util
import json
import statistics

import pytest

from conftest import LORA, REPOSITORY, config_for
from forgebook.catalog import shape_of
from forgebook.planning.memory import CONTEXT_BYTES, memory_of
from forgebook.planning.trainable import trainable_parameters

LLAMA_8B = "meta-llama/Meta-Llama-3-8B-Instruct"


def big(model_id=LLAMA_8B, **values):
    """A config of an 8B model without DeepSpeed; keywords override."""
    settings = {"context_length": 512, "train_batch_size_per_device": 4, "deepspeed": None, **values}
    return config_for(model_id, **settings)


def test_a_vision_tower_is_loaded_and_not_trained(tmp_path):
    """Its bytes are in the plan's weights; of Gemma 3 4B's 4.30 billion parameters 3.88 are trained."""
    shape = shape_of("google/gemma-3-4b-it")
    config = big("google/gemma-3-4b-it")
    assert trainable_parameters(config.lora_config, shape) == shape.parameters - shape.towers == 3_880_263_168
    text = dataclasses.replace(shape, towers=0)
    need, need_text = (memory_of(config, one, workers=1, length=512) for one in (shape, text))
    assert need.weights - need_text.weights == 2 * shape.towers and need.optimizer == need_text.optimizer
    pattern = {"r": 8, "target_modules": r"model\.language_model\.layers\.\d+\.self_attn\.q_proj"}
    assert trainable_parameters(pattern, shape) == 34 * 8 * (2560 + 8 * 256)


# -- memory


def test_full_training_holds_sixteen_bytes_per_parameter():
    config = big()
    shape = shape_of(config.model_id)
    need = memory_of(config, shape, workers=1, length=512)
    assert need.weights == need.gradients == 2 * shape.parameters
    assert need.optimizer == 12 * shape.parameters and need.largest == "optimizer"


def test_muon_holds_one_moment_of_a_matrix():
    shape = shape_of(LLAMA_8B)
    adamw, muon = (memory_of(big(optimizer=kind), shape, workers=1, length=512) for kind in ("adamw", "muon"))
    matrices = shape.parameters - 2 * shape.embedding_parameters  # Llama 3's output layer is a table of its own
    assert adamw.optimizer - muon.optimizer == pytest.approx(4 * matrices, rel=1e-6)


def test_adafactor_holds_a_row_and_a_column_and_two_copies_of_the_largest_tensor():
    shape = shape_of(LLAMA_8B)
    adamw, adafactor = (memory_of(big(optimizer=kind), shape, workers=1, length=64) for kind in ("adamw", "adafactor"))
    saved = adamw.optimizer - adafactor.optimizer
    assert saved == pytest.approx(8 * shape.parameters, rel=1e-3)
    copies = adafactor.activations - adamw.activations
    assert copies == pytest.approx(8 * shape.embedding_parameters, rel=0.01)


@pytest.mark.parametrize(
    ("stage", "micro_batches", "bytes_each"),
    [("zero_1", 1, 2 + 14 / 8), ("zero_1", 2, 4 + 12 / 8), ("zero_2", 2, 2 + 14 / 8)],
)
def test_zero_shares_out(stage, micro_batches, bytes_each):
    config = big(deepspeed=stage, gradient_accumulation_steps=micro_batches)
    shape = shape_of(config.model_id)
    need = memory_of(config, shape, workers=8, length=512)
    held = need.weights + need.gradients + need.optimizer
    assert held == pytest.approx(bytes_each * shape.parameters, rel=1e-6)


def test_zero_3_holds_its_part_and_what_is_gathered():
    config = big(deepspeed="zero_3")
    shape = shape_of(config.model_id)
    need = memory_of(config, shape, workers=8, length=512)
    gathered = 2 * 1_000_000_000
    held = need.weights + need.gradients + need.optimizer
    assert held == pytest.approx(16 * shape.parameters / 8 + gathered, rel=1e-6)


def test_offloading_moves_bytes_to_the_host():
    config = big(deepspeed="zero_3_offload_optim+param")
    shape = shape_of(config.model_id)
    need = memory_of(config, shape, workers=8, length=512)
    assert need.optimizer == need.gradients == 0 and need.weights < 2.2e9
    assert need.host > (12 + 4 + 2) * shape.parameters / 8


def test_four_bits_take_about_half_a_byte():
    lora = {"r": 8, "target_modules": "all-linear"}
    held = {
        kind: memory_of(
            big(lora_config=lora, quantization=kind), shape_of(big().model_id), workers=1, length=512
        ).weights
        for kind in (None, "int8", "nf4")
    }
    assert held[None] == pytest.approx(16.1e9, rel=0.01)
    # What bitsandbytes makes of Llama 3 8B: embeddings and output layer stay in two bytes.
    assert held["int8"] == pytest.approx(9.1e9, rel=0.02) and held["nf4"] == pytest.approx(5.7e9, rel=0.02)


def test_checkpointing_smaller_batches_and_kernels_save_activations():
    shape = shape_of(big().model_id)

    def activations(**values):
        config = big(lora_config=LORA, **values)
        return memory_of(config, shape, workers=1, length=2048).activations

    assert activations() < 0.2 * activations(gradient_checkpointing=False)
    assert activations(train_batch_size_per_device=1) < 0.5 * activations()
    # One layer's scores: 4 rows x 32 heads x 2048^2, in float32 and bfloat16, and two gradients.
    assert activations(attention="eager") - activations() == 4 * 32 * 2048**2 * (4 + 2 + 8)


def test_fused_kernels_save_what_a_gpu_measured():
    """On an H200 (benchmarks/gpu/results.json), where the longest of 16 examples in a batch had about 460 tokens."""
    session = json.loads((REPOSITORY / "benchmarks/gpu/results.json").read_text())["first_session"]
    measured = {one["system"]: one["peak_gigabytes"] for one in session["results"]}
    lora = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}

    def tensors(**values) -> float:
        config = big(lora_config=lora, gradient_checkpointing=False, train_batch_size_per_device=16, **values)
        return memory_of(config, shape_of(config.model_id), workers=1, length=460).tensors / 1e9

    assert tensors() == pytest.approx(measured["Forgebook"], rel=0.02)
    assert tensors(liger_kernel={"enabled": True}) == pytest.approx(measured["Forgebook, Liger kernels"], rel=0.02)
    assert tensors(liger_kernel={"enabled": "auto"}) == tensors()  # not known where the plan is made


def test_fsdp_keeps_gathered_weights_or_moves_its_parts_to_the_host():
    """Of 8B parameters on 4 GPUs in bfloat16: 14 GB of layers stay, or 4 + 4 + 8 bytes / 4 of each go to the host."""
    settings = {"sharding": "fsdp", "num_devices": 4, "lora_config": None, "gradient_checkpointing": True}
    blocks = [{}, {"reshard_after_forward": False}, {"cpu_offload": True}]
    freed, kept, moved = (
        memory_of(big(**settings, fsdp=block), shape_of(LLAMA_8B), workers=4, length=512) for block in blocks
    )
    shape = shape_of(LLAMA_8B)
    layers = 2 * (shape.parameters - 2 * shape.embedding_parameters)
    assert kept.weights - freed.weights == pytest.approx(layers * 31 / 32, rel=0.01)
    assert freed.optimizer == kept.optimizer == pytest.approx(2 * shape.parameters, rel=0.001)
    assert moved.optimizer == moved.gradients == 0 and moved.weights == freed.weights - shape.parameters
    assert moved.host - 2 * 2**30 == pytest.approx(4 * shape.parameters, rel=0.001) and moved.host > freed.host


@pytest.mark.parametrize("checkpointing", [False, True])
def test_workers_that_share_each_example_hold_the_activations_of_a_slice(checkpointing):
    """Half of 8,192 positions each, as of 4,096, and the same weights."""
    settings = {"gradient_checkpointing": checkpointing, "num_devices": 2, "sharding": "fsdp"}
    shared = big(context_length=8192, sequence_parallel=2, **settings)
    needs = [
        memory_of(config, shape_of(LLAMA_8B), workers=2, length=config.context_length)
        for config in (shared, big(context_length=4096, **settings))
    ]
    assert needs[0].terms == needs[1].terms and shared.global_batch_size == 4


def test_a_quantized_model_is_planned_as_a_gpu_measured_it():
    """The run on the H200 ended before step 28, whose batch is the longest; the longest before had about 270 tokens.

    benchmarks/gpu/results.json says how that is known.
    """
    session = json.loads((REPOSITORY / "benchmarks/gpu/results.json").read_text())["first_session"]
    measured = next(one for one in session["results"] if "nf4" in one["system"])
    lora = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}
    config = big(lora_config=lora, gradient_checkpointing=False, train_batch_size_per_device=16, quantization="nf4")
    need = memory_of(config, shape_of(config.model_id), workers=1, length=measured["longest_tokens"])
    assert need.tensors / 1e9 == pytest.approx(measured["peak_gigabytes"], rel=0.03)


def test_batches_without_padding_hold_their_own_tokens():
    """16 examples of which one is long; each token has the same activations, wherever it is."""
    shape, lengths = shape_of(LLAMA_8B), (460, *[200] * 40)

    def activations(**batch) -> int:
        config = big(lora_config=LORA, gradient_checkpointing=False, train_batch_size_per_device=16)
        return memory_of(config, shape, workers=1, length=460, **batch).activations

    assert activations(lengths=lengths) == pytest.approx(activations() * (460 + 15 * 200) / (16 * 460), rel=0.03)
    assert activations(lengths=[460] * 16) == activations(lengths=[460] * 20) == activations()


def test_fused_products_keep_nothing_of_the_adapters_rank():
    shape = shape_of(LLAMA_8B)

    def activations(**lora) -> int:
        settings = {"r": 64, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["down_proj"], **lora}
        config = big(lora_config=settings, gradient_checkpointing=False)
        need = memory_of(config, shape, workers=1, length=512)
        return need.activations + need.gradients  # DoRA has gradients of its own, which come while activations go

    saved = activations(use_dora=True) - activations()
    assert saved == 4 * 512 * 32 * 64 * 2  # tokens, layers, rank, bytes


def test_ddp_keeps_its_buckets_beside_all_activations():
    config = big(gradient_checkpointing=False, dtype="float32")
    shape = shape_of(config.model_id)
    one, two = (memory_of(config, shape, workers=workers, length=512) for workers in (1, 2))
    # Alone, gradients come while activations go.
    assert one.gradients == two.gradients == 4 * shape.parameters and two.activations > 2 * one.activations


def test_zero_counts_both_buckets_on_a_gpu_and_what_is_written_to_on_a_cpu():
    config = big(deepspeed="zero_2", lora_config=LORA)
    shape = shape_of(config.model_id)
    trained = trainable_parameters(config.lora_config, shape)
    for on_gpu, held in ((True, 2 * 500_000_000 * 2), (False, 2 * trained)):
        assert memory_of(config, shape, workers=2, length=512, on_gpu=on_gpu).buffers == held


@pytest.mark.parametrize(
    ("lora", "length", "tensors", "process"),
    [(True, 304, 3_614_704_332, 6_863_716_352), (False, 298, 5_105_834_476, 6_750_601_216)],
)
def test_a_worker_on_a_cpu_holds_libraries_and_what_malloc_keeps(lora, length, tensors, process):
    """The whole process as /proc shows it: runs of SmolLM2 on GSM8K, LoRA and full, 8 examples in float32."""
    config = config_for(
        "HuggingFaceTB/SmolLM2-135M-Instruct", train_batch_size_per_device=8, context_length=1024, dtype="float32",
        lora_config=LORA if lora else None, deepspeed=None, gradient_checkpointing=False,
    )  # fmt: skip
    need = memory_of(config, shape_of(config.model_id), workers=1, length=length, on_gpu=False)
    assert need.tensors == pytest.approx(tensors, rel=0.02)
    assert need.total == need.host == pytest.approx(process, rel=0.07)
    gpu = memory_of(config, shape_of(config.model_id), workers=1, length=length)
    chunks = (2048 - 256) * 49_152 * 8  # of the loss, which are larger on a GPU
    assert gpu.tensors == need.tensors + chunks and gpu.overhead == CONTEXT_BYTES


def test_rows_of_labels_are_trained_in_copies_of_the_table():
    """SmolLM2, LoRA, 4 messages of 99 tokens, of which a batch of 96 measured 1.259 GB."""
    settings = {
        "train_batch_size_per_device": 4, "context_length": 128, "dtype": "float32", "deepspeed": None,
        "lora_config": LORA, "gradient_checkpointing": False,
        "task": "classification", "classifier_config": {"label_tokens": ["[[ham]]", "[[spam]]"]},
    }  # fmt: skip
    config = config_for("HuggingFaceTB/SmolLM2-135M-Instruct", **settings)
    need = memory_of(config, shape_of(config.model_id), workers=1, length=96, on_gpu=False)
    assert need.tensors == pytest.approx(1_258_791_276, rel=0.03)


def measured_runs():
    """Read what benchmarks/plan measured, and the benchmark's own way to plan a case."""
    folder = REPOSITORY / "benchmarks" / "plan"
    spec = importlib.util.spec_from_file_location("benchmark_of_the_plan", folder / "run.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark, json.loads((folder / "results.json").read_text())


def test_the_plan_is_near_what_was_measured():
    benchmark, found = measured_runs()
    errors = {one["case"]: benchmark.planned(one["case"]).tensors / one["measured"] - 1 for one in found["results"]}
    assert len(errors) >= 12 and set(errors) == set(benchmark.CASES)
    assert {case: error for case, error in errors.items() if abs(error) > 0.25} == {}
    assert statistics.median(map(abs, errors.values())) <= 0.15
    # The committed figures are those of this plan.
    assert {one["case"]: one["error"] for one in found["results"]} == pytest.approx(errors, abs=1e-3)
