"""Evaluations on real, tiny runs: figures that other code confirms, mistakes that can be read."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_judge import endpoint
from transformers import Qwen2Config, Qwen2ForCausalLM

from conftest import LORA, TINY_MODEL, chat, uneven_rows
from forgebook.config.parse import load_config
from forgebook.errors import ConfigError, DataError, StorageError
from forgebook.evaluation import results
from forgebook.evaluation.answers import SavedAnswers
from forgebook.evaluation.evaluate import evaluate
from forgebook.evaluation.judge import Judge
from forgebook.launch.fine_tune import fine_tune
from forgebook.runs.metrics import read_metrics
from forgebook.runs.run import Run
from support_vision import draw, image_row, save_vision_model

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def learn(tmp_path_factory):
    """Overfit a run on a few rows; the tuned model repeats them, its base does not."""
    folder = tmp_path_factory.mktemp("runs")

    def train(name, rows, **values):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {
            "model_id": str(TINY_MODEL), "train_path": str(path), "valid_path": str(path), "run_name": name,
            "task": "instruction_tuning", "storage_path": str(folder), "num_devices": 0, "num_epochs": 30,
            "train_batch_size_per_device": 8, "learning_rate": 3e-3, "num_warmup_steps": 0, "dtype": "float32",
            "deepspeed": None, "gradient_checkpointing": False, **values,
        }  # fmt: skip
        # One checkpoint, at the end: most of the time of a tiny run goes into evaluating and saving.
        frequency = {"unit": "epochs", "frequency": settings["num_epochs"]}
        settings["checkpoint_and_evaluation_frequency"] = frequency
        (folder / f"{name}.yaml").write_text(json.dumps(settings))
        return fine_tune(load_config(folder / f"{name}.yaml"))

    return train


QUESTIONS = ("alpha", "bravo", "carol", "delta")


@pytest.fixture(scope="module")
def by_heart(learn):
    """A run that answers `X` with "X and out", then a GSM8K number."""
    return learn("heart", [chat(q, f"{q} and out\n#### {k}") for k, q in enumerate(QUESTIONS)], num_epochs=60)


@pytest.fixture
def held_out(write_rows):
    """Three rows that the run knows, one to which it knows another answer."""
    rows = [chat(q, f"{q} and out\n#### {k}") for k, q in enumerate(QUESTIONS[:3])]
    return write_rows([*rows, chat("delta", "delta and out\n#### 4")], "held-out.jsonl")


def test_a_run_learns_its_rows_by_heart(by_heart):
    evaluation = evaluate(by_heart)
    compared, [score] = evaluation.comparison, evaluation.scores
    assert (score.name, score.before.value, score.after.value, evaluation.rows) == ("exact_match", 0, 1, 4)
    assert evaluation.summary()["max_new_tokens"] == 128  # the least
    assert (
        compared.tuned == compared.references
        and compared.references[0] == "alpha and out\n#### 0"
        and compared.prompts[0] == "alpha"
    )


def test_a_base_is_measured_without_the_biases_of_its_adapter(learn, tokenizer, tmp_path):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, **sizes))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = [chat(question, f"{question} and out") for question in QUESTIONS]
    lora = LORA | {"bias": "all"}
    run = learn("biases", rows, model_id=str(tmp_path), lora_config=lora, eval_first=True, learning_rate=3e-2)
    [score] = evaluate(run, metric="perplexity").scores
    losses = [row["eval_loss"] for row in read_metrics(run.metrics) if "eval_loss" in row]
    assert score.before.value == pytest.approx(math.exp(losses[0]), rel=1e-3) and losses[-1] < losses[0]


def test_the_runs_own_examples_are_read_by_its_rule_for_bad_rows(learn):
    rows = [chat("alpha", "one"), {"messages": []}, chat("bravo", "two")]
    run = learn("bad rows", rows, on_bad_rows="drop", num_epochs=1)
    assert evaluate(run, metric="perplexity").rows == 2
    with pytest.raises(DataError, match="1 of 3 rows"):
        evaluate(run, path=load_config(run.config).valid_path, metric="perplexity")


def test_examples_of_another_file_get_the_system_message_of_training(by_heart, write_rows, tmp_path):
    plain, whole = (
        write_rows([chat(q, f"{q} and out", system) for q in QUESTIONS], f"{name}.jsonl")
        for name, system in (("plain", None), ("whole", "Be brief."))
    )
    run = Run(Path(shutil.copytree(by_heart.folder, tmp_path / "runs" / "heart")))
    config = yaml.safe_load(run.config.read_text())
    values = {}
    for system in (None, "Be brief."):
        run.config.write_text(yaml.safe_dump(config | {"train_path": {"path": config["train_path"], "system": system}}))
        for path in (plain, whole):
            values[system, path] = evaluate(run, path=path, metric="perplexity").scores[0].after.value
    assert values[None, plain] != values[None, whole]
    assert values["Be brief.", plain] == values["Be brief.", whole] == values[None, whole]


@pytest.mark.parametrize(
    ("metric", "kind"), [(None, "different"), ("gsm8k", "wrong number")], ids=["exact_match", "gsm8k"]
)
def test_right_and_wrong_answers_are_counted_and_shown(by_heart, held_out, metric, kind):
    notes = []
    found = evaluate(by_heart, path=held_out, metric=metric, max_new_tokens=24, on_note=notes.append)
    assert any("metric=gsm8k compares it alone" in note for note in notes) == (metric is None)
    [score] = found.scores
    assert (score.before.value, score.after.value) == (0, 0.75) and score.difference.value == 0.75
    assert score.after.low == pytest.approx(0.3006, abs=1e-4) and score.after.high == pytest.approx(0.9544, abs=1e-4)
    assert score.difference.p == 0.25  # three rows won, none lost
    results.save(found, by_heart)
    [mistake] = [json.loads(line) for line in (by_heart.folder / "evaluation/mistakes.jsonl").read_text().splitlines()]
    assert mistake["kind"] == kind and mistake["prompt"] == "delta" and mistake["base_was_right"] is False
    assert mistake["tuned"] == "delta and out\n#### 3" and mistake["reference"].endswith("4") and "base" in mistake
    written = json.loads((by_heart.folder / "evaluation.json").read_text())
    name = metric or "exact_match"
    assert written["rows"] == 4 and written[f"{name}_after"] == 0.75 and written[f"{name}_after_95"] == [0.3006, 0.9544]
    assert sum(counts["after"] for counts in written["mistakes"].values()) == 1
    assert f"{name.replace('_', ' ')} on 4 held-out examples: base 0.0%, tuned 75.0%" in results.figure_lines(found)[0]


def test_an_interrupted_evaluation_resumes(by_heart, held_out, monkeypatch):
    """It says how many answers were saved; other settings start anew."""
    settings = {"path": held_out, "metric": "gsm8k", "max_new_tokens": 20}
    saved, add = [], SavedAnswers.add

    def add_until_killed(self, key, text):
        if len(saved) == 6:
            raise KeyboardInterrupt
        saved.append(key)
        add(self, key, text)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SavedAnswers, "add", add_until_killed)
        evaluate(by_heart, **settings)
    notes, counts = [], []
    resumed = evaluate(by_heart, **settings, on_note=notes.append, on_progress=lambda *count: counts.append(count))
    assert "20 tokens" in notes[0] and "4 of 4 answers of the base model" in notes[1]
    assert "2 of 4 answers of the tuned model" in notes[2] and len(notes) == 3
    assert [count[:3] for count in counts if len(count) == 3] == [("base", 4, 4), ("tuned", 2, 4)]
    notes.clear()
    whole = evaluate(by_heart, **{**settings, "max_new_tokens": 21}, on_note=notes.append)
    assert len(notes) == 1 and whole.comparison.tuned == resumed.comparison.tuned


def test_answers_may_be_half_as_long_again_as_the_longest_reference(by_heart, write_rows):
    long = write_rows([chat("alpha", "the old lamp of Maria " * 30)], "long.jsonl")
    limits = evaluate(by_heart, path=long).limits
    longest = limits["longest_reference_tokens"]
    assert longest > 120 and limits["max_new_tokens"] == longest + longest // 2


@pytest.mark.parametrize("opens", [False, True], ids=["thought-in-answer", "thought-opened-by-prompt"])
def test_thoughts_are_not_compared(learn, write_rows, tmp_path, monkeypatch, opens):
    """The references' own thoughts are other ones, which have no part in any metric."""
    model = shutil.copytree(TINY_MODEL, tmp_path / "model")
    if opens:
        template = (model / "chat_template.jinja").read_text()
        (model / "chat_template.jinja").write_text(template.replace('"<|assistant|>"', '"<|assistant|><think>\\n"'))

    def rows(*answers, thought):
        written = [chat(question, answer) for question, answer in zip(QUESTIONS, answers, strict=True)]
        for row in written:
            row["messages"][-1]["reasoning_content"] = thought
        return written

    known = rows(*(f"{question} it is" for question in QUESTIONS), thought="one lamp")
    run = learn(f"thoughts-{opens}", known, model_id=str(model), num_epochs=100)
    long = "one lamp " * 150 + "#### 7"
    valid = write_rows(
        rows(*(f"{question} it is" for question in QUESTIONS[:3]), "delta it i", thought=long), "thoughts.jsonl"
    )
    found = evaluate(run, path=valid)
    assert found.scores[0].after.value == 0.75 and found.kinds["does not stop"][1] == 1
    assert "one lamp\n</think>\n\ndelta it is" in found.mistakes[0]["tuned"]  # all of it, to be read
    assert found.limits["longest_reference_tokens"] > 200
    anls, _ = evaluate(run, path=valid, metric="anls").scores
    assert anls.after.value == pytest.approx((3 + 10 / 11) / 4)
    cut = evaluate(run, path=valid, max_new_tokens=8)
    assert cut.scores[0].after.value == 0 and cut.kinds["thought does not end"][1] == 4
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with endpoint(lambda question: "Verdict: TIE") as (url, requests):
        evaluate(run, path=valid, metric="judge", judge=Judge("any", url))
    assert all("lamp" not in one["messages"][1]["content"].partition("# A right")[2] for one in requests)
    assert any(one["messages"][1]["content"].endswith("# Answer B\nalpha it is") for one in requests)


