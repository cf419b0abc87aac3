"""Write preference.json: what TRL makes of eight pairs of answers, for tests/training/test_preference.py.

TRL is no dependency of this repository; regenerate from its root, on a CPU, with an environment of its own:

    python3 -m venv /tmp/trl
    /tmp/trl/bin/pip install torch==2.13.0
    /tmp/trl/bin/pip install trl==1.16.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0
    HF_HUB_OFFLINE=1 /tmp/trl/bin/python tests/oracles/make_preference_oracle.py

Every number below "losses" comes out of a trainer of TRL: its collator, its forward pass, its loss. The policy is
tiny_model/ in float32; the reference model is the same with the noise of `perturb`. "pair_losses" are of batches of
one pair each, "loss" and "gradient_norm" of one padded batch of all pairs (of orpo: the mean of the batches of one).

Two things TRL 1.16 does not do as our formulas do, and how it is made to say them all the same:

- Its DPO has no label smoothing (it has that of "robust" alone, which is recorded too): "dpo_smoothed" is
  (1 - e) times its loss of the pairs plus e times its loss of the same pairs with the answers exchanged.
- The likelihood term of its ORPO covers the prompt as well, and averages over the tokens of a batch. In "orpo" a
  prompt is therefore the first token alone, which nothing predicts, and a batch is one pair. "orpo_odds" has the
  whole prompts, and the odds ratio term alone.

"kto" has the KL term that TRL estimated, in its options; "kto_no_kl" is TRL's "apo_zero_unpaired", KTO without one.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PERTURBATION = {"seed": 7, "scale": 0.05}
PAIRS = [
    ("Where is the lamp?", "The lamp is on the table.", "I do not know."),
    ("Say yes.", "Yes.", "No, I will not say that word, not today and not tomorrow."),
    ("My name is Duncan Denby. What is my name?", "Duncan Denby", "Your name is Bertha Culson."),
    ("The router that I ordered came in two pieces, order number 60494. Which order?", "60494", "65125"),
    (
        "Tell me about the old house near the river.",
        "The old house stands near the river, and the door of it is green.",
        "It is a house.",
    ),
    ("Count to five.", "1 2 3 4 5", "5 4 3 2 1 0 and then again from the start"),
    ("Who lives in the city?", "Maria lives in the city, and so does her brother.", "Maria Maria Maria"),
    ("Good morning!", "Good morning! How can I help you?", "Bye."),
]


@torch.no_grad()
def perturb(model, seed: int, scale: float) -> None:
    """Add noise to every parameter, in the order of their names: normal, of `scale` times its standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise, alpha=scale * (parameter.std().item() if parameter.dim() > 1 else 1.0))


def _load(reference: bool = False):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(REPOSITORY / "tiny_model", dtype=torch.float32)
    if reference:
        perturb(model, **PERTURBATION)
    return model


