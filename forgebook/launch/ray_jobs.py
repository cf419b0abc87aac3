"""The same run as a job: on a Ray cluster through its Jobs API, or as a file that KubeRay or Anyscale takes.

    command = job_command(config.source, config.storage_path, overrides)
    job = submit_job(command, run_name, "http://head:8265")     ships this repository, returns the job's id
    follow_job(job, address) -> "SUCCEEDED"                     prints its log until it ends
    kuberay_manifest(...), anyscale_job(...) -> dict            to be written as YAML

Secrets are taken from the environment here and set in the job's environment there: never in its arguments, in a file
or in what is printed. Whoever may read the job list of a Ray cluster can read them: it needs a token.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import shlex
import socket
import subprocess
import sys
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forgebook.config.parse import SECRET_KEY
from forgebook.errors import ConfigError, ResourceError, StorageError, TrainingError, first_line, last_line
from forgebook.ray_cluster import EXCLUDED, IS_CHECKOUT, REPOSITORY, SECRETS, SETTINGS, WITH_PASSWORD

__all__ = [
    "ENDED",
    "anyscale_job",
    "find_job_server",
    "follow_job",
    "job_command",
    "job_status",
    "kuberay_manifest",
    "stop_job",
    "submit_job",
]

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


def find_job_server(option: str | None = None) -> str:
    """Return the job server's address: `option`, RAY_API_SERVER_ADDRESS, an http RAY_ADDRESS, or this machine's."""
    for address in (option, os.environ.get("RAY_API_SERVER_ADDRESS"), os.environ.get("RAY_ADDRESS")):
        if address and (address == option or "://" in address):
            if not re.match(r"https?://[^/]+", address):
                raise ConfigError(f"address: got {address!r}, must be the job server's, such as {DEFAULT_ADDRESS}")
            return address.rstrip("/")
    return DEFAULT_ADDRESS


# A job on a running cluster ---------------------------------------------------------------------------


def submit_job(command: str, run_name: str | None, address: str) -> str:
    """Ship this repository to the cluster, start the run there, and return the job's id. command: of `job_command`."""
    client = _client(address)
    environment = {name: os.environ[name] for name in (*SECRETS, *SETTINGS, *WITH_PASSWORD) if os.environ.get(name)}
    try:
        return client.submit_job(
            entrypoint=command,
            # Python would hold its lines back from a pipe, and with them the log that is followed.
            runtime_env={
                "working_dir": str(REPOSITORY),
                "excludes": EXCLUDED,
                "env_vars": environment | {"PYTHONUNBUFFERED": "1"},
            },
            metadata={"run_name": run_name},
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ResourceError(f"{address} did not take the job: {_cause(error)}") from None


def follow_job(job: str, address: str) -> str:
    """Print the job's log as it grows, and return the state it ends in."""
    client = _client(address)
    _job_details(client, job)

    async def tail() -> None:
        async for text in client.tail_job_logs(job):
            print(text, end="", flush=True)

    try:
        asyncio.run(tail())
    except RuntimeError as error:
        raise TrainingError(
            f"the log of {job} ended early: {_cause(error)}. The job may still be running: python main.py status {job}"
        ) from None
    return str(client.get_job_status(job).value)


def job_status(job: str, address: str) -> dict[str, Any]:
    """Return a job's state, entry point, start and end (seconds since 1970), and Ray's message."""
    details = _job_details(_client(address), job)
    return {
        "job": job,
        "status": str(details.status.value),
        "entrypoint": details.entrypoint,
        "started": details.start_time and details.start_time / 1000,
        "ended": details.end_time and details.end_time / 1000,
        "message": _cause(details.message) if details.message else None,
    }


def stop_job(job: str, address: str) -> str:
    """Request a job to stop and return the state it was in; one that has ended is left as it is."""
    client = _client(address)
    state = str(_job_details(client, job).status.value)
    if state not in ENDED:
        client.stop_job(job)
    return state


def _client(address: str):
    """Connect to the job server, or say how to reach one."""
    parts = urllib.parse.urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    how = (
        "Is the cluster up, with its dashboard (ray start --head)? Name it with address=http://HEAD:8265 or "
        "RAY_API_SERVER_ADDRESS"
    )
    try:
        socket.create_connection((parts.hostname or "", port), timeout=10).close()
    except OSError as error:
        raise ResourceError(f"no job server answers at {address} ({error}). {how}") from None
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)  # or it lists what it leaves out of the package, many times
    # Ray prefers this variable to its argument.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    token = _token()
    try:
        return JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"} if token else None)
    except Exception as error:  # whatever answered, it was no job server of Ray's
        raise ResourceError(f"no job server answers at {address} ({_cause(error)}). {how}") from None


def _token() -> str | None:
    """Find the cluster's token where Ray keeps it; Ray's own client sends it only if RAY_AUTH_MODE says so."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    return path.read_text().strip() if path.is_file() else None


def _job_details(client, job: str):
    """Fetch a job's details; raise ConfigError if the cluster has no such job."""
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if "404" not in str(error) and "does not exist" not in str(error):
            raise ResourceError(f"{job}: {_cause(error)}") from None
        jobs = [details.submission_id for details in client.list_jobs() if details.submission_id]
        latest = f"its latest are {', '.join(jobs[-3:])}" if jobs else "it has none"
        raise ConfigError(f"the cluster has no job {job!r}; {latest}") from None


