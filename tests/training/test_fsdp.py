"""FSDP2 in two processes: the losses and weights of DDP, and a training state that fits any number of workers."""

import json

import pytest
import torch
from safetensors.torch import load_file

from conftest import LORA, losses_of
from forgebook.launch.fine_tune import fine_tune
from forgebook.runs.atomic import read_json
from forgebook.runs.metrics import read_metrics
from support_ranks import run_two_ranks

TWO = {"num_devices": 2, "train_batch_size_per_device": 2, "gradient_accumulation_steps": 2}


def weights_of(run) -> dict[str, torch.Tensor]:
    folder = run.folder / read_json(run.summary)["best_checkpoint"]
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def order_of(run) -> list[str]:
    """List the tensors of the best checkpoint as its file has them."""
    [file] = (run.folder / read_json(run.summary)["best_checkpoint"]).glob("*.safetensors")
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return [name for name in header if name != "__metadata__"]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-5), ("bfloat16", 2e-2)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", [None, LORA], ids=["full", "lora"])
def test_losses_and_checkpoints_are_those_of_ddp(without_ray, make_config, method, dtype, near):
    """With accumulation, clipping and recomputed activations; the same names, shapes and dtypes are saved."""
    settings = {"lora_config": method, "dtype": dtype, "gradient_checkpointing": True, "learning_rate": 3e-4, **TWO}
    # Between the cases, each way to free weights and to hold parts.
    block = {"reshard_after_forward": method is None, "cpu_offload": dtype == "float32"}
    blocks = {"none": {}, "fsdp": {"fsdp": block}}
    runs = [fine_tune(make_config(sharding=one, run_name=one, **settings, **blocks[one])) for one in blocks]
    ddp, fsdp = ([*losses_of(run), read_json(run.summary)["eval_loss"]] for run in runs)
    assert len(ddp) == 4 and fsdp == pytest.approx(ddp, abs=near)
    norms = [[row["grad_norm"] for row in read_metrics(run.metrics) if "grad_norm" in row] for run in runs]
    assert norms[1] == pytest.approx(norms[0], rel=max(near, 1e-4) if dtype == "float32" else 0.05)
    expected, saved = map(weights_of, runs)
    assert {n: (t.shape, t.dtype) for n, t in saved.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    # Tensor by tensor, in the model's order: what safetensors gets at once it sorts by name.
    is_sorted = [order == sorted(order) for order in map(order_of, runs)]
    assert method or is_sorted == [True, False]
    for name, tensor in expected.items():
        torch.testing.assert_close(saved[name], tensor, atol=near, rtol=near)
    names = [sorted(path.name for path in (run.checkpoints / "epoch-1").iterdir()) for run in runs]
    assert names[0] == names[1]
    configs = [(run.checkpoints / "epoch-1" / "config.json") for run in runs]
    assert method or read_json(configs[0]) == read_json(configs[1])
    assert read_json(runs[1].summary)["stop_check"]["prompts"] == 3


# In one session of two ranks ----------------------------------------------------------------------------


class Layer(torch.nn.Linear):
    """What is gathered on its own; what is outside of such layers stays gathered until the backward pass has ended."""


class Layers(torch.nn.Module):
    """As large as needed to be divided: what fsdp.shard takes for a causal model of one layer and an output layer."""

    _no_split_modules = ("Layer",)

    def __init__(self):
        super().__init__()
        self.first, self.second = Layer(6, 5), torch.nn.Linear(5, 3)

    def forward(self, inputs):
        return self.second(torch.relu(self.first(inputs)))


class Wrapped(torch.nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.model = Layers().to(dtype)

    def forward(self, inputs):
        return self.model(inputs).square().sum()


def use_shards(rank: int) -> dict:
    from forgebook.errors import ModelError
    from forgebook.training import fsdp

    cpu, outcomes = torch.device("cpu"), {}
    plain, wrapped = Wrapped(), Wrapped()
    fsdp.shard(wrapped, torch.float32, cpu)
    inputs = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    own = list(wrapped.parameters())
    outcomes["parts"] = [p.to_local().shape[0] for p in wrapped.parameters()]
    for maximum in (float("inf"), 0.5):
        for model in (plain, wrapped):
            model.zero_grad()
        (plain(inputs[0]) + plain(inputs[1])).div(2).backward()
        wrapped(inputs[rank]).backward()
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), maximum)
        norm = fsdp.clip_gradients(list(wrapped.parameters()), maximum)
        pairs = zip(plain.parameters(), wrapped.parameters(), strict=True)
        equal = [torch.allclose(p.grad, q.grad.full_tensor(), atol=1e-6) for p, q in pairs]
        outcomes[f"clipped at {maximum}"] = [abs(float(expected - norm)) < 1e-5, all(equal)]
    wrapped.zero_grad()
    next(wrapped.parameters()).grad = None
    wrapped(inputs[rank] * (float("nan") if rank else 1)).backward()
    outcomes["nan"] = bool(fsdp.clip_gradients(list(wrapped.parameters()), 1.0).isnan())
    wrapped.zero_grad()
    wrapped(inputs[rank] * 0 - 1e9).mul(0).backward()
    outcomes["zero"] = float(fsdp.clip_gradients(list(wrapped.parameters()), 1.0))

    # Weights that changed after a forward pass without gradients are the ones that the next one computes with.
    with torch.no_grad():
        wrapped(inputs[0])
        for p in [*own, *plain.parameters()]:
            p.mul_(2)
        outcomes["outdated"] = abs(float(wrapped(inputs[0]) - plain(inputs[0]))) > 1e-4
    kept = Wrapped()
    fsdp.shard(kept, torch.float32, cpu, reshards=False, offloads=True)
    losses = [model(inputs[rank]) for model in (wrapped, kept)]
    outcomes["freed"] = [fsdp.is_shard(model.model.first.weight) for model in (wrapped, kept)]
    for loss in losses:
        loss.backward()
    outcomes["freed at last"] = fsdp.is_shard(kept.model.first.weight)
    try:
        fsdp.shard(Wrapped(), torch.bfloat16, cpu)
    except ModelError as refused:
        outcomes["mixed"] = str(refused)
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_two_ranks(use_shards, tmp_path_factory.mktemp("ranks"))


def test_each_rank_holds_a_part(outcomes):
    assert [each["parts"] for each in outcomes] == [[3, 3, 2, 2], [2, 2, 1, 1]]


def test_the_norm_is_of_all_parts_and_clips_them(outcomes):
    for each in outcomes:
        assert each["clipped at inf"] == each["clipped at 0.5"] == [True, True]


def test_a_gradient_that_is_not_finite_or_zero_on_one_rank_shows_on_all(outcomes):
    assert [each["nan"] for each in outcomes] == [True, True] and [each["zero"] for each in outcomes] == [0, 0]


def test_no_forward_pass_computes_with_outdated_weights(outcomes):
    assert [each["outdated"] for each in outcomes] == [False, False]


def test_weights_are_freed_after_the_forward_pass_or_kept_for_the_backward_pass(outcomes):
    assert [(each["freed"], each["freed at last"]) for each in outcomes] == [([True, False], True)] * 2


def test_a_model_of_several_dtypes_is_refused(outcomes):
    assert all(
        "sharding: fsdp would gather in torch.bfloat16: set sharding: zero_2" in one["mixed"] for one in outcomes
    )
