"""The Ray cluster: this machine's own, or a larger one that RAY_ADDRESS or `address:` names.

A larger one gets this repository, so that its workers can import `forgebook`, and the secrets of this environment: by a
function that each worker process runs first, never by an argument, a file, a log or Ray's own records.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from forgebook.catalog import model_mirrors
from forgebook.errors import ConfigError, ResourceError, last_line

__all__ = [
    "EXCLUDED",
    "IS_CHECKOUT",
    "REPOSITORY",
    "SECRETS",
    "SETTINGS",
    "WITH_PASSWORD",
    "is_joined",
    "machines_without",
    "name_address",
    "start_ray",
]

SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
# Not secret, and workers need the same ones. MLFLOW_TRACKING_URI may hold a password: it travels with the secrets.
SETTINGS = (
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "WANDB_BASE_URL",
    "TRACKIO_DIR",
    "TRACKIO_SERVER_URL",
    "HF_HOME",
)
WITH_PASSWORD = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN")
# How libraries behave; Ray's workers on this machine get them by themselves, those on others do not.
_BEHAVIOR = ("TOKENIZERS_PARALLELISM", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "HF_HUB_OFFLINE", "AWS_MAX_ATTEMPTS")

ANSWER_SECONDS = 60  # for a machine of the cluster to answer

REPOSITORY = Path(__file__).resolve().parent.parent
# Installed instead, other machines must have it installed, too: what lies around it then is not ours to send.
IS_CHECKOUT = (REPOSITORY / "main.py").is_file()
# In addition to what .gitignore names, which Ray leaves out.
EXCLUDED = [".git", ".venv", "/runs", "__pycache__", ".pytest_cache", ".ruff_cache", "*.ipynb", "/benchmarks"]


def name_address(address: str | None) -> None:
    """Let a config name the cluster, unless RAY_ADDRESS does: in a Ray job that is the job's own cluster."""
    if address is None or os.environ.get("RAY_ADDRESS"):
        return
    if "://" in address:
        raise ConfigError(
            f"address: got {address!r}, must be HOST:PORT of the head (port 6379) or auto, on a machine of the "
            "cluster; from outside it: python main.py submit CONFIG address=http://HEAD:8265"
        )
    os.environ["RAY_ADDRESS"] = address


def is_joined() -> bool:
    """Return whether the cluster is one that others started, whose workers may be on other machines."""
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


def start_ray(cores: int | None = None, secrets: Sequence[str] = ()) -> None:
    """Join the cluster of RAY_ADDRESS, or start one on this machine; do nothing if that was done before.

    cores: of a cluster that is started here; None for all. secrets: more environment variables that its workers get.

    Raises ResourceError if no cluster answers there.
    """
    # Ray would move each worker into a folder of its own, where the config's relative paths lead nowhere.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    import ray

    if ray.is_initialized():
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if not is_joined():
        _start_here(quiet, cores)
        return
    address = os.environ["RAY_ADDRESS"]
    try:
        ray.init(address=address, runtime_env=_runtime_env(secrets), **quiet)
    except (ConnectionError, RuntimeError) as error:
        raise ResourceError(
            f"no Ray cluster could be joined at {address}: {last_line(error)}. Is it up (ray status), and is its "
            "token here (RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token)? Without RAY_ADDRESS and address: this machine alone"
        ) from None


