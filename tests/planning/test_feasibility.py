"""What a run processes, whether it fits, and the fastest settings that do."""

import dataclasses

import pytest
from test_memory import big

from conftest import LORA
from forgebook.catalog import hardware_of, shape_of
from forgebook.errors import ConfigError
from forgebook.planning.feasibility import (
    capacity,
    cheapest_change,
    fit,
    fits,
    has_padding,
    longest_sequence,
    micro_batch_for,
    settle_checkpointing,
    unpadded_lengths,
    without_gaps,
    work_of,
)
from forgebook.planning.hardware import Cpu
from forgebook.planning.memory import memory_of
from forgebook.planning.plan import plan
from forgebook.planning.token_count import Statistics

LENGTHS = Statistics((100, 300, 200, 400), scale=10.0, how="counted")  # a tenth of the data


def resolved(**values):
    """Make a config of an 8B model without gaps: context 400, two examples per device, one device, one epoch."""
    settings = {"context_length": 400, "train_batch_size_per_device": 2, "num_epochs": 1, "deepspeed": None}
    config = big(**settings | values)
    return without_gaps(config, shape_of(config.model_id), LENGTHS)


@pytest.mark.parametrize(
    ("values", "steps", "tokens", "positions", "longest"),
    [
        ({}, 20, 10_000, 2 * 3_000 + 2 * 4_000, 400),  # two batches of the sample: 2 x 300 and 2 x 400
        ({"padding": "max_length"}, 20, 10_000, 16_000, 400),
        ({"padding": "packed"}, 15, 10_000, 10_000, 400),  # 1,000 tokens of the sample fill 3 sequences of 400
        ({"truncation": "right", "context_length": 200}, 20, 7_000, 8_000, 200),
        ({"truncation": "drop", "context_length": 300}, 15, 6_000, 8_000, 300),
        ({"num_epochs": 2}, 40, 20_000, 28_000, 400),
        ({"max_steps": 10}, 10, 5_000, 7_000, 400),
        ({"gradient_accumulation_steps": 2}, 10, 10_000, 14_000, 400),
    ],
)
def test_the_work_of_a_run_is_counted(values, steps, tokens, positions, longest):
    config = resolved(**values)
    work = work_of(config, LENGTHS)
    assert (work.steps, work.tokens, work.positions, work.longest) == (steps, tokens, positions, longest)
    assert longest_sequence(config, LENGTHS) == longest


A10G, T4 = (hardware_of(f"1x{name}")[1] for name in ("A10G", "T4"))


@pytest.mark.parametrize(
    ("values", "device", "model", "padded"),
    [
        ({}, A10G, None, False),
        ({}, T4, None, True),
        ({}, None, None, True),
        ({}, Cpu("", 1, 1), None, True),
        ({"attention": "varlen"}, Cpu("", 1, 1), None, False),
        ({"attention": "sdpa"}, A10G, None, True),
        ({"dtype": "float32"}, A10G, None, True),
        ({"padding": "max_length"}, A10G, None, True),
        ({"sequence_parallel": 2, "num_devices": 2, "sharding": "fsdp"}, A10G, None, True),
        ({}, A10G, "google/gemma-2-2b-it", True),  # capped logits
    ],
)
def test_batches_have_no_padding_where_the_kernel_keeps_examples_apart(values, device, model, padded):
    config, shape = resolved(**values), shape_of(model or big().model_id)
    assert has_padding(config, shape, device) == padded
    assert unpadded_lengths(config, shape, LENGTHS, device) == (() if padded else (400, 300, 200, 100))


