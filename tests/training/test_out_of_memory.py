"""Allocations that fail: which errors they are, and what the message names."""

import pytest
import torch

from conftest import LORA
from forgebook.errors import ConfigError, ResourceError, TrainingError
from forgebook.planning.memory import memory_of
from forgebook.training.out_of_memory import explain_out_of_memory, is_out_of_memory

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...\nmore lines")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (CUDA, True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            True,
        ),
        (TrainingError("worker 1: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_which_errors_are_failed_allocations(error, expected):
    assert is_out_of_memory(error) == expected


@pytest.fixture
def resolved(make_config):
    return lambda **values: make_config(context_length=512, lora_config=LORA, **values).resolved()


def message_of(config, **settings) -> str:
    with pytest.raises(ResourceError) as caught, explain_out_of_memory(config, 2, "in step 3", lambda: 345, **settings):
        raise CUDA
    assert caught.value.__cause__ is CUDA and "\n" not in str(caught.value)
    return str(caught.value)


def test_the_message_names_batch_length_and_the_change_of_the_plan(resolved):
    message = message_of(resolved(train_batch_size_per_device=8))
    assert "in step 3, with a micro batch of 8 and sequences of up to 345 tokens (train_batch_size_per_de" in message
    assert "set gradient_checkpointing=true" in message and "by the plan" in message
    assert "worker 0: OutOfMemoryError: CUDA out of memory" in message


def test_the_change_saves_memory_whatever_is_set_already(resolved):
    config = resolved(train_batch_size_per_device=8, gradient_checkpointing=True)
    changes = message_of(config).partition("set ")[2].partition(", which")[0]
    assert "train_batch_size_per_device=" in changes
    values = dict(change.split("=") for change in changes.split())
    changed = config.resolve(**{key: int(value) for key, value in values.items() if value.isdigit()})
    from forgebook.catalog import shape_of

    before, after = (memory_of(one, shape_of(one.model_id), workers=2, length=345).total for one in (config, changed))
    assert after < before


def test_in_an_evaluation_its_own_batch_is_named(resolved):
    message = message_of(resolved(eval_batch_size_per_device=6), is_evaluation=True)
    assert "micro batch of 6" in message and "set eval_batch_size_per_device=3" in message
    assert "set gradient_checkpointing" in message_of(resolved(eval_batch_size_per_device=1), is_evaluation=True)


def test_a_model_of_unknown_shape_is_advised_without_a_plan(resolved):
    config = resolved().resolve(model_id="org/unknown")
    assert "lower train_batch_size_per_device or context_length" in message_of(config)


@pytest.mark.parametrize("error", [ConfigError("learning_rate: 5 is too large"), ZeroDivisionError()])
def test_other_errors_stay_as_they_are(resolved, error):
    with pytest.raises(type(error)) as caught, explain_out_of_memory(resolved(), 1, "in step 3", lambda: 345):
        raise error
    assert caught.value is error
