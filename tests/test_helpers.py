"""The face of the notebooks: few names, each documented, light, typed, and what the engine says."""

import ast
import json
import subprocess
import sys

import pytest

import helpers
from conftest import REPOSITORY, TINY_MODEL, chat, uneven_rows

SOURCE = REPOSITORY / "helpers/__init__.py"
FILES = subprocess.run(["git", "ls-files", "*.ipynb"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
QUESTION = [{"role": "user", "content": "My name is Vera. What is my name?"}]


def test_it_is_small():
    assert len(helpers.__all__) <= 30
    assert len(SOURCE.read_text().splitlines()) < 120
    assert [path.name for path in SOURCE.parent.glob("*.py")] == ["__init__.py"]


def test_it_holds_what_notebooks_import_and_no_more():
    imported = set()
    for path in FILES.stdout.split():
        for cell in json.loads((REPOSITORY / path).read_text())["cells"]:
            for line in "".join(cell["source"]).splitlines() if cell["cell_type"] == "code" else ():
                if line.startswith("from helpers import"):
                    imported |= {alias.name for alias in ast.parse(line).body[0].names}
    assert imported == set(helpers.__all__)


def test_every_name_resolves_and_is_documented_in_one_line():
    for name in helpers.__all__:
        value = getattr(helpers, name)
        purpose = helpers._ENGINE[name][1] if name in helpers._ENGINE else value.__doc__
        assert purpose and "\n" not in purpose, name
        assert name not in helpers._ENGINE or f"{name} " in helpers.__doc__
    assert set(dir(helpers)) == set(helpers.__all__)
    with pytest.raises(AttributeError, match="helpers has no mend"):
        helpers.mend  # noqa: B018


def test_editors_and_mypy_see_the_names_that_there_are():
    (block,) = [node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert {name: f"forgebook.{module}" for name, (module, _) in helpers._ENGINE.items()}.items() <= seen.items()


def test_importing_it_loads_nothing():
    code = "import helpers, sys; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert not set(loaded.stdout.split()) & {"torch", "ray", "transformers", "pydantic", "numpy", "yaml", "forgebook"}


# The functions that put several of the engine's together ------------------------------------------------


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """Write a config with a prompt format of its own."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in uneven_rows(24)))
    prompt_format = {
        "system": "{instruction}\n",
        "user": "Q: {instruction}\n",
        "assistant": "A: {instruction}<|end|>\n",
    }
    values = {
        "model_id": "tiny", "train_path": str(folder / "rows.jsonl"), "task": "instruction_tuning", "run_name": "face",
        "storage_path": str(folder / "runs"), "context_length": 64, "train_batch_size_per_device": 8, "num_epochs": 1,
        "num_devices": 0, "generation_config": {"prompt_format": prompt_format},
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(values))
    return folder / "config.yaml"


def test_an_example_is_shown_as_the_model_or_the_config_has_it(config_file):
    messages = chat("Where is it?", "On the table.")["messages"]
    by_model, by_config = helpers.show_example(messages, "tiny").data, helpers.show_example(messages, config_file).data
    assert "Q: Where is it?" in by_config and "Q: " not in by_model
    assert "background" in by_model and "On the table." in by_model
    assert helpers.show_example(messages, TINY_MODEL).data == by_model


def test_tools_are_shown(config_file):
    tool = {"type": "function", "function": {"name": "rent_tent", "parameters": {"type": "object", "properties": {}}}}
    assert "rent_tent" in helpers.show_example(QUESTION + chat("", "Yes.")["messages"][2:], "tiny", tools=[tool]).data


def test_data_is_prepared_as_the_run_does(config_file):
    prepared = helpers.prepare_data(helpers.load_config(config_file, ["truncation=right"]))
    assert prepared.report["train"]["rows_read"] == 24 and 0 < len(prepared.train) <= 24
    assert prepared.config.context_length == 64 and prepared.train.lengths.max() <= 64


def test_a_plan_takes_its_hardware_by_name_or_from_the_config(config_file):
    # auto would move activations to the host to make it fit.
    large = ["model_id=meta-llama/Meta-Llama-3-70B-Instruct", "context_length=2048", "gradient_checkpointing=true"]
    config = helpers.load_config(config_file, large)
    planned = helpers.plan(config, "1xA10G")
    assert (planned.gpu, planned.workers, planned.fits) == ("A10G", 1, False)
    assert helpers.plan(config.resolve(hardware="8xA100-80G", num_devices=8)).gpu == "A100-80G"
    assert helpers.plan(config).gpu is None and len(helpers.plan(config).costs) == len(helpers.read_catalog().gpus)
    fitted = helpers.fit(config, "8xA100-80G")
    assert helpers.plan(fitted, "8xA100-80G").fits


def test_a_model_answers_in_its_own_prompt_format_or_another(config_file):
    loaded = helpers.load_for_generation("tiny")
    (answer,) = loaded.answer([QUESTION], max_new_tokens=5)
    prompt_format = helpers.load_config(config_file).generation_config.prompt_format
    (other,) = loaded.answer([QUESTION], prompt_format, max_new_tokens=5)
    assert answer != other and answer and len(helpers.load_tokenizer("tiny_model").encode(answer)) <= 8


def test_a_batch_predicts_the_tokens_in_the_loss():
    tokenizer = helpers.load_tokenizer("tiny_model")
    encoded = [helpers.encode(row["messages"], tokenizer) for row in uneven_rows(3)]
    batch = helpers.make_batch(encoded, tokenizer.pad_token_id)
    assert batch["input_ids"].shape == batch["labels"].shape and len(batch["labels"]) == 3
    for one, labels in zip(encoded, batch["labels"].tolist(), strict=True):
        targets = [token for token, is_trained in zip(one.input_ids, one.loss_mask, strict=True) if is_trained]
        assert [label for label in labels if label != -100] == targets


def test_a_curve_is_the_steps_and_values_of_one_metric(tmp_path):
    (tmp_path / "config.yaml").touch()
    lines = [{"step": 1, "train_loss_batch": 3.0}, {"step": 2, "train_loss_batch": 2.0}, {"step": 2, "eval_loss": 2.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert helpers.read_curve(str(tmp_path), "train_loss_batch") == ([1, 2], [3.0, 2.0])
    assert helpers.read_curve(str(tmp_path), "eval_loss") == ([2], [2.5])


def test_an_estimate_is_wilsons_for_right_and_wrong_and_the_bootstraps_for_lengths():
    share = helpers.estimate([True] * 9 + [False])
    assert share.value == 0.9 and share.low == pytest.approx(0.5958, abs=1e-4)  # Wilson (1927)
    length = helpers.estimate([10, 20, 30, 40])
    assert length.value == 25 and 10 <= length.low < 25 < length.high <= 40


def test_a_histogram_marks_values():
    (axes,) = helpers.plot_histogram([1, 2, 2, 3], "tokens", "examples", marks={"p50": 2}).axes
    assert sum(bar.get_height() for bar in axes.patches) == 4
    assert [text.get_text().strip() for text in axes.texts] == ["p50 2"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens", "examples")
