"""Trackers get the config, every step and the final figures; one that fails costs a sentence, never a run."""

import json
import os
import re
import struct
import subprocess
import sys
import time
import typing
import urllib.request

import pytest
import yaml

from conftest import free_port
from forgebook import ray_cluster
from forgebook.config.blocks import Logger
from forgebook.config.parse import load_config
from forgebook.errors import ConfigError
from forgebook.launch.fine_tune import fine_tune
from forgebook.reporting.trackers import TRACKERS
from forgebook.runs.metrics import read_metrics

SECRET = "b" * 40


@pytest.fixture(autouse=True)
def quick_and_offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory):
    """An MLflow server of its own process, on SQLite; yields its address."""
    folder = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/runs.db",
        "--artifacts-destination", str(folder / "artifacts"), "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1",
    ]  # fmt: skip
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{address}/health", timeout=1).close()
            break
        except OSError:
            assert server.poll() is None, (folder / "log").read_text()
            time.sleep(0.25)
    yield address
    server.terminate()
    server.wait()


def wandb_records(run) -> list:
    """Read back what wandb wrote offline: records in the blocks of LevelDB's log format, after a head of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    records = []
    for path in sorted(run.logs.glob("wandb/offline-run-*/run-*.wandb")):
        data, place, whole = path.read_bytes(), 7, b""
        assert data[:4] == b":W&B"
        while place < len(data):
            room = 32768 - place % 32768
            if room < 7:  # no head fits in the rest of a block
                place += room
                continue
            _, length, kind = struct.unpack_from("<IHB", data, place)
            whole += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # a record's only part, or its last one
                records.append(wandb_internal_pb2.Record.FromString(whole))
                whole = b""
    return records


def scalars(folder, name: str) -> list[tuple[int, float]]:
    """Read a curve back as TensorBoard does."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.mark.slow
def test_three_trackers_get_everything(make_config, mlflow_server):
    config = make_config(
        logger=[
            {"provider": "wandb", "provider_config": {"tags": ["tiny"]}},
            {"provider": "mlflow", "provider_config": {"tracking_uri": mlflow_server, "experiment_name": "tests"}},
            {"provider": "tensorboard"},
        ]
    )
    run = fine_tune(config)
    steps = [row for row in read_metrics(run.metrics) if "train_loss_batch" in row]
    expected = [(row["step"], pytest.approx(row["train_loss_batch"])) for row in steps]
    evaluation = next(row["eval_loss"] for row in read_metrics(run.metrics) if "eval_loss" in row)
    assert len(expected) == 3

    assert scalars(run.folder / "tensorboard", "train_loss_batch") == expected
    assert scalars(run.folder / "tensorboard", "final/eval_loss")[0][1] == pytest.approx(evaluation)

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=mlflow_server)
    (found,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    history = client.get_metric_history(found.info.run_id, "train_loss_batch")
    assert [(point.step, point.value) for point in history] == expected
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    assert found.data.metrics["final/eval_loss"] == pytest.approx(evaluation)
    assert found.data.params["learning_rate"] == "0.001"
    assert {item.path for item in client.list_artifacts(found.info.run_id)} == {"config.yaml", "loss.png"}

    records = wandb_records(run)
    first = next(record.run for record in records if record.HasField("run"))
    assert (first.project, first.run_group, first.display_name) == ("forgebook", config.model_id, "run")
    assert list(first.tags) == ["tiny"]
    assert {item.key: item.value_json for item in first.config.update}["learning_rate"] == "0.001"
    rows = [record.history.item for record in records if record.HasField("history")]
    rows = [{(item.key or item.nested_key[0]): json.loads(item.value_json) for item in row} for row in rows]
    logged = [(row["step"], row["train_loss_batch"]) for row in rows if "train_loss_batch" in row]
    assert logged == expected
    assert any("loss_curve" in row for row in rows)
    summary = {
        (item.key or item.nested_key[0]): item.value_json
        for record in records if record.HasField("summary") for item in record.summary.update
    }  # fmt: skip
    assert float(summary["final/eval_loss"]) == pytest.approx(evaluation)
    for path in run.folder.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_trackio_gets_everything_and_a_resumed_run_stays_one(make_config, tmp_path):
    """In processes of their own, as Trackio reads its folder's name when it is imported."""
    pytest.importorskip("trackio", reason="trackio is not installed: pip install trackio==0.43.0")
    config = make_config(logger={"provider": "trackio", "provider_config": {"project": "tests"}})
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}

    def run_python(*arguments: str) -> str:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for _ in range(2):
        run_python("main.py", config.source)
        (tmp_path / "runs/run/summary.json").unlink()  # as a driver leaves it that is killed at the very end
    name = (tmp_path / "runs/run/logs/trackio-0.id").read_text()
    code = (
        "import json, trackio; from trackio.sqlite_storage import SQLiteStorage as storage;"
        f"print(json.dumps([[r.name for r in trackio.Api().runs('tests')], storage.get_logs('tests', {name!r})]))"
    )
    names, rows = json.loads(run_python("-c", code).splitlines()[-1])
    assert names == [name]
    steps = [row for row in read_metrics(tmp_path / "runs/run/metrics.jsonl") if "train_loss_batch" in row]
    logged = [(row["step"], row["train_loss_batch"]) for row in rows if "train_loss_batch" in row]
    assert logged == [(row["step"], pytest.approx(row["train_loss_batch"])) for row in steps]
    assert any("final/eval_loss" in row for row in rows)


