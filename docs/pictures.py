"""Take the pictures of the chat page, of trackers and of Ray's dashboard, while they show a run.

python docs/pictures.py chat http://127.0.0.1:8000           serve runs/readme --ui, the run of README.ipynb
python docs/pictures.py tensorboard http://127.0.0.1:6006    the runs of cookbooks/serve_and_monitor
python docs/pictures.py mlflow http://127.0.0.1:5000
python docs/pictures.py wandb runs/serve/wandb               needs `pip install pyte`, a terminal in memory
python docs/pictures.py ray http://127.0.0.1:8265 JOB        while JOB runs; token: RAY_AUTH_TOKEN_PATH
"""

import copy
import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import struct
import sys
import tempfile
import termios
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "tests"))
import support_browser  # noqa: E402

# A headless browser has no mouse, and charts then show their tools always.
MOUSE = "primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4"
PRESS = "for (const button of document.querySelectorAll(arguments[0])) if (eval(arguments[1])) button.click()"
SETTLE = 4  # seconds until a chart has been drawn

COLUMNS, ROWS, CELL = 100, 21, (10, 20)  # of the terminal, in characters and in pixels of one
INK, PAPER = "#d0d0d0", "#161616"
NAMED = {"default": INK, "brightblack": "#808080", "white": "#ffffff", "black": "#000000"}
# What a program asks its terminal: the color behind the text, the cursor's position, what it can do.
TERMINAL_ANSWERS = {
    b"\x1b]11;?": b"\x1b]11;rgb:1616/1616/1616\x1b\\",
    b"\x1b[6n": b"\x1b[1;1R",
    b"\x1b[c": b"\x1b[?62;22c",
}
BRAILLE = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3)]  # column and row of each bit's dot