def job_command(source: str | None, storage_path: str, overrides: Sequence[str]) -> str:
    """Build the command of a job: fine-tune as the config from `source` says, with `overrides`.

    source: a file of this repository, or an https:// address.

    Raises ConfigError or StorageError for what would not arrive with the job, be lost, or be read by others.
    """
    if not IS_CHECKOUT:
        raise ConfigError("a job is sent with this program: run it from a clone of the repository (pip install -e .)")
    for override in overrides:
        key = override.partition("=")[0]
        if SECRET_KEY.search(key):
            raise ConfigError(
                f"{key}: a secret in a job's arguments is read by everyone who sees the job list: set it in the "
                f"environment instead ({', '.join(SECRETS[:3])} ... are passed on)"
            )
    if "://" not in storage_path and not Path(storage_path).expanduser().is_absolute():
        raise StorageError(
            f"storage_path: got {storage_path!r}, which in a job is below a folder that is deleted with it: "
            "set a bucket, or an absolute path on a disk that every machine shares"
        )
    if source is None:
        raise ConfigError(
            "a job needs a config file: save this config as YAML in the repository and load it from there"
        )
    if "://" not in source:
        path = Path(source).resolve()
        if not path.is_relative_to(REPOSITORY):
            raise ConfigError(f"{source} is outside {REPOSITORY}, which is what is sent with the job: move it there")
        source = str(path.relative_to(REPOSITORY))
        if _is_ignored(source):
            raise ConfigError(f"{source} is ignored by .gitignore and not sent with the job: move it")
    return shlex.join(["python", "main.py", source, *overrides])


def _is_ignored(path: str) -> bool:
    """Return whether .gitignore names a file, as git says; without git, False."""
    try:
        return subprocess.run(["git", "check-ignore", "-q", path], cwd=REPOSITORY, stderr=-3).returncode == 0
    except OSError:
        return False


def _cause(error: object) -> str:
    """Return the line of Ray's message that says what happened: of a traceback the last, else the first."""
    return (last_line(error) if "Traceback" in str(error) else first_line(error))[:300]


# A job as a file --------------------------------------------------------------------------------------


def kuberay_manifest(
    command: str,
    run_name: str,
    num_devices: int,
    image: str,
    working_dir: str,
    *,
    gpus_per_node: int = 1,
    max_retries: int = 1,
    secret: str = "forgebook",
) -> dict[str, Any]:
    """Make a RayJob of KubeRay: a cluster for this run alone, which ends with it.

    command: of `job_command`. image: one with requirements.txt installed. working_dir: a zip of this repository
    (s3://, gs://, https://), or its folder inside the image. secret: the Kubernetes secret whose keys are the names in
    SECRETS and SETTINGS.
    A retry starts a new cluster, where the run continues from its storage_path.
    Fields: KubeRay's API reference, ray.io/v1.
    """
    environment: dict[str, Any] = {"env_vars": {"PYTHONUNBUFFERED": "1"}}
    if "://" in working_dir:
        environment["working_dir"] = working_dir
    elif not working_dir.startswith("/"):
        raise ConfigError(
            f"working_dir: got {working_dir!r}; a RayJob needs the address of a zip of this repository "
            "(s3://, gs://, https://), or its folder inside the image, such as /app"
        )
    # Not `cd`: KubeRay hands the entry point to a shell that would run its second half elsewhere.
    inside = {"workingDir": working_dir} if working_dir.startswith("/") else {}
    spec: dict[str, Any] = {
        "entrypoint": command,
        "runtimeEnvYAML": _yaml(environment),
        "backoffLimit": max_retries,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "rayClusterSpec": {
            "rayVersion": _ray_version(),
            # No GPU and no work: the head is lost if a worker takes its memory.
            "headGroupSpec": {
                "rayStartParams": {"num-cpus": "0"} if num_devices else {},
                "template": {"spec": {"containers": [_container("ray-head", image, secret) | inside]}},
            },
        },
    }
    if num_devices:
        nodes = math.ceil(num_devices / gpus_per_node)
        container = _container("ray-worker", image, secret) | inside
        container["resources"] = {"limits": {"nvidia.com/gpu": gpus_per_node}}
        spec["rayClusterSpec"]["workerGroupSpecs"] = [
            {
                "groupName": "gpu",
                "replicas": nodes,
                "minReplicas": nodes,
                "maxReplicas": nodes,
                "rayStartParams": {},
                "template": {"spec": {"containers": [container]}},
            }
        ]
    name = re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")[:40].strip("-") or "forgebook"
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": name}, "spec": spec}


def _container(name: str, image: str, secret: str) -> dict[str, Any]:
    """Make a container whose secrets come from Kubernetes; those that the secret lacks are left out."""
    return {
        "name": name,
        "image": image,
        "env": [
            {"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": variable, "optional": True}}}
            for variable in (*SECRETS, *SETTINGS, *WITH_PASSWORD)
        ],
    }


def anyscale_job(
    command: str,
    run_name: str | None,
    image: str | None = None,
    working_dir: str = ".",
    *,
    max_retries: int = 1,
) -> dict[str, Any]:
    """Make an Anyscale job, for `anyscale job submit --config-file FILE`.

    command: of `job_command`. image: None installs requirements.txt on Anyscale's own. Secrets are not in it: they
    belong in the cloud's secret store or in `--env`. Fields: JobConfig of Anyscale's Job API reference.
    """
    settings = {name: os.environ[name] for name in SETTINGS if os.environ.get(name) and "@" not in os.environ[name]}
    return {
        "name": run_name,
        "entrypoint": command,
        **({"image_uri": image} if image else {"requirements": "requirements.txt"}),
        "working_dir": working_dir,
        "excludes": EXCLUDED,
        "env_vars": {"PYTHONUNBUFFERED": "1", **settings},
        "max_retries": max_retries,
    }


def _yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, sort_keys=False, width=sys.maxsize)


def _ray_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("ray")
