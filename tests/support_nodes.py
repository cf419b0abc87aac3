"""Real Ray nodes on one Linux machine, each in a network namespace with its own address, joined by a bridge.

    nodes = Nodes(folder); nodes.up(2)
    nodes.run(["python", "main.py", ...])       on the first node, the head
    nodes.cut(2); nodes.heal(2)                 the link of node 2
    nodes.kill(2); nodes.start(2)               all processes of node 2; a new machine in its place

Needs root and iproute2: `why_not()` says what is missing. Each command of a node also has its own view of the file
system, so that a folder can be hidden from it.
"""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NET, NAME = "10.78.0", "forge"
BRIDGE = f"{NAME}br0"


def why_not() -> str | None:
    """Say why there can be no nodes here, None if there can."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "network namespaces need Linux and iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    tried = subprocess.run(["ip", "netns", "add", f"{NAME}-try"], capture_output=True, text=True)
    if tried.returncode:
        return f"network namespaces are not allowed here: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", f"{NAME}-try"], check=False)
    return None


class Nodes:
    """Nodes of two cores each; the first is the head. hidden: node -> a folder that it sees empty."""

    def __init__(self, hidden: dict[int, Path] | None = None):
        self.hidden = hidden or {}
        self.temporary = Path(tempfile.mkdtemp(prefix="fb"))  # short: sockets lie in it
        self.address = f"{NET}.1:6379"
        token = self.temporary / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_worker_niceness": "0",  # as in conftest.py
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "200",  # a busy machine starts slowly
        }  # fmt: skip
        self.count = 0

    def up(self, count: int, **environment: str) -> None:
        """Lay the network and start the nodes."""
        self.environment |= environment
        self.count = count
        if (Path("/sys/class/net") / BRIDGE).exists():  # left by tests that were killed
            self._take_down()
        self._ip(f"link add {BRIDGE} type bridge")
        self._ip(f"addr add {NET}.254/24 dev {BRIDGE}")
        self._ip(f"link set {BRIDGE} up")
        for k in range(1, count + 1):
            self._ip(f"netns add {NAME}{k}")
            self._ip(f"link add {NAME}v{k} type veth peer name eth0 netns {NAME}{k}")
            self._ip(f"link set {NAME}v{k} master {BRIDGE} up")
            self._ip(f"-n {NAME}{k} addr add {NET}.{k}/24 dev eth0")
            self._ip(f"-n {NAME}{k} link set eth0 up")
            self._ip(f"-n {NAME}{k} link set lo up")
            self.start(k)

    def start(self, k: int) -> None:
        """Start a node's Ray; after `kill` it is a new machine at the old address."""
        ray = str(Path(sys.executable).with_name("ray"))
        role = ["--head", "--port", "6379", "--include-dashboard", "false"] if k == 1 else ["--address", self.address]
        # Each node has its own folder, as a machine would: a node that joins deletes the engine's copy in it.
        place = ["--temp-dir", str(self.temporary / f"ray{k}"), "--node-ip-address", f"{NET}.{k}", "--num-cpus", "2"]
        command = [ray, "start", *role, *place]
        for _ in range(3):  # on a busy machine Ray's raylet does not wait long enough for its own agent, and ends
            done = subprocess.run(self._on(k, command), env=self.environment, capture_output=True, text=True)
            if done.returncode == 0:
                return
            self.kill(k)
        raise RuntimeError(done.stdout + done.stderr)

    def popen(self, command: list[str], **environment: str) -> subprocess.Popen:
        """Start a command on the head."""
        environment = self.environment | {"RAY_ADDRESS": self.address} | environment
        return subprocess.Popen(
            self._on(1, command), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, command: list[str], **environment: str) -> str:
        """Run a command on the head; return what it printed."""
        process = self.popen(command, **environment)
        output = process.communicate(timeout=280)[0]
        assert process.returncode == 0, output
        return output

    def processes(self, k: int) -> list[int]:
        """List the processes of a node."""
        listed = subprocess.run(["ip", "netns", "pids", f"{NAME}{k}"], capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]

    def commands(self) -> list[str]:
        """List the command lines of all processes."""
        found = []
        for pid in [pid for k in range(1, self.count + 1) for pid in self.processes(k)]:
            with contextlib.suppress(OSError):  # it has ended
                found.append(Path(f"/proc/{pid}/cmdline").read_text(errors="replace"))
        return found

    def kill(self, k: int) -> None:
        """End a node at once."""
        for pid in self.processes(k):
            subprocess.run(["kill", "-9", str(pid)], check=False, stderr=subprocess.DEVNULL)

    def cut(self, k: int) -> None:
        """Take a node's link down."""
        self._ip(f"link set {NAME}v{k} down")

    def heal(self, k: int) -> None:
        """Bring it up again."""
        self._ip(f"link set {NAME}v{k} up")

    def down(self) -> None:
        """End everything and remove what was made."""
        self._take_down()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def _take_down(self) -> None:
        for k in range(1, self.count + 1):
            self.kill(k)
            # By name: its namespace is there until its last process is gone.
            subprocess.run(["ip", "link", "del", f"{NAME}v{k}"], check=False, stderr=subprocess.DEVNULL)
            subprocess.run(["ip", "netns", "del", f"{NAME}{k}"], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "del", BRIDGE], check=False)

    def _on(self, k: int, command: list[str]) -> list[str]:
        inside = ["ip", "netns", "exec", f"{NAME}{k}"]
        if k not in self.hidden:
            return [*inside, *command]
        return [*inside, "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(self.hidden[k]), *command]

    def _ip(self, words: str) -> None:
        subprocess.run(["ip", *words.split()], check=True)
