"""float16: a scaled loss, whose scale adapts, and steps that are skipped because a gradient overflowed."""

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file

from conftest import LORA, fine_tune_until, losses_of
from forgebook.errors import TrainingError
from forgebook.launch.fine_tune import fine_tune
from forgebook.runs.atomic import read_json
from forgebook.runs.metrics import read_metrics
from forgebook.training import losses, optimizers
from forgebook.training.optimizers import AdamW
from forgebook.training.step_metrics import Step, check_step
from support_ranks import run_two_ranks

SETTINGS = {"lora_config": LORA, "num_epochs": 3, "num_warmup_steps": 0, "valid_path": None}


def steps_of(run):
    return [row for row in read_metrics(run.metrics) if "train_loss_batch" in row]


@pytest.mark.parametrize("method", [LORA, None], ids=["lora", "full"])
def test_the_losses_are_those_of_float32(make_config, method, monkeypatch):
    monkeypatch.setattr(optimizers, "FIRST_LOSS_SCALE", 2.0**10)
    settings = SETTINGS | {"lora_config": method, "learning_rate": 1e-3 if method else 1e-4, "num_epochs": 2}
    exact, half = (fine_tune(make_config(run_name=d, dtype=d, **settings)) for d in ("float32", "float16"))
    # AdamW's first steps divide each gradient by its own size, so that the smallest differ most.
    assert losses_of(half) == pytest.approx(losses_of(exact), rel=1e-3 if method else 1e-2)
    assert losses_of(half)[-1] < losses_of(half)[0]
    norms = [[row["grad_norm"] for row in steps_of(run)] for run in (exact, half)]
    assert norms[1] == pytest.approx(norms[0], rel=2e-2)
    assert {row["loss_scale"] for row in steps_of(half)} == {2.0**10}
    assert read_json(half.summary)["skipped_steps"] == 0 and read_json(exact.summary)["skipped_steps"] is None
    [saved] = (half.folder / read_json(half.summary)["best_checkpoint"]).glob("*model.safetensors")
    assert {tensor.dtype for tensor in load_file(saved).values()} == {torch.float16}


def test_accumulated_gradients_are_those_of_one_batch(make_config):
    settings = SETTINGS | {"dtype": "float16", "num_epochs": 1}
    whole = fine_tune(make_config(run_name="whole", **settings))
    split = make_config(run_name="split", train_batch_size_per_device=1, gradient_accumulation_steps=8, **settings)
    assert losses_of(fine_tune(split)) == pytest.approx(losses_of(whole), rel=1e-3)


def test_steps_that_overflow_are_skipped_until_the_scale_fits(make_config, monkeypatch, capsys):
    monkeypatch.setattr(optimizers, "FIRST_LOSS_SCALE", 2.0**22)
    run = fine_tune(make_config(dtype="float16", **SETTINGS))
    rows = steps_of(run)
    skipped = [row["step"] for row in rows if "skipped" in row]
    assert skipped == list(range(1, len(skipped) + 1)) and 2 <= len(skipped) <= 7
    assert [row["loss_scale"] for row in rows[:3]] == [2.0**22, 2.0**21, 2.0**20]
    assert all(("grad_norm" in row) != ("skipped" in row) for row in rows)
    assert all(math.isfinite(row["train_loss_batch"]) for row in rows)
    assert losses_of(run)[-1] < losses_of(run)[0]
    assert read_json(run.summary)["skipped_steps"] == len(skipped)
    assert f"{len(skipped)} of {len(rows)} steps were skipped" in " ".join(capsys.readouterr().out.split())


def test_a_run_whose_steps_are_all_skipped_ends_with_the_reason(make_config, monkeypatch):
    monkeypatch.setattr(optimizers, "FIRST_LOSS_SCALE", 2.0**100)
    with pytest.raises(TrainingError, match="all 3 steps were skipped, as their gradients overflow float16"):
        fine_tune(make_config(dtype="float16", **SETTINGS | {"num_epochs": 1}))


def test_a_loss_that_is_not_finite_is_no_overflowed_gradient():
    step = Step(1.0, math.inf, 1, 1, 1, 1, 1, 1, is_skipped=True, loss_scale=4.0)
    check_step(step, 3, is_first=True)
    with pytest.raises(TrainingError, match=r"step 3: the loss is nan.* exceed float16 .*: set dtype"):
        check_step(dataclasses.replace(step, loss=math.nan), 3, is_first=False)
    with pytest.raises(TrainingError, match=r"step 3: the gradients overflow float16 however small .* \(0.5\)"):
        check_step(dataclasses.replace(step, loss_scale=0.5), 3, is_first=False)
    with pytest.raises(TrainingError, match="training has diverged"):
        check_step(dataclasses.replace(step, is_skipped=False, loss_scale=None), 3, is_first=False)
    with pytest.raises(TrainingError, match="gradient of the first step is zero"):
        check_step(dataclasses.replace(step, is_skipped=False, gradient=0.0), 3, is_first=True)


