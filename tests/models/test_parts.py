"""Weights read in parts in two processes: each rank has its rows of the weights that a whole model has, bit by bit."""

import pytest

from forgebook.models import parts
from support_families import save_family
from support_ranks import run_two_ranks

# Tied embeddings, towers, renamed and stacked experts, gpt-oss's transposed ones, float32 parts of other dtypes.
READ = ["Llama 3", "Gemma 3", "Gemma 4", "Qwen 3 MoE", "Qwen 3.5, 3.6 MoE", "Llama 4", "gpt-oss", "DeepSeek V3"]
ONE_EXPERT = {"num_experts": 1, "num_local_experts": 1, "num_experts_per_tok": 1}
WHOLE = {"enlarged": ("Llama 3", {}), "lacking": ("Llama 3", {}), "one expert": ("Qwen 3 MoE", ONE_EXPERT)}


def read_models(rank: int, folder: str) -> dict:
    import functools

    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    from forgebook.models import load

    mesh, outcomes = init_device_mesh("cpu", (2,)), {}
    for name in [*READ, *WHOLE]:
        tokens = 140 if name == "enlarged" else 128
        models, random = [], []
        for in_parts in (None, functools.partial(parts.read_in_parts, rows=mesh, tokens=tokens)):
            torch.manual_seed(0)
            models.append(load.load_model(f"{folder}/{name}", dtype="bfloat16", in_parts=in_parts))
            random.append(torch.rand(1))
        whole, model = models
        wrong = [] if torch.equal(*random) else ["random numbers"]
        wrong += [] if type(model) is type(whole) and model.config.to_dict() == whole.config.to_dict() else ["config"]
        divided = []
        for (key, expected), (own_key, p) in zip(whole.named_parameters(), model.named_parameters(), strict=True):
            part = p
            if isinstance(p, DTensor):
                divided.append(key)
                rows = torch.chunk(expected, 2)
                expected, part = (rows[rank] if rank < len(rows) else expected[:0]), p.to_local()
            if key != own_key or part.dtype != expected.dtype or not torch.equal(part, expected):
                wrong.append(key)
        buffers = zip(whole.named_buffers(), model.named_buffers(), strict=True)
        wrong += [key for (key, buffer), (_, own) in buffers if not torch.equal(buffer, own)]
        outcomes[name] = wrong, [key for key, _ in whole.named_parameters() if key not in divided]
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("models")
    for name, (family, settings) in ({name: (name, {}) for name in READ} | WHOLE).items():
        save_family(family, folder / name, **settings)
    weights = load_file(folder / "lacking/model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "lacking/model.safetensors", {"format": "pt"})
    return run_two_ranks(read_models, folder, str(folder))


@pytest.mark.parametrize("name", READ)
def test_each_rank_reads_its_rows_of_every_weight(outcomes, name):
    assert [each[name] for each in outcomes] == [[[], []]] * 2


def test_embeddings_that_are_enlarged_stay_whole(outcomes):
    assert [each["enlarged"] for each in outcomes] == [[[], ["model.embed_tokens.weight", "lm_head.weight"]]] * 2


@pytest.mark.parametrize("name", ["lacking", "one expert"])
def test_a_model_is_read_whole_where_its_rows_are_not_those_of_the_files(outcomes, name):
    for wrong, whole in (each[name] for each in outcomes):
        assert wrong == [] and len(whole) > 20
