"""Several machines: two real Ray nodes in network namespaces train what one does, and survive what happens to nodes."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from moto.server import ThreadedMotoServer

from conftest import LORA, REPOSITORY, losses_of, uneven_rows
from forgebook import ray_cluster
from forgebook.errors import ConfigError
from forgebook.launch.fine_tune import fine_tune
from forgebook.planning.hardware import local_hardware
from forgebook.runs import object_store
from forgebook.runs.atomic import read_json
from forgebook.runs.metrics import read_metrics
from forgebook.runs.run import Run
from support_nodes import NET, Nodes, why_not

SECRET = "hf_told-to-workers-alone"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """Two nodes of two cores each; the second has an empty disk of its own at nodes.hidden[2]."""
    if reason := why_not():
        pytest.skip(reason)
    private = tmp_path_factory.mktemp("private")
    nodes = Nodes(hidden={2: private})
    try:
        nodes.up(2, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", FORGEBOOK_CACHE=str(private / "cache"))
        yield nodes
    finally:
        nodes.down()


@pytest.fixture
def bucket(nodes, monkeypatch):
    """A bucket `forgebook` that the nodes can reach; the settings that name it."""
    import boto3

    server = ThreadedMotoServer(ip_address=f"{NET}.254", port=0)
    server.start()
    settings = {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()), "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="forgebook")
    yield settings
    server.stop()


def wait_until(process, is_so) -> None:
    """Wait until something is so, or the process has ended."""
    while process.poll() is None and not is_so():
        time.sleep(0.1)


def events_of(run: Run, key: str) -> list[dict]:
    """List the lines of a run's progress that have a key."""
    log = run.logs / "progress.jsonl"
    return [event for event in read_metrics(log) if key in event] if log.exists() else []


def until_step(process, run: Run, step: int) -> None:
    """Wait until a run has shown a step to whoever started it."""
    wait_until(process, lambda: any(event["step"] >= step for event in events_of(run, "train_loss_batch")))


def command(config) -> list[str]:
    """Write a config down and make the command that trains it on both nodes."""
    return [sys.executable, str(REPOSITORY / "main.py"), str(config.source)]


def through_bucket(config) -> list[str]:
    """Copy a config's rows to the bucket, and make the command that trains from there and has its run there."""
    for split in ("train", "valid"):
        object_store.write_file(f"s3://forgebook/{split}.jsonl", Path(getattr(config, f"{split}_path")).read_bytes())
    return [
        *command(config), "storage_path=s3://forgebook/runs", "train_path=s3://forgebook/train.jsonl",
        "valid_path=s3://forgebook/valid.jsonl",
    ]  # fmt: skip


def run_in_bucket(nodes, process, config) -> Run:
    """Wait until a run in the bucket has begun; return its folder on the machine of the command."""
    logs = f"cache/runs/*/{config.run_name}/logs/progress.jsonl"
    wait_until(process, lambda: list(nodes.hidden[2].glob(logs)))
    assert process.poll() is None, process.communicate()[0]
    [log] = nodes.hidden[2].glob(logs)
    return Run(log.parent.parent)


def states_of(config) -> dict[str, set[str]]:
    """List the files of each saved state of a run in the bucket."""
    states: dict[str, set[str]] = {}
    for path in map(Path, object_store.list_files(f"s3://forgebook/runs/{config.run_name}")):
        if path.parts[0] == "resume" and len(path.parts) > 2:
            states.setdefault(path.parts[1], set()).add(path.name)
    return states