def machines_without(is_there: Callable[[], bool], needed: dict[str, float]) -> list[str]:
    """List the addresses of the cluster's other machines on which `is_there()` is False.

    needed: resources; machines that have fewer are skipped, and one that does not answer within a minute is left
    out: no worker will start on it.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    others = [
        node
        for node in ray.nodes()
        if node["Alive"]
        and node["NodeID"] != here
        and all(node["Resources"].get(name, 0) >= amount for name, amount in needed.items())
    ]

    def answer_there() -> bool:  # Ray takes functions, and `is_there` may be a partial one
        return is_there()

    ask = ray.remote(num_cpus=0, max_retries=0)(answer_there)
    answers = {
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(): node
        for node in others
    }
    ready, _ = ray.wait(list(answers), num_returns=len(answers), timeout=ANSWER_SECONDS) if answers else ([], [])
    without = []
    for answer in ready:
        try:
            is_seen = ray.get(answer)
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError:  # the machine has gone
            continue
        if not is_seen:
            without.append(answers[answer]["NodeManagerAddress"])
    return without


def _start_here(quiet: dict[str, Any], cores: int | None) -> None:
    """Start a cluster on this machine: without a dashboard, on loopback; Ray sets a token.

    Ray gives its own processes half a minute to answer, which on a busy machine is not always enough. It starts no
    worker before there is work: one per core, of which a run of a few devices uses two.
    """
    import ray

    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    for attempts_left in (2, 1, 0):
        try:
            with _without_dashboard():
                ray.init(address="local", include_dashboard=False, num_cpus=cores, **quiet)
            _watch_agents()
            return
        except Exception as error:  # that is the class which Ray raises
            if "timed out during startup" not in str(error):
                raise
            if not attempts_left:
                raise ResourceError(f"Ray could not be started here, three times: {last_line(error)}") from None
            ray.shutdown()


# Waits until its parent is gone; then kills what the raylets of the parent left: their agents wait for a cluster that
# no longer answers. They are known by a variable that Ray sets for them.
_WATCHER = """
import glob, os, signal, sys, time
parent, marks = int(sys.argv[1]), [b"RAY_RAYLET_PID=%s" % pid.encode() for pid in sys.argv[2:]]
while os.getppid() == parent:
    time.sleep(0.25)
for _ in range(20):
    time.sleep(0.5)
    for path in glob.glob("/proc/[0-9]*/environ"):
        try:
            with open(path, "rb") as file:
                if not set(marks).isdisjoint(file.read().split(bytes(1))):
                    os.kill(int(path.split("/")[2]), signal.SIGKILL)
        except OSError:
            pass
"""


def _watch_agents() -> None:
    """Start a small process that outlives this one for seconds, to end Ray's agents if this one is killed."""
    import psutil

    raylets = [str(child.pid) for child in psutil.Process().children() if child.name() == "raylet"]
    nowhere = subprocess.DEVNULL
    subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", _WATCHER, str(os.getpid()), *raylets],
        stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True,
    )  # fmt: skip


@contextlib.contextmanager
def _without_dashboard() -> Iterator[None]:
    """Let the processes of a cluster that starts in a block know that it has no dashboard.

    Ray Train looks for one at the end of each run, and gives up after ten seconds; an address at which nothing
    listens ends that at once. Its watcher of preempted machines needs one, too.
    """
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = "http://127.0.0.1:9"  # the port of the discard service
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _runtime_env(secrets: Sequence[str] = ()) -> dict[str, Any]:
    """Build what every worker gets: this repository, unless it came with a job or is installed, and its environment."""
    names = (*SECRETS, *secrets, *SETTINGS, *WITH_PASSWORD, *_BEHAVIOR)
    # A worker runs in a copy of this repository, which has no .models/.
    variables = {"FORGEBOOK_MODELS": str(model_mirrors()[0])}
    variables |= {name: os.environ[name] for name in names if name in os.environ}
    # Else Ray unpacks the engine as soon as a machine joins, and again for the workers: each unpacking deletes the
    # previous copy, possibly while a worker imports from it.
    config = {"eager_install": False}
    hook = {"worker_process_setup_hook": _worker_hook(variables), "config": config}
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ or not IS_CHECKOUT:
        return hook
    return {"working_dir": str(REPOSITORY), "excludes": EXCLUDED, **hook}


def _worker_hook(variables: dict[str, str]) -> Callable[[], None]:
    """Make the function that a worker process runs first; it is sent by value, with the variables in it."""

    def prepare_worker() -> None:
        import os

        import psutil
        import ray

        for name, value in variables.items():
            os.environ.setdefault(name, value)
        # Workers talk to each other where Ray's nodes do. gloo would take the address of the host's name, which
        # often is loopback; NCCL the first interface.
        here = ray.util.get_node_ip_address()
        for interface, addresses in psutil.net_if_addrs().items():
            if any(address.address == here for address in addresses):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
                os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)

    return prepare_worker
