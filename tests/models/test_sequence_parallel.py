"""Sequence parallelism in two processes: the loss and the gradients of one process, whatever shares the lines."""

import pytest
from transformers import CONFIG_MAPPING

from conftest import LORA, losses_of, uneven_rows
from forgebook.launch.fine_tune import fine_tune
from forgebook.models.sequence_parallel import why_not_divided
from forgebook.runs.atomic import read_json
from forgebook.runs.metrics import read_metrics
from support_families import FAMILIES, TEXT, save_family
from support_ranks import run_two_ranks

LENGTHS = {"even": [[9, 7], [11, 5]], "odd": [[8, 5], [7, 6]]}


def batches(kind: str) -> dict:
    """Make a batch of two lines of two examples: padded, packed, or all in one line for a kernel that takes lengths."""
    import torch

    lengths = LENGTHS["odd" if "odd" in kind else "even"]
    generator = torch.Generator().manual_seed(1)
    width = sum(lengths[0])
    ids = torch.randint(3, 100, (2, width), generator=generator)
    labels = torch.where(torch.rand(2, width, generator=generator) < 0.6, ids.roll(-1, 1), -100)
    if "padded" in kind:
        labels[1, 9:] = -100
        return {"input_ids": ids, "labels": labels}
    positions = torch.stack([torch.cat([torch.arange(n) for n in line]) for line in lengths])
    if "packed" in kind:
        return {"input_ids": ids, "labels": labels, "position_ids": positions}
    starts = torch.tensor([0, *torch.tensor([n for line in lengths for n in line]).cumsum(0).tolist()])
    segments = starts.int(), max(n for line in lengths for n in line)
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: tensor.reshape(1, -1) for name, tensor in batch.items()} | {"segments": segments}


KINDS = ["padded", "padded, odd", "packed", "packed, odd", "one line", "one line, odd", "prompt in one slice"]


def compare(rank: int, folder: str) -> dict:
    import torch
    import torch.distributed as dist

    from forgebook.errors import ModelError
    from forgebook.models import adapters, load, sequence_parallel
    from forgebook.training.losses import SupervisedLM, check_slices

    sequence_parallel.register()
    group, outcomes = sequence_parallel.SequenceGroup.of(2), {}

    def measure(source, batch, shared, attention, **settings):
        torch.manual_seed(0)
        model = load.load_model(source, dtype="float32", attention=attention, **settings)
        if "lora" in settings:
            model = adapters.add_lora(model, settings.pop("lora"))
        wrapped = SupervisedLM(model, sequence_group=group if shared else None)
        loss = wrapped(**batch)
        loss.backward()
        if shared:
            dist.all_reduce(loss.detach())
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        for gradient in gradients if shared else ():
            dist.all_reduce(gradient)
        return wrapped, [loss.detach(), *gradients]

    def distance(*arguments, **settings):
        (_, whole), (_, sliced) = (measure(*arguments[:2], shared, *arguments[2:], **settings) for shared in (0, 1))
        return max(float((a - b).abs().max() / (a.abs().max() + 1e-9)) for a, b in zip(whole, sliced, strict=True))

    for kind in KINDS:
        batch = batches("padded" if kind == "prompt in one slice" else kind)
        if kind == "prompt in one slice":
            batch["labels"][:, :8] = -100
        outcomes[kind] = distance(f"{folder}/Llama 3", batch, "varlen" if "line" in kind else "sdpa")
    recomputed = {"gradient_checkpointing": True}
    outcomes["recomputed"] = distance(f"{folder}/Llama 3", batches("packed, odd"), "sdpa", **recomputed)
    for family in ("Qwen 3", "Qwen 3 MoE"):
        outcomes[family] = distance(f"{folder}/{family}", batches("packed, odd"), "sdpa")

    # A model whose attention gets no group is found out.
    wrapped, _ = measure(f"{folder}/Llama 3", batches("padded"), True, "sdpa")
    check_slices(wrapped, torch.device("cpu"))
    layer = wrapped.model.model.layers[0].self_attn
    forward = layer.forward
    layer.forward = lambda *arguments, sequence_group=None, **kwargs: forward(*arguments, **kwargs)
    try:
        check_slices(wrapped, torch.device("cpu"))
    except (ModelError, RuntimeError) as error:
        outcomes["found out"] = str(error)
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("Llama 3", "Qwen 3", "Qwen 3 MoE"):
        save_family(name, folder / name)
    return run_two_ranks(compare, folder, str(folder))


@pytest.mark.parametrize("case", [*KINDS, "recomputed", "Qwen 3", "Qwen 3 MoE"])
def test_slices_have_the_loss_and_the_gradients_of_the_whole(outcomes, case):
    assert max(each[case] for each in outcomes) < 2e-5


def test_a_model_that_hands_no_group_on_is_refused(outcomes):
    assert all("sequence_parallel changes the loss of this model" in each["found out"] for each in outcomes)


@pytest.mark.parametrize(
    ("family", "size", "reason"),
    [
        ("Llama 3", 2, None),
        ("Llama 3", 4, "its num_key_value_heads, 2, cannot be divided by 4"),
        ("Gemma 3", 2, "layers of sliding_attention"),
        ("Qwen 3 Next", 2, "layers of linear_attention"),
        ("Mistral", 2, "it has sliding windows"),
        ("Qwen 2.5", 2, None),
    ],
)
def test_models_that_cannot_be_divided(family, size, reason):
    kind, settings = FAMILIES[family]
    config = CONFIG_MAPPING[kind](**settings if "text_config" in settings else TEXT | settings)
    found = why_not_divided(config, size)
    assert found is None if reason is None else reason in found


# Whole runs ---------------------------------------------------------------------------------------------

SHARED = {"num_devices": 2, "sequence_parallel": 2, "train_batch_size_per_device": 4, "eval_batch_size_per_device": 8}
OWN = {"num_devices": 2, "train_batch_size_per_device": 2, "eval_batch_size_per_device": 4}


@pytest.mark.slow
@pytest.mark.parametrize(("padding", "sharding", "rows"), [("packed", "fsdp", 96), ("longest", "none", 24)])
def test_losses_are_those_of_workers_with_examples_of_their_own(
    without_ray, make_config, write_rows, padding, sharding, rows
):
    """With accumulation, clipping, recomputed activations; an evaluation, a checkpoint and a resumed run."""
    settings = {
        "train_path": write_rows(uneven_rows(rows), "many.jsonl"), "num_epochs": 2, "context_length": 256,
        "lora_config": LORA, "padding": padding, "gradient_accumulation_steps": 2, "gradient_checkpointing": True,
        "learning_rate": 3e-4, "attention": "sdpa", "sharding": sharding,
    }  # fmt: skip
    own = fine_tune(make_config(run_name="own", **OWN, **settings))
    for steps in (2, None):
        shared = fine_tune(make_config(run_name="shared", max_steps=steps, **SHARED, **settings))
    losses = [[*losses_of(run), read_json(run.summary)["eval_loss"]] for run in (own, shared)]
    assert len(losses[0]) >= 5 and losses[1] == pytest.approx(losses[0], abs=1e-5)
    rows = [[row for row in read_metrics(run.metrics) if "grad_norm" in row] for run in (own, shared)]
    norms, tokens = ([[row[key] for row in one] for one in rows] for key in ("grad_norm", "trained_tokens"))
    assert norms[1] == pytest.approx(norms[0], rel=1e-4) and tokens[1] == tokens[0]