def test_a_run_without_padding_processes_its_tokens_alone():
    config = resolved(gradient_checkpointing=False, lora_config=LORA)
    padded, exact = (work_of(config, LENGTHS, padded=padded) for padded in (True, False))
    assert (padded.positions, padded.lengths) == (14_000, ())
    assert (exact.positions, exact.tokens, exact.lengths) == (10_000, 10_000, (400, 300, 200, 100))
    shape = shape_of(config.model_id)
    planned = [plan(config.resolve(attention=kind), shape, (1, A10G), LENGTHS) for kind in ("auto", "sdpa")]
    needs = [
        memory_of(config, shape, workers=1, length=400, lengths=lengths) for lengths in (exact.lengths, padded.lengths)
    ]
    assert [one.memory for one in planned] == needs and needs[0].total < needs[1].total
    assert planned[0].seconds == pytest.approx(planned[1].seconds * 10 / 14)


def test_what_fits_without_padding_is_taken():
    """The largest micro batch that fits is larger where one example is long and the others are short."""
    data = Statistics((2000, *[100] * 63), scale=1.0, how="counted")
    config = big(context_length=2048, train_batch_size_per_device=64, lora_config=LORA, num_epochs=1)
    sizes = [
        fit(config.resolve(attention=kind), shape_of(config.model_id), (1, A10G), data).train_batch_size_per_device
        for kind in ("auto", "sdpa")
    ]
    assert sizes[0] == 64 > sizes[1]


def test_attention_is_counted_for_the_example_of_the_mean_token():
    assert work_of(resolved(), LENGTHS).mean == (100**2 + 300**2 + 200**2 + 400**2) / 1000


def test_a_context_that_leaves_no_example_is_refused():
    with pytest.raises(ConfigError, match="context_length: 50 is shorter than every example"):
        resolved(truncation="drop", context_length=50, num_epochs=None)


def test_gaps_are_filled_as_the_run_fills_them():
    config = big(context_length=None, train_batch_size_per_device=None, num_epochs=None, min_update_steps=45)
    filled = without_gaps(config, shape_of(config.model_id), LENGTHS)
    assert filled.context_length == shape_of(config.model_id).context
    assert filled.train_batch_size_per_device == micro_batch_for(filled.context_length)
    steps = work_of(filled, LENGTHS).steps
    assert steps >= 45 and steps % filled.num_epochs == 0 and steps - steps // filled.num_epochs < 45


@pytest.mark.parametrize(("context", "batch"), [(100, 16), (512, 16), (513, 8), (4096, 2), (8192, 1)])
def test_longer_contexts_have_smaller_batches(context, batch):
    assert micro_batch_for(context) == batch


def test_a_gpu_loses_a_part_to_fragmentation_and_a_cpu_none():
    _, gpu = hardware_of("1xA100-80G")
    assert capacity(gpu) == int(gpu.memory * 0.95)
    assert capacity(Cpu("a processor", 10**10, 10**10)) == 10**10


def test_a_change_that_is_not_needed_is_taken_back():
    """Sharding alone makes it fit, so the recomputation and smaller batches tried before it are not advised."""
    config = resolved(gradient_checkpointing=False, num_devices=8)
    count, gpu = hardware_of("8xA100-80G")
    changes, need = cheapest_change(config, shape_of(config.model_id), count, 400, gpu)
    assert changes and need is not None and fits(need, gpu)
    for change in changes:
        others = [one for one in changes if one != change]
        values = dict(pair.split("=", 1) for one in others for pair in one.split())
        without = memory_of(config.resolve(**values), shape_of(config.model_id), workers=count, length=400)
        assert not fits(without, gpu), change


def test_the_fastest_settings_that_fit_keep_the_examples_of_a_step():
    config = big(train_batch_size_per_device=8, deepspeed="zero_3_offload_optim+param")
    shape = shape_of(config.model_id)
    fitted = fit(config, shape, hardware_of("8xA100-80G"))
    assert fitted.global_batch_size == 64 and fitted.deepspeed.config_path.endswith("zero_1.json")
    length = longest_sequence(fitted, None)
    assert fits(memory_of(fitted, shape, workers=8, length=length), hardware_of("8xA100-80G")[1])
    assert fit(config, shape, hardware_of("1xH200")).deepspeed.config_path.endswith("offload_optim.json")


