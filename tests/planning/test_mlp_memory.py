"""What an MLP takes of a layer's activations; benchmarks/plan holds the whole plan with tiles to what was measured."""

import pytest

from conftest import LORA, config_for
from forgebook.catalog import shape_of
from forgebook.planning.memory import memory_of
from forgebook.planning.mlp_memory import mlp_bytes

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
ATTENTION_ALONE = LORA | {"target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("lora", "saved"), [(None, 4), (LORA, 4), (ATTENTION_ALONE, 3)], ids=["full", "all linear", "attention alone"]
)
def test_gate_its_activation_up_and_what_a_trained_product_gets(lora, saved):
    shape = shape_of(MODEL)
    lora = config_for(MODEL, lora_config=lora).lora_config
    assert mlp_bytes(lora, shape, shape.kinds[0], 2, False) == (saved * 2 * 14336, 3 * 2 * 14336)
    assert mlp_bytes(lora, shape, shape.kinds[0], 2, True) == ((saved - 1) * 2 * 14336, 2 * 14336)


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
def test_tiles_take_what_one_tile_takes(recomputes):
    """With tiles, what grows with the context no longer has the inner width in it."""
    settings = {"lora_config": LORA, "train_batch_size_per_device": 1, "deepspeed": "none"}
    shape = shape_of(MODEL)

    def activations(length, **tiles):
        config = config_for(MODEL, gradient_checkpointing=recomputes, **settings, **tiles)
        return memory_of(config, shape, workers=1, length=length).activations

    grown = activations(65536) - activations(32768)
    grown_in_tiles = activations(65536, tiled_mlp=True) - activations(32768, tiled_mlp=True)
    layers = 1 if recomputes else 32
    assert grown - grown_in_tiles == pytest.approx(32768 * (layers * 4 + 3) * 2 * 14336, rel=0.02)
    if recomputes:  # one tile is the whole batch
        assert activations(4096, tiled_mlp=True) == pytest.approx(activations(4096), rel=1e-3)
