"""Losses of pairs of answers: against TRL's own, and against what their papers say of them."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import REPOSITORY, TINY_MODEL
from forgebook.config.blocks import PreferenceTuningConfig, needs_reference
from forgebook.training.preference import PairLogps, preference_loss, preference_metrics
from oracles.make_preference_oracle import perturb

# Somebody else's result: written by TRL, see tests/oracles/make_preference_oracle.py.
ORACLE = json.loads((REPOSITORY / "tests" / "oracles" / "preference.json").read_text())
KINDS = ("dpo", "ipo", "simpo", "orpo", "kto")


def load_model(reference=False):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)
    if reference:
        perturb(model, **ORACLE["perturbation"])
    return model


@pytest.fixture(scope="module")
def policy():
    return load_model()


@pytest.fixture(scope="module")
def reference():
    return load_model(reference=True)


def answer_logps(model, side, prompt=slice(None)):
    """Sum the log-probabilities of each answer's tokens, one sequence at a time, with nothing of ours."""
    sums = []
    for pair in ORACLE["pairs"]:
        start, answer = pair["prompt_ids"][prompt], pair[f"{side}_ids"]
        logits = model(input_ids=torch.tensor([start + answer])).logits[0, len(start) - 1 : -1]
        sums.append(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())
    return torch.stack(sums)


def logps_of(policy, reference=None, prompt=slice(None)):
    with torch.no_grad():
        theirs = [None if reference is None else answer_logps(reference, side) for side in ("chosen", "rejected")]
    tokens = [torch.tensor([len(pair[f"{side}_ids"]) for pair in ORACLE["pairs"]]) for side in ("chosen", "rejected")]
    ours = (answer_logps(policy, side, prompt) for side in ("chosen", "rejected"))
    return PairLogps(*ours, *tokens, *theirs)


def loss_as_named(name, logps):
    """Compute with our function what the oracle has under a name."""
    kind, _, variant = name.partition("_")
    options = dict(ORACLE["losses"][name]["options"])
    beta = options.pop("beta")
    if variant == "robust":  # Robust DPO is conservative DPO of another, negative, smoothing.
        options["label_smoothing"] /= -(1 - 2 * options["label_smoothing"])
    losses = preference_loss(kind, logps, beta, **options)
    return losses + logps.chosen / logps.chosen_tokens if variant == "odds" else losses


def test_the_log_probabilities_are_those_that_trl_computed(policy, reference):
    computed = logps_of(policy, reference)
    for name, values in ORACLE["logps"].items():
        torch.testing.assert_close(
            getattr(computed, name).detach().float(), torch.tensor(values).float(), rtol=0, atol=1e-3
        )