def test_perplexity_is_that_of_the_training_loop(by_heart):
    """The same rows as the run's own validation: the same figure, by other code."""
    last = [row for row in read_metrics(by_heart.metrics) if "eval_loss" in row]
    best = min(row["eval_loss"] for row in last)
    found = evaluate(by_heart, metric="perplexity")
    [score] = found.scores
    assert score.after.value == pytest.approx(np.exp(best), rel=1e-4) and score.before.value > 5
    assert score.difference.p == 2 / 2**4 and found.mistakes == []  # of four examples, all better


@pytest.mark.parametrize("truncation", ["error", "left", "right"])
def test_perplexity_truncates_as_the_run_does(learn, write_rows, truncation):
    """An answer beyond the context: cut to its end, as in training, or left out and reported."""
    short = [chat("where is the lamp", "on the table") for _ in range(4)]
    long = [*short, chat("where is the lamp of Maria near the old door " * 8, "on the table")]
    trained = short if truncation == "error" else long
    run = learn(f"cut-{truncation}", trained, num_epochs=1, context_length=40, truncation=truncation)
    evaluation = evaluate(run, path=write_rows(long, "long.jsonl"), metric="perplexity")
    left_out = 0 if truncation == "left" else 1
    assert (evaluation.rows, evaluation.left_out) == (5 - left_out, left_out)
    assert evaluation.summary().get("rows_left_out", 0) == left_out
    assert ("1 left out" in results.figure_lines(evaluation)[0]) == bool(left_out)
    logged = min(row["eval_loss"] for row in read_metrics(run.metrics) if "eval_loss" in row)
    assert evaluation.scores[0].after.value == pytest.approx(np.exp(logged), rel=1e-4)


