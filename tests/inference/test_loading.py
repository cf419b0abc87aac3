"""Loading: which model a name means, what ends its answers, adapters that share a base."""

import json
import shutil
import warnings

import pytest

from conftest import LORA, TINY_MODEL, uneven_rows
from forgebook.errors import CheckpointError, ModelError, StorageError
from forgebook.inference.generate import complete
from forgebook.inference.loading import base_of, find_model, load_for_generation, load_together
from forgebook.launch.fine_tune import fine_tune


def questions(count):
    return [row["messages"][:-1] for row in uneven_rows(count)]


def test_a_prompt_format_travels_with_the_checkpoint(make_config):
    fmt = {"system": "{instruction}", "user": "Q {instruction}", "assistant": " A {instruction}<|end|>"}
    run = fine_tune(make_config(generation_config={"prompt_format": fmt}))
    _, _, loaded = load_for_generation(next(run.checkpoints.iterdir()))
    assert loaded.user == "Q {instruction}" and loaded.assistant.endswith("<|end|>")


# What ends an answer ----------------------------------------------------------------------------------


@pytest.fixture
def model_folder(tmp_path):
    return shutil.copytree(TINY_MODEL, tmp_path / "model")


def test_every_stop_is_gathered(model_folder, tokenizer):
    """generation_config.json's ids and strings, the tokenizer's eos and the token that closes a turn."""
    path = model_folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [7, 9], "stop_strings": ["STOP"]}))
    settings = model_folder / "tokenizer_config.json"
    eos = tokenizer.convert_ids_to_tokens(0)
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token": eos}))
    model, _, _ = load_for_generation(model_folder)
    # 0: the eos that the tokenizer now names; 2: <|end|>, with which the template closes an answer.
    assert model.generation_config.eos_token_id == [7, 9, 0, 2]
    assert model.generation_config.stop_strings == ["STOP"]


def test_stopping_sequences_and_the_formats_end_stop_an_answer(make_config):
    """Texts end an answer and are no part of it; a prompt format may close turns with a plain text."""
    fmt = {"system": "{instruction}", "user": "Q {instruction}", "assistant": "{instruction} ###"}
    config = make_config(
        num_epochs=1, generation_config={"prompt_format": fmt, "stopping_sequences": [" the", 5]}, lora_config=LORA
    )
    run = fine_tune(config)
    checkpoint = find_model(str(run.folder))
    model, tokenizer, prompt_format = load_for_generation(checkpoint)
    ends = model.generation_config
    assert ends.stop_strings == ["###", " the"] and set(ends.eos_token_id) == {2, 5}
    unstopped = complete(model, tokenizer, questions(4), prompt_format=prompt_format, max_new_tokens=16)
    assert not any(" the" in text or "###" in text for text in unstopped)
    ends.stop_strings, ends.eos_token_id = None, [2]
    longer = complete(model, tokenizer, questions(4), prompt_format=prompt_format, max_new_tokens=16)
    assert all(one.startswith(other) for one, other in zip(longer, unstopped, strict=True))


# Which model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """Two LoRA runs over one base, the first with two checkpoints."""
    from forgebook.config.parse import load_config

    folder = tmp_path_factory.mktemp("runs")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in uneven_rows(8)))
    runs = []
    for name, rate in (("one", 3e-2), ("two", 1e-2)):
        settings = {
            "model_id": str(TINY_MODEL), "train_path": str(folder / "rows.jsonl"), "task": "instruction_tuning",
            "valid_path": str(folder / "rows.jsonl"), "run_name": name, "storage_path": str(folder), "num_devices": 0,
            "num_epochs": 2, "train_batch_size_per_device": 4, "learning_rate": rate, "num_warmup_steps": 0,
            "dtype": "float32", "deepspeed": None, "num_checkpoints_to_keep": 2, "lora_config": LORA,
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(settings))
        runs.append(fine_tune(load_config(folder / f"{name}.yaml")))
    return runs


def test_a_name_means_its_best_or_named_checkpoint(two_runs, monkeypatch):
    run = two_runs[0]
    best = run.folder / json.loads(run.summary.read_text())["best_checkpoint"]
    assert find_model(str(run.folder)) == find_model(str(run.folder), "best") == str(best)
    assert find_model(str(run.folder), "epoch-1").endswith("one/checkpoints/epoch-1")
    assert find_model(str(best)) == str(best)
    assert find_model("tiny") == str(TINY_MODEL) and find_model("owner/name") == "owner/name"
    with pytest.raises(StorageError, match="it has epoch-1, epoch-2"):
        find_model(str(run.folder), "epoch-9")
    with pytest.raises(StorageError, match="no run 'none'"):
        find_model("none")


def test_adapters_share_a_base_and_answer_as_if_alone(two_runs):
    sources = [str(TINY_MODEL), *(find_model(str(run.folder)) for run in two_runs)]
    asked, together = questions(6), load_together(sources)
    assert len({id(one.model.get_base_model()) for one in together}) == 1
    answers = []
    for one in [*together, together[1]]:  # and back again
        with one.active() as model:
            answers.append(complete(model, one.tokenizer, asked, max_new_tokens=8))
    assert answers[1] == answers[3] and len({tuple(some) for some in answers}) == 3
    for source, together_said in zip(sources, answers, strict=False):
        model, tokenizer, _ = load_for_generation(source, "float32")
        assert complete(model, tokenizer, asked, max_new_tokens=8) == together_said


def test_loading_prints_and_warns_of_nothing(two_runs, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        load_together([find_model(str(run.folder)) for run in two_runs])
    assert "".join(capfd.readouterr()) == ""


def test_models_of_other_bases_share_nothing(two_runs, model_folder):
    with pytest.raises(ModelError, match="only adapters of one base"):
        load_together([str(model_folder), find_model(str(two_runs[0].folder))])


@pytest.mark.parametrize("settings", ['{"r": 8}', '{"base_model_name_or_path": null}'])
def test_an_adapter_that_names_no_base_is_an_error(tmp_path, settings):
    (tmp_path / "adapter_config.json").write_text(settings)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json names no base model: set base_model_name_or_path"):
        base_of(tmp_path)