def test_activations_are_offloaded_before_the_optimizer_is():
    """As `plan` advises: of an adapter the optimizer is small, and ZeRO-3 alone would gather each layer again."""
    config = big("Qwen/Qwen3-8B", lora_config=LORA, context_length=12288, train_batch_size_per_device=2)
    shape, (workers, gpu) = shape_of(config.model_id), hardware_of("1xL4")
    fitted = fit(config, shape, (workers, gpu))
    assert (fitted.gradient_checkpointing, fitted.train_batch_size_per_device) == ("offload", 1)
    assert fitted.deepspeed is None and fits(memory_of(fitted, shape, workers=1, length=12288), gpu)
    advised, _ = cheapest_change(config.resolve(gradient_checkpointing=True), shape, workers, 12288, gpu)
    assert advised[-1] == "gradient_checkpointing=offload"


def test_nothing_fits_where_nothing_can():
    large = big("meta-llama/Meta-Llama-3-70B", context_length=8192)
    assert fit(large, shape_of(large.model_id), hardware_of("1xT4")) is None


@pytest.mark.parametrize("key", ["deepspeed", "gradient_checkpointing", "train_batch_size_per_device"])
def test_what_is_to_be_kept_is_kept(key):
    config = big(train_batch_size_per_device=4, deepspeed="zero_3", num_devices=8)
    fitted = fit(config, shape_of(config.model_id), hardware_of("8xA100-80G"), keep=[key])
    assert getattr(fitted, key) == getattr(config, key)


def test_auto_moves_inputs_to_the_host_where_recomputing_alone_does_not_fit():
    lengths = {65_536: True, 131_072: "offload"}
    for length, choice in lengths.items():
        config = big(lora_config=LORA, context_length=length, train_batch_size_per_device=1, deepspeed=None)
        shape, device = shape_of(config.model_id), hardware_of("1xA100-80G")[1]
        chosen, _ = settle_checkpointing(config, shape, 1, length, device)
        assert chosen.gradient_checkpointing == choice
        need, recomputing = (
            memory_of(config.resolve(gradient_checkpointing=kind), shape, workers=1, length=length)
            for kind in ("offload", True)
        )
        assert need.host - recomputing.host == shape.layers * length * shape.hidden * 2
        assert recomputing.total - need.total == (shape.layers - 2) * length * shape.hidden * 2
    assert need.total < capacity(device) < recomputing.total


@pytest.mark.parametrize(
    ("gpu", "choice", "reason"),
    [
        ("1xH200", False, "the least that fits: "),
        ("1xA100-80G", "selective", "the least that fits: "),
        ("1xL4", True, "it does not fit with less"),
        (None, True, "the hardware is not known"),
    ],
)
def test_auto_recomputes_the_least_that_fits(gpu, choice, reason):
    config = big(lora_config=LORA, context_length=4096, train_batch_size_per_device=3, deepspeed=None)
    shape, device = shape_of(config.model_id), hardware_of(gpu)[1] if gpu else None
    chosen, notes = settle_checkpointing(config, shape, 1, 4096, device)
    assert chosen.gradient_checkpointing is choice or chosen.gradient_checkpointing == choice
    assert chosen.origins["gradient_checkpointing"].startswith(f"auto: {reason}")
    expected = [f"gradient_checkpointing: {str(choice).lower()} ({reason}"] if choice else []
    assert [note[: len(expected[0])] for note in notes] == expected
    for kept in (True, False, "selective"):
        asked = config.resolve(gradient_checkpointing=kept)
        assert settle_checkpointing(asked, shape, 1, 4096, device) == (asked, [])
    if choice == "selective":  # of a mixture of experts too little would be kept
        experts = dataclasses.replace(shape, experts=8)
        assert settle_checkpointing(config, experts, 1, 4096, device)[0].gradient_checkpointing is True