@pytest.mark.slow
def test_a_continued_run_stays_one_run(make_config, mlflow_server):
    """Stopped after two steps and started again with more: one MLflow run, one curve, one wandb id."""
    logger = [
        {"provider": "mlflow", "provider_config": {"tracking_uri": mlflow_server, "experiment_name": "continued"}},
        {"provider": "wandb"},
        {"provider": "tensorboard"},
    ]
    often = {"unit": "steps", "frequency": 1}
    settings = {"logger": logger, "checkpoint_and_evaluation_frequency": often}
    run = fine_tune(make_config(**settings))
    ids = [(run.logs / name).read_text() for name in ("mlflow-0.id", "wandb-1.id")]
    run.summary.unlink()  # as a driver leaves it that is killed at the very end
    assert fine_tune(make_config(**settings)).folder == run.folder
    assert ids == [(run.logs / name).read_text() for name in ("mlflow-0.id", "wandb-1.id")]

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=mlflow_server)
    (found,) = client.search_runs([client.get_experiment_by_name("continued").experiment_id])
    assert found.info.status == "FINISHED"
    assert {record.run.run_id for record in wandb_records(run) if record.HasField("run")} == {ids[1]}
    assert [step for step, _ in scalars(run.folder / "tensorboard", "train_loss_batch")] == [1, 2, 3]


@pytest.mark.slow
def test_dead_and_missing_trackers_are_one_warning_each(make_config, capsys, monkeypatch):
    """Nobody listens at one address, one package is missing, one is a setting that wandb refuses."""
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    dead = {"tracking_uri": "http://127.0.0.1:9", "experiment_name": "none"}
    logger = [
        {"provider": "mlflow", "provider_config": dead},
        {"provider": "tensorboard"},
        {"provider": "wandb", "provider_config": {"no_such_argument": 1}},
    ]
    run = fine_tune(make_config(logger=logger))
    output = " ".join(capsys.readouterr().out.split())
    assert run.is_complete
    assert output.count("logger: mlflow fails") == 1 and "logger: mlflow did not receive 5 lines" in output
    assert "pip install tensorboardX" in output
    assert re.search(r"logger: wandb fails \(TypeError: .*no_such_argument", output)


@pytest.mark.slow
def test_a_dead_wandb_server_lets_the_process_end(make_config, tmp_path):
    """Online, with a server that does not answer: the command ends well, and its process ends."""
    config = make_config(logger={"provider": "wandb"})
    environment = os.environ | {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    command = [sys.executable, "main.py", config.source]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert "logger: wandb" in ended.stdout or "wandb did not finish" in ended.stdout


@pytest.mark.parametrize(
    ("logger", "message"),
    [
        ({"provider": "mlflow", "provider_config": {"tracking_url": "x"}}, "did you mean 'tracking_uri'"),
        ([{"provider": "wandb"}, {"provider": "neptune"}], "neptune"),
    ],
    ids=["key", "provider"],
)
def test_mistakes_are_found_before_the_run(make_config, logger, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_config(logger=logger)


@pytest.mark.parametrize("name", sorted(TRACKERS))
def test_a_trackers_variables_reach_other_machines(name):
    """A run that is submitted as a job, or a trial of a sweep, sends to its trackers from there."""
    passed_on = {*ray_cluster.SECRETS, *ray_cluster.SETTINGS, *ray_cluster.WITH_PASSWORD}
    assert set(TRACKERS[name].environment) <= passed_on, "add them to forgebook/ray_cluster.py"


def test_every_tracker_that_a_config_may_name_has_a_row():
    assert set(TRACKERS) == set(typing.get_args(Logger.model_fields["provider"].annotation))


def test_secrets_stay_out_of_the_run_folder(make_config):
    config = make_config(logger=[{"provider": "wandb", "provider_config": {"api_key": SECRET}}])
    from forgebook.config.parse import dump_config

    assert SECRET not in dump_config(config)
    assert yaml.safe_load(dump_config(config))["logger"][0]["provider_config"] == {"api_key": "***"}
    assert load_config(config.source) == config