def test_the_judge_sees_both_orders(by_heart, held_out, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")

    def verdict(question):
        first, second = question.split("# Answer A\n")[1].split("\n\n# Answer B\n")
        is_known = ["and out" in text for text in (first, second)]
        return "Verdict: " + ("TIE" if is_known[0] == is_known[1] else "A" if is_known[0] else "B")

    with endpoint(verdict) as (url, requests):
        found = evaluate(by_heart, path=held_out, metric="judge", judge=Judge("any", url), max_new_tokens=16)
    [score] = found.scores
    assert len(requests) == 8 and score.before is None
    assert score.after.value == 1 and score.after.low < 0.6 and found.mistakes == []
    assert score.difference.p == 2 / 2**4  # four wins of four
    assert found.kinds == {"lost": (4, 0)}
    assert results.figure_lines(found)[0] == "win rate on 4 held-out examples: tuned 100.0%"


def test_tool_calls_turn_by_turn(learn, write_rows):
    """A run that has learnt two conversations; one of them is held against another reference."""

    def talk(city, wanted, after="It is sunny."):
        call = {"id": "1", "function": {"name": "weather", "arguments": {"city": wanted}}}
        turns = [
            {"role": "user", "content": f"{city}?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "sun", "tool_call_id": "1"},
            {"role": "assistant", "content": after},
        ]
        return {"messages": turns, "tools": TOOLS}

    run = learn("tools", [talk("Paris", "Paris"), talk("Rome", "Rome")], num_epochs=60)
    path = write_rows([talk("Paris", "Paris", after="Sun, sun."), talk("Rome", "Milan")], "tools-held-out.jsonl")
    found = evaluate(run, path=path, max_new_tokens=60)
    assert found.metric == "tool_calls" and found.rows == 2
    [score] = found.scores
    # Text beside calls is not compared: Paris is right in both turns. Rome counts once.
    assert score.after.value == 0.5 and score.before.value == 0
    assert {kind: after for kind, (_, after) in found.kinds.items() if after} == {"wrong value": 1}
    assert sum(before for before, _ in found.kinds.values()) == 2
    [mistake] = found.mistakes
    assert mistake["prompt"] == "Rome?" and '"city": "Milan"' in mistake["reference"]
    assert "Rome" in mistake["tuned"] and mistake["kind"] == "wrong value"


def test_a_classifier_and_its_base_share_out_labels(learn):
    """The tuned model's labels are tokens; to its base they are several, judged by their likelihood."""
    labels = ["[[yes]]", "[[no]]"]
    rows = [chat(f"number {k}", labels[k % 2]) for k in range(8)]
    run = learn(
        "classes", rows, task="classification", num_epochs=40,
        classifier_config={"label_tokens": labels, "eval_metrics": ["accuracy", "f1", "prauc"]},
    )  # fmt: skip
    found = evaluate(run)
    by_name = {score.name: score for score in found.scores}
    assert list(by_name) == ["accuracy", "f1", "prauc"] and found.metric == "classification"
    logged = [row for row in read_metrics(run.metrics) if "eval_loss" in row]
    best = min(logged, key=lambda row: row["eval_loss"])
    for name, score in by_name.items():
        assert score.after.value == pytest.approx(best[f"eval_{name}"], abs=1e-6), name
        assert 0 <= score.before.value <= 1 and score.after.low <= score.after.value <= score.after.high
    wrong = sum(before for before, _ in found.kinds.values())
    assert by_name["accuracy"].before.value == pytest.approx(1 - wrong / 8)


def test_pairs_and_texts_have_metrics_of_their_own(learn):
    pairs = [
        {side: chat(f"{q}?", text)["messages"] for side, text in (("chosen", f"{q} it is"), ("rejected", "Who knows."))}
        for q in QUESTIONS
    ]
    preferring = learn("pairs", pairs, task="preference_tuning", num_epochs=5, lora_config=LORA)
    [score] = evaluate(preferring).scores
    assert score.name == "chosen_likelier" and score.after.value == 1
    texts = learn("texts", [{"text": "The lamp is old."}, {"text": "A new door."}], task="causal_lm", num_epochs=5)
    found = evaluate(texts)
    logged = min(row["eval_loss"] for row in read_metrics(texts.metrics) if "eval_loss" in row)
    assert found.metric == "perplexity" and found.scores[0].after.value == pytest.approx(np.exp(logged), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"metric": "exactly"}, ConfigError, "unknown metric 'exactly'; expected one of exact_match"),
        ({"metric": "classification"}, ConfigError, "no classifier_config"),
        ({"metric": "judge"}, ConfigError, "needs judge=MODEL"),
        ({"checkpoint": "epoch-99"}, StorageError, "no checkpoint 'epoch-99'"),
        ({"path": "none.jsonl"}, StorageError, "none.jsonl does not exist"),
        ({"metric": "perplexity", "engine": "vllm"}, ConfigError, "engine=vllm generates answers, and metric=perplex"),
        ({"metric": "exact_match", "engine": "vlm"}, ConfigError, "engine must be auto, transformers or vllm"),
    ],
    ids="metric labels judge checkpoint path engine engines".split(),
)
def test_what_cannot_be_measured_is_refused(by_heart, options, kind, message):
    with pytest.raises(kind, match=message):
        evaluate(by_heart, **options)


