"""Headless Chromium for tests, driven over W3C WebDriver, which is plain HTTP: chromedriver and Python's own client."""

import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver's name of a reference to an element
ENTER, ESCAPE, TAB, RIGHT = "\ue007", "\ue00c", "\ue004", "\ue014"
FLAGS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,820
""".split()


def missing() -> str:
    """Name what is not installed; empty if a browser can be started."""
    return " and ".join(name for name in ("chromium", "chromedriver") if shutil.which(name) is None)


class Browser:
    """A page in a browser. Waits are for conditions, at most half a minute."""

    def __init__(self, driver: str):
        self._driver, self._session = driver, ""

    def _call(self, method: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._driver + path, data, {"content-type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def start(self, profile: str) -> None:
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"], "binary": shutil.which("chromium")}
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self._session = f"/session/{session['sessionId']}"

    def end(self) -> None:
        if self._session:
            self._call("DELETE", self._session)

    def open(self, url: str) -> None:
        self._call("POST", f"{self._session}/url", {"url": url})

    def run(self, script: str, *arguments):
        """Run JavaScript in the page; `arguments[0]` is the first argument."""
        return self._call("POST", f"{self._session}/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script: str, seconds: float = 30):
        """Wait until a JavaScript expression is true; return its value."""
        until = time.monotonic() + seconds
        while not (value := self.run(f"return {script}")):
            assert time.monotonic() < until, f"not within {seconds} s: {script}\n{self.text()}"
            time.sleep(0.1)
        return value

    def text(self) -> str:
        return self.run("return document.body.innerText")

    def type(self, selector: str, text: str) -> None:
        """Type into an element, as keys."""
        body = {"using": "css selector", "value": selector}
        element = self._call("POST", f"{self._session}/element", body)[ELEMENT]
        self._call("POST", f"{self._session}/element/{element}/value", {"text": text})

    def click(self, selector: str) -> None:
        body = {"using": "css selector", "value": selector}
        element = self._call("POST", f"{self._session}/element", body)[ELEMENT]
        self._call("POST", f"{self._session}/element/{element}/click", {})

    def press(self, *keys: str) -> None:
        """Press keys where the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("POST", f"{self._session}/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def hover(self, selector: str) -> None:
        x, y = self.run(
            "const box = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return [Math.round(box.x + box.width / 2), Math.round(box.y + box.height / 2)]", selector,
        )  # fmt: skip
        move = {"type": "pointerMove", "x": x, "y": y, "duration": 0}
        pointer = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [move]}
        self._call("POST", f"{self._session}/actions", {"actions": [pointer]})

    def prefers(self, scheme: str) -> None:
        """Let the system prefer the `light` or the `dark` color scheme."""
        features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        body = {"cmd": "Emulation.setEmulatedMedia", "params": features}
        self._call("POST", f"{self._session}/goog/cdp/execute", body)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", f"{self._session}/screenshot")))

    def log(self, kind: str) -> list[dict]:
        """Read what was logged since the last call: `browser` is the console, `performance` the network."""
        return self._call("POST", f"{self._session}/se/log", {"type": kind})

    def requested(self) -> set[str]:
        """List the addresses that the pages have requested since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        sent = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
        return {url for url in sent if not url.startswith("data:")}


@contextlib.contextmanager
def open_browser():
    """Start chromedriver and a browser of its own; end both."""
    process = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        try:
            port = next(
                line.split()[-1].rstrip(".") for line in process.stdout if "started successfully on port" in line
            )
            browser = Browser(f"http://127.0.0.1:{port}")
            try:
                browser.start(profile)
                yield browser
            finally:
                browser.end()
        finally:
            process.terminate()
            process.wait()