def test_resuming_takes_up_the_scale(make_config, monkeypatch):
    """It is saved with the state, as are the steps since it last overflowed, and the steps that were skipped."""
    monkeypatch.setattr(optimizers, "FIRST_LOSS_SCALE", 2.0**22)
    frequency = {"unit": "steps", "frequency": 4}
    settings = SETTINGS | {"checkpoint_and_evaluation_frequency": frequency, "dtype": "float16"}
    whole, halves = (make_config(run_name=name, **settings) for name in ("whole", "halves"))
    whole = fine_tune(whole)
    with pytest.raises(KeyboardInterrupt):
        fine_tune_until(halves, step=5)
    halves = fine_tune(halves)
    for key in ("train_loss_batch", "loss_scale", "skipped", "grad_norm"):
        assert [row.get(key) for row in steps_of(halves)] == [row.get(key) for row in steps_of(whole)]
    assert read_json(halves.summary)["skipped_steps"] == read_json(whole.summary)["skipped_steps"] >= 2


def test_small_gradients_reach_the_masters_and_overflows_leave_all_as_it_was():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = AdamW([p], lr=0.1, weight_decay=0.0)
    assert optimizer.scaler is not None

    def step(values, max_norm=math.inf):
        # A gradient of 1e-9 is zero in float16, but not once it is scaled.
        optimizer.scaler.scale((p.float() * torch.tensor(values)).sum()).backward()
        norm, skipped, scale = optimizer.scaled_step(max_norm).tolist()
        optimizer.zero_grad()
        return norm, skipped, scale

    norm, skipped, scale = step([1e-9, 0.0, 0.0, 0.0])
    assert norm == pytest.approx(1e-9, rel=0.02) and (skipped, scale) == (0, 2.0**16)
    before = [tensor.clone() for tensor in (p, optimizer.masters[0])]
    state = {name: value.clone() for name, value in optimizer.inner.state[optimizer.masters[0]].items()}
    assert step([1.0, 1.0, 1.0, 70000.0])[1:] == (1, 2.0**16)
    assert all(torch.equal(*pair) for pair in zip(before, (p, optimizer.masters[0]), strict=True))
    assert all(torch.equal(state[name], value) for name, value in optimizer.inner.state[optimizer.masters[0]].items())
    norm, skipped, scale = step([0.3, 0.4, 0.0, 0.0], max_norm=0.1)
    assert norm == pytest.approx(0.5, rel=1e-3) and (skipped, scale) == (0, 2.0**15)
    first, second = optimizer.inner.state[optimizer.masters[0]]["exp_avg"][:2].tolist()
    assert (first, second) == pytest.approx((0.1 * 0.06, 0.1 * 0.08), rel=1e-2)  # clipped to a fifth


def test_the_output_layer_keeps_small_probabilities(monkeypatch):
    """50,000 tokens have a probability of 1e-8 each, which is zero in float16; the sum of them is not."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 8), torch.randn(50_000, 8) * 0.02
    hidden[:, 1], weight[:, 0], weight[:, 1], weight[0, 1] = 18, 0.5, 0, 1
    labels = torch.zeros(300, dtype=torch.long)

    def gradient(dtype):
        inputs = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in (hidden, weight)]
        (losses.fused_linear_cross_entropy(*inputs, labels) * (2.0**12 / 300)).backward()
        assert all(one.grad.isfinite().all() for one in inputs)
        return inputs[0].grad.float()

    def error():
        exact = gradient(torch.float32)
        return float((gradient(torch.float16) - exact).norm() / exact.norm())

    assert error() < 0.02
    monkeypatch.setattr(losses, "FLOAT16_LIFT", 1)
    assert error() > 0.3


def losses_in_two_ranks(rank: int) -> list:
    """One rank's gradient overflows; both skip the step, and take the same one after it."""
    from accelerate import Accelerator

    model = torch.nn.Linear(2, 1, bias=False).half()
    torch.nn.init.ones_(model.weight)
    wrapped = Accelerator(cpu=True).prepare(model)
    optimizer = AdamW(list(model.parameters()), lr=0.1, weight_decay=0.0)
    figures = []
    for values in ([[1.0, 70000.0 if rank else 1.0]], [[1.0, float(rank)]]):
        optimizer.scaler.scale(wrapped(torch.tensor(values).half() / 60).float().sum()).backward()
        figures.append([*optimizer.scaled_step(math.inf).tolist(), *model.weight.flatten().tolist()])
        optimizer.zero_grad()
    return figures


def test_workers_skip_the_same_steps(tmp_path):
    first, second = run_two_ranks(losses_in_two_ranks, tmp_path)
    assert first == second or str(first) == str(second)
    assert first[0][1:] == [1, 2.0**16, 1.0, 1.0] and first[1][1:3] == [0, 2.0**15]
    assert first[1][3:] == pytest.approx([0.9, 0.9], abs=1e-3)