@pytest.mark.parametrize("metric", ["exact_match", "tool_calls"])
def test_a_row_without_a_prompt_is_left_out(by_heart, write_rows, metric):
    """It had counted as right for both models."""
    said = {"role": "assistant", "content": "alpha"}
    call = {"id": "1", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    asked = {"messages": [{"role": "user", "content": "alpha"}, said | {"tool_calls": [call]}], "tools": TOOLS}
    found = evaluate(by_heart, path=write_rows([{"messages": [said]}, asked]), metric=metric, max_new_tokens=4)
    [score] = found.scores
    assert (score.before.value, score.after.value, found.rows, found.left_out) == (0, 0, 1, 1)
    assert found.summary()["rows_left_out"] == 1
    assert "on 1 held-out examples (1 left out: nothing to answer)" in results.figure_lines(found)[0]


def test_a_row_without_an_answer_is_named(by_heart, write_rows):
    rows = [*uneven_rows(1), {"messages": [*chat("a", "b")["messages"], {"role": "user", "content": "c"}]}]
    with pytest.raises(DataError, match=r"rows.jsonl:2: messages: must end with the assistant"):
        evaluate(by_heart, path=write_rows(rows))


def test_a_run_that_has_not_ended_is_refused(by_heart, tmp_path):
    (tmp_path / "config.yaml").write_text(by_heart.config.read_text())
    with pytest.raises(StorageError, match="has not finished"):
        evaluate(Run(tmp_path))


def test_a_share_that_was_held_out_is_evaluated(learn, write_rows):
    """The run's own copy of it: the files, their columns and the split are not needed again."""
    rows = [{"q": f"{word} {k}", "a": word} for k in range(4) for word in QUESTIONS]
    source = {"path": write_rows(rows, "qa.jsonl"), "columns": {"user": "q", "assistant": "a"}}
    run = learn("share", [], train_path=source, valid_path={"split": 0.25}, num_epochs=1)
    Path(source["path"]).unlink()
    measured = evaluate(run, max_new_tokens=2)
    assert measured.rows == 4 == len(run.held_out.read_text().splitlines())


@pytest.mark.slow
def test_answers_about_images_are_compared(learn, tmp_path):
    """The images alone say which answer is right: the questions are the same."""
    import helpers

    paths = [draw(tmp_path / f"{k}.png", f"n{k}", (40, 30), color) for k, color in enumerate(["navy", "maroon"] * 3)]
    rows = [image_row("Which color?", f"a {('navy', 'maroon')[k % 2]} card", str(path)) for k, path in enumerate(paths)]
    adapted = {"r": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
    run = learn(
        "colors", rows, task="vision_language", vision_language_config={}, lora_config=adapted, learning_rate=1e-2,
        num_epochs=60, model_id=save_vision_model("SmolVLM", tmp_path / "model"),
    )  # fmt: skip
    wrong = tmp_path / "held-out.jsonl"
    wrong.write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows[:3], image_row("Which color?", "a navy cart", str(paths[0]))])
    )
    found = evaluate(run, path=str(wrong), metric="anls", max_new_tokens=24)
    anls, exact = found.scores
    assert (anls.name, exact.name) == ("anls", "exact_match") and (exact.before.value, exact.after.value) == (0, 0.75)
    assert anls.after.value == pytest.approx((3 + 10 / 11) / 4) and found.kinds["close"] == (0, 1)
    assert found.comparison.prompts[0] == f"[image {paths[0]}]Which color?"
    # Answers are found by the bytes of an image: another one under its name is answered anew.
    draw(paths[1], "n0", (40, 30), "navy")
    assert evaluate(run, path=str(wrong), max_new_tokens=24).comparison.tuned[1] == "a navy card"
    asked = [[{"role": "user", "content": rows[2]["messages"][0]["content"]}]]
    assert helpers.load_for_generation(run.folder).answer(asked, max_new_tokens=24) == ["a navy card"]
    with pytest.raises(ConfigError, match="metric=perplexity reads text alone"):
        evaluate(run, path=str(wrong), metric="perplexity")
    paths[2].write_bytes(paths[2].read_bytes()[:60])
    with pytest.raises(DataError, match=r"held-out.jsonl:3: messages\[0\]: image: .*2.png: a damaged image"):
        evaluate(run, path=str(wrong))
