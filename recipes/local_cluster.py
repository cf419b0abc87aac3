"""Start a Ray head on this machine that takes jobs, until standard input closes: for trying out jobs without a cluster.

    python recipes/local_cluster.py        prints NAME=VALUE lines to set in the environment, once jobs are accepted

The head listens on loopback, on free ports, and requires a token; other Ray clusters of this machine are not touched.
Its processes and its folder are gone when this command ends, however the process that started it ends.
"""

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

# A head whose port another process took meanwhile never accepts a job: another is started, on other ports.
STARTS, START_SECONDS = 3, 120
# Below the ports that systems give to outgoing connections (from 32768), above those of Ray's workers (to 19999).
PORTS = range(20000, 32000)


def free_port() -> int:
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("", random.choice(PORTS)))
                return probe.getsockname()[1]
            except OSError:  # in use
                continue


def start_head(folder: Path, port: int) -> subprocess.Popen:
    """Start the head in a process group of its own, so that all of its processes can be ended together."""
    command = [
        *("ray", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats", f"--temp-dir={folder}"),
        *(f"--port={free_port()}", f"--dashboard-port={port}", f"--dashboard-agent-listen-port={free_port()}"),
        f"--ray-client-server-port={free_port()}",
    ]
    with open(folder / "head.log", "w") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def wait_for_jobs(head: subprocess.Popen, address: str, token: str) -> str:
    """Return "" once a job that does nothing is accepted (other requests are answered earlier), or the last error."""
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    job = Request(f"{address}/api/jobs/", b'{"entrypoint": "true"}', headers)
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            urlopen(job, timeout=10).close()
            return ""
        except (OSError, HTTPException) as error:
            if head.poll() is not None or time.monotonic() > end:
                return str(error)
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


def log_ends(folder: Path) -> str:
    """Return the last lines of what the head and its dashboard logged."""
    logs = [folder / "head.log", *sorted(folder.glob("session_latest/logs/dashboard*.log"))]
    return "\n".join(f"{path.name}:\n{path.read_text(errors='replace')[-1500:]}" for path in logs)


def serve(port: int) -> str:
    """Start a head, print its settings, stay until standard input closes; return why it did not start, or ""."""
    # Near the root: the path of a socket may have 107 characters, and Ray's are long.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    address = f"http://127.0.0.1:{port}"
    head = start_head(folder, port)
    try:
        if error := wait_for_jobs(head, address, token.read_text()):
            return f"{error}\n{log_ends(folder)}"
        print(f"RAY_API_SERVER_ADDRESS={address}")
        print("RAY_AUTH_MODE=token")
        print(f"RAY_AUTH_TOKEN_PATH={token}", flush=True)
        sys.stdin.read()
        return ""
    finally:
        end_head(head, folder)


def main() -> None:
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.pop("RAY_AUTH_TOKEN", None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a notebook interrupts its cells' processes; this one stays
    for _ in range(STARTS):
        if not (error := serve(free_port())):
            return
        print(f"the head did not start: {error}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