@pytest.mark.slow
def test_a_cut_link_and_a_killed_node_change_nothing(nodes, make_config, write_rows):
    """A worker on each node, the run's folder on a disk that both see: equal to one process all the way.

    The link between the nodes is down for 20 s: training waits (or resumes with one worker and takes the second one in
    again, where a machine is so busy that Ray gives the node up). A node dies: training resumes with one worker, and
    takes a second one in when a node comes. The secrets of the head are in no argument and no log.
    """
    settings = {
        "train_path": write_rows(uneven_rows(160), "many.jsonl"), "lora_config": LORA, "learning_rate": 2e-5,
        "lr_scheduler_type": "constant", "num_epochs": 1000, "on_existing": "overwrite",
        "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 10},
    }  # fmt: skip
    config = make_config(
        run_name="both", num_devices={"min": 1, "max": 2}, train_batch_size_per_device=4, address=nodes.address,
        **settings,
    )  # fmt: skip
    run = Run(Path(config.storage_path) / "both")
    # Ray first waits this long for two workers, until it knows that a machine is gone.
    environment = {"RAY_ADDRESS": "", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30", "HF_TOKEN": SECRET}
    process = nodes.popen(command(config), **environment)
    until_step(process, run, 6)
    nodes.cut(2)
    time.sleep(20)
    nodes.heal(2)
    until_step(process, run, len(losses_of(run)) + 12)
    wait_until(process, lambda: workers_of(run)[-1] == 2)
    counts = workers_of(run)
    assert counts in ([2], [2, 1, 2])
    commands = nodes.commands()
    assert len(commands) > 10 and not any(SECRET in words for words in commands)
    for change, workers in ((nodes.kill, 1), (nodes.start, 2)):
        change(2)
        counts = [*counts, workers]
        wait_until(process, lambda counts=counts: workers_of(run) == counts)
        until_step(process, run, len(losses_of(run)) + 12)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=240)[0]
    assert workers_of(run) == counts and process.returncode == 143 and "with 2 workers\n" in printed, printed

    steps = len(losses_of(run))
    alone = fine_tune(make_config(run_name="alone", train_batch_size_per_device=8, max_steps=steps, **settings))
    assert steps > 30 and losses_of(run) == pytest.approx(losses_of(alone), abs=2e-3)
    logs = [run.config, *run.logs.rglob("*"), *nodes.temporary.rglob("*.log"), *nodes.temporary.rglob("*.out")]
    texts = [path.read_text(errors="replace") for path in logs if path.is_file()]
    assert len(texts) > 10 and not any(SECRET in text for text in [printed, *texts])


@pytest.mark.slow
def test_a_sharded_run_continues_with_fewer_workers_and_with_more(nodes, bucket, make_config, write_rows):
    """Full fine-tuning with FSDP2 on two nodes, on one when the other dies, on two when it comes back.

    They share a bucket alone: each uploads its own shards, and downloads those of both.
    """
    settings = {
        "train_path": write_rows(uneven_rows(160), "many.jsonl"), "learning_rate": 2e-5, "num_epochs": 1000,
        "lr_scheduler_type": "constant", "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 10},
    }  # fmt: skip
    config = make_config(
        run_name="sharded", num_devices={"min": 1, "max": 2}, train_batch_size_per_device=4, sharding="fsdp",
        address=nodes.address, **settings,
    )  # fmt: skip
    environment = {"RAY_ADDRESS": "", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30"} | bucket
    process = nodes.popen(through_bucket(config), **environment)
    run = run_in_bucket(nodes, process, config)
    until_step(process, run, 12)
    counts = [2]
    assert workers_of(run) == counts
    for change, workers in ((nodes.kill, 1), (nodes.start, 2)):
        change(2)
        counts = [*counts, workers]
        wait_until(process, lambda counts=counts: workers_of(run) == counts)
        until_step(process, run, events_of(run, "train_loss_batch")[-1]["step"] + 12)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=240)[0]
    assert workers_of(run) == counts and process.returncode == 143, printed
    [shards] = states_of(config).values()
    assert {"__0_0.distcp", "__1_0.distcp"} <= shards

    object_store.download_file("s3://forgebook/runs/sharded/metrics.jsonl", run.metrics)
    steps = len(losses_of(run))
    on_existing = {"on_existing": "overwrite"}
    alone = fine_tune(
        make_config(run_name="alone", train_batch_size_per_device=8, max_steps=steps, **settings, **on_existing)
    )
    assert steps > 30 and losses_of(run) == pytest.approx(losses_of(alone), abs=2e-3)


def workers_of(run: Run) -> list[int]:
    """List how many workers the run had, start by start."""
    return [event["workers"] for event in events_of(run, "workers")]


