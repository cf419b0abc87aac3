"""Labels as tokens, the loss on them alone, and scores."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn import metrics as sk

from conftest import LORA, TINY_MODEL, chat, losses_of
from forgebook.config.blocks import labels_of
from forgebook.data import masking, tokenize
from forgebook.data.row_formats import Example
from forgebook.inference.loading import load_for_generation
from forgebook.launch.fine_tune import fine_tune
from forgebook.models import load
from forgebook.models.tokenizer import label_pieces, load_tokenizer, tokenizer_of
from forgebook.runs.metrics import read_metrics
from forgebook.training import classification

LABELS = ["[[even]]", "[[odd]]"]


def rows(count):
    return [chat(f"the lamp {k}", LABELS[k % 2], system=None) for k in range(count)]


@pytest.fixture
def classifier(make_config, write_rows):
    """A config for a small classifier."""

    def make(**values):
        settings = {
            "task": "classification", "classifier_config": {"label_tokens": LABELS, "eval_metrics": ["accuracy", "f1"]},
            "train_path": write_rows(rows(16), "c.jsonl"), "valid_path": write_rows(rows(20)[16:], "v.jsonl"),
        }  # fmt: skip
        return make_config(**settings | values)

    return make


def test_labels_are_single_tokens_and_stay_in_decoded_text(classifier):
    tokenizer = tokenizer_of(classifier())
    assert [len(tokenizer(label, add_special_tokens=False)["input_ids"]) for label in LABELS] == [1, 1]
    assert tokenizer.decode(classification.label_ids(tokenizer, LABELS), skip_special_tokens=True) == "[[even]][[odd]]"


def test_a_word_is_a_label_only_as_a_whole():
    tokenizer = load_tokenizer(str(TINY_MODEL), ["flim"])
    label = tokenizer.convert_tokens_to_ids("flim")
    assert label in tokenizer("say flim")["input_ids"] and label not in tokenizer("flimsy")["input_ids"]


def test_only_the_last_label_is_trained(classifier):
    config = classifier()
    tokenizer = tokenizer_of(config)
    messages = [*chat("[[odd]] or [[even]]?", "[[odd]]")["messages"], *chat("and now?", "[[even]]", None)["messages"]]
    [[encoded]] = tokenize.encode_examples(
        [Example("f:1", messages=messages)],
        tokenizer,
        tokenize.EncodingOptions("classification", labels=labels_of(config.classifier_config)),
    )
    trained = [i for i, t in zip(encoded.input_ids, encoded.loss_mask, strict=True) if t]
    assert trained == classification.label_ids(tokenizer, ["[[even]]"]) and encoded.loss_mask.index(True) > 20


@pytest.mark.parametrize("method", [None, LORA], ids=["full", "lora"])
def test_the_loss_is_that_of_a_hand_computation(classifier, method):
    """-log p(label) over the whole vocabulary, at the position before the label, mean over rows."""
    run = fine_tune(classifier(lora_config=method, num_epochs=2))
    model, tokenizer, _ = load_for_generation(run.checkpoints / "epoch-2")
    model = model.float() if method else load.load_model(str(run.checkpoints / "epoch-2"), dtype="float32")
    losses = []
    for row in rows(20)[16:]:
        prompt = torch.tensor([masking.encode_prompt(row["messages"][:-1], tokenizer)])
        with torch.no_grad():
            logp = torch.log_softmax(model(prompt).logits[0, -1], -1)
        losses.append(-float(logp[tokenizer.convert_tokens_to_ids(row["messages"][-1]["content"])]))
    evaluation = read_metrics(run.metrics)[-1]
    assert evaluation["eval_loss"] == pytest.approx(np.mean(losses), abs=1e-4)
    assert {"eval_accuracy", "eval_f1"} <= set(evaluation)
    assert "perplexity" not in evaluation  # the loss of a label is not that of a text
    assert losses_of(run)[-1] < losses_of(run)[0]


def test_other_modules_to_save_leave_the_labels_trained(classifier):
    config = classifier(lora_config=LORA | {"modules_to_save": ["norm"]})
    model = load.load_model(str(TINY_MODEL), dtype="float32")
    assert (
        len(
            load.fit_vocabulary(model, tokenizer_of(config), labels_of(config.classifier_config), config.lora_config)[
                "trainable_token_indices"
            ]
        )
        == 1
    )
    own = classifier(lora_config=LORA | {"modules_to_save": ["embed_tokens"]})
    assert load.fit_vocabulary(model, tokenizer_of(own), labels_of(own.classifier_config), own.lora_config) == {}


def test_only_the_rows_of_the_labels_move(classifier, capsys):
    """Peers' point 19: under LoRA new tokens are trained, merged and saved; all other embeddings stay."""
    run = fine_tune(classifier(lora_config=LORA))
    printed = capsys.readouterr().out  # vLLM's verdict before and after training
    assert printed.count("trainable_token_indices is set") == 2 and "can serve the adapter: yes" not in printed
    model, tokenizer, _ = load_for_generation(run.checkpoints / "epoch-1")
    merged = model.merge_and_unload().get_input_embeddings().weight
    base = load.load_model(str(TINY_MODEL), dtype="float32").get_input_embeddings().weight
    assert torch.equal(merged[: len(base)].float(), base.to(merged.dtype).float())
    assert len(merged) == len(tokenizer) == len(base) + 2 and not torch.equal(merged[-1], merged[-2])


