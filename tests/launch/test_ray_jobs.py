"""Jobs on a real Ray head, job files against what KubeRay and Anyscale publish, and mistakes before either."""

import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import psutil
import pytest
import yaml

from conftest import REPOSITORY, free_port
from forgebook.cli.main import main
from forgebook.runs.atomic import read_json

CONFIG = "training_configs/tiny/quickstart.yaml"
TOKEN = "hf_" + "s" * 30
SCHEMAS = Path(__file__).parent / "schemas"


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, "")


# On a cluster -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A Ray head of its own processes, with a token; yields its job server's address."""
    folder = tmp_path_factory.mktemp("head")
    (folder / "token").write_text(secrets.token_hex(32))
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in token.items():
            patch.setenv(name, value)
        with started_head(folder) as address:
            yield address


@contextlib.contextmanager
def started_head(folder: Path):
    """Start a head; another one if Ray's own time limit, a minute, ends the first on a busy machine."""
    # A socket's path may have 107 characters: Ray's folder has to be near the root.
    session, log = Path(f"/tmp/ray-{os.getpid()}"), folder / "head.log"
    for is_last in (False, True):
        port = free_port()
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2",
            f"--port={free_port()}", f"--dashboard-port={port}", f"--dashboard-agent-listen-port={free_port()}",
            f"--ray-client-server-port={free_port()}", f"--temp-dir={session}", "--disable-usage-stats",
        ]  # fmt: skip
        with open(log, "w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            takes_jobs = wait_for_agent(address := f"http://127.0.0.1:{port}", process)
            if not takes_jobs and not is_last:
                continue
            assert takes_jobs, log.read_text()
            yield address
            return
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            shutil.rmtree(session, ignore_errors=True)


def wait_for_agent(address: str, process) -> bool:
    """Wait until the head takes jobs, or has ended: its dashboard answers before its agent does."""
    from forgebook.launch.ray_jobs import _client

    for _ in range(120):
        if process.poll() is not None:
            return False
        try:
            client = _client(address)
            client.submit_job(entrypoint="true")
            return True
        except Exception:
            time.sleep(1)
    return False


@pytest.mark.slow
def test_a_job_runs_and_is_reported(head, tmp_path, capfd):
    words = ["num_devices=1", "deepspeed=none", "max_steps=3", f"storage_path={tmp_path}", "run_name=as-job"]
    assert main(["submit", CONFIG, f"address={head}", *words]) == 0
    printed = capfd.readouterr()
    assert "best checkpoint" in printed.out and "succeeded" in printed.out
    job = printed.out.split()[1]
    # The run is where it was asked for, by a worker of the job's own cluster.
    assert read_json(tmp_path / "as-job/summary.json")["workers"] == 1
    assert main(["status", job, f"address={head}"]) == 0
    asked = capfd.readouterr().out
    assert "SUCCEEDED" in asked and "max_steps=3" in asked
    assert main(["stop", job, f"address={head}"]) == 0
    assert "had already succeeded" in capfd.readouterr().out
    for text in (printed.out, printed.err, asked):
        assert TOKEN not in text
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.slow
def test_a_job_is_stopped(head, tmp_path, capsys):
    words = ["num_devices=0", "deepspeed=none", "num_epochs=500", f"storage_path={tmp_path}", "run_name=stopped"]
    assert main(["submit", CONFIG, f"address={head}", "--no-follow", *words]) == 0
    job = capsys.readouterr().out.split()[1]
    # Ray calls a job stopped whose process is only about to start, and starts it: it would train on behind the tests.
    wait_until(lambda: (tmp_path / "stopped/logs/progress.jsonl").exists())
    assert main(["stop", job, f"address={head}"]) == 0
    state = "RUNNING"
    for _ in range(120):
        main(["status", job, f"address={head}"])
        state = capsys.readouterr().out
        if "STOPPED" in state:
            break
        time.sleep(0.5)
    assert "STOPPED" in state
    wait_until(lambda: not any(str(tmp_path) in " ".join(process.info["cmdline"] or ()) for process in processes()))


def processes():
    """List the processes of this machine."""
    return psutil.process_iter(["cmdline"])


def wait_until(is_true, seconds: int = 120):
    """Wait for a condition; fail after some time."""
    until = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.3)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["status", "stop"])
def test_an_unknown_job(head, capsys, verb):
    assert main([verb, "none", f"address={head}"]) == 2
    assert "has no job 'none'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_wrong_token(head, capsys, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    assert main(["status", "none", f"address={head}"]) == 2
    printed = capsys.readouterr().err
    assert "token" in printed and "Traceback" not in printed and len(printed) < 700


# Mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit"], "submit needs a CONFIG"),
        (["status"], "status needs a JOB"),
        (["status", "x", "server=http://a"], "unknown option server"),
        (["status", "x", "address=127.0.0.1:8265"], "must be the job server's, such as http://"),
        (["status", "x", "address=http://127.0.0.1:9"], "no job server answers at http://127.0.0.1:9"),
        (["submit", CONFIG, "storage_path=/x", "address=http://127.0.0.1:9"], "RAY_API_SERVER_ADDRESS"),
        (["submit", CONFIG], "storage_path: got 'runs', which in a job"),
        (["submit", CONFIG, "storage_path=/x", "image=a"], "image has no effect on a job on a running cluster"),
        (["submit", CONFIG, "storage_path=/x", "--format", "kuberay"], "needs image="),
        (["submit", CONFIG, "storage_path=/x", "--format", "kuberay", "image=a"], "folder inside the image"),
        (["submit", CONFIG, "learning_rat=1"], "did you mean 'learning_rate'?"),
        (
            ["submit", CONFIG, "storage_path=/x", "logger={provider: wandb}", "logger.provider_config.api_key=k"],
            "a secret in a job's arguments",
        ),
    ],
    ids="config job option address server submit storage image kuberay working_dir key secret".split(),
)
def test_mistakes_end_with_two_and_a_sentence(capsys, arguments, message):
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed


def test_a_config_elsewhere_is_not_sent(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text((REPOSITORY / CONFIG).read_text())
    assert main(["submit", str(path), "storage_path=/x"]) == 2
    assert "is outside" in capsys.readouterr().err


# Job files --------------------------------------------------------------------------------------------


def printed(capsys, *arguments) -> dict:
    assert main(["submit", CONFIG, "storage_path=s3://bucket/runs", "run_name=My run_1", *arguments]) == 0
    text = capsys.readouterr().out
    assert TOKEN not in text
    return yaml.safe_load(text)


def test_the_kuberay_manifest_keeps_to_the_schema(capsys):
    words = ["image=me/forgebook:1", "working_dir=s3://bucket/code.zip", "num_devices=6", "gpus_per_node=4"]
    job = printed(capsys, "--format", "kuberay", *words)
    schema = json.loads((SCHEMAS / "rayjob.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(job)
    assert job["metadata"]["name"] == "my-run-1"
    spec = job["spec"]
    assert shlex.split(spec["entrypoint"])[:3] == ["python", "main.py", CONFIG]
    assert "run_name=My run_1" in shlex.split(spec["entrypoint"])
    assert yaml.safe_load(spec["runtimeEnvYAML"])["working_dir"] == "s3://bucket/code.zip"
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    container = workers["template"]["spec"]["containers"][0]
    assert workers["replicas"] == 2 and container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    token = next(variable for variable in container["env"] if variable["name"] == "HF_TOKEN")
    assert token["valueFrom"]["secretKeyRef"] == {"name": "forgebook", "key": "HF_TOKEN", "optional": True}


@pytest.mark.parametrize(
    "change",
    [
        lambda job: job["spec"].update(entryPoint="x"),
        lambda job: job["spec"].update(backoffLimit="1"),
        lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"].pop("template"),
        lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
    ],
    ids=["name", "type", "missing", "text"],
)
def test_the_schema_finds_mistakes(capsys, change):
    job = printed(capsys, "--format", "kuberay", "image=a", "working_dir=/app")
    change(job)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, json.loads((SCHEMAS / "rayjob.json").read_text()))


def test_a_folder_of_the_image(capsys):
    job = printed(capsys, "--format", "kuberay", "image=a", "working_dir=/app", "num_devices=0", "max_retries=0")
    (container,) = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert job["spec"]["entrypoint"].startswith("python main.py") and container["workingDir"] == "/app"
    assert "workerGroupSpecs" not in job["spec"]["rayClusterSpec"] and job["spec"]["backoffLimit"] == 0


def test_the_anyscale_job_keeps_to_the_schema(capsys, monkeypatch):
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    job = printed(capsys, "--format", "anyscale", "image=me/forgebook:1", "max_retries=2")
    jsonschema.Draft202012Validator(json.loads((SCHEMAS / "anyscale_job.json").read_text())).validate(job)
    assert job["name"] == "My run_1" and job["image_uri"] == "me/forgebook:1" and job["max_retries"] == 2
    assert job["working_dir"] == "." and job["env_vars"]["AWS_REGION"] == "us-west-2"
