"""SmolLM2-135M-Instruct, pretrained: what a model that this repository made may hide. `make models` fetches it."""

import json

import pytest
import torch

from conftest import LORA, REPOSITORY, chat
from forgebook.catalog import model_folder, shape_of
from forgebook.data.masking import encode, encode_prompt
from forgebook.inference.generate import complete
from forgebook.launch.fine_tune import fine_tune
from forgebook.models.adapters import read_lora_config
from forgebook.models.tokenizer import load_tokenizer
from forgebook.runs.metrics import read_metrics
from forgebook.runs.run import best_checkpoint
from helpers import load_for_generation

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
pytestmark = pytest.mark.skipif(not model_folder(SMOLLM2).is_dir(), reason=f"{SMOLLM2} is not here: make models")
ROWS = [json.loads(line) for line in (REPOSITORY / "data/quickstart/train.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(model_folder(SMOLLM2)))


@pytest.fixture(scope="module")
def plain():
    """The model as plain transformers loads it, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder(SMOLLM2), dtype=torch.float32).eval()


def test_a_conversation_is_encoded_as_its_own_template_does(tokenizer):
    """Without a system message the template writes one of its own; only the answer and its end are in the loss."""
    messages = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]
    encoded = encode(messages, tokenizer)
    assert encoded.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert encode_prompt(messages[:1], tokenizer) == prompt and "named SmolLM" in tokenizer.decode(prompt)
    supervised = [token for token, in_loss in zip(encoded.input_ids, encoded.loss_mask, strict=True) if in_loss]
    assert tokenizer.decode(supervised) == "It is 4.<|im_end|>" and not any(encoded.loss_mask[: len(prompt)])


def test_the_plan_counts_its_parameters(plain):
    assert shape_of(SMOLLM2).parameters == sum(p.numel() for p in plain.parameters()) == 134_515_008


def test_it_answers():
    question = [{"role": "user", "content": "What is the capital of France?"}]
    [answer] = load_for_generation(SMOLLM2).answer([question], max_new_tokens=12)
    assert "Paris" in answer


def test_a_batch_answers_as_plain_transformers_does_one_prompt_at_a_time(tokenizer, plain):
    """Prompts of several lengths; the third joins when one of the first two has ended."""
    prompts = [row["messages"][:-1] for row in ROWS[96:98]] + [[{"role": "user", "content": "Say yes."}]]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([encode_prompt(prompt, tokenizer)])
        output = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        expected.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    assert complete(plain, tokenizer, prompts, max_new_tokens=12, batch_size=2) == expected


@pytest.mark.slow
def test_a_few_steps_of_lora_on_real_rows(make_config, write_rows, tokenizer, plain):
    """The loss before the first step is that of plain transformers, masks included; then it falls, steeply."""
    held_out = ROWS[96:100]
    config = make_config(
        model_id=SMOLLM2, lora_config=LORA, num_epochs=1, eval_first=True,
        train_path=write_rows(ROWS[:32], "records.jsonl"), valid_path=write_rows(held_out, "held-out.jsonl"),
    )  # fmt: skip
    run = fine_tune(config)
    losses = [row["eval_loss"] for row in read_metrics(run.metrics) if "eval_loss" in row]
    assert losses[0] == pytest.approx(loss_of(plain, tokenizer, held_out), abs=1e-4)
    assert losses[-1] < 0.6 * losses[0]
    assert read_lora_config(best_checkpoint(run))["base_model_name_or_path"] == SMOLLM2


@torch.inference_mode()
def loss_of(model, tokenizer, rows) -> float:
    """Return the mean loss per token of the answers, example by example, with transformers alone."""
    total = count = 0
    for row in rows:
        whole = tokenizer.apply_chat_template(row["messages"], return_dict=False)
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=False)
        end = len(whole) - 1  # the template's line end after <|im_end|>
        labels = [-100] * len(prompt) + whole[len(prompt) : end] + [-100]
        total += model(torch.tensor([whole]), labels=torch.tensor([labels])).loss.item() * (end - len(prompt))
        count += end - len(prompt)
    return total / count


@pytest.mark.slow
def test_a_classifier_learns_labels_that_are_new_tokens(make_config, write_rows):
    """Spam or not: 16 steps with the learning rate of any LoRA, of which the labels' rows have a multiple."""
    lines = (REPOSITORY / "tests/real/sms_spam.tsv").read_text().splitlines()
    rows = [chat(text, f"[[{label}]]", system=None) for label, text in (line.split("\t") for line in lines)]
    config = make_config(
        model_id=SMOLLM2, lora_config=LORA, num_epochs=1, learning_rate=1e-4, train_batch_size_per_device=4,
        classifier_config={"label_tokens": ["[[ham]]", "[[spam]]"], "eval_metrics": ["accuracy", "rocauc"]},
        task="classification", train_path=write_rows(rows[:64], "sms.jsonl"),
        valid_path=write_rows(rows[64:104], "held-out.jsonl"),
    )  # fmt: skip
    run = fine_tune(config)
    evaluation = read_metrics(run.metrics)[-1]
    # Chance: 0.69, 0.5 and 0.5. After so few steps the threshold between the labels depends on seed and processor: five
    # runs on two machines ended at accuracies of 0.70 to 0.88.
    assert evaluation["eval_loss"] < 0.6 and evaluation["eval_accuracy"] > 0.6 and evaluation["eval_rocauc"] > 0.9
    prompts = [row["messages"][:1] for row in rows[64:66]]
    answers = load_for_generation(best_checkpoint(run)).answer(prompts, max_new_tokens=1)
    assert set(answers) <= {"[[ham]]", "[[spam]]"}