@pytest.mark.slow
def test_nodes_that_share_a_bucket_alone(nodes, bucket, make_config, write_rows):
    """Full parameter with ZeRO-3, rows and run in a bucket; a node dies and another comes: as one process.

    The second node sees nothing of the first one's disk where the run is: both upload their own shards. The engine is
    unpacked once per node: unpacking deletes the previous copy.
    """
    settings = {"train_path": write_rows(uneven_rows(96), "many.jsonl"), "num_epochs": 3, "learning_rate": 3e-4}
    alone = fine_tune(make_config(run_name="alone", **settings))
    config = make_config(run_name="zero", num_devices=2, train_batch_size_per_device=4, deepspeed="zero_3", **settings)
    process = nodes.popen(through_bucket(config), **bucket)
    run = run_in_bucket(nodes, process, config)
    until_step(process, run, 14)
    shards = set().union(*states_of(config).values())
    assert all(any(f"rank_{rank}_" in name for name in shards) for rank in (0, 1))
    nodes.kill(2)
    nodes.start(2)
    printed = process.communicate(timeout=480)[0]
    assert process.returncode == 0, printed
    starts = [event["start"] for event in events_of(run, "start")]
    assert starts[0] == 0 and starts[1:] in ([12], [24])
    assert losses_of(run) == pytest.approx(losses_of(alone), abs=3e-3) and len(losses_of(run)) == 36
    summary = read_json(run.summary)
    assert summary["workers"] == 2 and summary["zero_stage"] == 3
    assert (run.logs / "worker-1.log").exists()
    logs = nodes.temporary.glob("ray2/session_*/logs/runtime_env_agent*.log")
    assert max(logs, key=os.path.getmtime).read_text().count("Creating runtime env") == 1
    assert object_store.read_manifest(f"s3://forgebook/runs/zero/{summary['best_checkpoint']}")
    paths = object_store.list_files("s3://forgebook/runs/zero")
    assert not any(path.startswith((".", "checkpoint_manager")) for path in paths if "/" not in path)


@pytest.mark.slow
def test_nodes_that_share_nothing_are_refused_before_training(nodes, make_config):
    config = make_config(run_name="both", num_devices=2, storage_path=str(nodes.hidden[2] / "runs"))
    process = nodes.popen(command(config))
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 2, printed
    assert f"storage_path: {NET}.2 cannot see {nodes.hidden[2]}/runs/both" in " ".join(printed.split())
    assert not list((nodes.hidden[2] / "runs/both/logs").glob("worker-*.log"))


# Before the workers start -----------------------------------------------------------------------------


@pytest.fixture
def elsewhere(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "")  # put back as it was at the end, whatever is set meanwhile


@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265"], ids=["client", "jobs"])
def test_an_address_from_outside_the_cluster(elsewhere, make_config, address):
    with pytest.raises(ConfigError, match=r"must be HOST:PORT of the head .* python main.py submit"):
        fine_tune(make_config(address=address))


@pytest.mark.parametrize(
    ("address", "is_joined"), [("", False), ("local", False), ("auto", True), ("10.0.0.1:6379", True)]
)
def test_only_a_cluster_of_others_is_joined(elsewhere, monkeypatch, address, is_joined):
    """With RAY_ADDRESS=local the GPUs to plan for are this machine's."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert ray_cluster.is_joined() == is_joined
    if is_joined:
        with pytest.raises(ConfigError, match="the run goes to a Ray cluster"):
            local_hardware()
    else:
        local_hardware()


def test_the_whole_engine_is_sent_to_a_cluster():
    """What is left out is meant for the top of the repository: the engine has a room named runs."""
    packaging = pytest.importorskip("ray._private.runtime_env.packaging")
    leaves_out = packaging._get_excludes(REPOSITORY, ray_cluster.EXCLUDED)
    files = list((REPOSITORY / "forgebook").rglob("*.py"))
    assert len(files) > 80 and not [path for path in files if leaves_out(path)]
    assert leaves_out(REPOSITORY / "runs") and leaves_out(REPOSITORY / "benchmarks")


def test_the_environment_counts_more_than_the_file(monkeypatch):
    """A job of Ray's finds its own cluster there."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    ray_cluster.name_address("10.0.0.2:6379")
    assert ray_cluster.os.environ["RAY_ADDRESS"] == "10.0.0.1:6379" and ray_cluster.is_joined()


OWNER = """
import os, subprocess, sys, time
from forgebook import ray_cluster
raylet = subprocess.Popen([sys.argv[1], "60"])
agents = [
    subprocess.Popen([sys.argv[2], "60"], env={**os.environ, "RAY_RAYLET_PID": str(pid)}, start_new_session=True)
    for pid in (raylet.pid, 1)
]
ray_cluster._watch_agents()
print(raylet.pid, *[agent.pid for agent in agents], flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_no_agent_outlives_a_killed_process_that_started_ray(tmp_path):
    """Ray's agents have no parent that ends them: they wait for a cluster that has gone with their driver."""
    sleep, raylet = shutil.which("sleep"), tmp_path / "raylet"
    assert sleep is not None
    shutil.copy(sleep, raylet)
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(raylet), sleep], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    try:
        owner.kill()
        owner.wait()
        deadline = time.monotonic() + 20
        while psutil.pid_exists(pids[1]) and psutil.Process(pids[1]).status() != "zombie":
            assert time.monotonic() < deadline, "the agent is still there"
            time.sleep(0.2)
        assert psutil.Process(pids[2]).status() != "zombie"  # another cluster's
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
