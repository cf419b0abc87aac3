"""How many positions of the loss are computed at once."""

from forgebook.planning.loss_chunk import loss_chunk


def test_chunks_are_small_on_a_cpu_and_fill_a_gpu_within_a_gibibyte():
    sizes = {"Llama 2": 32_000, "Llama 3": 128_256, "Gemma 3": 262_208, "characters": 128}
    assert {loss_chunk(False, vocabulary * 6) for vocabulary in sizes.values()} == {256}
    on_gpu = {name: loss_chunk(True, vocabulary * 6) for name, vocabulary in sizes.items()}
    assert on_gpu == {"Llama 2": 4096, "Llama 3": 1024, "Gemma 3": 512, "characters": 4096}
    assert loss_chunk(True, 2**31) == 256