@pytest.mark.parametrize("name", list(ORACLE["losses"]))
def test_losses_gradients_and_margins_equal_those_of_trl(name, policy, reference):
    theirs = ORACLE["losses"][name]
    kind = name.partition("_")[0]
    prompt = slice(1) if name == "orpo" else slice(None)
    logps = logps_of(policy, reference if needs_reference(PreferenceTuningConfig(loss=kind)) else None, prompt)
    losses = loss_as_named(name, logps)
    assert losses.mean().item() == pytest.approx(theirs["loss"], abs=1e-4)
    if "pair_losses" in theirs:
        torch.testing.assert_close(losses.detach(), torch.tensor(theirs["pair_losses"]), rtol=1e-5, atol=1e-4)
    margins = preference_metrics(logps, theirs["options"]["beta"])["reward_margin"]
    assert margins.mean().item() == pytest.approx(theirs["reward_margin"], abs=1e-4)
    gradients = torch.autograd.grad(losses.mean(), list(policy.parameters()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    assert norm == pytest.approx(theirs["gradient_norm"], rel=1e-3)


def test_the_kl_term_of_the_oracle_differs_from_none():
    kto, without = (ORACLE["losses"][name] for name in ("kto", "kto_no_kl"))
    assert kto["options"]["kl"] > 0 and abs(kto["loss"] - without["loss"]) > 5e-4


logp = st.floats(-20, -0.01)
betas = st.floats(0.01, 1)
lengths = st.integers(1, 50)


@st.composite
def pair(draw):
    """Make one pair with any log-probabilities and lengths, in float64 so that no small difference is rounded off."""
    values = [torch.tensor([draw(logp)], dtype=torch.float64) for _ in range(4)]
    return PairLogps(values[0], values[1], torch.tensor([draw(lengths)]), torch.tensor([draw(lengths)]), *values[2:])


def exchange(logps):
    return PairLogps(
        logps.rejected, logps.chosen, logps.rejected_tokens, logps.chosen_tokens,
        logps.reference_rejected, logps.reference_chosen,
    )  # fmt: skip


@given(pair(), betas, st.floats(0, 0.5))
def test_dpo_of_a_model_that_is_its_own_reference_is_log_2(logps, beta, smoothing):
    same = replace(logps, reference_chosen=logps.chosen, reference_rejected=logps.rejected)
    assert preference_loss("dpo", same, beta, label_smoothing=smoothing).item() == pytest.approx(math.log(2))
    assert preference_loss("kto", same, beta).item() == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["dpo", "simpo", "orpo", "kto"])
@given(pair(), betas, st.floats(0.1, 5))
def test_losses_fall_when_the_chosen_answer_becomes_likelier(kind, logps, beta, step):
    risen = replace(logps, chosen=(logps.chosen + step).clamp(max=-0.005))
    before, after = (preference_loss(kind, p, beta).item() for p in (logps, risen))
    assert after < before


@pytest.mark.parametrize("with_reference", [True, False])
@given(pair(), betas)
def test_exchanging_the_answers_negates_the_margin(with_reference, logps, beta):
    if not with_reference:
        logps = replace(logps, reference_chosen=None, reference_rejected=None)
    one, other = preference_metrics(logps, beta), preference_metrics(exchange(logps), beta)
    assert one["reward_margin"].item() == -other["reward_margin"].item()
    assert one["reward_chosen"].item() == other["reward_rejected"].item()
    margin = one["reward_margin"].item()
    assert one["reward_accuracy"].item() == (0.5 if margin == 0 else float(margin > 0))


@given(pair(), betas)
def test_ipo_is_least_where_the_margin_per_token_is_half_of_one_by_beta(logps, beta):
    rejected = (logps.rejected - logps.reference_rejected) / logps.rejected_tokens
    best = logps.reference_chosen + logps.chosen_tokens * (rejected + 1 / (2 * beta))
    losses = [preference_loss("ipo", replace(logps, chosen=best + k), beta).item() for k in (0.0, -30.0, 30.0)]
    assert losses[0] == pytest.approx(0, abs=1e-12) and losses[0] < min(losses[1:])


@given(pair(), betas, st.floats(0, 3))
def test_simpo_asks_for_its_margin_per_token(logps, beta, gamma):
    tokens = logps.chosen_tokens
    at_margin = replace(logps, chosen=tokens * (logps.rejected / logps.rejected_tokens + gamma))
    loss = preference_loss("simpo", at_margin, beta, gamma_beta_ratio=gamma)
    assert loss.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chosen", [0.0, -1e-9, -1e-3, -1e4])
def test_losses_and_gradients_are_finite_at_the_ends(kind, chosen):
    values = [torch.tensor([x], requires_grad=True) for x in (chosen, -1e4)]
    logps = PairLogps(*values, torch.tensor([1]), torch.tensor([0]), torch.tensor([-2.0]), torch.tensor([-3.0]))
    loss = preference_loss(kind, logps, 0.1)
    loss.sum().backward()
    assert loss.isfinite().all() and all(value.grad.isfinite().all() for value in values)


def test_no_gradient_flows_into_the_kl_term():
    kl = torch.tensor(0.3, requires_grad=True)
    chosen = torch.tensor([-2.0], requires_grad=True)
    one = torch.tensor([1])
    logps = PairLogps(chosen, torch.tensor([-3.0]), one, one, torch.tensor([-2.5]), torch.tensor([-2.5]))
    preference_loss("kto", logps, 0.1, kl=kl).sum().backward()
    assert kl.grad is None and chosen.grad is not None


def test_unknown_options_of_a_loss_are_refused():
    one = torch.ones(2)
    logps = PairLogps(-one, -2 * one, one, one)
    assert [kind for kind in KINDS if needs_reference(PreferenceTuningConfig(loss=kind))] == ["dpo", "ipo", "kto"]
    for kind in KINDS:
        if needs_reference(PreferenceTuningConfig(loss=kind)):
            with pytest.raises(ValueError, match="reference"):
                preference_loss(kind, logps, 0.1)
    with pytest.raises(ValueError, match="'ppo'"):
        preference_loss("ppo", logps, 0.1)
    with pytest.raises(TypeError, match="label_smoothing"):
        preference_loss("simpo", logps, 0.1, label_smoothing=0.1)
