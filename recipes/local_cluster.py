"""Start a Ray head on this machine that takes jobs, until standard input closes: for trying out jobs without a cluster.

    python recipes/local_cluster.py        prints NAME=VALUE lines to set in the environment, once jobs are accepted

The head listens on loopback, on free ports, and requires a token; other Ray clusters of this machine are not touched.
Its processes and its folder are gone when this command ends, however the process that started it ends.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

START_SECONDS = 300


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_head(folder: Path, port: int) -> subprocess.Popen:
    """Start the head in a process group of its own, so that all of its processes can be ended together."""
    command = [
        *("ray", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats", f"--temp-dir={folder}"),
        *(f"--port={free_port()}", f"--dashboard-port={port}", f"--dashboard-agent-listen-port={free_port()}"),
        f"--ray-client-server-port={free_port()}",
    ]
    with open(folder / "head.log", "w") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def wait_for_jobs(head: subprocess.Popen, address: str, log: Path) -> None:
    """Return once a job that does nothing is accepted: the dashboard answers a little earlier than that."""
    from ray.job_submission import JobSubmissionClient

    end = time.monotonic() + START_SECONDS
    while True:
        try:
            JobSubmissionClient(address).submit_job(entrypoint="true")
            return
        except Exception as error:
            if head.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the head did not start: {error}\n{log.read_text()[-2000:]}") from None
            time.sleep(1)


def processes_of(folder: Path) -> list[int]:
    """List the processes that name the head's folder in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder) in (path / "cmdline").read_text():
                found.append(int(path.name))
        except OSError:  # it ended meanwhile
            continue
    return [process for process in found if process != os.getpid()]


def end_head(head: subprocess.Popen, folder: Path) -> None:
    """End the head and all that it started; remove its folder."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        for end_one, process in [(os.killpg, head.pid), *((os.kill, process) for process in processes_of(folder))]:
            try:
                end_one(process, kind)
            except ProcessLookupError:
                continue
        end = time.monotonic() + 15
        while processes_of(folder) and time.monotonic() < end:
            head.poll()
            time.sleep(0.2)
    head.wait()
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    # Near the root: the path of a socket may have 107 characters, and Ray's are long.
    folder, port = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp")), free_port()
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    address = f"http://127.0.0.1:{port}"
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a notebook interrupts its cells' processes; this one stays
    head = start_head(folder, port)
    try:
        wait_for_jobs(head, address, folder / "head.log")
        print(f"RAY_API_SERVER_ADDRESS={address}")
        print("RAY_AUTH_MODE=token")
        print(f"RAY_AUTH_TOKEN_PATH={token}", flush=True)
        sys.stdin.read()
    finally:
        end_head(head, folder)


if __name__ == "__main__":
    main()