@pytest.mark.parametrize("tied", [True, False])
def test_new_labels_start_from_the_tokens_of_their_text(classifier, tied):
    """In both layers; a label that is a token of the model already keeps its row."""
    config = classifier(classifier_config={"label_tokens": ["[[even]]", "the"]})
    tokenizer, plain = tokenizer_of(config), load_tokenizer(str(TINY_MODEL))
    pieces = label_pieces(tokenizer, labels_of(config.classifier_config))
    new = tokenizer.convert_tokens_to_ids("[[even]]")
    assert pieces == {new: plain("[[even]]", add_special_tokens=False)["input_ids"]} and len(pieces[new]) > 1
    model = load.load_model(str(TINY_MODEL), dtype="float32")
    if not tied:
        model.set_output_embeddings(copy.deepcopy(model.get_output_embeddings()))
        model.config.tie_word_embeddings = False
        model.get_output_embeddings().weight = torch.nn.Parameter(model.get_output_embeddings().weight * 2)
    before = [layer.weight.detach().clone() for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    load.fit_vocabulary(model, tokenizer, labels_of(config.classifier_config), None)
    load.start_labels(model, pieces)
    for old, layer in zip(before, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        assert torch.allclose(layer.weight[new], old[pieces[new]].mean(0), atol=1e-6)
        assert torch.equal(layer.weight[: len(old)], old)


@pytest.mark.parametrize("per_run", [160.0, 2.0])
def test_an_adapters_labels_have_their_own_learning_rate(classifier, per_run, monkeypatch):
    """From the mean of their texts, in the one step after the warm-up, by that rate; the adapter by its own.

    per_run: what the labels' logits move in a run; of two steps here.
    """
    monkeypatch.setattr(classification, "LOGIT_PER_RUN", per_run)
    rate = 1e-5
    config = classifier(lora_config=LORA, learning_rate=rate, weight_decay=0.0, num_epochs=1)
    run = fine_tune(config)
    weights = load_file(run.checkpoints / "epoch-1" / "adapter_model.safetensors")
    [rows] = [weight for name, weight in weights.items() if "token_adapter" in name]
    base = load.load_model(str(TINY_MODEL), dtype="float32").get_input_embeddings().weight
    starts = torch.stack(
        [base[ids].mean(0) for ids in label_pieces(tokenizer_of(config), labels_of(config.classifier_config)).values()]
    )
    moved = (rows - starts).abs().max().item()
    assert moved == pytest.approx(min(4.0, per_run / 2) / 256, rel=0.05) and moved > 100 * rate
    largest_b = max(weight.abs().max().item() for name, weight in weights.items() if "lora_B" in name)
    assert largest_b == pytest.approx(rate, rel=0.05)


def test_a_step_has_both_labels_where_one_has_the_longer_examples(classifier, write_rows):
    """Otherwise each step moves the balance of the labels its way. In the plan and in training alike."""
    texts = [("the lamp " * (1 + 12 * (k % 2)) + str(k), LABELS[k % 2]) for k in range(32)]
    path = write_rows([chat(*one, system=None) for one in texts], "lengths.jsonl")
    run = fine_tune(classifier(train_path=path, train_batch_size_per_device=8, num_epochs=1))
    tokens = np.diff([0, *(step["trained_tokens"] for step in read_metrics(run.metrics) if "trained_tokens" in step)])
    assert len(tokens) == 4 and tokens.max() < 2 * tokens.min()
    assert json.loads(run.data_report.read_text())["train"]["padding_share"] > 0.4


def test_the_labels_rate_falls_with_the_number_of_steps():
    """Down to that of the run."""
    rates = [classification.label_rate(1e-3, 256, steps) for steps in (1, 40, 80, 160, 10_000)]
    assert rates == [4 / 256, 4 / 256, 2 / 256, 1 / 256, 1e-3]


def test_scores_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth, raw = rng.integers(0, 4, 200), rng.random((200, 4))
    probabilities = (raw + 0.7 * np.eye(4)[truth]) / (raw + 0.7 * np.eye(4)[truth]).sum(1, keepdims=True)
    computed = classification.score_predictions(
        probabilities, truth, ["accuracy", "f1", "precision", "recall", "prauc", "rocauc"]
    )
    predicted = probabilities.argmax(1)
    assert computed["eval_accuracy"] == pytest.approx(sk.accuracy_score(truth, predicted), abs=1e-6)
    assert computed["eval_f1"] == pytest.approx(sk.f1_score(truth, predicted, average="macro"), abs=1e-6)
    assert computed["eval_prauc"] == pytest.approx(
        sk.average_precision_score(np.eye(4)[truth], probabilities, average="macro"), abs=1e-6
    )
    assert computed["eval_rocauc"] == pytest.approx(
        sk.roc_auc_score(truth, probabilities, multi_class="ovr", average="macro"), abs=1e-6
    )


def test_scores_of_two_labels_are_those_of_the_second():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    computed = classification.score_predictions(probabilities, np.array([0, 1, 1, 0]), ["precision", "recall", "prauc"])
    assert computed == {"eval_precision": 0.5, "eval_recall": 0.5, "eval_prauc": pytest.approx(0.833333)}