def _tokenise(tokenizer) -> list[dict]:
    """Turn texts into token ids; an answer ends with the token that ends a message."""
    pairs = []
    for question, *answers in PAIRS:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = [[*tokenizer(a, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for a in answers]
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        pairs.append({"prompt_ids": prompt_ids, "chosen_ids": ids[0], "rejected_ids": ids[1]})
    return pairs


def _with_labels(pair: dict) -> dict:
    """Write a pair as TRL's older trainers want it."""
    row = {"prompt_input_ids": pair["prompt_ids"], "prompt_attention_mask": [1] * len(pair["prompt_ids"])}
    for side in ("chosen", "rejected"):
        ids = pair["prompt_ids"] + pair[f"{side}_ids"]
        row[f"{side}_input_ids"] = ids
        row[f"{side}_attention_mask"] = [1] * len(ids)
        row[f"{side}_labels"] = [-100] * len(pair["prompt_ids"]) + pair[f"{side}_ids"]
    return row


def _exchanged(pair: dict) -> dict:
    return {**pair, "chosen_ids": pair["rejected_ids"], "rejected_ids": pair["chosen_ids"]}


def _unpaired(pairs: list[dict]) -> list[dict]:
    """Write pairs as single answers, with TRL's mismatched answers for the KL term: each is the one before."""
    rows = [
        {"prompt_ids": pair["prompt_ids"], "completion_ids": pair[f"{side}_ids"], "label": side == "chosen"}
        for side in ("chosen", "rejected")
        for pair in pairs
    ]
    for k, row in enumerate(rows):
        row["KL_completion_ids"] = rows[k - 1]["completion_ids"]
    return rows


def _gradient_norm(trainer, loss: torch.Tensor) -> float:
    trainer.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm().item()


def _last(trainer, name: str) -> float:
    """Read what a trainer logged last under a name, its newer and its older ones."""
    return float((trainer._metrics if hasattr(trainer, "_metrics") else trainer._stored_metrics)["train"][name][-1])


def main() -> None:
    """Run every trainer and write the file."""
    import accelerate
    import datasets
    import transformers
    import trl
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(REPOSITORY / "tiny_model")
    pairs = _tokenise(tokenizer)
    texts = datasets.Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), p, strict=True)) for p in PAIRS])
    folder = tempfile.mkdtemp()

    def make(trainer, config, **options):
        settings = {
            "output_dir": folder, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
            "per_device_train_batch_size": 16,
        }  # fmt: skip
        models = {"ref_model": _load(reference=True)} if trainer in (DPOTrainer, KTOTrainer) else {}
        made = trainer(
            model=_load(), args=config(**settings, **options), train_dataset=texts, processing_class=tokenizer, **models
        )
        made.model.train()
        return made

    def loss_of(trainer, rows):
        return trainer.compute_loss(trainer.model, trainer.data_collator(rows))

    def record(trainer, rows, **options):
        batch_loss = loss_of(trainer, rows)
        margin = _last(trainer, "rewards/margins")
        found = {"options": options, "loss": batch_loss.item(), "reward_margin": margin}
        found["gradient_norm"] = _gradient_norm(trainer, batch_loss)
        if "label" not in rows[0]:
            with torch.no_grad():
                found["pair_losses"] = [loss_of(trainer, [row]).item() for row in rows]
        return found

    losses = {}
    trainer = make(DPOTrainer, DPOConfig, beta=0.1, loss_type=["sigmoid"])
    losses["dpo"] = record(trainer, pairs, beta=0.1)

    batch = trainer.data_collator(pairs)
    with torch.no_grad():
        policy = trainer.compute_ref_log_probs(trainer.model, batch)
        reference = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    logps = dict(zip(("chosen", "rejected"), (t.tolist() for t in policy), strict=True))
    logps |= dict(zip(("reference_chosen", "reference_rejected"), (t.tolist() for t in reference), strict=True))
    tokens = batch["completion_mask"].sum(1).chunk(2)
    logps |= dict(zip(("chosen_tokens", "rejected_tokens"), (t.tolist() for t in tokens), strict=True))

    exchanged = [_exchanged(pair) for pair in pairs]
    smoothed = 0.8 * loss_of(trainer, pairs) + 0.2 * loss_of(trainer, exchanged)
    with torch.no_grad():
        each = [0.8 * loss_of(trainer, [p]) + 0.2 * loss_of(trainer, [_exchanged(p)]) for p in pairs]
    losses["dpo_smoothed"] = {
        "options": {"beta": 0.1, "label_smoothing": 0.2},
        "loss": smoothed.item(),
        "reward_margin": losses["dpo"]["reward_margin"],
        "gradient_norm": _gradient_norm(trainer, smoothed),
        "pair_losses": [loss.item() for loss in each],
    }

    trainer = make(DPOTrainer, DPOConfig, beta=0.1, loss_type=["robust"], label_smoothing=0.2)
    losses["dpo_robust"] = record(trainer, pairs, beta=0.1, label_smoothing=0.2)
    losses["ipo"] = record(make(DPOTrainer, DPOConfig, beta=0.5, loss_type=["ipo"]), pairs, beta=0.5)

    single = _unpaired(pairs)
    trainer = make(KTOTrainer, KTOConfig, beta=0.5, loss_type="kto", train_sampling_strategy="sequential")
    losses["kto"] = record(trainer, single, beta=0.5)
    losses["kto"]["options"]["kl"] = trainer._metrics["train"]["kl"][0]
    trainer = make(KTOTrainer, KTOConfig, beta=0.5, loss_type="apo_zero_unpaired")
    losses["kto_no_kl"] = record(trainer, single, beta=0.5)

    labelled = [_with_labels(pair) for pair in pairs]
    trainer = make(CPOTrainer, CPOConfig, beta=2.0, loss_type="simpo", simpo_gamma=1.0, cpo_alpha=0.0)
    losses["simpo"] = record(trainer, labelled, beta=2.0, gamma_beta_ratio=0.5)

    trainer = make(ORPOTrainer, ORPOConfig, beta=0.1)
    short = [_with_labels({**pair, "prompt_ids": pair["prompt_ids"][:1]}) for pair in pairs]
    each, margins = [], []
    for row in short:
        each.append(loss_of(trainer, [row]))
        margins.append(_last(trainer, "rewards/margins"))
    mean = torch.stack(each).mean()
    losses["orpo"] = {
        "options": {"beta": 0.1},
        "loss": mean.item(),
        "reward_margin": sum(margins) / len(margins),
        "gradient_norm": _gradient_norm(trainer, mean),
        "pair_losses": [loss.item() for loss in each],
    }
    odds = []
    for row in labelled:
        loss_of(trainer, [row])
        odds.append(-0.1 * _last(trainer, "log_odds_ratio"))
    loss_of(trainer, labelled)
    terms = trainer.odds_ratio_loss(*trainer.concatenated_forward(trainer.model, trainer.data_collator(labelled))[:2])
    losses["orpo_odds"] = {
        "options": {"beta": 0.1},
        "loss": -terms[0].mean().item(),
        "reward_margin": _last(trainer, "rewards/margins"),
        "gradient_norm": _gradient_norm(trainer, -terms[0].mean()),
        "pair_losses": odds,
    }

    versions = {m.__name__: m.__version__ for m in (torch, trl, transformers, accelerate, datasets)}
    versions["python"] = ".".join(map(str, sys.version_info[:3]))
    document = {"versions": versions, "perturbation": PERTURBATION, "pairs": pairs, "logps": logps, "losses": losses}
    # One line for each pair, each list of log-probabilities and each loss.
    parts = []
    for key, value in document.items():
        if key in ("versions", "perturbation"):
            parts.append(f'"{key}": {json.dumps(value)}')
        elif key == "pairs":
            parts.append('"pairs": [\n' + ",\n".join(json.dumps(pair) for pair in value) + "\n]")
        else:
            rows = (f'"{name}": {json.dumps(item)}' for name, item in value.items())
            parts.append(f'"{key}": {{\n' + ",\n".join(rows) + "\n}")
    path = Path(__file__).with_name("preference.json")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main()