def save(name: str, picture: Image.Image, box: tuple[int, int, int, int] | None = None) -> None:
    """Save a part of a picture in at most 256 colors, which halves what a reader loads."""
    path = DOCS / f"{name}.png"
    picture.crop(box).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(DOCS.parent)}: {path.stat().st_size // 1000} kB")


class Page:
    """A page in a window of a given size."""

    def __init__(self, browser: support_browser.Browser):
        self.browser = browser
        browser.prefers("light")

    def open(self, url: str, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        body = {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics}
        self.browser._call("POST", f"{self.browser._session}/goog/cdp/execute", body)
        self.browser.open(url)
        time.sleep(2 * SETTLE)

    def press(self, selector: str, which: str) -> None:
        """Press the buttons for which a JavaScript expression of `button` is true."""
        self.browser.run(PRESS, selector, which)
        time.sleep(SETTLE)

    def picture(self) -> Image.Image:
        with tempfile.NamedTemporaryFile(suffix=".png") as file:
            self.browser.screenshot(Path(file.name))
            return Image.open(io.BytesIO(Path(file.name).read_bytes())).convert("RGB")


def chat(page: Page, address: str) -> None:
    page.open(address, 1280, 600)
    with open(DOCS.parent / "data/quickstart/train.jsonl") as lines:
        system, user, _ = json.loads(next(lines))["messages"]
    page.browser.type("#system", system["content"])
    page.browser.type("#message", user["content"] + support_browser.ENTER)
    page.browser.wait("document.querySelectorAll('.turn .meta:not(:empty)').length == 2")
    page.browser.hover(".token")
    time.sleep(1)
    save("chat", page.picture())


def tensorboard(page: Page, address: str) -> None:
    page.open(f"{address}/?tagFilter=%5E(eval_loss%7Ctrain_loss_batch)&smoothing=0#timeseries", 1100, 596)
    page.press("button", "button.innerText.trim() == 'Settings'")
    page.press("card-view button", "/^Fit line/.test(button.ariaLabel)")
    save("tensorboard", page.picture())


def mlflow(page: Page, address: str) -> None:
    page.open(f"{address}/#/experiments/1/runs?compareRunsMode=CHART", 1180, 700)
    page.press("button", "button.ariaLabel == 'Close' || button.ariaLabel == 'Toggle sidebar'")
    page.browser.type("input[placeholder='Search metric charts']", "^(eval_loss|train_loss)")
    time.sleep(SETTLE)
    save("mlflow", page.picture(), (49, 12, 896, 664))


def ray(page: Page, address: str, job: str) -> None:
    page.open(address, 1280, 560)
    if token := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        page.browser.type("[role=dialog] input", Path(token).read_text().strip())
        page.browser.press(support_browser.ENTER)
        time.sleep(SETTLE)
    page.open(f"{address}/#/actors", 1280, 560)
    page.browser.run(
        "const label = [...document.querySelectorAll('label')].find(one => one.innerText.trim() == 'Class');"
        "document.getElementById(label.htmlFor).dataset.here = ''"
    )
    page.browser.type("[data-here]", "RayTrain")
    time.sleep(SETTLE)
    save("ray-workers", page.picture(), (12, 60, 1090, 510))
    page.open(f"{address}/#/jobs/{job}", 1040, 1100)
    page.press(".MuiSwitch-root input", "true")
    save("ray-job", page.picture(), (68, 104, 1036, 1086))


def terminal(command: list[str], keys: str):
    """Run a command in a terminal in memory, press keys, and return the screen."""
    import pyte

    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    home = tempfile.mkdtemp()  # without settings of an earlier time
    environment = os.environ | {"HOME": home, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    process, device = pty.fork()
    if process == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        os.execvpe(command[0], command, environment)
    for key in ["", *keys]:
        os.write(device, key.encode())
        until = time.monotonic() + (1.5 if key else 2 * SETTLE)
        while time.monotonic() < until:
            if select.select([device], [], [], 0.1)[0]:
                written = os.read(device, 65536)
                for question, answer in TERMINAL_ANSWERS.items():
                    if question in written:
                        os.write(device, answer)
                stream.feed(written)
    drawn = copy.deepcopy(screen)
    os.write(device, b"q")
    os.waitpid(process, 0)
    return drawn


def color(value: str) -> str:
    return f"#{value}" if re.fullmatch("[0-9a-f]{6}", value) else NAMED.get(value, value)


def draw(screen) -> Image.Image:
    """Draw a screen; the dots of Braille, which the charts are made of, one by one, as terminals do."""
    (width, height), margin = CELL, 10
    picture = Image.new("RGB", (COLUMNS * width + 2 * margin, ROWS * height + 2 * margin), PAPER)
    pen = ImageDraw.Draw(picture)
    fonts = [ImageFont.truetype(f"DejaVuSansMono{kind}.ttf", 16) for kind in ("", "-Bold")]
    for row in range(ROWS):
        for column in range(COLUMNS):
            cell = screen.buffer[row][column]
            x, y = margin + column * width, margin + row * height
            ink, paper = color(cell.fg), PAPER if cell.bg == "default" else color(cell.bg)
            if cell.reverse:
                ink, paper = paper, ink
            pen.rectangle((x, y, x + width - 1, y + height - 1), paper)
            if "\u2800" <= cell.data <= "\u28ff":
                for k, (across, down) in enumerate(BRAILLE):
                    if ord(cell.data) >> k & 1:
                        left, top = x + 1 + 5 * across, y + 1 + 5 * down
                        pen.rectangle((left, top, left + 2, top + 2), ink)
            else:
                pen.text((x, y), cell.data, ink, fonts[cell.bold])
    return picture


def wandb(folder: str) -> None:
    keys = "s /(eval_loss|train_loss_batch)\rr1c2]"  # both runs, two metrics in two columns, no overview
    with tempfile.TemporaryDirectory() as place:  # the filter and the selection of an earlier time are stored there
        shutil.copytree(folder, place, dirs_exist_ok=True, symlinks=True, ignore=shutil.ignore_patterns(".*"))
        picture = draw(terminal(["wandb", "leet", place], keys))
    bottom = picture.height - CELL[1] - 10  # the last line names the folder
    save("wandb", picture, (0, 0, picture.width, bottom))


def main() -> None:
    name, *arguments = sys.argv[1:]
    if name == "wandb":
        return wandb(*arguments)
    support_browser.FLAGS += ["--hide-scrollbars", f"--blink-settings={MOUSE}"]
    with support_browser.open_browser() as browser:
        {"chat": chat, "tensorboard": tensorboard, "mlflow": mlflow, "ray": ray}[name](Page(browser), *arguments)


if __name__ == "__main__":
    main()
