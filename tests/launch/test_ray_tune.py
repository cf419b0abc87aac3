"""Sweeps: what is tried is decided and checked before the first trial; trials are runs, the best one is named."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from conftest import REPOSITORY
from forgebook.cli.main import main
from forgebook.config.parse import load_config
from forgebook.errors import ConfigError
from forgebook.launch import ray_tune
from forgebook.launch.ray_tune import Trial, trial_rank, variants
from forgebook.runs.run import Run

QUICKSTART = str(REPOSITORY / "training_configs/tiny/quickstart.yaml")


def test_a_trial_that_diverged_is_never_the_best(tmp_path):
    curves = {
        "diverged": [(1, math.nan), (2, math.inf)], "recovered": [(1, math.nan), (2, 2.0)], "best": [(1, 1.0)],
        "later": [(1, 1.5), (2, math.nan)], "none": [],
    }  # fmt: skip
    trials = [Trial(Run(tmp_path / name), {}, "complete", curve) for name, curve in curves.items()]
    trials.append(Trial(Run(tmp_path / "stopped"), {}, "stopped", [(1, 0.5)]))
    ranked = [trial.run.name for trial in sorted(trials, key=trial_rank)]
    assert ranked == ["best", "later", "recovered", "diverged", "none", "stopped"]
    assert trials[0].eval_loss is None and trials[1].eval_loss == 2.0


def test_a_trial_is_not_stopped_at_its_last_step(tmp_path, monkeypatch):
    """ASHA stops a trial when it reports: the last evaluation is reported after the run has written its results."""
    run, reported = Run(tmp_path), []
    run.logs.mkdir()
    main = threading.main_thread()  # the others report while the run goes on
    monkeypatch.setattr(
        "ray.tune.report", lambda result: reported.append((result["step"], threading.current_thread() is main))
    )
    events = [{"kind": "stage", "text": "training", "steps": 8}, *({"step": k, "eval_loss": 1.0} for k in (4, 8))]
    with ray_tune._reporting(run):
        (run.logs / "progress.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert reported == [(4, False), (8, True)]


def test_lists_make_a_grid():
    tried = variants(["learning_rate=[1.0e-4, 3.0e-4]", "lora_config.r=[8, 16]"], None, seed=1)
    assert [tuple(values.values()) for values in tried] == [(1e-4, 8), (1e-4, 16), (3e-4, 8), (3e-4, 16)]


def test_values_that_read_alike_are_trials_of_their_own():
    words = ["seed=[20240601,20240602]", "max_examples=[1000000,1000001]", "train_path=[data/a.jsonl,data_a.jsonl]"]
    tried = variants(words, None, seed=0)
    assert len(tried) == 8 and len({ray_tune._name(values) for values in tried}) == 8
    assert ray_tune._name({"learning_rate": 5e-3, "seed": 20240601}) == "learning_rate=0.005,seed=20240601"


def test_ranges_are_sampled_alike_for_a_seed():
    words = ["lora_config.r=[8,16]", "learning_rate=loguniform(1e-5, 1e-3)", "weight_decay=uniform(0,0.1)"]
    tried = variants(words, 20, seed=1)
    assert tried == variants(words, 20, seed=1) != variants(words, 20, seed=2)
    assert len(tried) == 40 and tried[0] | {"lora_config.r": 16} == tried[20]
    rates = [values["learning_rate"] for values in tried]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)
    # Even on a logarithmic scale: about half below the geometric mean (binomial, 20 draws, p = 0.0004 outside).
    assert 3 <= sum(rate < math.sqrt(1e-5 * 1e-3) for rate in rates[:20]) <= 17


@pytest.mark.parametrize(
    ("words", "samples", "message"),
    [
        ([], None, "needs values to try"),
        (["learning_rate=[]"], None, "must be a list of values"),
        (["learning_rate=[1"], None, "must be a list of values"),
        (["learning_rate=loguniform(0,1)"], 2, "above 0"),
        (["learning_rate=uniform(2,1)"], 2, "the lower one first"),
        (["learning_rate=uniform(1,2)"], None, "samples=8"),
        (["learning_rate=[1]"], 3, "has nothing to sample"),
    ],
    ids="none empty broken zero order often needless".split(),
)
def test_what_cannot_be_tried_is_refused(words, samples, message):
    with pytest.raises(ConfigError, match=message):
        variants(words, samples, seed=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["learning_rate=[1.0e-3,many]"], "learning_rate: got 'many'"),
        (["learning_rat=[1,2]"], "did you mean 'learning_rate'?"),
        (["learning_rate=[1.0e-3]", "valid_path=null"], "set valid_path"),
        (["learning_rate=[1.0e-3]", "samples=none"], "samples must be a whole number"),
    ],
    ids="value key valid samples".split(),
)
def test_mistakes_are_found_before_the_first_trial(tmp_path, capsys, words, message):
    assert main(["tune", QUICKSTART, f"storage_path={tmp_path}", *words]) == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed and not any(tmp_path.iterdir())


def test_an_interrupt_says_what_is_saved_and_ends_with_130(tmp_path, monkeypatch, capsys):
    def run_all(configs, num_devices, folder, output):
        if not saves:
            raise KeyboardInterrupt
        first, second, _ = (Run(folder / name) for name in configs)
        first.folder.mkdir()
        first.summary.write_text("{}")
        (second.resume / "step-3").mkdir(parents=True)
        (second.resume / "step-3" / "place.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("forgebook.launch.ray_tune._run_all", run_all)
    monkeypatch.chdir(REPOSITORY)
    command = ["tune", QUICKSTART, "learning_rate=[1.0e-3,2.0e-3,3.0e-3]", f"storage_path={tmp_path}"]
    saves = False
    assert main(command) == 130
    assert "stopped before a trial saved a state in " in capsys.readouterr().err
    saves = True
    assert main(command) == 130
    error = capsys.readouterr().err
    assert "stopped; 1 of 3 trials are complete in " in error and "1 has a saved state" in error
    assert "the same command resumes those and runs the others" in error and "Traceback" not in error


@pytest.mark.slow
def test_a_sweep_finds_the_better_rate(ray_session, tmp_path, monkeypatch, capfd):
    """Two learning rates, one of them useless: it is stopped early or ends last; the same command continues."""
    monkeypatch.chdir(REPOSITORY)
    words = [
        "learning_rate=[5.0e-3,1.0e-7]", "num_devices=0", "deepspeed=none", "max_steps=12", "num_epochs=9",
        "checkpoint_and_evaluation_frequency={unit: steps, frequency: 4}", "max_examples=64",
        f"storage_path={tmp_path}",
    ]  # fmt: skip
    assert main(["tune", QUICKSTART, *words, "--json"]) == 0
    printed = capfd.readouterr().out  # here Ray Tune's own lines come first; a command sends them to tune.log
    found = json.loads(printed[printed.index("{\n") :])
    best, *others = found["trials"]
    assert best["values"] == {"learning_rate": 0.005} and best["state"] == "complete"
    assert [step for step, _ in best["curve"]] == [4, 8, 12]
    assert all(trial["state"] in ("complete", "stopped") for trial in others)
    assert all(trial["eval_loss"] is None or trial["eval_loss"] > best["eval_loss"] for trial in others)
    folder = tmp_path / "quickstart-tune"
    assert {path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."} == {
        "learning_rate=0.005", "learning_rate=1e-07",
    }  # fmt: skip
    assert (folder / "tune.png").stat().st_size > 5000
    for trial in found["trials"]:
        # A run folder like any other: its config can be read, nothing half-written is left.
        run = Run(folder / trial["folder"].rpartition("/")[2])
        assert load_config(run.config).learning_rate == trial["values"]["learning_rate"]
        assert run.is_complete == (trial["state"] == "complete")
        assert not list(run.folder.rglob(".*"))
    assert found["command"].startswith(f"python main.py {QUICKSTART} ") and "learning_rate=0.005" in found["command"]
    # Again, with one more value: what is complete is not trained again.
    complete = folder / "learning_rate=0.005/summary.json"
    before = complete.stat().st_mtime_ns
    words[0] = "learning_rate=[5.0e-3,4.0e-3]"
    assert main(["tune", QUICKSTART, *words]) == 0
    printed = capfd.readouterr().out
    assert complete.stat().st_mtime_ns == before
    assert "best checkpoint" in printed and "0.004" in printed and "tune.png" in printed


@pytest.mark.slow
def test_ctrl_c_ends_a_sweep_with_all_its_processes_and_the_same_command_resumes(request, tmp_path, monkeypatch):
    """As a terminal sends it: to Ray's processes and the trials, too."""
    words = [
        "learning_rate=[5.0e-3,4.0e-3]", "num_devices=0", "deepspeed=none", "max_steps=30", "num_epochs=9",
        "checkpoint_and_evaluation_frequency={unit: steps, frequency: 3}", "max_examples=64",
        f"storage_path={tmp_path}",
    ]  # fmt: skip
    command, environment = [sys.executable, "main.py", "tune", QUICKSTART, *words], {"RAY_ADDRESS": "local"}
    folder = tmp_path / "quickstart-tune"
    with open(tmp_path / "printed.txt", "w+") as file:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=os.environ | environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            while process.poll() is None and not list(folder.glob("learning_rate=*/resume/step-*/place.json")):
                time.sleep(0.1)
            started = psutil.Process(process.pid).children(recursive=True)
            os.killpg(process.pid, signal.SIGINT)
            process.wait(timeout=180)  # on a busy machine Ray takes its time
        finally:
            process.kill()
        file.seek(0)
        printed = file.read()
    assert process.returncode == 130, printed
    assert "stopped; 0 of 2 trials are complete in " in printed and "Traceback" not in printed
    assert "the same command resumes those and runs the others" in printed
    assert len(started) > 3 and not psutil.wait_procs(started, timeout=20)[1]  # Ray's and the trials'

    request.getfixturevalue("ray_session")
    monkeypatch.chdir(REPOSITORY)
    assert main(command[2:]) == 0
    events = [
        json.loads(line)
        for path in folder.glob("learning_rate=*/logs/progress.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert any(event.get("start", 0) >= 3 for event in events)
    assert any(Run(path).is_complete for path in folder.glob("learning_rate=*"))


@pytest.mark.slow
def test_a_sweep_of_failures_says_why(ray_session, tmp_path, capsys):
    words = ["num_devices=0", "deepspeed=none", "context_length=4", "learning_rate=[1.0e-3,2.0e-3]"]
    assert main(["tune", QUICKSTART, *words, f"storage_path={tmp_path}"]) == 1
    printed = capsys.readouterr().err
    assert "all 2 trials failed" in printed and "context_length 4" in printed
