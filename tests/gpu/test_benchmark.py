"""benchmarks/gpu: its runs are configs that can be trained, and the script runs on a CPU with a tiny model."""

import importlib.util
import json
import subprocess
import sys

import pytest

from conftest import REPOSITORY, chat
from forgebook.config.parse import load_config
from forgebook.config.rules import broken_rules
from forgebook.models.shapes import find_shape

FOLDER = REPOSITORY / "benchmarks/gpu"


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_of_the_gpu", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "WORK", tmp_path)
    return module


def test_every_run_is_a_config_that_works(benchmark, write_yaml):
    for name, (shape, settings) in benchmark.OURS.items():
        path = write_yaml(
            "model_id: tiny_model\ntrain_path: t\nnum_devices: 0\ngradient_checkpointing: false\ndeepspeed: null\n"
        )
        config = load_config(path, settings)
        assert broken_rules(config) == [], name
        assert shape in benchmark.SHAPES and ("full" in name) == (config.lora_config is None)
    assert set(benchmark.PEERS.values()) <= set(benchmark.SHAPES)
    kinds = {"lora", "qlora", "full", "dpo", "lora_packed"}
    assert kinds <= set(benchmark.OURS)
    assert {f"trl{kind.removeprefix('lora') and '_' + kind.removeprefix('lora_')}" for kind in kinds} <= set(
        benchmark.PEERS
    )


def test_pairs_are_an_answer_and_that_of_the_next_conversation(benchmark, write_rows):
    from pathlib import Path

    rows = [chat(f"question {k}", f"answer {k}") for k in range(3)]
    benchmark.make_data(Path(write_rows(rows)))
    pairs = [json.loads(line) for line in benchmark.data_of("trl_dpo").read_text().splitlines()]
    assert [one["chosen"] for one in pairs] == [row["messages"] for row in rows]
    assert [one["rejected"][-1]["content"] for one in pairs] == ["answer 1", "answer 2", "answer 0"]
    assert [one["rejected"][:-1] for one in pairs] == [row["messages"][:-1] for row in rows]
    assert benchmark.data_of("lora").read_text().count("\n") == 3


def test_flops_are_four_per_parameter_with_an_adapter_and_six_without(benchmark):
    model = benchmark.make_model("tiny", str(REPOSITORY / "tiny_model"))
    multiplied = find_shape(str(model)).active_parameters
    counts = [benchmark.flops_per_token(model, is_full=is_full) for is_full in (False, True)]
    assert counts == [4 * multiplied, 6 * multiplied]


@pytest.mark.slow
def test_a_run_on_a_cpu_gives_its_figures(write_rows):
    train = write_rows([chat("where is the lamp? " * (1 + k % 5), f"on table {k}") for k in range(64)])
    command = [sys.executable, "benchmarks/gpu/run.py", train, "--shape", "tiny", "--no-save", "--runs", "lora", "dpo"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    lora, dpo = (json.loads(line) for line in done.stdout.splitlines())
    for result in (lora, dpo):
        assert result["tokens_per_second"] > 0 and result["seconds_to_first_step"] > 1
        assert result["planned_gigabytes"] > 0 and result["peak_gigabytes"] > 0
    assert "mfu" not in lora  # the peak of a CPU is not known


def test_every_way_to_the_loss_has_the_same_and_what_is_missing_is_named():
    command = [sys.executable, "benchmarks/gpu/loss.py", "--shape", "tiny", "--full", "--rounds", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = {line["way"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert list(lines)[:4] == ["ours", "ours, half", "ours, double", "plain"]
    assert all(lines[way]["loss"] == pytest.approx(lines["plain"]["loss"], abs=0.02) for way in list(lines)[:4])
    assert "ms" in lines["liger"] or "not measured" in lines["liger"]["note"]
